"""`--search exhaustive`: every tile of the finest level is looked at and scored.

The baseline that coarse-to-fine search is measured against: it cannot miss a tile, and costs as
many encoder runs as the level has tiles. Its tokens are kept in memory until all are scored, so
unlike the search's, its memory grows with the image.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.rows import Embeds, joined
from lrs_edge.language.sequence import LocalTokens
from lrs_edge.pyramid.levels import Level, TileIndex
from lrs_edge.pyramid.selection import top_indices
from lrs_edge.search.context import SearchContext, spread
from lrs_edge.search.ranking import Shown, as_pass
from lrs_edge.search.result import LevelPass, SearchResult
from lrs_edge.search.rfm import token_scores
from lrs_edge.search.scorers import Scorer, TokenLogits


class Exhaustive:
    """All tiles of the finest level, scored in groups as large as a level of the search.

    Every group is one pass after the shared prefix; the softmax goes over what all passes saw.

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
        result = context.nothing()
        index = len(context.pyramid.levels) - 1
        level = context.pyramid.levels[index]
        tiles, remaining = level.tiles(), context.remaining_tiles()
        if remaining is not None and remaining < len(tiles):
            result.end_by("max_tiles", index)
            tiles = spread(tiles, remaining)
        if not tiles:
            return result
        context.on_level(index, len(tiles))
        scored = self._score(index, level, tiles, result)
        if scored is not None:
            result.passes.append(scored)
            result.send_kept()
        return result

    def _score(
        self, index: int, level: Level, tiles: list[TileIndex], result: SearchResult
    ) -> LevelPass | None:
        """Encode and score group after group; None where the time ran out before the first."""
        context = self._context
        grid = context.grid(index, level)
        canvas = _Canvas(context.model.sequences.places(grid, tiles, index))
        looked_at: list[TileIndex] = []
        remembered, views = context.tiles.from_cache, None
        size = context.options.tiles_per_level
        for start in range(0, len(tiles), size):
            group = tiles[start : start + size]
            features = context.tiles.local_tokens(level, group, context.budget.search_over)
            if features:
                local = context.place(grid, features, index)
                logits = self._scorer.local(local)
                canvas.add(local, logits.local)
                # The view's logits differ a little from pass to pass, through the question's last
                # token; only `--kv-budget` looks at them, and the first pass's are as good as any.
                views = logits.global_view if views is None else views
                looked_at += sorted(features)
            if len(features) < len(group):
                result.end_by("timeout", index)
                break
        if views is None:
            return None
        local, logits_of_all = canvas.tokens()
        from_cache = context.tiles.from_cache - remembered
        shown = Shown(index, level, grid, tuple(looked_at), from_cache, local)
        return self._choose(shown, TokenLogits(logits_of_all, views))

    def _choose(self, shown: Shown, logits: TokenLogits) -> LevelPass:
        """Keep as many tokens as the search would at its finest level, with their newlines."""
        context, local = self._context, shown.local
        scores = token_scores(logits.local)
        tiles = np.flatnonzero(~local.is_structure)
        per_level = context.options.tiles_per_level * context.model.per_tile**2
        count = int(context.model.keep_ratio * min(per_level, len(tiles)))
        top = tiles[top_indices(scores[tiles], min(max(count, 1), len(tiles)))]
        structure = local.structure_of(top)
        if context.closes_gaps(shown.grid):
            # As on a sparse level: a row has a newline where a tile with kept tokens lies in it.
            rows = local.cells[structure] // shown.grid.width // shown.grid.per_tile
            stays = np.isin(rows, local.tile_rows[top]) | local.is_mark[structure]
            structure = structure[stays]
        return as_pass(shown, logits, scores, top, structure)


class _Canvas:
    """Tokens and logits of a level, filled group by group.

    Args:
        places: Of all tokens that may be added, without embeddings.
    """

    def __init__(self, places: LocalTokens) -> None:
        self._places = places
        self._embeds: list[Embeds] = []
        # Of each place, its row among all that were added.
        self._rows = np.full(len(places), -1, np.int64)
        self._logits: NDArray[np.float32] | None = None
        self._filled = np.zeros(len(places), bool)

    def add(self, local: LocalTokens, logits: NDArray[np.float32]) -> None:
        """Add one group's tokens with their logits [H, n].

        A row's newline is in every group that has it; the logarithms of the sums make its share of
        the softmax the sum of its shares.
        """
        if self._logits is None:
            self._logits = np.full((len(logits), len(self._places)), -np.inf, np.float32)
        places = np.searchsorted(self._places.indices, local.indices)
        self._rows[places] = sum(map(len, self._embeds)) + np.arange(len(local))
        self._embeds.append(local.embeds)
        self._logits[:, places] = np.logaddexp(self._logits[:, places], logits)
        self._filled[places] = True

    def tokens(self) -> tuple[LocalTokens, NDArray[np.float32]]:
        """What was added, in the order of the level's sequence, and the logits [H, n]."""
        assert self._logits is not None
        embeds = joined(self._embeds)
        if self._filled.all():
            return replace(self._places, embeds=embeds[self._rows]), self._logits
        places = np.flatnonzero(self._filled)
        local = replace(self._places.take(places), embeds=embeds[self._rows[places]])
        return local, self._logits[:, places]
