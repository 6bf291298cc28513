"""What the search leaves as evidence: regions, level reports and token counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lrs_edge.answer import Bounds, LevelReport, Region, Ring, SegmentReport, TokenCounts
from lrs_edge.manifest import SegmentSpec
from lrs_edge.pruning.inside import VISION
from lrs_edge.pyramid import Level, LevelWindow, Pyramid, TileIndex
from lrs_edge.search_result import LevelPass, SearchResult
from lrs_edge.segments import SegmentCaches

#: Closed rings in the image's CRS and in WGS 84 of a pixel window, None without georeference.
ToPolygon = Callable[[Bounds], tuple[Ring, Ring] | None]


def regions(result: SearchResult, pyramid: Pyramid, to_polygon: ToPolygon) -> tuple[Region, ...]:
    """Tiles looked at, finest level first, best score first."""
    found = []
    last = result.passes[-1] if result.passes else None
    for scored in result.passes:
        sent = result.final.indices if scored is last else None
        ordered = [_region(scored, tile, pyramid, sent) for tile in scored.tiles]
        ordered.sort(key=lambda region: -region.score)
        found.append(ordered)
    flat = [region for level in reversed(found) for region in level]
    return tuple(_located(region, to_polygon) for region in flat)


def _region(
    scored: LevelPass, tile: TileIndex, pyramid: Pyramid, sent: np.ndarray | None
) -> Region:
    local = scored.local
    places = np.flatnonzero((local.tile_rows == tile.row) & (local.tile_cols == tile.col))
    bounds = source_bounds(pyramid, scored.level, scored.level.tile_window(tile))
    scores = scored.scores[places]
    kept = np.intersect1d(local.indices[places], local.indices[scored.kept])
    if sent is not None:
        kept = np.intersect1d(kept, sent)
    peak = bounds
    if len(places):
        best = int(local.indices[places[int(np.argmax(scores))]])
        peak = _cell_bounds(pyramid, scored, best)
    return Region(
        level=scored.local.level,
        row=tile.row,
        col=tile.col,
        bounds=bounds,
        peak=peak,
        score=float(scores.sum()),
        kept=len(kept) > 0,
        tokens_kept=len(kept),
    )


def _cell_bounds(pyramid: Pyramid, scored: LevelPass, index: int) -> Bounds:
    level, grid = scored.level, scored.grid
    row, col = divmod(index, grid.width)
    cell = level.tile // grid.per_tile
    rows = min(cell, level.height - row * cell)
    cols = min(cell, level.width - col * cell)
    return source_bounds(
        pyramid, level, LevelWindow(row * cell, col * cell, max(rows, 0), max(cols, 0))
    )


def source_bounds(pyramid: Pyramid, level: Level, window: LevelWindow) -> Bounds:
    """A window of a level as x0, y0, x1, y1 in pixels of the source image."""
    across, down = pyramid.image_width / level.width, pyramid.image_height / level.height
    return (
        window.col0 * across,
        window.row0 * down,
        (window.col0 + window.cols) * across,
        (window.row0 + window.rows) * down,
    )


def _located(region: Region, to_polygon: ToPolygon) -> Region:
    rings = to_polygon(region.bounds)
    if rings is None:
        return region
    return replace(region, polygon=rings[0], polygon_wgs84=rings[1])


def level_reports(result: SearchResult) -> tuple[LevelReport, ...]:
    """The searched levels from coarse to fine."""
    return tuple(
        LevelReport(
            level=scored.local.level,
            height=scored.level.height,
            width=scored.level.width,
            tile_rows=scored.level.tile_rows,
            tile_cols=scored.level.tile_cols,
            tiles_encoded=len(scored.tiles) - scored.from_cache,
            tiles_from_cache=scored.from_cache,
            tokens_scored=scored.tokens_scored,
            tokens_kept=len(scored.kept),
        )
        for scored in result.passes
    )


def segment_reports(
    segments: tuple[SegmentSpec, ...], caches: SegmentCaches
) -> tuple[SegmentReport, ...]:
    """What each segment of the language model holds of the prompt.

    Args:
        segments: The segments.
        caches: Their caches after prefill.
    """
    return tuple(
        SegmentReport(
            first_layer=segment.first_layer,
            layers=segment.layers,
            tokens=len(tokens),
            vision_tokens=int(np.isin(tokens["kind"], VISION).sum()),
        )
        for segment, tokens in zip(segments, caches.tokens, strict=True)
    )


def token_counts(
    result: SearchResult,
    *,
    global_tokens: int,
    local_per_tile: int,
    sent: int,
    text: int,
    evicted: int,
    generated: int,
) -> TokenCounts:
    """Token counts of one question.

    Args:
        result: The search.
        global_tokens: Tokens of the global view.
        local_per_tile: Local tokens of one tile.
        sent: Vision tokens in the sequence given to the language model.
        text: Text tokens in it.
        evicted: Dropped from the KV cache.
        generated: Tokens of the answer.
    """
    every = sum(scored.level.tile_count for scored in result.passes)
    looked_at = sum(len(scored.tiles) for scored in result.passes)
    return TokenCounts(
        seen=global_tokens + every * local_per_tile,
        encoded=global_tokens + looked_at * local_per_tile,
        scored=sum(scored.tokens_scored for scored in result.passes),
        sent=sent,
        text=text,
        evicted=evicted,
        generated=generated,
    )
