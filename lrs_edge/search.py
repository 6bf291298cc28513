"""The coarse-to-fine search: which tiles are looked at, which tokens reach the language model.

Two policies over the same parts. `full` is what the paper describes: level after level down to the
original resolution, or until a budget ends it, each level bounded. `reference` is what the authors'
released code does, bug for bug: the base level, one finer level, the second pass dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lrs_edge.answer import SearchEnd
from lrs_edge.budget import Clock
from lrs_edge.cache import KVCache, TokenKind
from lrs_edge.errors import OutOfMemoryError, UsageError
from lrs_edge.options import AskOptions
from lrs_edge.pyramid import Level, Pyramid, TileIndex, TokenGrid, token_grid
from lrs_edge.rfm import RegionFocus, dense_bias, token_scores
from lrs_edge.search_result import LevelPass, SearchResult
from lrs_edge.selection import (
    best_tiles,
    kept_indices,
    reference_tiles,
    tile_scores,
    top_indices,
    trim_to_budget,
)
from lrs_edge.sequence import (
    LocalTokens,
    build_suffix,
    concatenate,
    pad_dense,
    place_local,
)
from lrs_edge.sequence import Sequence as TokenSequence
from lrs_edge.tiles import TileSession


@dataclass(frozen=True)
class SearchModel:
    """What the search needs to know of a model.

    Attributes:
        focus: The RFM.
        newline: float32 [D], the embedding that ends a row of local tokens.
        per_tile: Local tokens along a tile's side.
        tile: Tile side in pixels.
        base_side: Long side of the base level in pixels.
        keep_ratio: Share of local tokens kept at every level.
        max_length: Longest sequence given to the language model.
        max_positions: Longest sequence whose positions the RFM was made for.
    """

    focus: RegionFocus
    newline: NDArray[np.float32]
    per_tile: int
    tile: int
    base_side: int
    keep_ratio: float
    max_length: int
    max_positions: int

    @property
    def trained_rows(self) -> int:
        """Token rows that the finer of two levels can have: the RFM is trained on as many."""
        return (2 * self.base_side // self.tile + 1) * self.per_tile

    @property
    def trained_span(self) -> int:
        """Positions that the finer of two levels can take up."""
        return self.trained_rows * (self.trained_rows + 1)


#: A level with more token rows than this many times the trained ones has newlines only where a
#: tile is shown, so that upright strips of any length stay cheap.
MAX_ROWS_SHARE = 4

#: Told before a level is searched: its index and the tiles it will look at.
OnLevel = Callable[[int, int], None]


class Search:
    """One search for one question on one image.

    Args:
        model: The model's parts.
        pyramid: Levels of the image under the policy.
        tiles: Gives tokens of tiles.
        cache: The RFM's cache; its prefix is reused between levels and questions.
        prefix: Text before the image, global view, separator.
        after: float32 [a, D], embeddings of the text after the image.
        options: Policy and budgets.
        clock: Deadline.
        on_level: Progress.
        traced: Also compute what only traces show.
    """

    def __init__(
        self,
        model: SearchModel,
        pyramid: Pyramid,
        tiles: TileSession,
        cache: KVCache,
        prefix: TokenSequence,
        after: NDArray[np.float32],
        options: AskOptions,
        clock: Clock,
        on_level: OnLevel,
        *,
        traced: bool = False,
    ) -> None:
        self._model = model
        self._pyramid = pyramid
        self._tiles = tiles
        self._cache = cache
        self._prefix = prefix
        self._after = after
        self._options = options
        self._clock = clock
        self._on_level = on_level
        self._traced = traced

    def run(self) -> SearchResult:
        """Search, and choose the tokens for the language model.

        Raises:
            UsageError: The prompt alone is longer than the model can take.
            ImageError: A tile cannot be read.
            BackendError: An engine fails.
        """
        room = self._model.max_length - len(self._prefix) - len(self._after)
        reference = self._options.policy == "reference"
        if room < 0 and not reference:
            raise UsageError(
                f"the question has {len(self._after)} tokens; with the global view the model can "
                f"take {self._model.max_length - len(self._prefix)}; ask a shorter question"
            )
        with self._clock.stage("prefix"):
            self._model.focus.fill_prefix(self._cache, self._prefix.embeds, self._prefix.tokens)
        result = self._reference() if reference else self._full()
        # Over the model's length the reference cuts the end of the prompt; the request does that.
        if not reference:
            self._trim(result, room, "the model's length")
        if self._options.max_vision_tokens is not None:
            fixed = self._fixed_vision_tokens()
            if fixed > self._options.max_vision_tokens:
                result.warnings.append(
                    f"the {fixed} tokens of the global view and its separator are always sent, "
                    "more than --max-vision-tokens"
                )
            local = max(self._options.max_vision_tokens - fixed, 0)
            self._trim(result, local, "--max-vision-tokens")
        return result

    def _fixed_vision_tokens(self) -> int:
        """Vision tokens that are always sent: the global view and the separator."""
        kinds = self._prefix.tokens["kind"]
        return int(np.isin(kinds, (TokenKind.GLOBAL, TokenKind.SEPARATOR)).sum())

    def _trim(self, result: SearchResult, budget: int, limit: str) -> None:
        final, wanted = result.final, len(result.final)
        if wanted <= budget:
            return
        rows = final.indices // result.passes[-1].grid.width
        stays = trim_to_budget(rows, result.final_scores, final.is_newline, budget)
        result.final = final.take(np.flatnonzero(stays))
        result.final_scores = result.final_scores[stays]
        if result.end == "finest_level":
            result.end = "max_vision_tokens"
        result.warnings.append(
            f"only {budget} of {wanted} kept local tokens fit {limit}; the lowest-scored were left "
            "out"
        )

    # -- policy `full` ---------------------------------------------------------------------------

    def _full(self) -> SearchResult:
        levels = self._pyramid.levels
        result = SearchResult([], self._nothing(), np.zeros(0, np.float32))
        tiles = self._base_tiles(result)
        for index, level in enumerate(levels):
            if not tiles:
                self._end(result, "max_tiles", index)
                break
            if index > 0 and self._clock.search_expired():
                self._end(result, "timeout", index)
                break
            try:
                scored = self._score_level(index, level, tiles)
            except OutOfMemoryError:
                if index == 0:
                    raise
                self._end(result, "memory", index)
                break
            if scored is None:
                self._end(result, "timeout", index)
                break
            result.passes.append(scored)
            if len(scored.tiles) < len(tiles):
                self._end(result, "timeout", index)
                break
            if index + 1 < len(levels):
                tiles = self._next_tiles(scored, levels[index + 1], index + 1, result)
        if result.passes:
            last = result.passes[-1]
            result.final, result.final_scores = last.kept_tokens, last.scores[last.kept]
        return result

    def _nothing(self) -> LocalTokens:
        base = self._pyramid.levels[0]
        grid = TokenGrid(0, 0, self._model.per_tile, base.tile_rows, base.tile_cols)
        return place_local(grid, {}, self._model.newline, 0)

    def _remaining(self) -> int | None:
        if self._options.max_tiles is None:
            return None
        return max(self._options.max_tiles - self._tiles.looked_at, 0)

    def _base_tiles(self, result: SearchResult) -> list[TileIndex]:
        """All tiles of the base level, or those under the best global tokens if not all may be."""
        base, remaining = self._pyramid.levels[0], self._remaining()
        if remaining is None or remaining >= base.tile_count:
            return base.tiles()
        self._end(result, "max_tiles", 0)
        if remaining == 0:
            return []
        suffix = build_suffix(self._after, len(self._prefix))
        with self._clock.stage("score"):
            logits = self._model.focus.logits(self._cache, suffix.embeds, suffix.tokens)
        scores = token_scores(logits[:, self._global_places()])
        view = self._pyramid.global_view
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

    def _global_places(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._prefix.tokens["kind"] == TokenKind.GLOBAL)

    def _next_tiles(
        self, scored: LevelPass, finer: Level, index: int, result: SearchResult
    ) -> list[TileIndex]:
        top = scored.top
        totals = tile_scores(
            scored.local.indices[top], scored.scores[top], scored.grid, scored.level, finer
        )
        count = self._options.tiles_per_level
        remaining = self._remaining()
        if remaining is not None:
            # Shared evenly over the levels to come, so that a small budget still reaches the
            # original resolution.
            share = -(-remaining // (len(self._pyramid.levels) - index))
            if share < min(count, int((totals > 0).sum())):
                self._end(result, "max_tiles", index)
            count = min(count, share)
        return best_tiles(totals, count)

    def _end(self, result: SearchResult, why: SearchEnd, index: int) -> None:
        if result.end == why:
            return
        result.end = why
        reasons = {
            "max_tiles": "the tile budget (--max-tiles) did not cover every tile that the search "
            "wanted to look at",
            "timeout": f"the search stopped at level {index} because its share of the time limit "
            "was used up",
            "memory": f"the search stopped before level {index} because memory ran out",
        }
        result.warnings.append(reasons[why])

    def _score_level(
        self, index: int, level: Level, tiles: Sequence[TileIndex]
    ) -> LevelPass | None:
        """Encode and score tiles of a level; None where the time ran out before all were read."""
        self._on_level(index, len(tiles))
        remembered = self._tiles.from_cache
        stop = self._clock.search_expired if index > 0 else self._clock.expired
        features = self._tiles.local_tokens(level, tiles, stop)
        if len(features) < len(tiles) and (index > 0 or not features):
            return None
        grid = token_grid(level, self._model.per_tile, self._aspect(index, level))
        local = place_local(
            grid, features, self._model.newline, index, close_gaps=self._is_beyond_training(grid)
        )
        shown = tuple(sorted(features))
        return self._score(index, level, grid, shown, self._tiles.from_cache - remembered, local)

    def _is_beyond_training(self, grid: TokenGrid) -> bool:
        """Whether a level's padded sequence, or its newlines alone, are far too long to compute."""
        length = len(self._prefix) + grid.count + len(self._after)
        trained = self._model.trained_span + len(self._prefix)
        too_long = length > max(self._model.max_positions, trained)
        return too_long or grid.rows > MAX_ROWS_SHARE * self._model.trained_rows

    def _aspect(self, index: int, level: Level) -> tuple[int, int]:
        """Whose aspect ratio cuts the padding off (algorithm.md, "Unpad and newlines")."""
        if index == 0:
            return self._pyramid.image_height, self._pyramid.image_width
        return level.height, level.width

    def _score(
        self,
        index: int,
        level: Level,
        grid: TokenGrid,
        tiles: tuple[TileIndex, ...],
        from_cache: int,
        local: LocalTokens,
    ) -> LevelPass:
        logits, global_logits = self._logits(local)
        quirk = self._options.policy == "reference"
        hidden = local.hidden if local.hidden.any() else None
        scores = token_scores(logits, hidden, reference_quirk=quirk)
        # In the reference newlines compete with the tokens of tiles, and may crowd them out.
        eligible = np.flatnonzero(~local.hidden if quirk else ~local.is_newline)
        count = int(self._model.keep_ratio * len(eligible))
        if not quirk:
            count = min(max(count, 1), len(eligible))
        top = eligible[top_indices(scores[eligible], count)]
        kept = kept_indices(top, np.flatnonzero(local.is_newline))
        return LevelPass(
            index, level, grid, tiles, from_cache, local, logits, scores, top, kept, global_logits
        )

    def _logits(self, local: LocalTokens) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits of the last prompt token to the local tokens [H, n] and the global view [H, T]."""
        start = len(self._prefix)
        suffix = build_suffix(self._after, start + local.span)
        new = concatenate(local.sequence(start + local.offsets), suffix)
        bias = None
        if local.hidden.any():
            hidden = np.concatenate([local.hidden, np.zeros(len(suffix), bool)])
            bias = dense_bias(start, hidden)
        with self._clock.stage("score"):
            logits = self._model.focus.logits(self._cache, new.embeds, new.tokens, bias)
        return logits[:, start : start + len(local)], logits[:, self._global_places()]

    # -- policy `reference` ----------------------------------------------------------------------

    def _reference(self) -> SearchResult:
        levels = self._pyramid.levels
        result = SearchResult([], self._nothing(), np.zeros(0, np.float32))
        base = self._reference_pass(0, 0, levels[0].tiles())
        result.passes.append(base)
        finer = len(levels) - 1
        chosen = reference_tiles(base.local.indices[base.kept], base.grid, levels[finer])
        second = None
        if len(base.tiles) == levels[0].tile_count and not self._clock.search_expired():
            second = self._reference_pass(1, finer, chosen)
        if second is not None and len(second.tiles) == len(chosen):
            result.passes.append(second)
        else:
            self._end(result, "timeout", 0 if second is None else 1)
        last = result.passes[-1]
        result.final, result.final_scores = last.kept_tokens, last.scores[last.kept]
        return result

    def _reference_pass(self, number: int, index: int, tiles: Sequence[TileIndex]) -> LevelPass:
        level = self._pyramid.levels[index]
        self._on_level(number, len(tiles))
        remembered = self._tiles.from_cache
        features = self._tiles.local_tokens(level, tiles, self._clock.expired)
        grid = token_grid(level, self._model.per_tile, self._aspect(number, level), min_cols=0)
        compact = place_local(grid, features, self._model.newline, number)
        local = pad_dense(compact, grid) if len(compact) < grid.count else compact
        from_cache = self._tiles.from_cache - remembered
        scored = self._score(index, level, grid, tuple(sorted(features)), from_cache, local)
        if self._traced and len(compact) < len(local):
            masked = np.zeros(len(local), np.float32)
            masked[compact.indices] = token_scores(self._logits(compact)[0])
            return replace(scored, masked_scores=masked)
        return scored
