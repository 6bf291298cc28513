"""How much a vision token matters: the RFM, and what it is compared with.

Every scorer gives logits, which a softmax over the tokens of a level turns into scores: the RFM one
row per attention head, the others a single row of logarithms, whose softmax is the score's share.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.rows import Embeds
from lrs_edge.errors import UsageError
from lrs_edge.language.kv_cache import KVCache
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.sequence import LocalTokens, TokenSequence, global_places
from lrs_edge.requests.budget import Budget
from lrs_edge.requests.options import Prune
from lrs_edge.search.context import SearchContext
from lrs_edge.search.rfm import RegionFocus, dense_bias, relative_logits

#: Below the norm of any token that shows something; keeps logarithms finite.
_TINY = 1e-30


class TokenLogits(NamedTuple):
    """Logits of the local tokens float32 [H, n] and of the global view's float32 [H, T]."""

    local: NDArray[np.float32]
    global_view: NDArray[np.float32]


class Scorer(Protocol):
    """Scores tokens for one question."""

    def local(self, local: LocalTokens) -> TokenLogits:
        """Logits of local tokens of one level, and of the global view before them."""
        ...

    def global_view(self) -> NDArray[np.float32]:
        """Logits float32 [H, T] of the global view's tokens, without any local token."""
        ...

    def unseen(self, local: int) -> int:
        """Tokens to run before the question's, of the prefix and so many of the base level."""
        ...


class ScoringCaches(NamedTuple):
    """Caches that an RFM works with on a scene: its own, and the language model's of the scene.

    The second is None where the RFM has the prefix to itself.
    """

    own: KVCache
    llm: KVCache | None = None


#: A cache larger than this in bytes is not held twice, and only its prefix is kept for later.
MAX_KEPT_BYTES = 128 << 20


class RfmScorer:
    """The Region Focus Module: attention of the prompt's last token.

    The base level is the same for every question on a scene, so the scene's cache keeps its keys
    and values; other passes work after a copy of the prefix, which is gone after the question.

    Args:
        focus: The RFM.
        sequences: Builds the prompt's sequences.
        caches: The scene's.
        prefix: Text before the image, global view, separator.
        after: float32 [a, D], what stands after the local tokens.
        budget: Time is counted as `prefix` and `score`; asked whether to go on.
        generic: float32 [g, D], embeddings of a generic instruction in place of the question, where
            scores are relative to those under it; None where they are not.
    """

    def __init__(
        self,
        focus: RegionFocus,
        sequences: SequenceBuilder,
        caches: ScoringCaches,
        prefix: TokenSequence,
        after: Embeds,
        budget: Budget,
        generic: Embeds | None = None,
    ) -> None:
        self._generic = generic
        self._focus = focus
        self._sequences = sequences
        self._cache, self._llm_cache = caches
        self._other: KVCache | None = None
        self._prefix = prefix
        self._after = after
        self._budget = budget

    def local(self, local: LocalTokens) -> TokenLogits:
        """One pass of the RFM; hidden tokens are masked as keys (the reference's dense pass)."""
        asked = self._local(local, self._after)
        if self._generic is None:
            return asked
        generic = self._local(local, self._generic)
        return TokenLogits(
            relative_logits(asked.local, generic.local),
            relative_logits(asked.global_view, generic.global_view),
        )

    def _local(self, local: LocalTokens, after: Embeds) -> TokenLogits:
        """Logits under one text after the image."""
        start, whole = len(self._prefix), self._sequences.level(self._prefix, local, after)
        ends, bias = [start], None
        if local.hidden.any():
            bias = dense_bias(start, np.pad(local.hidden, (0, len(after))))
        else:
            if local.level == 0 or self._generic is not None:
                # Another text follows the same tokens later.
                ends.append(start + len(local))
            if local.level == 0:
                ends.append(len(whole))
        logits = self._logits(whole, ends, bias, stays=local.level == 0 and bias is None)
        views = global_places(whole)
        return TokenLogits(logits[:, start : start + len(local)], logits[:, views])

    def global_view(self) -> NDArray[np.float32]:
        """One pass of the RFM over the question alone."""
        asked = self._view(self._after)
        return asked if self._generic is None else relative_logits(asked, self._view(self._generic))

    def _view(self, after: Embeds) -> NDArray[np.float32]:
        whole = self._sequences.without_local(self._prefix, after)
        return self._logits(whole, [len(self._prefix)], None)[:, global_places(whole)]

    def unseen(self, local: int) -> int:
        """What the scene's cache does not hold."""
        prefix = len(self._prefix)
        return max(prefix + local - self._focus.known(self._cache, prefix, self._llm_cache), 0)

    def _logits(
        self,
        whole: TokenSequence,
        ends: list[int],
        bias: NDArray[np.float32] | None,
        *,
        stays: bool = False,
    ) -> NDArray[np.float32]:
        def on_part(*_: int) -> None:
            self._budget.check()

        clock, prefix = self._budget.clock, self._prefix
        with clock.step("prefix"):
            self._focus.fill_prefix(
                self._cache, prefix.embeds, prefix.tokens, on_part, self._llm_cache
            )
        with clock.step("score"):
            cache = self._cache if stays else self._passing()
            return self._focus.logits(cache, whole.embeds, whole.tokens, ends, bias, on_part)

    def _passing(self) -> KVCache:
        """The cache for what no later question can use."""
        if self._other is None:
            if self._cache.buffers.nbytes > MAX_KEPT_BYTES:
                return self._cache
            self._other = self._cache.copy(len(self._prefix))
        return self._other


