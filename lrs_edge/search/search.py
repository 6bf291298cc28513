"""The search for one question: which tiles are looked at, which tokens reach the language model.

It picks the search and the scorer that the options name, and trims what they find to what the
language model can take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lrs_edge.answer.answer import SearchEnd
from lrs_edge.baselines.as_released import AsReleased
from lrs_edge.baselines.tower import CompressedLevel, CompressedTiles
from lrs_edge.baselines.unpruned import AllTokens, Unpruned
from lrs_edge.errors import UsageError
from lrs_edge.language.kv_cache import TokenKind
from lrs_edge.pyramid.selection import trim_to_budget
from lrs_edge.requests.options import SCORING
from lrs_edge.search.coarse_to_fine import CoarseToFine
from lrs_edge.search.context import MAX_ROWS_SHARE, SearchContext, SearchModel, Strategy
from lrs_edge.search.exhaustive import Exhaustive
from lrs_edge.search.result import SearchResult
from lrs_edge.search.scorers import Scorer, ScoringCaches, make_scorer

__all__ = ["MAX_ROWS_SHARE", "Search", "SearchContext", "SearchModel"]


@dataclass(frozen=True)
class _Room:
    """Local tokens that fit: by the model's length, and by `max_vision_tokens` (None: no limit).

    `length` leaves room for the answer; it is below 0 where not even one token of it has room.
    """

    length: int
    budget: int | None

    @property
    def least(self) -> int:
        """The smaller of both, at least 0."""
        both = [self.length] if self.budget is None else [self.length, self.budget]
        return max(min(both), 0)


class Search:
    """One search for one question on one image.

    Args:
        context: The question, the image, and what the search may cost; its `local_budget` is set
            here.
        caches: What the RFM works with; the prefix is reused between levels and questions. None
            where there is no RFM.
        compressed: Compressed tokens of tiles, where the options ask for them.
    """

    def __init__(
        self,
        context: SearchContext,
        caches: ScoringCaches | None,
        compressed: CompressedTiles | None = None,
    ) -> None:
        self._compressed = compressed
        self._room = _room(context)
        self._context = replace(context, local_budget=self._room.least)
        self._caches = caches

    def run(self) -> SearchResult:
        """Search, and choose the tokens for the language model.

        Raises:
            UsageError: The prompt alone is longer than the model can take.
            ImageError: A tile cannot be read.
            BackendError: An engine fails.
        """
        context = self._context
        reference = context.options.policy == "reference"
        if self._room.length < 0 and not reference:
            whole = context.model.sequences.without_local(context.prefix, context.after)
            asked = int((whole.tokens["kind"] == TokenKind.QUESTION).sum())
            most = context.model.max_length - (len(whole) - asked) - 1
            raise UsageError(
                f"the question has {asked} tokens; with the global view the model can "
                f"take {most}; ask a shorter question"
            )
        result = self._strategy().run()
        # Over the model's length the reference cuts the end of the prompt; the request does that.
        if not reference:
            _trim(result, self._room.length, "the model's length")
        if self._room.budget is not None:
            if self._room.budget < 0:
                result.warnings.append(
                    f"the {_fixed_vision_tokens(context)} tokens of the global view and its "
                    "separator are always sent, more than --max-vision-tokens"
                )
            _trim(result, max(self._room.budget, 0), "--max-vision-tokens")
        return result

    def _strategy(self) -> Strategy:
        context, options = self._context, self._context.options
        if self._compressed is not None:
            return Unpruned(context, CompressedLevel(context, self._compressed))
        if options.prune not in SCORING:
            return Unpruned(context, AllTokens(context))
        if options.policy == "reference":
            return AsReleased(context, self._scorer())
        if options.search == "exhaustive":
            return Exhaustive(context, self._scorer())
        return CoarseToFine(context, self._scorer())

    def _scorer(self) -> Scorer:
        return make_scorer(self._context, self._caches)


def room_by_length(context: SearchContext) -> int:
    """Local tokens that fit the model's length, with room for an answer; may be below 0."""
    return _room(context).length


def _room(context: SearchContext) -> _Room:
    length = context.model.max_length - len(context.prefix) - len(context.after)
    # The answer is written after the prompt: what it may need is not for the image, unless it may
    # be so long that no image would be left.
    length -= max(min(context.options.max_tokens, length // 2), 1)
    most = context.options.max_vision_tokens
    return _Room(length, None if most is None else most - _fixed_vision_tokens(context))


def _fixed_vision_tokens(context: SearchContext) -> int:
    """Vision tokens that are always sent: the global view and the separator."""
    whole = context.model.sequences.without_local(context.prefix, context.after)
    kinds = whole.tokens["kind"]
    return int(np.isin(kinds, (TokenKind.GLOBAL, TokenKind.SEPARATOR)).sum())


def _trim(result: SearchResult, budget: int, limit: str) -> None:
    trim(result, budget, limit, "max_vision_tokens")


def trim(result: SearchResult, budget: int, limit: str, end: SearchEnd) -> None:
    """Leave out the lowest-scored local tokens, with a warning, until the others fit.

    Args:
        result: Its `final` tokens and their scores change.
        budget: Tokens that may stay.
        limit: What they must fit, for the warning.
        end: Why the search ended, if nothing ended it before.
    """
    final, wanted = result.final, len(result.final)
    if wanted <= budget:
        return
    last = result.passes[-1]
    groups, frame = final.groups(last.grid), final.is_frame | final.is_break
    stays, inner = frame.copy(), ~frame
    stays[inner] = trim_to_budget(
        groups[inner],
        result.final_scores[inner],
        final.is_structure[inner],
        max(budget - int(frame.sum()), 0),
    )
    # A mark without its tile says what is not there; a newline only ends a row.
    shown = stays & ~final.is_structure
    marks = final.is_mark & inner
    stays[marks] &= np.isin(groups, groups[shown])[marks]
    stays[frame] &= shown.any()
    stays[final.is_break] = final.breaks(np.flatnonzero(shown))[final.is_break]
    result.final = final.take(np.flatnonzero(stays))
    result.final_scores = result.final_scores[stays]
    if result.end == "finest_level":
        result.end = end
    chosen = "the lowest-scored were left out" if last.is_scored else "an even spread was sent"
    result.warnings.append(f"only {budget} of {wanted} kept local tokens fit {limit}; {chosen}")
