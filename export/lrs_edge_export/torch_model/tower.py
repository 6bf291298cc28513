"""Vision transformers in PyTorch, layer by layer.

Shares no code with the graph writers, which it checks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.checkpoints.towers import TransformerTower
from lrs_edge_export.torch_model import qwen_tower
from lrs_edge_export.torch_model.decoder import Observer
from lrs_edge_export.torch_model.layers import activation, linear, read


def tower_embeddings(tower: TransformerTower, pixels: Tensor) -> Tensor:
    """Input [N, places, W] of the first encoder layer for normalised tiles [N, 3, S, S]."""
    if isinstance(tower, QwenTower):
        return qwen_tower.embeddings(tower, pixels)
    name = "embeddings.patch_embedding"
    kernel = read(tower.tensors, f"{name}.weight")
    bias = read(tower.tensors, f"{name}.bias") if tower.patch_bias else None
    x = F.conv2d(pixels, kernel, bias, stride=tower.patch).flatten(2).transpose(1, 2)
    if tower.class_token:
        first = torch.from_numpy(tower.first_place()).expand(len(pixels), 1, -1)
        x = torch.cat((first, x), dim=1)
    x = x + torch.from_numpy(tower.positions())
    return _norm(tower, tower.first_norm, x) if tower.first_norm else x


def tower_layer(
    tower: TransformerTower, layer: int, x: Tensor, observe: Observer | None = None
) -> Tensor:
    """Output [N, places, W] of one encoder layer for x of the same shape.

    Hidden states that features need later stand behind it.
    """
    if isinstance(tower, QwenTower):
        return qwen_tower.layer(tower, layer, x, observe)
    x, kept = x[..., : tower.hidden], x[..., tower.hidden :]
    if layer in tower.kept_states:
        kept = torch.cat((kept, x), dim=-1)
    tensors, name = tower.tensors, f"encoder.layers.{layer}"
    normed = _norm(tower, f"{name}.layer_norm1", x)
    query, key, value = (
        _projected(tower, f"{name}.self_attn.{part}", normed, observe)
        .view(len(x), -1, tower.heads, tower.hidden // tower.heads)
        .transpose(1, 2)
        for part in ("q", "k", "v")
    )
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    mixed = linear(tensors, f"{name}.self_attn.out_proj", mixed, observe)
    x = x + _scaled(tower, f"{name}.layer_scale1", mixed)
    wide = linear(tensors, f"{name}.mlp.fc1", _norm(tower, f"{name}.layer_norm2", x), observe)
    narrow = linear(tensors, f"{name}.mlp.fc2", activation(tower.activation, wide), observe)
    x = x + _scaled(tower, f"{name}.layer_scale2", narrow)
    return torch.cat((x, kept), dim=-1)


def _projected(tower: TransformerTower, name: str, x: Tensor, observe: Observer | None) -> Tensor:
    """Queries, keys or values [N, places, W]: a linear layer, and an RMS norm if there is one."""
    y = linear(tower.tensors, f"{name}_proj", x, observe)
    if not tower.attention_norm or name.endswith("v"):
        return y
    weight = read(tower.tensors, f"{name}_norm.weight")
    return F.rms_norm(y, (tower.hidden,), weight, tower.attention_eps)


def _scaled(tower: TransformerTower, name: str, x: Tensor) -> Tensor:
    return x * read(tower.tensors, name) if tower.layer_scale else x


def tower_features(tower: TransformerTower, x: Tensor) -> Tensor:
    """Features [N, T, W] in the last layer's output: all but the class token's."""
    if isinstance(tower, QwenTower):
        return qwen_tower.features(tower, x)
    if tower.states:
        parts = dict(
            zip((tower.layers, *tower.kept_states), torch.split(x, tower.hidden, -1), strict=True)
        )
        x = torch.cat([parts[state] for state in tower.states], dim=-1)
    elif tower.last_norm:
        x = _norm(tower, tower.last_norm, x)
    return x[:, 1:] if tower.class_token else x


def _norm(tower: TransformerTower, name: str, x: Tensor) -> Tensor:
    weight = read(tower.tensors, f"{name}.weight")
    if tower.rms_norms and name != tower.last_norm:
        return F.rms_norm(x, (tower.hidden,), weight, tower.eps)
    bias = read(tower.tensors, f"{name}.bias")
    return F.layer_norm(x, (tower.hidden,), weight, bias, tower.eps)
