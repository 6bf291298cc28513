"""Decoder layers in PyTorch for training: one sequence that several questions share.

Everything before a question (prompt, global view, tiles) does not see the question, so questions
about the same tiles share it: the sequence is the image part once, then the text of each question.
A question's text attends to the image part and to itself, never to another question's. Numbers
equal those of one sequence per question (`tests/test_distill_layers.py`).

Functions of plain tensors: the teacher's layers come from disk one at a time, the student's are
trained, and both run through the same code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.model import DecoderConfig, DecoderStage

#: Weights of one layer by name without `layers.{i}.`, such as `self_attn.q_proj.weight`.
LayerWeights = Mapping[str, Tensor]

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class PackedInput:
    """One image part and the questions about it, as the decoder takes them.

    Attributes:
        embeds: float32 [I + S, D]: image part, then the questions' texts one after the other.
        positions: int64 [I + S] for RoPE; every question starts behind the image part.
        image: I, tokens of the image part (prompt prefix, global view, separator, local tokens).
        local: First and last + 1 place of the local vision tokens, within the image part.
        lengths: Tokens of each question's text; their sum is S.
    """

    embeds: NDArray[np.float32]
    positions: NDArray[np.int64]
    image: int
    local: tuple[int, int]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """A packed input's geometry on a device, computed once for all layers.

    Attributes:
        cos: float32 [I + S, head_dim].
        sin: float32 [I + S, head_dim].
        image: I.
        local: First and last + 1 place of the local tokens.
        last: int64 [Q], place of each question's last token.
        mask: bool [S, I + S], what the questions' tokens see.
    """

    cos: Tensor
    sin: Tensor
    image: int
    local: tuple[int, int]
    last: Tensor
    mask: Tensor


def packing(config: DecoderConfig, packed: PackedInput, device: torch.device) -> Packing:
    """Positions and mask of a packed input."""
    positions = torch.from_numpy(packed.positions).to(device)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    # The reciprocal of the power, as transformers computes it: at large positions bits matter.
    frequencies = 1.0 / config.theta ** (exponents / config.head_dim)
    angles = torch.outer(positions.to(torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    lengths = torch.tensor(packed.lengths, device=device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    places = torch.arange(len(owner), device=device)
    own = (owner[:, None] == owner) & (places[:, None] >= places)
    seen = torch.ones((len(owner), packed.image), dtype=torch.bool, device=device)
    last = packed.image + torch.cumsum(lengths, 0) - 1
    mask = torch.cat((seen, own), dim=1)
    return Packing(angles.cos(), angles.sin(), packed.image, packed.local, last, mask)


def layer_names(config: DecoderConfig, *, scoring: bool = False) -> tuple[str, ...]:
    """Names of a layer's weights; of a scoring layer only those that its scores depend on."""
    parts = ("q", "k") if scoring else ("q", "k", "v")
    names = [f"self_attn.{part}_proj.weight" for part in parts]
    if config.qkv_bias:
        names += [f"self_attn.{part}_proj.bias" for part in parts]
    if scoring:
        return (_NORMS[0], *names)
    return (*_NORMS, *names, "self_attn.o_proj.weight", *_MLP)


def read_layer(
    stage: DecoderStage, layer: int, device: torch.device, *, scoring: bool = False
) -> dict[str, Tensor]:
    """One layer's weights, float32. Raises ExportError when damaged."""
    names = layer_names(stage.config, scoring=scoring)
    return {name: torch.from_numpy(stage.read(layer, name)).to(device) for name in names}


def run_layer(config: DecoderConfig, weights: LayerWeights, x: Tensor, packing: Packing) -> Tensor:
    """Output [I + S, D] of one full layer for x [I + S, D]."""
    normed = _rms_norm(x, weights["input_layernorm.weight"], config.eps)
    x = x + _attention(config, weights, normed, packing)
    normed = _rms_norm(x, weights["post_attention_layernorm.weight"], config.eps)
    gate = F.silu(F.linear(normed, weights["mlp.gate_proj.weight"]))
    wide = gate * F.linear(normed, weights["mlp.up_proj.weight"])
    return x + F.linear(wide, weights["mlp.down_proj.weight"])


def attention_logits(
    config: DecoderConfig, weights: LayerWeights, x: Tensor, packing: Packing
) -> Tensor:
    """Text-to-image attention of one layer before the softmax.

    Args:
        config: Sizes of the stack.
        weights: Of the layer; input norm, query and key projections are enough.
        x: [I + S, D], the layer's input.
        packing: Geometry.

    Returns:
        float32 [Q, H, n]: scaled query-key products of each question's last token with the n local
        vision tokens.
    """
    first, stop = packing.local
    normed = _rms_norm(x, weights["input_layernorm.weight"], config.eps)
    asking, shown = normed[packing.last], normed[first:stop]
    query = _heads(config, weights, "q", asking)  # [H, Q, d]
    query = _rotate(query, packing.cos[packing.last], packing.sin[packing.last])
    key = _heads(config, weights, "k", shown)
    key = _rotate(key, packing.cos[first:stop], packing.sin[first:stop])
    key = key.repeat_interleave(config.heads // config.kv_heads, 0)
    # Few numbers, and the ones that count: full precision under autocast, too.
    with torch.autocast(x.device.type, enabled=False):
        products = query.float() @ key.float().transpose(1, 2)
    return products.transpose(0, 1) / math.sqrt(config.head_dim)


def attention_scores(logits: Tensor) -> Tensor:
    """Scores [Q, n] of logits [Q, H, n]: softmax per head over the local tokens, mean over heads.

    As `lrs_edge.search.rfm.token_scores`.
    """
    return torch.softmax(logits.float(), dim=-1).mean(dim=1)


def _attention(config: DecoderConfig, weights: LayerWeights, x: Tensor, packing: Packing) -> Tensor:
    group, image = config.heads // config.kv_heads, packing.image
    query = _rotate(_heads(config, weights, "q", x), packing.cos, packing.sin)
    key = _rotate(_heads(config, weights, "k", x), packing.cos, packing.sin)
    value = _heads(config, weights, "v", x)
    # RoPE's tables are float32, and under autocast the projections are not.
    query, key = query.to(value.dtype)[None], key.to(value.dtype).repeat_interleave(group, 0)[None]
    value = value.repeat_interleave(group, 0)[None]
    shown = F.scaled_dot_product_attention(
        query[:, :, :image], key[:, :, :image], value[:, :, :image], is_causal=True
    )
    asked = F.scaled_dot_product_attention(query[:, :, image:], key, value, packing.mask)
    mixed = torch.cat((shown, asked), dim=2)[0]
    flat = mixed.transpose(0, 1).reshape(len(x), -1)
    return F.linear(flat, weights["self_attn.o_proj.weight"])


def _heads(config: DecoderConfig, weights: LayerWeights, part: str, x: Tensor) -> Tensor:
    """Query, key or value [heads, T, head_dim]."""
    bias = weights.get(f"self_attn.{part}_proj.bias")
    projected = F.linear(x, weights[f"self_attn.{part}_proj.weight"], bias)
    return projected.view(len(x), -1, config.head_dim).transpose(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
