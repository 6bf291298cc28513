"""Decoder layers in PyTorch: dense, causal, keys and values concatenated as they come."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from benchmarks.reference_torch.weights import DecoderWeights

#: Keys and values [kv_heads, T, head_dim] of each layer.
Cache = list[tuple[Tensor, Tensor]]


class Decoder:
    """A LLaMA-like stack: RMSNorm, grouped-query attention, rotate-half RoPE, SwiGLU.

    Args:
        weights: Its sizes and tensors.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        self._config = weights.config
        self._tensors = weights.tensors

    def states(
        self, x: Tensor, first: int = 0, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Output [L, D] of the last full layer.

        Args:
            x: [L, D], new tokens at the positions first .. first + L - 1.
            first: Tokens before them.
            mask: bool [L, L], True where a token may look; None for causal.
            cache: Keys and values of the tokens before; the new ones are appended. None for none.
        """
        angles = self._angles(first, len(x))
        for layer in range(self._config.layers):
            normed = self._norm(x, f"layers.{layer}.input_layernorm")
            x = x + self._attention(normed, layer, angles, mask, cache)
            normed = self._norm(x, f"layers.{layer}.post_attention_layernorm")
            gate = F.silu(self._linear(normed, f"layers.{layer}.mlp.gate_proj"))
            wide = gate * self._linear(normed, f"layers.{layer}.mlp.up_proj")
            x = x + self._linear(wide, f"layers.{layer}.mlp.down_proj")
        return x

    def last_logits(self, x: Tensor, lm_head: Tensor) -> Tensor:
        """Logits [V] after the last of the states [L, D]."""
        return F.linear(self._norm(x[-1:], "norm"), lm_head)[0]

    def scores(self, x: Tensor) -> Tensor:
        """Scaled query-key products [H, L] of the last token at layer n, for states [L, D]."""
        config, layer = self._config, self._config.layers
        normed = self._norm(x, f"layers.{layer}.input_layernorm")
        cos, sin = self._angles(0, len(x))
        query = _rotated(self._heads(normed[-1:], layer, "q"), cos[-1:], sin[-1:])
        key = self._repeated(_rotated(self._heads(normed, layer, "k"), cos, sin))
        return (query @ key.transpose(1, 2))[:, 0] / math.sqrt(config.head_dim)

    def _attention(
        self,
        x: Tensor,
        layer: int,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        query = _rotated(self._heads(x, layer, "q"), *angles)
        key = _rotated(self._heads(x, layer, "k"), *angles)
        value = self._heads(x, layer, "v")
        if cache is not None:
            if layer < len(cache):
                key = torch.cat((cache[layer][0], key), dim=1)
                value = torch.cat((cache[layer][1], value), dim=1)
                cache[layer] = key, value
            else:
                cache.append((key, value))
        mixed = F.scaled_dot_product_attention(
            query[None],
            self._repeated(key)[None],
            self._repeated(value)[None],
            attn_mask=mask,
            # One new token may look at all before it; more come only without a cache.
            is_causal=mask is None and len(x) > 1,
        )[0]
        flat = mixed.transpose(0, 1).reshape(len(x), -1)
        return self._linear(flat, f"layers.{layer}.self_attn.o_proj")

    def _heads(self, x: Tensor, layer: int, part: str) -> Tensor:
        """Query, key or value [heads, L, head_dim]."""
        projected = self._linear(x, f"layers.{layer}.self_attn.{part}_proj")
        return projected.view(len(x), -1, self._config.head_dim).transpose(0, 1)

    def _repeated(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self._config.heads // self._config.kv_heads, 0)

    def _angles(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [count, head_dim] of the positions."""
        config = self._config
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        places = torch.arange(first, first + count, dtype=torch.float32)
        angles = torch.outer(places, 1.0 / config.theta**exponents).repeat(1, 2)
        return angles.cos(), angles.sin()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._config.eps)
        return scaled * self._tensors[f"{name}.weight"]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
