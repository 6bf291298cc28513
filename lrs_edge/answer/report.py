"""Answers as JSON, GeoJSON and text. Knows `answer.py`, neither engines nor terminals.

The structs below are the output's schema: `docs/answer.schema.json` is generated from them. Fields
may be added under the same `SCHEMA_VERSION`; one that goes away or changes its meaning needs a new
one.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from lrs_edge.answer.answer import (
    Answer,
    FinishReason,
    LevelReport,
    ObjectReport,
    Polygons,
    Region,
    Ring,
    SearchEnd,
    SegmentReport,
    Timings,
    TokenCounts,
)
from lrs_edge.answer.confidence import UNSURE, is_unsure
from lrs_edge.errors import UsageError
from lrs_edge.requests.options import SCORING, Prune, SearchMode

SCHEMA_NAME: Final = "lrs-edge/answer"
SCHEMA_VERSION: Final = 2

#: Regions listed by `evidence`.
BEST_REGIONS = 5

#: Digits after the point: about a millimetre in degrees, a millionth of the attention in scores.
_DEGREE_DIGITS = 8
_SCORE_DIGITS = 6

Window = Annotated[
    tuple[float, float, float, float],
    Meta(description="x0, y0, x1, y1 in pixels of the image, from its top left corner"),
]
Polygon = Annotated[Ring, Meta(description="closed ring of [x, y] positions")]


class PolygonGeometry(msgspec.Struct, frozen=True, tag_field="type", tag="Polygon"):
    """GeoJSON geometry of a region in one piece."""

    coordinates: Annotated[tuple[Polygon, ...], Meta(description="exterior ring, then holes")]


class MultiPolygonGeometry(msgspec.Struct, frozen=True, tag_field="type", tag="MultiPolygon"):
    """GeoJSON geometry of a region that was cut at the antimeridian."""

    coordinates: Annotated[
        tuple[tuple[Polygon, ...], ...], Meta(description="of each piece, as in a Polygon")
    ]


Geometry = PolygonGeometry | MultiPolygonGeometry


class ImageFacts(msgspec.Struct, frozen=True):
    """The image that was asked about."""

    path: Annotated[str, Meta(description="as the user named it")]
    width: Annotated[int, Meta(description="columns in pixels", ge=1)]
    height: Annotated[int, Meta(description="rows in pixels", ge=1)]
    crs: Annotated[
        str | None, Meta(description="EPSG:n, or WKT where there is no code; null without")
    ] = None
    gsd: Annotated[float | None, Meta(description="metres per pixel at the image's centre")] = None


class RegionRecord(msgspec.Struct, frozen=True):
    """One tile that the model looked at."""

    level: Annotated[int, Meta(description="search level, 0 is the coarsest", ge=0)]
    row: Annotated[int, Meta(description="tile row in its level", ge=0)]
    col: Annotated[int, Meta(description="tile column in its level", ge=0)]
    window: Window
    peak: Annotated[Window, Meta(description="window of the tile's highest-scored token")]
    score: Annotated[
        float, Meta(description="share of the level's attention that fell on the tile", ge=0, le=1)
    ]
    kept: Annotated[
        bool, Meta(description="a token of the tile was among the level's best, see docs/answer.md")
    ]
    tokens_kept: Annotated[int, Meta(description="how many tokens were", ge=0)]
    polygon: Annotated[Polygon | None, Meta(description="the window in the image's CRS")]
    polygon_wgs84: Annotated[
        Polygon | None,
        Meta(
            description="the window as [longitude, latitude], counter-clockwise; steps from 180 to "
            "-180 across the antimeridian; null where a part of it has no place in WGS 84"
        ),
    ]
    geometry_wgs84: Annotated[
        Geometry | None,
        Meta(
            description="the window as GeoJSON geometry, cut at the antimeridian and closed at the "
            "poles; null as polygon_wgs84"
        ),
    ] = None
    centre_wgs84: Annotated[
        tuple[float, float] | None,
        Meta(
            description="longitude and latitude of the window's centre, null without such a place"
        ),
    ] = None


class ObjectRecord(msgspec.Struct, frozen=True):
    """One object that the bundle's detector found on the tiles looked at."""

    label: Annotated[str, Meta(description="what it is")]
    score: Annotated[float, Meta(description="how sure the detector is", ge=0, le=1)]
    bbox: Annotated[
        tuple[int, int, int, int],
        Meta(description="x0, y0, x1, y1 in pixels of the image, from its top left corner"),
    ]
    doubtful: Annotated[bool, Meta(description="below the label's threshold of sure ones")]


class StageRecord(msgspec.Struct, frozen=True):
    """Where one stage of the model ran."""

    stage: Literal["vision", "rfm", "llm"]
    engine: Annotated[str, Meta(description="such as onnxruntime")]
    device: Annotated[str, Meta(description="such as cpu, as --device names it")]
    nodes: Annotated[
        dict[str, int],
        Meta(description="nodes of its graphs by what ran them; empty where that is not told"),
    ]


class AnswerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of `lrs-edge ask --format json`."""

    schema: Literal["lrs-edge/answer"]
    schema_version: Literal[2]
    question: str
    answer: Annotated[str, Meta(description="partial where finish_reason is timeout")]
    finish_reason: Annotated[FinishReason, Meta(description="why the answer ended")]
    search_end: Annotated[SearchEnd, Meta(description="why the search ended")]
    image: ImageFacts
    model: Annotated[str, Meta(description="name of the bundle")]
    policy: Literal["full", "reference"]
    search: Annotated[
        SearchMode, Meta(description="used where prune scores tokens: rfm, random, norm")
    ]
    prune: Annotated[Prune, Meta(description="how vision tokens were chosen, see docs/pruning.md")]
    regions: Annotated[list[RegionRecord], Meta(description="finest level first, best score first")]
    levels: Annotated[list[LevelReport], Meta(description="searched levels, coarse to fine")]
    tokens: TokenCounts
    segments: Annotated[
        list[SegmentReport],
        Meta(description="tokens per group of layers, for fastv and pdrop; else empty"),
    ]
    objects: Annotated[
        list[ObjectRecord],
        Meta(description="the best 200 found, best score first; empty without a detector"),
    ]
    stages: Annotated[
        list[StageRecord],
        Meta(description="where every stage of the model ran"),
    ]
    timings: Timings
    peak_memory_bytes: Annotated[
        int, Meta(description="peak resident memory of the process so far", ge=0)
    ]
    warnings: Annotated[list[str], Meta(description="one sentence each")]
    confidence: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | UnsetType,
        Meta(description="calibrated probability that the answer is right; left out without one"),
    ] = UNSET


def record(answer: Answer, image: ImageFacts) -> AnswerRecord:
    """The answer as it is written to JSON."""
    return AnswerRecord(
        schema=SCHEMA_NAME,
        schema_version=SCHEMA_VERSION,
        question=answer.question,
        answer=answer.text,
        finish_reason=answer.finish_reason,
        search_end=answer.search_end,
        image=image,
        model=answer.model,
        policy="reference" if answer.policy == "reference" else "full",
        search=answer.search,
        prune=answer.prune,
        regions=[_region(region) for region in answer.regions],
        levels=list(answer.levels),
        tokens=answer.tokens,
        segments=list(answer.segments),
        objects=[_object(found) for found in answer.objects],
        stages=[
            StageRecord(place.stage, place.engine, place.device, dict(place.nodes))
            for place in answer.stages
        ],
        timings=_rounded_timings(answer.timings),
        peak_memory_bytes=answer.peak_memory,
        warnings=list(answer.warnings),
        confidence=UNSET if answer.confidence is None else round(answer.confidence, 4),
    )


def _region(region: Region) -> RegionRecord:
    return RegionRecord(
        level=region.level,
        row=region.row,
        col=region.col,
        window=region.bounds,
        peak=region.peak,
        score=round(region.score, _SCORE_DIGITS),
        kept=region.kept,
        tokens_kept=region.tokens_kept,
        polygon=_rounded(region.polygon),
        polygon_wgs84=_rounded(region.polygon_wgs84),
        geometry_wgs84=None if region.geometry_wgs84 is None else geometry(region.geometry_wgs84),
        centre_wgs84=None if region.centre_wgs84 is None else _rounded_point(region.centre_wgs84),
    )


def _object(found: ObjectReport) -> ObjectRecord:
    score = round(found.score, _SCORE_DIGITS)
    return ObjectRecord(found.label, score, found.bbox, found.doubtful)


def _rounded_timings(timings: Timings) -> Timings:
    return Timings(**{step: round(value, 4) for step, value in asdict(timings).items()})


def _rounded(ring: Ring | None) -> Ring | None:
    if ring is None:
        return None
    return tuple(_rounded_point(point) for point in ring)


def _rounded_point(point: tuple[float, float]) -> tuple[float, float]:
    return round(point[0], _DEGREE_DIGITS), round(point[1], _DEGREE_DIGITS)


def to_json(answer: Answer, image: ImageFacts) -> str:
    """One JSON object on one line, as `docs/answer.schema.json` describes it."""
    return msgspec.json.encode(record(answer, image)).decode() + "\n"


def json_schema() -> str:
    """JSON Schema (draft 2020-12) of `to_json`'s output."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{SCHEMA_NAME}/{SCHEMA_VERSION}",
        "title": "Answer of lrs-edge",
        **msgspec.json.schema(AnswerRecord),
    }
    return json.dumps(schema, indent=2) + "\n"


def to_geojson(answer: Answer, image: ImageFacts) -> str:
    """`feature_collection` as JSON on one line. Raises UsageError as it does."""
    return msgspec.json.encode(feature_collection(answer, image)).decode() + "\n"


