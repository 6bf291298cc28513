"""What the search leaves as evidence: regions, level reports and token counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lrs_edge.answer.answer import (
    KeptTokens,
    LevelReport,
    ObjectReport,
    Region,
    SegmentReport,
    TokenCounts,
)
from lrs_edge.baselines.inside import VISION
from lrs_edge.baselines.segments import SegmentCaches
from lrs_edge.bundle.manifest import ObjectSpec, SegmentSpec
from lrs_edge.objects.detections import Detections
from lrs_edge.pyramid.box import Box
from lrs_edge.pyramid.levels import Level, LevelWindow, Pyramid, TileIndex
from lrs_edge.search.result import LevelPass, SearchResult

if TYPE_CHECKING:
    from lrs_edge.raster.georeference import Place

#: Where a pixel window lies; None without georeference.
ToPlace = Callable[[Box], "Place | None"]

#: Objects that an answer lists at most.
MOST_OBJECTS = 200

#: Kept tokens of a level whose places an answer has at most.
MOST_KEPT = 4096

#: Most tiles that are looked for a place before the model runs.
_MOST_LOOKED_UP = 1024


def regions(result: SearchResult, pyramid: Pyramid, to_place: ToPlace) -> tuple[Region, ...]:
    """Tiles looked at, finest level first, best score first."""
    flat: list[Region] = []
    for scored in reversed(result.passes):
        sent = result.final.indices if scored is result.passes[-1] else None
        flat += sorted(_regions(scored, pyramid, sent), key=lambda region: -region.score)
    return tuple(_located(region, to_place) for region in flat)


def _regions(
    scored: LevelPass, pyramid: Pyramid, sent: NDArray[np.int64] | None
) -> Iterator[Region]:
    """The tiles of one level, in their order; every token is looked at once.

    Args:
        scored: The level.
        pyramid: Of the image.
        sent: int64, the tokens given to the language model, None where all kept ones count.
    """
    local, level = scored.local, scored.level
    kept = np.zeros(len(local), bool)
    kept[scored.kept] = True
    if sent is not None:
        kept &= np.isin(local.indices, sent)
    # Newlines have row and column -1 and come before all tiles.
    owners = np.where(local.is_structure, -1, local.tile_rows * level.tile_cols + local.tile_cols)
    order = np.argsort(owners, kind="stable")
    numbers = np.array([tile.row * level.tile_cols + tile.col for tile in scored.tiles], np.int64)
    starts = np.searchsorted(owners[order], numbers, side="left")
    ends = np.searchsorted(owners[order], numbers, side="right")
    for tile, start, end in zip(scored.tiles, starts.tolist(), ends.tolist(), strict=True):
        places = order[start:end]
        bounds = peak = source_bounds(pyramid, level, level.tile_window(tile))
        scores = scored.scores[places]
        count = int(kept[places].sum())
        if len(places):
            best = places[[int(scores.argmax())]]
            (peak,) = _cell_bounds(pyramid, scored, local.cells[best])
        yield Region(
            level=local.level,
            row=tile.row,
            col=tile.col,
            bounds=bounds,
            peak=peak,
            score=float(scores.sum()),
            kept=count > 0,
            tokens_kept=count,
        )


def kept_tokens(result: SearchResult, pyramid: Pyramid) -> tuple[KeptTokens, ...]:
    """Where the kept tokens of every level lie, coarse to fine; of the last level those sent."""
    found = []
    for scored in result.passes:
        local, places = scored.local, scored.kept
        places = places[~local.is_structure[places]]
        if scored is result.passes[-1]:
            places = places[np.isin(local.indices[places], result.final.indices)]
        places = places[np.argsort(-scored.scores[places], kind="stable")][:MOST_KEPT]
        bounds = _cell_bounds(pyramid, scored, local.cells[places])
        found.append(KeptTokens(local.level, tuple(bounds), tuple(scored.scores[places].tolist())))
    return tuple(found)


def _cell_bounds(pyramid: Pyramid, scored: LevelPass, cells: NDArray[np.int64]) -> Iterator[Box]:
    """The parts of the source image that tokens of a level show, cut at the image's edge."""
    level, grid = scored.level, scored.grid
    rows, cols = np.divmod(cells, grid.width)
    # A tile's side need not be a multiple of its tokens.
    cell = level.tile / grid.per_tile
    across, down = pyramid.image_width / level.width, pyramid.image_height / level.height
    x0, x1 = (np.minimum((cols + end) * cell, level.width) * across for end in (0, 1))
    y0, y1 = (np.minimum((rows + end) * cell, level.height) * down for end in (0, 1))
    return zip(x0.tolist(), y0.tolist(), x1.tolist(), y1.tolist(), strict=True)


