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
        first = read(tower.tensors, "embeddings.class_embedding").expand(len(pixels), 1, -1)
        x = torch.cat((first, x), dim=1)
    x = x + torch.from_numpy(tower.positions())
    return _norm(tower, tower.first_norm, x) if tower.first_norm else x


def tower_layer(
    tower: TransformerTower, layer: int, x: Tensor, observe: Observer | None = None
) -> Tensor:
    """Output [N, places, W] of one encoder layer for x of the same shape."""
    if isinstance(tower, QwenTower):
        return qwen_tower.layer(tower, layer, x, observe)
    tensors, name = tower.tensors, f"encoder.layers.{layer}"
    normed = _norm(tower, f"{name}.layer_norm1", x)
    query, key, value = (
        linear(tensors, f"{name}.self_attn.{part}_proj", normed, observe)
        .view(len(x), -1, tower.heads, tower.hidden // tower.heads)
        .transpose(1, 2)
        for part in ("q", "k", "v")
    )
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x = x + linear(tensors, f"{name}.self_attn.out_proj", mixed, observe)
    wide = linear(tensors, f"{name}.mlp.fc1", _norm(tower, f"{name}.layer_norm2", x), observe)
    return x + linear(tensors, f"{name}.mlp.fc2", activation(tower.activation, wide), observe)


def tower_features(tower: TransformerTower, x: Tensor) -> Tensor:
    """Features [N, T, W] in the last layer's output: all but the class token's."""
    if isinstance(tower, QwenTower):
        return qwen_tower.features(tower, x)
    if tower.last_norm:
        x = _norm(tower, tower.last_norm, x)
    return x[:, 1:] if tower.class_token else x


def _norm(tower: TransformerTower, name: str, x: Tensor) -> Tensor:
    weight, bias = (read(tower.tensors, f"{name}.{part}") for part in ("weight", "bias"))
    return F.layer_norm(x, (tower.hidden,), weight, bias, tower.eps)
