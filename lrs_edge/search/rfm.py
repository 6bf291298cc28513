"""Region Focus Module: how much each vision token matters for one question.

Paper section 3.3: the attention of the prompt's last token to the local vision tokens, at a layer
distilled from the language model; softmax per head over the local tokens alone, mean over heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import KVBuffers
from lrs_edge.engines.joined import JoinedBuffers
from lrs_edge.engines.rows import Embeds
from lrs_edge.language.decoder import Decoder, OnPart
from lrs_edge.language.kv_cache import KVCache, Tokens

if TYPE_CHECKING:
    from lrs_edge.language.llm import LanguageModel

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


#: Least attention that a token counts as having: below it, a share of it says nothing.
LEAST_SCORE = 1e-9


def relative_logits(
    asked: NDArray[np.float32], generic: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scores under a question, divided by those under a generic instruction, as one row of logits.

    Tokens that draw attention whatever is asked (sinks, borders) lose what they draw anyway (Zhang
    et al., arXiv 2502.17422, section 4).

    Args:
        asked: float32 [H, n], logits under the question.
        generic: float32 [H, n], logits under an instruction such as "Describe the image."

    Returns:
        float32 [1, n], logarithms: `token_scores` of them is each token's share of all quotients.
    """
    found = [np.maximum(token_scores(logits), LEAST_SCORE) for logits in (asked, generic)]
    return np.log(found[0] / found[1])[None]


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
    """Scores tokens with the RFM graph over a cache that may hold the beginning already.

    Args:
        decoder: The RFM's layers.
        llm: The language model, where these are its own first layers in memory: the prefix then
            runs through it alone, which needs it in any case.
    """

    def __init__(self, decoder: Decoder, llm: LanguageModel | None = None) -> None:
        self._decoder = decoder
        self._llm = llm

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
        embeds: Embeds,
        tokens: Tokens,
        on_part: OnPart | None = None,
        llm_cache: KVCache | None = None,
    ) -> None:
        """Make the cache begin with the prefix: text before the image, global view, separator.

        What it holds after the prefix stays where the prefix was there already.

        Args:
            cache: Of the RFM.
            embeds: float32 [n, D].
            tokens: Labels [n].
            on_part: As in `Decoder.prefill`.
            llm_cache: The language model's for the same image. Where the RFM is its first layers,
                the prefix runs through the whole of it, if it is not there yet, and its keys and
                values are taken over.
        """
        if self._decoder.begins_with(cache, embeds, tokens):
            return
        front = _front(llm_cache)
        if self._llm is None or llm_cache is None or front is None:
            self._decoder.prefill(cache, embeds, tokens, (len(tokens),), on_part=on_part)
            return
        self._llm.fill_prefix(llm_cache, embeds, tokens, on_part)
        cache.take_over(llm_cache, front, len(tokens))

    def known(self, cache: KVCache, prefix: int, llm_cache: KVCache | None = None) -> int:
        """Tokens at the start that a sequence need not run, the first `prefix` being the prefix."""
        shared = self._llm is not None and llm_cache is not None and llm_cache.known >= prefix
        return max(cache.known, prefix if shared else 0)

    def logits(
        self,
        cache: KVCache,
        embeds: Embeds,
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


def _front(llm_cache: KVCache | None) -> KVBuffers | None:
    """The language model's buffers of the RFM's layers, where they are held apart."""
    buffers = None if llm_cache is None else llm_cache.buffers
    return buffers.front if isinstance(buffers, JoinedBuffers) else None
