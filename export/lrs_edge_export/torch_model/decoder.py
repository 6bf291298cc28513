"""Decoder layers in PyTorch: RMSNorm, grouped-query attention, rotate-half RoPE, SwiGLU.

Functions of plain tensors, so that one definition serves weights that come from disk one at a time
(parity, calibration, a teacher), that are trained (a student, the embedded model), or that lie in
memory (benchmarks). Gradients flow wherever weights or inputs ask for them. Shares no code with the
graph writers, which it checks.

Shapes are [.., T, D] for hidden states and [.., heads, T, head_dim] for queries, keys and values;
further axes in front are batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.model import DecoderConfig

#: Weights of one layer by names such as `self_attn.q_proj.weight`; biases need not be there.
LayerWeights = Mapping[str, Tensor]

#: Called with the name and the input [.., K] of a linear before it is applied; must not change it.
Observer = Callable[[str, Tensor], None]

#: Mixed values [.., H, T, d] of rotated queries [.., H, T, d] and grouped keys and values.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rope(NamedTuple):
    """Cosine and sine [.., T, head_dim] of rotary position embeddings, float32."""

    cos: Tensor
    sin: Tensor

    def at(self, places: slice | Tensor) -> Rope:
        """Those of some places of a sequence that has no batch axes."""
        return Rope(self.cos[places], self.sin[places])


def rope(config: DecoderConfig, positions: Tensor) -> Rope:
    """Rotations of positions, integers, on their device: [.., T], or [k, T] of several axes."""
    exponents = torch.arange(
        0, config.head_dim, 2, dtype=torch.float32, device=positions.device
    ).div(config.head_dim)
    # The reciprocal of the power, as transformers computes it: at large positions bits matter.
    frequencies = 1.0 / config.theta**exponents
    gain = 1.0
    if config.scaling is not None:
        frequencies = config.scaling.applied(frequencies, config.theta)
        gain = config.scaling.gain
    if config.rope_axes:
        # Every frequency turns by the position of its axis: [k, T] becomes [T, head_dim / 2].
        axes = torch.tensor(config.rope_axes, device=positions.device)
        angles = positions.to(torch.float32)[axes].T * frequencies
    else:
        angles = positions.to(torch.float32)[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return Rope(angles.cos() * gain, angles.sin() * gain)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` over its root mean square along the last axis, weighted, float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Mixed values [.., H, T, d] of grouped heads, by PyTorch's fused kernels.

    Args:
        query: [.., H, T, d].
        key: [.., H or a divisor of it, S, d].
        value: As `key`.
        mask: [.., T, S], bool (True where a query looks at a key) or floats that are added to the
            products; None for none.
        is_causal: Every query looks at the keys up to its own place; T = S.
    """
    if query.dim() == 3:
        # The fused kernels want a batch axis.
        return attention(query[None], key[None], value[None], mask, is_causal=is_causal)[0]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    heads = query.shape[-3]
    return F.scaled_dot_product_attention(
        query, to_all_heads(key, heads), to_all_heads(value, heads), mask, is_causal=is_causal
    )


def to_all_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values [.., heads, T, d] of [.., a divisor of heads, T, d]: each to its group."""
    group = heads // x.shape[-3]
    return x if group == 1 else x.repeat_interleave(group, -3)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention under a causal mask; an `Attend`."""
    return attention(query, key, value, is_causal=True)


def masked(mask: Tensor) -> Attend:
    """Attention under a mask; see `attention`."""
    return lambda query, key, value: attention(query, key, value, mask)


def decoder_layer(
    config: DecoderConfig,
    weights: LayerWeights,
    x: Tensor,
    turns: Rope,
    attend: Attend = causal,
    observe: Observer | None = None,
) -> Tensor:
    """Output [.., T, D] of one full layer.

    Args:
        config: Sizes.
        weights: Of the layer. Each is asked for once, right before it is used.
        x: [.., T, D].
        turns: Of the tokens' positions, [.., T, head_dim].
        attend: What sees what; a causal mask by default.
        observe: Observer of linears, by names such as `mlp.down_proj`.
    """
    normed = rms_norm(x, weights["input_layernorm.weight"], config.eps)
    query = rotated_heads(config, weights, "q", normed, turns, observe)
    key = rotated_heads(config, weights, "k", normed, turns, observe)
    value = _heads(config, weights, "v", normed, observe)
    # RoPE's tables are float32, and under autocast the projections are not.
    mixed = attend(query.to(value.dtype), key.to(value.dtype), value)
    x = x + _linear(weights, "self_attn.o_proj", mixed.transpose(-3, -2).flatten(-2), observe)
    normed = rms_norm(x, weights["post_attention_layernorm.weight"], config.eps)
    gate = F.silu(_linear(weights, "mlp.gate_proj", normed, observe))
    wide = gate * _linear(weights, "mlp.up_proj", normed, observe)
    return x + _linear(weights, "mlp.down_proj", wide, observe)


def attention_logits(
    config: DecoderConfig,
    weights: LayerWeights,
    x: Tensor,
    turns: Rope,
    queries: slice | Tensor,
    keys: slice = slice(None),
    observe: Observer | None = None,
) -> Tensor:
    """Attention of some places to others before the softmax: what the region focus module scores.

    Args:
        config: Sizes.
        weights: Of the layer; input norm, query and key projections are enough.
        x: [T, D], the layer's input.
        turns: Of the tokens' positions, [T, head_dim].
        queries: The places that look.
        keys: The places that are looked at.
        observe: Observer of linears.

    Returns:
        float32 [H, queries, keys]: query-key products over the root of head_dim.
    """
    normed = rms_norm(x, weights["input_layernorm.weight"], config.eps)
    query = rotated_heads(config, weights, "q", normed[queries], turns.at(queries), observe)
    key = rotated_heads(config, weights, "k", normed[keys], turns.at(keys), observe)
    # Few numbers, and the ones that count: full precision under autocast, too.
    with torch.autocast(x.device.type, enabled=False):
        products = query.float() @ to_all_heads(key, config.heads).float().transpose(-2, -1)
    return products / math.sqrt(config.head_dim)


def rotated_heads(
    config: DecoderConfig,
    weights: LayerWeights,
    part: str,
    normed: Tensor,
    turns: Rope,
    observe: Observer | None = None,
) -> Tensor:
    """Queries (`q`) or keys (`k`) [.., heads, T, head_dim] of a normalised input, after RoPE."""
    x = _heads(config, weights, part, normed, observe)
    if config.qk_norm:
        x = rms_norm(x, weights[f"self_attn.{part}_norm.weight"], config.eps)
    first, second = x.chunk(2, dim=-1)
    cos, sin = (table.unsqueeze(-3) for table in turns)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _heads(
    config: DecoderConfig, weights: LayerWeights, part: str, x: Tensor, observe: Observer | None
) -> Tensor:
    projected = _linear(weights, f"self_attn.{part}_proj", x, observe)
    return projected.view(*x.shape[:-1], -1, config.head_dim).transpose(-3, -2)


def _linear(weights: LayerWeights, name: str, x: Tensor, observe: Observer | None) -> Tensor:
    if observe is not None:
        observe(name, x)
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
