"""Qwen's vision transformers in PyTorch, layer by layer.

Shares no code with the graph writers, which it checks. States are those of `QwenTower`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.torch_model.decoder import Observer
from lrs_edge_export.torch_model.layers import activation, linear, read


def embeddings(tower: QwenTower, pixels: Tensor) -> Tensor:
    """Patches [N, grid * grid, hidden] of normalised tiles [N, 3, S, S], as the layers take them.

    The kernel over frames is applied to equal frames here, not folded.
    """
    name = "embeddings.patch_embedding"
    kernel = read(tower.tensors, f"{name}.weight")
    bias = read(tower.tensors, f"{name}.bias") if tower.stem_bias else None
    frames = pixels[:, :, None].expand(-1, -1, tower.temporal, -1, -1)
    stride = tower.temporal, tower.patch, tower.patch
    x = F.conv3d(frames, kernel, bias, stride=stride).flatten(2).transpose(1, 2)
    if tower.table_grid:
        x = x + torch.from_numpy(tower.positions())
    return x[:, _order(tower)]


def layer(tower: QwenTower, number: int, states: Tensor, observe: Observer | None = None) -> Tensor:
    """States after one layer; where it is tapped, its output is appended."""
    x, tapped = states[..., : tower.hidden], states[..., tower.hidden :]
    tensors, name = tower.tensors, f"encoder.layers.{number}"
    normed = _norm(tower, f"{name}.layer_norm1", x)
    if observe is not None:
        observe(f"{name}.self_attn.q_proj", normed)
    packed = linear(tensors, f"{name}.self_attn.qkv_proj", normed)
    heads = packed.view(*packed.shape[:-1], 3, tower.heads, tower.head_dim)
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    turns = _turns(tower)
    places = tower.places_of(number)
    parts = [_turned(query, *turns), _turned(key, *turns), value]
    # [N, H, P, d] as windows: [N, P / places, H, places, d].
    shape = len(x), tower.heads, -1, places, tower.head_dim
    windows = [part.reshape(shape).transpose(1, 2) for part in parts]
    mixed = F.scaled_dot_product_attention(*windows).transpose(1, 2).flatten(2, 3)
    mixed = mixed.transpose(1, 2).flatten(2)
    x = x + linear(tensors, f"{name}.self_attn.out_proj", mixed, observe)
    x = x + _mlp(tower, name, _norm(tower, f"{name}.layer_norm2", x), observe)
    more = (x,) if number in tower.taps else ()
    return torch.cat((x, tapped, *more), dim=-1)


def features(tower: QwenTower, states: Tensor) -> Tensor:
    """Features [N, grid * grid, hidden * (1 + taps)], row after row."""
    x = _norm(tower, tower.last_norm, states[..., : tower.hidden])
    rows = torch.empty_like(states)
    rows[:, _order(tower)] = torch.cat((x, states[..., tower.hidden :]), dim=-1)
    return rows


def _mlp(tower: QwenTower, name: str, x: Tensor, observe: Observer | None) -> Tensor:
    tensors = tower.tensors
    if not tower.gated:
        wide = linear(tensors, f"{name}.mlp.fc1", x, observe)
        return linear(tensors, f"{name}.mlp.fc2", activation(tower.activation, wide), observe)
    gate = activation(tower.activation, linear(tensors, f"{name}.mlp.gate_proj", x, observe))
    wide = gate * linear(tensors, f"{name}.mlp.up_proj", x, observe)
    return linear(tensors, f"{name}.mlp.down_proj", wide, observe)


def _order(tower: QwenTower) -> Tensor:
    """Place among the rows of patches of each state."""
    rows, cols = (torch.from_numpy(axis) for axis in tower.order())
    return rows * tower.grid + cols


def _turns(tower: QwenTower) -> tuple[Tensor, Tensor]:
    """Cosine and sine [P, head_dim] of the patches' rows and columns."""
    width = tower.head_dim // 2
    frequencies = 1.0 / tower.theta ** (torch.arange(0, width, 2).float() / width)
    rows, cols = (torch.from_numpy(axis).float() for axis in tower.order())
    angles = torch.cat((rows[:, None] * frequencies, cols[:, None] * frequencies), dim=-1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _norm(tower: QwenTower, name: str, x: Tensor) -> Tensor:
    weight = read(tower.tensors, f"{name}.weight")
    if tower.rms_norm:
        return F.rms_norm(x, (tower.hidden,), weight, tower.eps)
    return F.layer_norm(x, (tower.hidden,), weight, read(tower.tensors, f"{name}.bias"), tower.eps)
