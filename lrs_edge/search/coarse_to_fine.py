"""Policy `full`: level after level down to the original resolution, each bounded (the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.errors import OutOfMemoryError
from lrs_edge.pyramid.levels import Level, TileIndex, TokenGrid
from lrs_edge.pyramid.selection import best_tiles, tile_scores
from lrs_edge.requests.budget import WORTHWHILE_TILES
from lrs_edge.requests.sharing import share_tiles
from lrs_edge.search.context import SearchContext
from lrs_edge.search.ranking import Shown, rank
from lrs_edge.search.result import LevelPass, SearchResult
from lrs_edge.search.rfm import token_scores
from lrs_edge.search.scorers import Scorer

#: A finer level's tiles show less of the image, but are not read faster without end.
LEAST_NARROWING = 0.25


class CoarseToFine:
    """Every level's best tokens choose the tiles of the next, until a budget or the last level.

    Args:
        context: The question and the image.
        scorer: Says which tokens are best.
    """

    def __init__(self, context: SearchContext, scorer: Scorer) -> None:
        self._context = context
        self._scorer = scorer
        self._levels = context.pyramid.levels
        finer = [min(context.options.tiles_per_level, lv.tile_count) for lv in self._levels[1:]]
        #: Tiles that each level would look at without a budget.
        self._wanted = [self._levels[0].tile_count, *finer]
        self._read_level = context.pyramid.global_view

    def run(self) -> SearchResult:
        """Search; see `Search.run`."""
        context, budget = self._context, self._context.budget
        result = context.nothing()
        for index, level in enumerate(self._levels):
            budget.check()
            if budget.search_over():
                result.end_by("timeout", index)
                break
            if budget.lacks_memory():
                result.end_by("memory", index)
                break
            try:
                tiles = self._choose(index, level, result)
                if tiles is None:
                    continue
                scored = self._score_level(index, level, tiles) if tiles else None
            except OutOfMemoryError:
                if not result.passes:
                    raise
                result.end_by("memory", index)
                break
            if scored is None:
                if tiles:
                    result.end_by("timeout", index)
                break
            result.passes.append(scored)
            budget.found(len(scored.kept))
            if len(scored.tiles) < len(tiles):
                result.end_by("timeout", index)
                break
        result.send_kept()
        return result

    def _choose(self, index: int, level: Level, result: SearchResult) -> list[TileIndex] | None:
        """Tiles of a level to look at: none where a budget ends the search here.

        Returns:
            None where the level is skipped: a small tile budget is better spent on finer ones.
        """
        context, last = self._context, result.passes[-1] if result.passes else None
        wanted = self._wanted[index:]
        totals = None
        if last is not None:
            totals = tile_scores(
                last.local.cells[last.top], last.scores[last.top], last.grid, last.level, level
            )
            wanted[0] = len(best_tiles(totals, wanted[0]))
        shares, limit = context.budget.share(context.tiles.looked_at, wanted)
        if limit is not None and shares[0] < wanted[0]:
            result.end_by(limit, index)
        if shares[0] == 0:
            if index == 0 and any(shares):
                self._tell_skipped(shares, result)
            return None if any(shares) else []
        if totals is None and shares[0] < level.tile_count:
            totals = self._under_global_view(level)
        tiles = level.tiles() if totals is None else best_tiles(totals, shares[0])
        count = self._in_time(index, level, tiles, shares)
        if count == len(tiles):
            return tiles
        result.end_by("timeout", index)
        if count == 0 or (last is not None and count < WORTHWHILE_TILES):
            return []
        return best_tiles(self._under_global_view(level) if totals is None else totals, count)

    def _tell_skipped(self, shares: Sequence[int], result: SearchResult) -> None:
        skipped = sum(share == 0 for share in shares)
        result.warnings.append(
            f"--max-tiles allows fewer tiles than the image has levels: the {skipped} coarsest "
            "were skipped, and the global view chose where to look"
        )

    def _under_global_view(self, level: Level) -> NDArray[np.float64]:
        """How much of the global view's score lies over each tile of a level."""
        scores = token_scores(self._scorer.global_view())
        view = self._context.pyramid.global_view
        side = round(len(scores) ** 0.5)
        # The global view has no newlines; a grid one column wider than the tile leaves room for
        # them, so the same mapping serves.
        grid = TokenGrid(side, side, side, 1, 1)
        places = np.arange(len(scores), dtype=np.int64)
        shown = places // side * grid.width + places % side
        cells = view.tile / side
        inside = (places // side * cells < view.height) & (places % side * cells < view.width)
        return tile_scores(shown[inside], scores[inside], grid, view, level)

    def _in_time(
        self, index: int, level: Level, tiles: Sequence[TileIndex], shares: Sequence[int]
    ) -> int:
        """How many of the tiles can be looked at in time, some left for finer levels."""
        context = self._context
        if not context.budget.is_timed:
            return len(tiles)
        known = context.tiles.remembers(level, tiles)
        local = len(tiles) * context.model.per_tile**2
        affordable = context.budget.affordable_tiles(
            known, self._unseen(index, local) - local, self._narrowing(level)
        )
        if affordable is None or affordable >= known + sum(shares):
            return len(tiles)
        if affordable <= known:
            return min(affordable, len(tiles))
        # As many levels as get tiles enough to be worth it, rather than one tile of each.
        levels = max(min(affordable // WORTHWHILE_TILES, len(shares)), 1)
        more = share_tiles(affordable - known, [len(tiles) - known, *shares[1:levels]])
        return known + more[0]

    def _unseen(self, index: int, local: int) -> int:
        """Tokens before the question that a pass over so many local tokens has to run."""
        if index == 0:
            return self._scorer.unseen(local)
        return self._scorer.unseen(0) + local

    def _narrowing(self, level: Level) -> float:
        """How much less of the image a tile shows than one of the level that was read last."""
        if level.height * level.width <= self._read_level.height * self._read_level.width:
            return 1.0
        area = self._read_level.height * self._read_level.width
        # With overviews, a tile of any level takes as long as one of any other.
        return max(area / (level.height * level.width), LEAST_NARROWING)

    def _score_level(
        self, index: int, level: Level, tiles: Sequence[TileIndex]
    ) -> LevelPass | None:
        """Encode and score tiles of a level; None where the time ran out before all were read."""
        context, budget = self._context, self._context.budget
        context.on_level(index, len(tiles))
        remembered, read = context.tiles.from_cache, context.tiles.read
        waited = budget.clock.seconds("read")
        features = context.tiles.local_tokens(level, tiles, budget.search_over)
        budget.check()
        if context.tiles.read > read:
            seconds = budget.clock.seconds("read") - waited
            budget.has_read(seconds / (context.tiles.read - read))
            self._read_level = level
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
        if not budget.can_score(self._unseen(index, len(shown.local))):
            return None
        return rank(shown, self._scorer.local(shown.local), context.model.keep_ratio)
