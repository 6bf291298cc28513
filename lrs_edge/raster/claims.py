"""What decoding one block of a file would cost, by its header, before a decoder is given it.

GDAL asks for memory by the header's word. The blocks of an open image are checked in `opening.py`;
here are those that GDAL does not tell of: tiles of JPEG 2000, and of TIFFs that others name.
"""

from __future__ import annotations

import struct
from pathlib import Path

from lrs_edge.raster.tiff_tags import directories
from lrs_edge.raster.xml_scan import XmlRefusedError

#: Most bytes of one decoded block with all its bands.
MAX_BLOCK_BYTES = 64 << 20
#: Most samples, and code blocks, of one tile of JPEG 2000. OpenJPEG keeps a record of each code
#: block of a tile, and about two bytes per sample while it decodes a part.
MAX_TILE_SAMPLES = 100_000_000
MAX_CODE_BLOCKS = 500_000

_CODESTREAM = b"\xff\x4f\xff\x51"
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _PLANAR = 256, 257, 258, 259, 277, 284
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


def check_tiff_tiles(path: Path) -> None:
    """Refuses a TIFF with tiles that are too large, in any of its images.

    Raises:
        XmlRefusedError: It has such tiles.
    """
    for tags in directories(path):
        width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0)
        bands = tags.get(_SAMPLES, 1) if tags.get(_PLANAR, 1) == 1 else 1
        size = width * height * bands * max(tags.get(_BITS, 8), 8) // 8
        if size > MAX_BLOCK_BYTES:
            raise XmlRefusedError(
                f"is stored in blocks of {width}x{height} pixels, each too large for memory "
                f"({size >> 20} MiB, at most {MAX_BLOCK_BYTES >> 20}); convert it with "
                "gdal_translate -of COG"
            )


def check_jpeg2000_tiles(path: Path) -> None:
    """Refuses a JPEG 2000 with tiles that are too large (ISO/IEC 15444-1, A.5.1 and A.6.1).

    Raises:
        XmlRefusedError: It has such tiles.
    """
    head = _codestream(path)
    if len(head) < 42:
        return
    x1, y1, x0, y0, wide, high = struct.unpack_from(">6I", head, 8)
    bands = struct.unpack_from(">H", head, 40)[0]
    width, height = min(wide, max(x1 - x0, 0)), min(high, max(y1 - y0, 0))
    samples = width * height * bands
    blocks = samples // _code_block_samples(head)
    if samples > MAX_TILE_SAMPLES or blocks > MAX_CODE_BLOCKS:
        raise XmlRefusedError(
            f"is JPEG 2000 in tiles of {width}x{height} pixels and {bands} bands, each too large "
            f"to decode a part of (at most {MAX_TILE_SAMPLES // 1_000_000} million samples); "
            "convert it with gdal_translate -of COG on a machine with enough memory"
        )


def _code_block_samples(head: bytes) -> int:
    """Samples of a code block, from the default coding style."""
    at = head.find(b"\xff\x52")
    if at < 0 or at + 12 > len(head):
        return 4096
    return 1 << (min(head[at + 10], 8) + min(head[at + 11], 8) + 4)


def _codestream(path: Path) -> bytes:
    """The beginning of the codestream, after the boxes of a JP2 file."""
    with path.open("rb") as file:
        at, end = 0, path.stat().st_size
        if file.read(4) != _CODESTREAM:
            for _ in range(1000):
                file.seek(at)
                box = file.read(16)
                if len(box) < 8:
                    return b""
                length, kind = struct.unpack_from(">I4s", box)
                start = 8
                if length == 1 and len(box) == 16:
                    length, start = struct.unpack_from(">Q", box, 8)[0], 16
                if kind == b"jp2c":
                    at += start
                    break
                if length < start or at + length >= end:
                    return b""
                at += length
        file.seek(at)
        head = file.read(1 << 16)
    return head if head.startswith(_CODESTREAM) else b""
