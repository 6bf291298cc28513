"""What a search finds: the scored levels, and the tokens for the language model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lrs_edge.answer import SearchEnd
from lrs_edge.pyramid import Level, TileIndex, TokenGrid
from lrs_edge.sequence import LocalTokens


@dataclass(frozen=True)
class LevelPass:
    """One scored level.

    Attributes:
        index: Index of the level in the pyramid's search levels.
        level: The level.
        grid: Its token grid.
        tiles: Tiles looked at, row-major.
        from_cache: How many of them were remembered.
        local: The scored tokens.
        logits: float32 [H, n], attention logits of the last prompt token to them.
        scores: float32 [n].
        top: int64 [k], places of the best tokens, best first.
        kept: int64 [m], places of `top` and all newlines, ascending.
        global_logits: float32 [H, T], the same for the global view.
        masked_scores: float32 [n] under a proper mask, where the pass was dense and traced.
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

    @property
    def kept_tokens(self) -> LocalTokens:
        """The kept tokens."""
        return self.local.take(self.kept)


@dataclass
class SearchResult:
    """What the search found.

    Attributes:
        passes: The scored levels from coarse to fine.
        final: Local tokens for the language model.
        final_scores: float32 [n], their scores.
        end: Why the search ended.
        warnings: One sentence each.
    """

    passes: list[LevelPass]
    final: LocalTokens
    final_scores: NDArray[np.float32]
    end: SearchEnd = "finest_level"
    warnings: list[str] = field(default_factory=list)
