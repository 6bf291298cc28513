"""What a search finds: the levels looked at, and the tokens for the language model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lrs_edge.answer.answer import SearchEnd
from lrs_edge.language.sequence import LocalTokens
from lrs_edge.pyramid.levels import Level, TileIndex, TokenGrid


@dataclass(frozen=True)
class LevelPass:
    """One level that was looked at.

    Attributes:
        index: Index of the level in the pyramid's search levels.
        level: The level.
        grid: Its token grid.
        tiles: Tiles looked at, row-major.
        from_cache: How many of them were remembered.
        local: The tokens of these tiles.
        logits: float32 [H, n], logits of their scores (for the RFM: attention logits of the last
            prompt token to them).
        scores: float32 [n].
        top: int64 [k], places of the best tokens, best first.
        kept: int64 [m], places of `top` and the newlines and marks that go with them, ascending.
        global_logits: float32 [H, T], logits of the global view's tokens.
        masked_scores: float32 [n] under a proper mask, where the pass was dense and traced.
        is_scored: False where all tokens were taken as they were.
    """

    index: int
    level: Level
    grid: TokenGrid
    tiles: tuple[TileIndex, ...]
    from_cache: int
    local: LocalTokens
    logits: NDArray[np.float32]
    scores: NDArray[np.float32]
    top: NDArray[np.int64]
    kept: NDArray[np.int64]
    global_logits: NDArray[np.float32]
    masked_scores: NDArray[np.float32] | None = None
    is_scored: bool = True

    @property
    def kept_tokens(self) -> LocalTokens:
        """The kept tokens."""
        return self.local.take(self.kept)

    @property
    def tokens_scored(self) -> int:
        """Local tokens that were scored, newlines and marks included."""
        return int((~self.local.hidden).sum()) if self.is_scored else 0


@dataclass
class SearchResult:
    """What the search found.

    Attributes:
        passes: The levels looked at, from coarse to fine.
        final: Local tokens for the language model.
        final_scores: float32 [n], in the order in which they may be left out, lowest first: their
            scores, or without any an even spread.
        end: Why the search ended.
        warnings: One sentence each.
    """

    passes: list[LevelPass]
    final: LocalTokens
    final_scores: NDArray[np.float32]
    end: SearchEnd = "finest_level"
    warnings: list[str] = field(default_factory=list)

    def send_kept(self) -> None:
        """Give the kept tokens of the last level to the language model."""
        if self.passes:
            last = self.passes[-1]
            self.final, self.final_scores = last.kept_tokens, last.scores[last.kept]

    def end_by(self, why: SearchEnd, index: int) -> None:
        """Note, once, what ended the search at or before level `index`, with a warning."""
        if self.end == why:
            return
        self.end = why
        reasons = {
            "max_tiles": "the tile budget (--max-tiles) did not cover every tile that the search "
            "wanted to look at",
            "timeout": f"the search was cut short at level {index}: the rest of the time limit was "
            "needed for prefill and answer",
            "memory": f"the search stopped before level {index} because memory ran out",
        }
        self.warnings.append(reasons[why])
