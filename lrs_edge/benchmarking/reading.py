"""The read stage: tiles out of an image file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lrs_edge.benchmarking.floor import Work
from lrs_edge.benchmarking.measure import Measurement, Stopwatch, repeat
from lrs_edge.bundle.manifest import Manifest
from lrs_edge.pyramid.levels import Level, TileIndex, build_pyramid
from lrs_edge.raster.raster import Raster
from lrs_edge.search.context import spread

#: Working set of reading: an image is far larger than any cache.
_BEYOND_CACHES = 1 << 40


def measure_read(
    image: Path, manifest: Manifest, tiles: int, repetitions: int, *, warmup: bool
) -> Iterator[Measurement]:
    """Read tiles of the finest level and of the base level, each a row.

    The image is opened anew for every repetition, untimed, so that no decoded blocks are left in
    GDAL's memory from the one before.

    Args:
        image: The image.
        manifest: Says how large tiles and levels are.
        tiles: Most tiles of one repetition, spread evenly over the level.
        repetitions: How often.
        warmup: Whether one repetition goes before, untimed.

    Raises:
        ImageError: The image cannot be read.
    """
    with Raster.open(image) as raster:
        pyramid = build_pyramid(
            raster.height,
            raster.width,
            tile=manifest.vision.tile,
            base_side=manifest.search.base_side,
            stretched=manifest.vision.stretched,
        )
    numbers = [len(pyramid.levels) - 1, 0] if len(pyramid.levels) > 1 else [0]
    for number in numbers:
        level = pyramid.levels[number]
        yield _measure_level(image, number, level, tiles, repetitions, warmup=warmup)


def _measure_level(
    image: Path, number: int, level: Level, tiles: int, repetitions: int, *, warmup: bool
) -> Measurement:
    chosen = spread(level.tiles(), tiles)
    decoded = 0

    def once(watch: Stopwatch) -> None:
        nonlocal decoded
        with Raster.open(image) as raster:
            before = raster.bytes_read
            watch.time(lambda: _read(raster, level, chosen))
            decoded = raster.bytes_read - before

    timed = repeat(once, repetitions, warmup=warmup)
    return Measurement(
        stage="read",
        parameters=f"level {number}, {len(chosen)} of {level.tile_count} tiles",
        seconds=timed.seconds,
        unit="tile",
        units=len(chosen),
        rate_unit="MB/s" if decoded else "",
        rated=decoded / 1e6,
        # Nothing is taken out of a file that was decoded as a whole when it was opened.
        work=Work(0, decoded, _BEYOND_CACHES) if decoded else None,
        peak=timed.peak,
        growth=timed.growth,
        raster_bytes=decoded,
        reads=timed.reads,
    )


def _read(raster: Raster, level: Level, tiles: Sequence[TileIndex]) -> None:
    for tile in tiles:
        raster.read((level.height, level.width), level.tile_window(tile), "area")