def feature_collection(answer: Answer, image: ImageFacts) -> dict[str, Any]:
    """A GeoJSON FeatureCollection (RFC 7946): the regions in WGS 84, the rest as foreign members.

    Regions without a place in WGS 84 are not features; `warnings` counts them.

    Raises:
        UsageError: The image is not georeferenced.
    """
    if image.crs is None:
        raise UsageError(no_geojson(image.path, "it is not georeferenced"))
    features = [_feature(region) for region in answer.regions if region.geometry_wgs84 is not None]
    members = msgspec.to_builtins(record(answer, image))
    del members["regions"]
    return {"type": "FeatureCollection", "features": features, **members}


def no_geojson(path: str, reason: str) -> str:
    """What to tell a user who asks for GeoJSON of an image without a place in WGS 84."""
    return f"there is no GeoJSON of {path}: {reason}; use --format json"


def _feature(region: Region) -> dict[str, Any]:
    properties = msgspec.to_builtins(_region(region))
    shape = properties.pop("geometry_wgs84")
    del properties["polygon"], properties["polygon_wgs84"]
    return {
        "type": "Feature",
        "id": f"{region.level}/{region.row}/{region.col}",
        "geometry": shape,
        "properties": properties,
    }


def geometry(parts: Polygons) -> Geometry:
    """GeoJSON geometry of polygons as `footprint.polygons` gives them."""
    if len(parts) == 1:
        return PolygonGeometry(parts[0])
    return MultiPolygonGeometry(parts)


_CUT = {"timeout": "the time limit was over", "length": "--max-tokens was reached"}


def evidence(answer: Answer) -> str:
    """A few lines for a reader: where the model looked, what it cost, what to know."""
    width, height = answer.image_size
    best = best_regions(answer)
    lines = [
        f"Looked at {_count(len(answer.regions), 'tile')} on {_count(len(answer.levels), 'level')} "
        f"of {width} x {height} pixels ({_way(answer)}, model {answer.model})."
        + (" Best:" if best else "")
    ]
    lines += [_region_line(region) for region in best]
    lines += [_token_line(answer.tokens)]
    if answer.segments:
        lines.append(_segment_line(answer))
    if answer.confidence is not None:
        word = f" ({UNSURE})" if is_unsure(answer.confidence) else ""
        lines.append(f"Confidence: {100 * answer.confidence:.0f} %{word}")
    lines.append(_time_line(answer))
    if answer.finish_reason in _CUT:
        lines.append(f"The answer was cut: {_CUT[answer.finish_reason]}.")
    lines += [f"Warning: {warning}" for warning in answer.warnings]
    return "\n".join(lines) + "\n"


def mark(answer: Answer) -> str:
    """What the text output puts behind an answer: one word in brackets where it is unsure."""
    if not is_unsure(answer.confidence):
        return ""
    return f" ({UNSURE})" if answer.text else f"({UNSURE})"


def _way(answer: Answer) -> str:
    """How was searched and pruned; the usual way is not mentioned."""
    if answer.prune not in SCORING:
        return f"no search, --prune {answer.prune}"
    search = answer.policy if answer.search == "pyramid" else answer.search
    return f"{search} search" + ("" if answer.prune == "rfm" else f", --prune {answer.prune}")


def best_regions(answer: Answer, count: int = BEST_REGIONS) -> list[Region]:
    """The first regions that were kept: finest level first, best score first."""
    return [region for region in answer.regions if region.kept][:count]


def _region_line(region: Region) -> str:
    x0, y0, x1, y1 = (round(value) for value in region.bounds)
    line = (
        f"  level {region.level}  x {x0:>6}..{x1:<6} y {y0:>6}..{y1:<6} "
        f"score {region.score:.3f}  {_count(region.tokens_kept, 'token')} kept"
    )
    if region.centre_wgs84 is not None:
        line += "  at {1:.6f}, {0:.6f} (lat, lon)".format(*region.centre_wgs84)
    return line


def _token_line(tokens: TokenCounts) -> str:
    evicted = f", {tokens.evicted} evicted" if tokens.evicted else ""
    return (
        f"Tokens: {tokens.seen} in all tiles, {tokens.encoded} encoded, {tokens.scored} scored, "
        f"{tokens.sent} sent with {tokens.text} of text{evicted}, {tokens.generated} generated"
    )


def _segment_line(answer: Answer) -> str:
    parts = [
        f"{segment.tokens} in layers {segment.first_layer}"
        f"..{segment.first_layer + segment.layers - 1}"
        for segment in answer.segments
    ]
    return f"Prompt tokens of the language model: {', '.join(parts)}"


def _time_line(answer: Answer) -> str:
    times = answer.timings
    return (
        f"Time: {times.total:.2f} s (read {times.read:.2f}, encode {times.encode:.2f}, "
        f"score {times.score:.2f}, prefill {times.prefill:.2f}, decode {times.decode:.2f}); "
        f"peak memory {answer.peak_memory / 1e6:.0f} MB"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
