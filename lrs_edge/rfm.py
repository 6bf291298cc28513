"""Region Focus Module: how much each vision token matters for one question.

Paper section 3.3: the attention of the prompt's last token to the local vision tokens, at a layer
distilled from the language model; softmax per head over the local tokens alone, mean over heads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrs_edge.cache import KVCache, Tokens
from lrs_edge.decoder import Decoder

#: The authors' additive mask passes through a boolean: hidden tokens get +1.0, not -infinity.
REFERENCE_MASK_BIAS = 1.0

#: Added to attention logits that must not count; large enough for float32 and float16 engines.
MASKED = -3e4


def token_scores(
    logits: NDArray[np.float32],
    hidden: NDArray[np.bool_] | None = None,
    *,
    reference_quirk: bool = False,
) -> NDArray[np.float32]:
    """One score per local token.

    Args:
        logits: float32 [H, n], scaled query-key products of the last prompt token.
        hidden: bool [n], True for tokens that are not really there (zero tokens of tiles that were
            not selected).
        reference_quirk: Treat hidden tokens as the authors' code does (`REFERENCE_MASK_BIAS`);
            otherwise they are masked.

    Returns:
        float32 [n]; sums to 1.
    """
    if logits.shape[1] == 0:
        return np.zeros(0, np.float32)
    shifted = logits.astype(np.float32, copy=True)
    if hidden is not None:
        shifted[:, hidden] += REFERENCE_MASK_BIAS if reference_quirk else -np.inf
    shifted -= shifted.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.asarray(weights.mean(axis=0), np.float32)


def dense_bias(
    cached: int, hidden: NDArray[np.bool_], *, masked: float = MASKED
) -> NDArray[np.float32]:
    """Attention bias for new tokens behind `cached` ones: causal, hidden tokens masked as keys.

    Args:
        cached: Keys before the new tokens; all can be seen.
        hidden: bool [L] over the new tokens.
        masked: Bias of what must not be seen.

    Returns:
        float32 [L, cached + L].
    """
    length = len(hidden)
    bias = np.zeros((length, cached + length), np.float32)
    local = bias[:, cached:]
    places = np.arange(length)
    local[places[:, None] < places] = masked
    local[:, hidden] = masked
    return bias


class RegionFocus:
    """Scores tokens with the RFM graph over a cache whose prefix is the same for every question."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return self._decoder.new_cache()

    def fill_prefix(self, cache: KVCache, embeds: NDArray[np.float32], tokens: Tokens) -> None:
        """Make the cache hold the prefix (text before the image, global view, separator) only."""
        if cache.has_prefix(tokens):
            cache.truncate(len(tokens))
            return
        cache.truncate(0)
        self._decoder.forward(cache, embeds, tokens)

    def logits(
        self,
        cache: KVCache,
        embeds: NDArray[np.float32],
        tokens: Tokens,
        attention_bias: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Attention logits of the last of the new tokens against all keys.

        Args:
            cache: Holds the prefix, and does so again afterwards.
            embeds: float32 [L, D] of the local tokens and the text after the image.
            tokens: Their labels [L].
            attention_bias: float32 [L, prefix + L] for the dense pass of the reference.

        Returns:
            float32 [H, prefix + L].
        """
        prefix = len(cache)
        try:
            return self._decoder.forward(cache, embeds, tokens, attention_bias)
        finally:
            cache.truncate(prefix)
