"""Region Focus Module: how much each vision token matters for one question.

Paper section 3.3: the attention of the prompt's last token to the local vision tokens, at a layer
distilled from the language model; softmax per head over the local tokens alone, mean over heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.language.decoder import Decoder, OnPart
from lrs_edge.language.kv_cache import KVCache, Tokens

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
    """Attention bias for new tokens after `cached` ones: causal, hidden tokens masked as keys.

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
    """Scores tokens with the RFM graph over a cache that may hold the beginning already."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    @property
    def graph_name(self) -> str:
        """File of the graph, under which its runs are counted."""
        return self._decoder.graph_name

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return self._decoder.new_cache()

    def fill_prefix(
        self,
        cache: KVCache,
        embeds: NDArray[np.float32],
        tokens: Tokens,
        on_part: OnPart | None = None,
    ) -> None:
        """Make the cache begin with the prefix: text before the image, global view, separator.

        What it holds after the prefix stays where the prefix was there already.
        """
        if not self._decoder.begins_with(cache, embeds, tokens):
            self._decoder.prefill(cache, embeds, tokens, (len(tokens),), on_part=on_part)

    def logits(
        self,
        cache: KVCache,
        embeds: NDArray[np.float32],
        tokens: Tokens,
        ends: Sequence[int],
        attention_bias: NDArray[np.float32] | None = None,
        on_part: OnPart | None = None,
    ) -> NDArray[np.float32]:
        """Attention logits of a sequence's last token against all keys; the cache holds it then.

        Args:
            cache: Anything; what it holds of the sequence is reused.
            embeds: float32 [T, D] of prefix, local tokens and text after the image.
            tokens: Their labels [T].
            ends: Lengths at which later sequences may part from this one (`Decoder.prefill`).
            attention_bias: float32 [T - ends[0], T] for the dense pass of the reference.
            on_part: As in `Decoder.prefill`.

        Returns:
            float32 [H, T].
        """
        return self._decoder.prefill(cache, embeds, tokens, ends, attention_bias, on_part)
