"""From logits to a scored level: scores, the best tokens, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrs_edge.language.sequence import LocalTokens
from lrs_edge.pyramid.levels import Level, TileIndex, TokenGrid
from lrs_edge.pyramid.selection import kept_indices, top_indices
from lrs_edge.search.result import LevelPass
from lrs_edge.search.rfm import token_scores
from lrs_edge.search.scorers import TokenLogits


@dataclass(frozen=True)
class Shown:
    """The tiles of one level that were looked at, and their tokens.

    Attributes:
        index: Index of the level in the pyramid's search levels.
        level: The level.
        grid: Its token grid.
        tiles: Tiles looked at, row-major.
        from_cache: How many of them were remembered.
        local: Their tokens and newlines.
    """

    index: int
    level: Level
    grid: TokenGrid
    tiles: tuple[TileIndex, ...]
    from_cache: int
    local: LocalTokens


def rank(
    shown: Shown, logits: TokenLogits, keep_ratio: float, *, reference_quirks: bool = False
) -> LevelPass:
    """Keep the best share of a level's tokens, and the structure that goes with them.

    Args:
        shown: The level's tokens.
        logits: Theirs.
        keep_ratio: Share of the tile tokens that is kept, at least one.
        reference_quirks: Newlines compete with the tokens of tiles and may crowd them out, and
            hidden tokens are not masked but get +1.0, as in the authors' code.
    """
    local = shown.local
    hidden = local.hidden if local.hidden.any() else None
    scores = token_scores(logits.local, hidden, reference_quirk=reference_quirks)
    eligible = np.flatnonzero(~local.hidden if reference_quirks else ~local.is_structure)
    count = int(keep_ratio * len(eligible))
    if not reference_quirks:
        count = min(max(count, 1), len(eligible))
    top = eligible[top_indices(scores[eligible], count)]
    return as_pass(shown, logits, scores, top, local.structure_of(top))


def as_pass(
    shown: Shown,
    logits: TokenLogits,
    scores: NDArray[np.float32],
    top: NDArray[np.int64],
    structure: NDArray[np.int64],
    *,
    is_scored: bool = True,
) -> LevelPass:
    """A level with the tokens that were chosen.

    Args:
        shown: The level's tokens.
        logits: Theirs.
        scores: float32 [n].
        top: int64 [k], places of the chosen tile tokens, best first.
        structure: int64 [m], places of the newlines and marks that are kept with them.
        is_scored: False where nothing was computed to choose them.
    """
    return LevelPass(
        index=shown.index,
        level=shown.level,
        grid=shown.grid,
        tiles=shown.tiles,
        from_cache=shown.from_cache,
        local=shown.local,
        logits=logits.local,
        scores=scores,
        top=top,
        kept=kept_indices(top, structure),
        global_logits=logits.global_view,
        is_scored=is_scored,
    )
