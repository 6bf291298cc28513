"""No search before the language model: one whole level, all of its tokens or a few of each tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lrs_edge.answer.answer import SearchEnd
from lrs_edge.pyramid.levels import TileIndex
from lrs_edge.search.context import SearchContext, spread
from lrs_edge.search.ranking import Shown, as_pass
from lrs_edge.search.result import LevelPass, SearchResult
from lrs_edge.search.rfm import token_scores
from lrs_edge.search.scorers import TokenLogits

#: Multiples of it modulo 1 are spread evenly, however many there are (golden ratio).
_GOLDEN = (5**0.5 - 1) / 2


class LevelTokens(Protocol):
    """Gives the tokens of a level for the language model."""

    @property
    def looked_at(self) -> int:
        """Tiles looked at for this question so far, the global view included."""
        ...

    def count(self, index: int) -> int:
        """Local tokens of the whole level with this index."""
        ...

    def show(self, index: int, tiles: Sequence[TileIndex]) -> Shown:
        """Tokens of some of the level's tiles; of fewer where the time runs out."""
        ...


class AllTokens:
    """Every token of a level, and its newlines; `fastv` and `pdrop` prune them later.

    Args:
        context: The question and the image.
    """

    def __init__(self, context: SearchContext) -> None:
        self._context = context

    @property
    def looked_at(self) -> int:
        """Tiles looked at for this question so far."""
        return self._context.tiles.looked_at

    def count(self, index: int) -> int:
        """Tokens of the unpadded grid, newlines and marks included."""
        context = self._context
        return context.model.sequences.count(context.grid(index, context.pyramid.levels[index]))

    def show(self, index: int, tiles: Sequence[TileIndex]) -> Shown:
        """Tokens of the tiles in the order of the level's sequence."""
        context = self._context
        level = context.pyramid.levels[index]
        grid = context.grid(index, level)
        remembered = context.tiles.from_cache
        features = context.tiles.local_tokens(level, tiles, context.budget.search_over)
        return Shown(
            index=index,
            level=level,
            grid=grid,
            tiles=tuple(sorted(features)),
            from_cache=context.tiles.from_cache - remembered,
            local=context.place(grid, features, index),
        )


class Unpruned:
    """All tiles of the finest level whose tokens fit.

    Args:
        context: The question and the image.
        tokens: Gives the tokens of the level.
    """

    def __init__(self, context: SearchContext, tokens: LevelTokens) -> None:
        self._context = context
        self._tokens = tokens

    def run(self) -> SearchResult:
        """Read the level; see `Search.run`."""
        context = self._context
        result = context.nothing()
        index, why = self._finest_that_fits()
        level = context.pyramid.levels[index]
        remaining = context.remaining_tiles(self._tokens.looked_at)
        tiles = level.tiles() if remaining is None else spread(level.tiles(), remaining)
        if why is not None:
            result.end = why
            result.warnings.append(self._told(index, why))
        if not tiles:
            return result
        context.on_level(index, len(tiles))
        shown = self._tokens.show(index, tiles)
        if len(shown.tiles) < len(tiles):
            result.end_by("timeout", index)
        if shown.tiles:
            result.passes.append(_take_all(shown, context.views))
            result.send_kept()
            result.final_scores = spread_scores(len(result.final))
        return result

    def _finest_that_fits(self) -> tuple[int, SearchEnd | None]:
        """Index of the level, and what kept finer ones out; the base level where none fits."""
        why: SearchEnd | None = None
        for index in reversed(range(len(self._context.pyramid.levels))):
            found = self._refusal(index)
            if found is None:
                return index, why
            why = found
        return 0, why

    def _refusal(self, index: int) -> SearchEnd | None:
        """What a level is too large for, or None."""
        context = self._context
        level = context.pyramid.levels[index]
        remaining = context.remaining_tiles(self._tokens.looked_at)
        if remaining is not None and level.tile_count > remaining:
            return "max_tiles"
        if self._tokens.count(index) > context.local_budget:
            return "max_vision_tokens"
        return None

    def _told(self, index: int, why: SearchEnd) -> str:
        """What the user should know where the image is not shown whole at its finest level."""
        context = self._context
        levels = context.pyramid.levels
        level, finest = levels[index], levels[-1]
        limit = {
            "max_tiles": "tiles are more than --max-tiles allows",
            "max_vision_tokens": "tokens are more than the model's length and --max-vision-tokens "
            "allow",
        }[why]
        size = f"{level.width} x {level.height} pixels"
        if self._refusal(index) is None:
            return (
                f"--prune {context.options.prune} shows the whole image at {size} and not at its "
                f"finest {finest.width} x {finest.height}: finer, its {limit}"
            )
        return (
            f"--prune {context.options.prune} cannot show the whole image: even at {size} its "
            f"{limit}"
        )


def _take_all(shown: Shown, views: int) -> LevelPass:
    count = len(shown.local)
    logits = TokenLogits(np.zeros((1, count), np.float32), np.zeros((1, views), np.float32))
    tiles = np.flatnonzero(~shown.local.is_structure)
    structure = shown.local.structure_of(tiles)
    return as_pass(shown, logits, token_scores(logits.local), tiles, structure, is_scored=False)


def spread_scores(count: int) -> NDArray[np.float32]:
    """Scores float32 [count] in 0..1 of which the best k are spread evenly, for every k."""
    return (np.arange(1, count + 1) * _GOLDEN % 1.0).astype(np.float32)
