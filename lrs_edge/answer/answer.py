"""What a question returns: plain frozen dataclasses, ready for `report.py` or a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lrs_edge.engines.devices import StagePlace
from lrs_edge.pyramid.box import Box, PixelBox
from lrs_edge.requests.options import Prune, SearchMode

#: Closed ring of (x, y) points; (longitude, latitude) in WGS 84.
Ring = tuple[tuple[float, float], ...]

#: Polygons, each its exterior ring and then its holes: coordinates of a GeoJSON MultiPolygon.
Polygons = tuple[tuple[Ring, ...], ...]

#: Why an answer ended: a stop token or text, `max_tokens`, or the time limit.
FinishReason = Literal["stop", "length", "timeout"]

#: What ended the search before the finest level, if anything did.
SearchEnd = Literal["finest_level", "max_tiles", "max_vision_tokens", "timeout", "memory"]


@dataclass(frozen=True)
class Region:
    """One tile that the model looked at.

    Attributes:
        level: Search level, 0 for the base (coarsest).
        row: Tile row in its level.
        col: Tile column in its level.
        bounds: The tile's window in source pixels (x0, y0, x1, y1).
        peak: Window of the tile's highest-scored token in source pixels.
        score: Share of the level's attention that fell on the tile, 0..1.
        kept: At least one token of the tile was among the kept ones: at the last level those went
            to the language model, at coarser levels they chose tiles of the next.
        tokens_kept: How many.
        polygon: `bounds` as a closed ring in the image's CRS, None without georeference.
        polygon_wgs84: The same as one ring of (longitude, latitude), which steps from 180 to -180
            across the antimeridian; None where a part of it has no place in WGS 84.
        geometry_wgs84: The same as polygons that are cut at the antimeridian and closed at the
            poles; None as `polygon_wgs84`.
        centre_wgs84: Longitude and latitude of the centre of `bounds`, None without such a place.
    """

    level: int
    row: int
    col: int
    bounds: Box
    peak: Box
    score: float
    kept: bool
    tokens_kept: int
    polygon: Ring | None = None
    polygon_wgs84: Ring | None = None
    geometry_wgs84: Polygons | None = None
    centre_wgs84: tuple[float, float] | None = None


@dataclass(frozen=True)
class LevelReport:
    """One searched level: its size in pixels, its tiles, and how many of them were encoded."""

    level: int
    height: int
    width: int
    tile_rows: int
    tile_cols: int
    tiles_encoded: int
    tiles_from_cache: int
    tokens_scored: int
    tokens_kept: int


@dataclass(frozen=True)
class KeptTokens:
    """Where the kept tokens of one level lie, best score first; the best 4,096 at most.

    Attributes:
        level: Search level, 0 for the base (coarsest).
        bounds: What each token shows in source pixels (x0, y0, x1, y1).
        scores: Share of the level's attention that fell on each, 0..1.
    """

    level: int
    bounds: tuple[Box, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class TokenCounts:
    """Tokens at every step of one question.

    Attributes:
        seen: Vision tokens that encoding every tile of the searched levels would have given.
        encoded: Vision tokens of the tiles that were encoded (or found in the cache).
        scored: Local tokens that were scored (by the RFM, or by what `prune` names), newlines
            included, over all levels; 0 where all tokens were taken as they were.
        sent: Vision tokens in the sequence given to the language model: global view, separator,
            kept local tokens and newlines.
        text: Text tokens of the prompt.
        evicted: Vision tokens dropped from the KV cache under `kv_budget`.
        generated: Tokens generated, the stop token not counted.
    """

    seen: int
    encoded: int
    scored: int
    sent: int
    text: int
    evicted: int
    generated: int


@dataclass(frozen=True)
class SegmentReport:
    """Consecutive layers of the language model that saw the same tokens of the prompt.

    Attributes:
        first_layer: Index of the first layer, from 0.
        layers: How many there are.
        tokens: Tokens of the prompt in their KV cache.
        vision_tokens: How many of them are vision tokens; the rest is text and the separator.
    """

    first_layer: int
    layers: int
    tokens: int
    vision_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds spent per step; `total` also holds what lies between the steps.

    `read` is the time that encoding waited for tiles, which a thread reads beside it.
    """

    read: float
    encode: float
    score: float
    prefill: float
    decode: float
    total: float


@dataclass(frozen=True)
class ObjectReport:
    """One object that the bundle's detector found on the tiles looked at.

    Attributes:
        label: What it is.
        score: How sure the detector is, 0..1.
        bbox: Its box in pixels of the image.
        doubtful: Its score is below the label's threshold of sure ones.
    """

    label: str
    score: float
    bbox: PixelBox
    doubtful: bool


@dataclass(frozen=True)
class Answer:
    """The answer to one question, with its evidence.

    Attributes:
        text: The answer; what there was of it where `finish_reason` is `timeout`.
        question: The question as asked.
        finish_reason: Why the answer ended.
        search_end: Why the search ended; anything but `finest_level` is also among `warnings`.
        regions: Tiles looked at, finest level first, best score first.
        levels: The searched levels from coarse to fine.
        tokens: Token counts.
        timings: Seconds per step.
        peak_memory: Peak resident memory of the process in bytes, so far.
        warnings: One sentence each.
        token_ids: The generated tokens, the stop token not included.
        model: Name of the bundle.
        policy: `full` or `reference`.
        image_size: Width and height of the image in pixels.
        search: `pyramid` or `exhaustive`; neither is used where `prune` chooses no tiles.
        prune: How vision tokens were chosen, such as `rfm`.
        segments: Tokens per group of layers, where `prune` drops tokens inside the language model.
        confidence: Calibrated probability 0..1 that the answer is right (docs/confidence.md); None
            where the bundle has no calibration for it, or decoding was not greedy, or under the
            reference policy.
        margin: Of an answer that begins with yes or no: how much rather yes than no, in logits.
        log_probability: Mean natural log-probability of the generated tokens, None without any.
        least_log_probability: The least of them.
        objects: The 200 best objects at most, best score first, sure and doubtful ones; empty where
            the bundle has no detector (docs/bundles.md).
        stages: Where every stage ran.
        kept: Where the kept tokens of every level lie, coarse to fine, for drawing; not part of the
            JSON.
    """

    text: str
    question: str
    finish_reason: FinishReason
    search_end: SearchEnd
    regions: tuple[Region, ...]
    levels: tuple[LevelReport, ...]
    tokens: TokenCounts
    timings: Timings
    peak_memory: int
    warnings: tuple[str, ...]
    token_ids: tuple[int, ...]
    model: str
    policy: str
    image_size: tuple[int, int]
    search: SearchMode = "pyramid"
    prune: Prune = "rfm"
    segments: tuple[SegmentReport, ...] = ()
    confidence: float | None = None
    margin: float | None = None
    log_probability: float | None = None
    least_log_probability: float | None = None
    objects: tuple[ObjectReport, ...] = ()
    stages: tuple[StagePlace, ...] = ()
    kept: tuple[KeptTokens, ...] = ()


@dataclass(frozen=True)
class Progress:
    """A step of the search or of the answer, for progress displays.

    Attributes:
        stage: The step that happens now.
        level: Search level, or None outside the search.
        levels: Number of levels the search may visit.
        tiles_read: Tiles read from the image so far.
        tiles_encoded: Tiles encoded so far (the global view counts).
        tiles_total: Tiles this level will encode, with those of the levels before it.
    """

    stage: Literal["read", "encode", "score", "prefill", "decode"]
    level: int | None
    levels: int
    tiles_read: int
    tiles_encoded: int
    tiles_total: int
