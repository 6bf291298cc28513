"""Decoder layers over weights in memory: dense, keys and values appended as they come."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from benchmarks.reference_torch.weights import DecoderWeights
from lrs_edge_export.torch_model import decoder
from lrs_edge_export.torch_model.decoder import Attend, Rope

#: Keys and values [kv_heads, T, head_dim] of each layer.
Cache = list[tuple[Tensor, Tensor]]


class Decoder:
    """A stack of decoder layers, and what is made of their output.

    Args:
        weights: Its sizes and tensors.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        self._config = weights.config
        self._layers = weights.layers
        self._norm = weights.norm

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
        turns = self._turns(first, x)
        for layer in range(self._config.layers):
            weights, attend = self._layers[layer], _attend(layer, mask, cache)
            x = decoder.decoder_layer(self._config, weights, x, turns, attend)
        return x

    def last_logits(self, x: Tensor, lm_head: Tensor) -> Tensor:
        """Logits [V] after the last of the states [L, D]."""
        assert self._norm is not None
        return F.linear(decoder.rms_norm(x[-1:], self._norm, self._config.eps), lm_head)[0]

    def scores(self, x: Tensor) -> Tensor:
        """Scaled query-key products [H, L] of the last token at layer n, for states [L, D]."""
        weights, last = self._layers[self._config.layers], slice(len(x) - 1, None)
        turns = self._turns(0, x)
        return decoder.attention_logits(self._config, weights, x, turns, last)[:, 0]

    def _turns(self, first: int, x: Tensor) -> Rope:
        places = torch.arange(first, first + len(x), device=x.device)
        return decoder.rope(self._config, places)


def _attend(layer: int, mask: Tensor | None, cache: Cache | None) -> Attend:
    """One layer's attention over what its cache holds and the new tokens, which are appended."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if cache is not None:
            if layer < len(cache):
                key = torch.cat((cache[layer][0], key), dim=1)
                value = torch.cat((cache[layer][1], value), dim=1)
                cache[layer] = key, value
            else:
                cache.append((key, value))
        # One new token may look at all before it; more come only without a cache.
        is_causal = mask is None and query.shape[1] > 1
        return decoder.attention(query, key, value, mask, is_causal=is_causal)

    return attend
