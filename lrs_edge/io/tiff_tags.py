"""Reads one tag of a TIFF: the XML in which GDAL keeps metadata, before GDAL parses it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lrs_edge.io.xml_scan import MAX_BYTES, XmlRefusedError

#: TIFF tag of GDAL's metadata, ASCII: https://gdal.org/drivers/raster/gtiff.html
_GDAL_METADATA = 42112
_MAX_DIRECTORIES = 1024
_MAX_ENTRIES = 4096


def is_tiff(start: bytes) -> bool:
    """Whether a file that begins so is a TIFF or BigTIFF."""
    return start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def gdal_metadata(path: Path) -> list[bytes]:
    """The XML of every image directory; nothing where the file is damaged, for GDAL to find.

    Raises:
        XmlRefusedError: It is too large.
    """
    texts: list[bytes] = []
    try:
        with path.open("rb") as file:
            for count, offset in _metadata_places(file):
                if count > MAX_BYTES:
                    raise XmlRefusedError(
                        f"has {count >> 20} MiB of metadata, more than {MAX_BYTES >> 20}; write it "
                        "again with gdal_translate"
                    )
                file.seek(offset)
                text = file.read(count).split(b"\0")[0].strip()
                if text and text not in texts:
                    texts.append(text)
    except (OSError, struct.error, OverflowError):
        pass
    return texts


def _metadata_places(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Length and offset of the tag's text in each directory."""
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    word, length, entry = ("Q", 8, 20) if big else ("I", 4, 12)
    at = struct.unpack_from(order + word, head, 8 if big else 4)[0]
    seen: set[int] = set()
    while at and at not in seen and len(seen) < _MAX_DIRECTORIES:
        seen.add(at)
        file.seek(at)
        counter = "Q" if big else "H"
        entries = struct.unpack(order + counter, file.read(struct.calcsize(counter)))[0]
        if entries > _MAX_ENTRIES:
            return
        table = file.read(entries * entry)
        behind = file.read(length)
        for start in range(0, len(table) - entry + 1, entry):
            tag = struct.unpack_from(order + "H", table, start)[0]
            if tag == _GDAL_METADATA:
                count = struct.unpack_from(order + word, table, start + 4)[0]
                # Bytes and ASCII alike; short texts stand in the entry itself.
                place = at + struct.calcsize(counter) + start + 4 + length
                if count > length:
                    place = struct.unpack_from(order + word, table, start + 4 + length)[0]
                yield count, place
        at = struct.unpack(order + word, behind)[0] if len(behind) == length else 0
