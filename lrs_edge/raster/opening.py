"""From a path to a source that can be read: what is opened, refused, probed, and warned of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrs_edge.errors import ImageError
from lrs_edge.raster.claims import MAX_BLOCK_BYTES
from lrs_edge.raster.gdal_source import GdalSource
from lrs_edge.raster.pillow_source import check_progressive, decode_jpeg
from lrs_edge.raster.references import check_references
from lrs_edge.raster.source import (
    ImageHeader,
    MemorySource,
    Source,
    is_plain_jpeg,
    open_with_pillow,
)

#: From here on (pixels) a file without overviews or tiles is worth a warning.
_BIG = 50_000_000

#: Codecs that hold all of an image, decoded, from the first read on.
_WHOLE = {"WEBP", "JPEGXL", "AVIF", "HEIF"}


@dataclass(frozen=True)
class RasterLimits:
    """What is refused, and how much is kept in memory.

    Attributes:
        max_pixels: Height times width. The default admits 150,000 x 150,000.
        max_side: Height or width in pixels.
        max_bands: Bands in the file, shown or not.
        max_block_bytes: Memory for one block of the file; GDAL cannot decode a part of a block.
        in_memory_bytes: A file that only decodes from the start is decoded once and kept if its
            pixels take no more than this.
    """

    max_pixels: int = 25_000_000_000
    max_side: int = 1_000_000
    max_bands: int = 1000
    max_block_bytes: int = MAX_BLOCK_BYTES
    in_memory_bytes: int = 128 << 20


DEFAULT_LIMITS = RasterLimits()


def open_source(path: Path, limits: RasterLimits, page: int | None = None) -> Source:
    """The file opened with GDAL, or with Pillow where GDAL does not know the format.

    Args:
        path: A plain local file, from `gdal_env.local_file`.
        limits: What is refused.
        page: Which of a file's images, from 1; None for the largest.

    Raises:
        ImageError: It is not an image, is damaged, names what is not local, or exceeds a limit.
    """
    check_references(path)
    try:
        source: Source = GdalSource(path, limits.max_bands, page)
    except ImageError as error:
        if "not recognized" not in str(error):
            raise
        source = open_with_pillow(path, limits.in_memory_bytes)
    try:
        _check_size(path, source.header, limits)
    except ImageError:
        source.close()
        raise
    return source


def _check_size(path: Path, header: ImageHeader, limits: RasterLimits) -> None:
    size = f"{path} has {header.width}x{header.height} pixels"
    if max(header.width, header.height) > limits.max_side:
        raise ImageError(
            f"{size}; the longest side allowed is {limits.max_side}; cut it into parts"
        )
    if header.width * header.height > limits.max_pixels:
        raise ImageError(f"{size}; at most {limits.max_pixels} are allowed; cut it into parts")
    if header.driver == "AAIGrid" and path.stat().st_size < 2 * header.width * header.height - 1:
        raise ImageError(f"{size}, and the file is too small to hold them; get it again")
    if (
        header.driver in _WHOLE
        and header.nbytes(range(1, len(header.dtypes) + 1)) > limits.in_memory_bytes
    ):
        raise ImageError(
            f"{size} of {header.driver}, which can only be decoded as a whole; convert it to a "
            "Cloud-Optimized GeoTIFF (gdal_translate -of COG)"
        )
    if header.block_bytes > limits.max_block_bytes:
        rows, cols = header.block_shape
        raise ImageError(
            f"{path} is stored in blocks of {cols}x{rows} pixels, each too large for memory "
            f"({header.block_bytes >> 20} MiB); convert it with gdal_translate -of COG"
        )


def check_dtype(path: Path, header: ImageHeader, bands: Sequence[int]) -> np.dtype[Any]:
    """The common type of some bands (1-based).

    Raises:
        ImageError: A band does not hold real numbers.
    """
    for band in bands:
        name = header.dtypes[band - 1]
        if "complex" in name:
            raise ImageError(
                f"{path} has complex numbers in band {band}; convert them to amplitudes first"
            )
        try:
            known = np.dtype(name).kind in "buif"
        except TypeError:
            known = False
        if not known:
            raise ImageError(
                f"{path} has the unsupported type {name} in band {band}; convert it to a 16-bit "
                "or floating point image"
            )
    return header.dtype(bands)


def settle(
    path: Path, source: Source, bands: Sequence[int], limits: RasterLimits
) -> tuple[Source, list[str]]:
    """Decodes a sequential image that fits into memory, probes others, and warns of slow ones.

    Args:
        path: For messages.
        source: As it was opened.
        bands: Bands that will be read, 1-based.
        limits: How much may be kept in memory.

    Returns:
        The source to read from, and warnings.

    Raises:
        ImageError: The image cannot be decoded.
    """
    header = source.header
    if isinstance(source, MemorySource):
        return source, []
    check_progressive(path, header)
    if is_plain_jpeg(header):
        decoded = decode_jpeg(path, source, limits.in_memory_bytes)
        if decoded is not None:
            return decoded, []
    elif header.sequential and header.nbytes(bands) <= limits.in_memory_bytes:
        pixels = source.read(bands, header.full)
        return MemorySource(header, bands, pixels, source.bytes_read, source), []
    if not header.sequential:
        # The last block of a truncated file is missing.
        last = (header.width - 1, header.height - 1, header.width, header.height)
        source.read(bands, last)
    note = _slowness(header) if header.height * header.width >= _BIG else None
    return source, [f"{path.name} {note}; gdal_translate -of COG makes one"] if note else []


def _slowness(header: ImageHeader) -> str | None:
    """Why a big file is slow to read."""
    if header.sequential:
        return (
            f"is a large {header.driver} that only decodes from the start, again for every window:"
            " reading is slow, a tiled file with overviews is not"
        )
    if not header.overviews:
        return "is large without overviews: coarse levels read all of it, unlike a file with them"
    return (
        None if header.tiled else "is large and not tiled: reading is slower than from a tiled file"
    )