class RandomScorer:
    """Independent scores, uniform between 0 and 1: what is lost by not looking.

    Args:
        seed: The request's seed.
        alone: The prompt without local tokens.
        after: float32 [a, D]; every question draws numbers of its own, the same every time.
    """

    def __init__(self, seed: int, alone: TokenSequence, after: Embeds) -> None:
        self._random = np.random.default_rng([seed, zlib.crc32(np.asarray(after).tobytes())])
        self._views = len(global_places(alone))

    def local(self, local: LocalTokens) -> TokenLogits:
        """New numbers at every call."""
        return TokenLogits(self._draw(len(local)), self._draw(self._views))

    def global_view(self) -> NDArray[np.float32]:
        """New numbers at every call."""
        return self._draw(self._views)

    def unseen(self, local: int) -> int:  # noqa: ARG002
        """Nothing runs."""
        return 0

    def _draw(self, count: int) -> NDArray[np.float32]:
        return np.log(1.0 - self._random.random((1, count))).astype(np.float32)


class NormScorer:
    """L2 norm of a token's embedding: saliency that knows no question.

    Args:
        alone: The prompt without local tokens.
    """

    def __init__(self, alone: TokenSequence) -> None:
        self._views = _log_norms(alone.embeds[global_places(alone)])

    def local(self, local: LocalTokens) -> TokenLogits:
        """Logarithms of the norms."""
        return TokenLogits(_log_norms(local.embeds), self._views)

    def global_view(self) -> NDArray[np.float32]:
        """Logarithms of the norms."""
        return self._views

    def unseen(self, local: int) -> int:  # noqa: ARG002
        """Nothing runs."""
        return 0


def _log_norms(embeds: Embeds) -> NDArray[np.float32]:
    norms = np.linalg.norm(np.asarray(embeds, np.float64), axis=1)
    logits: NDArray[np.float32] = np.log(np.maximum(norms, _TINY)).astype(np.float32)[None]
    return logits


def make_scorer(context: SearchContext, caches: ScoringCaches | None) -> Scorer:
    """The scorer that `context.options.prune` names.

    Args:
        context: The question and the image.
        caches: What the RFM works with; None where there is none.

    Raises:
        UsageError: That way to prune scores no tokens before the language model.
    """
    options, model, prefix = context.options, context.model, context.prefix
    after, budget = context.after, context.budget
    alone = partial(model.sequences.without_local, prefix, after)
    makers: dict[Prune, Callable[[], Scorer]] = {
        "random": lambda: RandomScorer(options.seed, alone(), after),
        "norm": lambda: NormScorer(alone()),
    }
    if model.focus is not None and caches is not None:
        # The authors' code knows no relative scores.
        generic = None
        if model.generic is not None and options.policy != "reference":
            whole = alone()
            generic = model.sequences.after(model.generic, whole.embeds[global_places(whole)])
        rfm = RfmScorer(model.focus, model.sequences, caches, prefix, after, budget, generic)
        makers["rfm"] = lambda: rfm
    if options.prune not in makers:
        raise UsageError(f"--prune {options.prune} has no scores; use one of {', '.join(makers)}")
    return makers[options.prune]()