def source_bounds(pyramid: Pyramid, level: Level, window: LevelWindow) -> Box:
    """A window of a level as x0, y0, x1, y1 in pixels of the source image."""
    across, down = pyramid.image_width / level.width, pyramid.image_height / level.height
    return (
        window.col0 * across,
        window.row0 * down,
        (window.col0 + window.cols) * across,
        (window.row0 + window.rows) * down,
    )


def _located(region: Region, to_place: ToPlace) -> Region:
    place = to_place(region.bounds)
    if place is None:
        return region
    return replace(
        region,
        polygon=place.polygon,
        polygon_wgs84=place.polygon_wgs84,
        geometry_wgs84=place.geometry_wgs84,
        centre_wgs84=place.centre_wgs84,
    )


def unplaced_warning(found: tuple[Region, ...]) -> tuple[str, ...]:
    """One sentence where regions of a georeferenced image have no place in WGS 84."""
    georeferenced = [
        region
        for region in found
        # A tile that lies in the padding of its level has no area to place.
        if region.polygon is not None and _has_area(region.bounds)
    ]
    missing = sum(region.polygon_wgs84 is None for region in georeferenced)
    if not missing:
        return ()
    return (
        f"{missing} of {len(found)} regions have no polygon in WGS 84: all or a part of each lies "
        "where the image's CRS leads to no place on the earth",
    )


def _has_area(bounds: Box) -> bool:
    x0, y0, x1, y1 = bounds
    return x0 < x1 and y0 < y1


def can_be_placed(pyramid: Pyramid, to_place: ToPlace) -> bool:
    """Whether a tile that a search may look at has a polygon in WGS 84.

    Tiles are tried from the coarsest level on; True where there are too many to try.
    """
    tried = 0
    for level in pyramid.levels:
        for row in range(level.tile_rows):
            for col in range(level.tile_cols):
                if tried >= _MOST_LOOKED_UP:
                    return True
                tried += 1
                window = level.tile_window(TileIndex(row, col))
                place = to_place(source_bounds(pyramid, level, window))
                if place is not None and place.polygon_wgs84 is not None:
                    return True
    return False


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


def object_reports(
    found: Detections, spec: ObjectSpec, width: int, height: int
) -> tuple[ObjectReport, ...]:
    """The best objects found.

    Args:
        found: Merged objects, best first.
        spec: Labels and thresholds.
        width: Of the image in pixels.
        height: Of the image in pixels.
    """
    best = found.take(np.arange(min(len(found), MOST_OBJECTS)))
    boxes = np.rint(best.boxes.astype(np.float64) * (width, height, width, height)).astype(int)
    return tuple(
        ObjectReport(
            label=spec.labels[label],
            score=float(score),
            bbox=(x0, y0, x1, y1),
            # As `lrs_edge.objects.describe` compares them.
            doubtful=bool(score < np.float32(spec.thresholds[label][1])),
        )
        for label, score, (x0, y0, x1, y1) in zip(
            best.labels.tolist(), best.scores, boxes.tolist(), strict=True
        )
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
