"""Policy `full`: level after level down to the original resolution, each bounded (the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrs_edge.errors import OutOfMemoryError
from lrs_edge.pruning.context import SearchContext
from lrs_edge.pruning.ranking import Shown, rank
from lrs_edge.pruning.scorers import Scorer
from lrs_edge.pyramid import Level, TileIndex, TokenGrid
from lrs_edge.rfm import token_scores
from lrs_edge.search_result import LevelPass, SearchResult
from lrs_edge.selection import best_tiles, tile_scores


class CoarseToFine:
    """Every level's best tokens choose the tiles of the next, until a budget or the last level.

    Args:
        context: The question and the image.
        scorer: Says which tokens are best.
    """

    def __init__(self, context: SearchContext, scorer: Scorer) -> None:
        self._context = context
        self._scorer = scorer

    def run(self) -> SearchResult:
        """Search; see `Search.run`."""
        context = self._context
        levels = context.pyramid.levels
        result = context.nothing()
        tiles = self._base_tiles(result)
        for index, level in enumerate(levels):
            if not tiles:
                result.end_by("max_tiles", index)
                break
            if index > 0 and context.clock.search_expired():
                result.end_by("timeout", index)
                break
            try:
                scored = self._score_level(index, level, tiles)
            except OutOfMemoryError:
                if index == 0:
                    raise
                result.end_by("memory", index)
                break
            if scored is None:
                result.end_by("timeout", index)
                break
            result.passes.append(scored)
            if len(scored.tiles) < len(tiles):
                result.end_by("timeout", index)
                break
            if index + 1 < len(levels):
                tiles = self._next_tiles(scored, levels[index + 1], index + 1, result)
        result.send_kept()
        return result

    def _base_tiles(self, result: SearchResult) -> list[TileIndex]:
        """All tiles of the base level, or those under the best global tokens if not all may be."""
        context = self._context
        base, remaining = context.pyramid.levels[0], context.remaining_tiles()
        if remaining is None or remaining >= base.tile_count:
            return base.tiles()
        result.end_by("max_tiles", 0)
        if remaining == 0:
            return []
        scores = token_scores(self._scorer.global_view())
        view = context.pyramid.global_view
        side = round(len(scores) ** 0.5)
        # The global view has no newlines; a grid one column wider than the tile leaves room for
        # them, so the same mapping serves.
        grid = TokenGrid(side, side, side, 1, 1)
        places = np.arange(len(scores), dtype=np.int64)
        shown = places // side * grid.width + places % side
        cells = view.tile / side
        inside = (places // side * cells < view.height) & (places % side * cells < view.width)
        totals = tile_scores(shown[inside], scores[inside], grid, view, base)
        return best_tiles(totals, remaining)

    def _next_tiles(
        self, scored: LevelPass, finer: Level, index: int, result: SearchResult
    ) -> list[TileIndex]:
        context, top = self._context, scored.top
        totals = tile_scores(
            scored.local.indices[top], scored.scores[top], scored.grid, scored.level, finer
        )
        count = context.options.tiles_per_level
        remaining = context.remaining_tiles()
        if remaining is not None:
            # Shared evenly over the levels to come, so that a small budget still reaches the
            # original resolution.
            share = -(-remaining // (len(context.pyramid.levels) - index))
            if share < min(count, int((totals > 0).sum())):
                result.end_by("max_tiles", index)
            count = min(count, share)
        return best_tiles(totals, count)

    def _score_level(
        self, index: int, level: Level, tiles: Sequence[TileIndex]
    ) -> LevelPass | None:
        """Encode and score tiles of a level; None where the time ran out before all were read."""
        context = self._context
        context.on_level(index, len(tiles))
        remembered = context.tiles.from_cache
        stop = context.clock.search_expired if index > 0 else context.clock.expired
        features = context.tiles.local_tokens(level, tiles, stop)
        if len(features) < len(tiles) and (index > 0 or not features):
            return None
        grid = context.grid(index, level)
        shown = Shown(
            index=index,
            level=level,
            grid=grid,
            tiles=tuple(sorted(features)),
            from_cache=context.tiles.from_cache - remembered,
            local=context.place(grid, features, index),
        )
        return rank(shown, self._scorer.local(shown.local), context.model.keep_ratio)
