"""Policy `reference`: what the authors' released code does, bug for bug."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lrs_edge.language.sequence import pad_dense
from lrs_edge.pyramid.levels import TileIndex
from lrs_edge.pyramid.selection import reference_tiles
from lrs_edge.search.context import SearchContext
from lrs_edge.search.ranking import Shown, rank
from lrs_edge.search.result import LevelPass, SearchResult
from lrs_edge.search.rfm import token_scores
from lrs_edge.search.scorers import Scorer


class AsReleased:
    """The base level and one finer level, the second pass dense.

    Args:
        context: The question and the image.
        scorer: The RFM.
    """

    def __init__(self, context: SearchContext, scorer: Scorer) -> None:
        self._context = context
        self._scorer = scorer

    def run(self) -> SearchResult:
        """Search; see `Search.run`."""
        context = self._context
        levels = context.pyramid.levels
        result = context.nothing()
        base = self._pass(0, 0, levels[0].tiles())
        if base is None:
            result.end_by("timeout", 0)
            return result
        result.passes.append(base)
        finer = len(levels) - 1
        chosen = reference_tiles(base.local.indices[base.kept], base.grid, levels[finer])
        second = None
        if len(base.tiles) == levels[0].tile_count and not context.budget.search_over():
            second = self._pass(1, finer, chosen)
        if second is not None and len(second.tiles) == len(chosen):
            result.passes.append(second)
        else:
            result.end_by("timeout", 0 if second is None else 1)
        result.send_kept()
        return result

    def _pass(self, number: int, index: int, tiles: Sequence[TileIndex]) -> LevelPass | None:
        context = self._context
        level = context.pyramid.levels[index]
        context.on_level(number, len(tiles))
        remembered = context.tiles.from_cache
        features = context.tiles.local_tokens(level, tiles, context.budget.search_over)
        context.budget.check()
        if not features:
            return None
        grid = context.grid(number, level, min_cols=0)
        compact = context.model.sequences.local(grid, features, number)
        local = pad_dense(compact, grid) if len(compact) < grid.count else compact
        from_cache = context.tiles.from_cache - remembered
        shown = Shown(index, level, grid, tuple(sorted(features)), from_cache, local)
        scored = rank(
            shown, self._scorer.local(local), context.model.keep_ratio, reference_quirks=True
        )
        if context.traced and len(compact) < len(local):
            masked = np.zeros(len(local), np.float32)
            masked[compact.indices] = token_scores(self._scorer.local(compact).local)
            return replace(scored, masked_scores=masked)
        return scored
