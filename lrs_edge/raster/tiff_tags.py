"""Reads a few tags of a TIFF before GDAL does: GDAL's own metadata, and sizes of tiles."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lrs_edge.raster.xml_scan import MAX_BYTES, XmlRefusedError

#: TIFF tag of GDAL's metadata, ASCII: https://gdal.org/drivers/raster/gtiff.html
_GDAL_METADATA = 42112
_BITS_PER_SAMPLE = 258
_MAX_DIRECTORIES = 1024
_MAX_ENTRIES = 4096
#: Types of numbers that are read, and bytes per value of the types that matter.
_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 12: 8, 16: 8}


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


def directories(path: Path) -> list[dict[int, int]]:
    """The first number of every tag of every image directory; 0 for texts. Damage ends the list."""
    try:
        with path.open("rb") as file:
            return [{tag: entry.number for tag, entry in each.items()} for each in _walk(file)]
    except (OSError, struct.error, OverflowError):
        return []


def _metadata_places(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Length and offset of the tag's text in each directory."""
    for entries in _walk(file):
        if _GDAL_METADATA in entries:
            entry = entries[_GDAL_METADATA]
            yield entry.values, entry.place


class _Entry(NamedTuple):
    """One tag: how many values, where they stand, and the first where it is a short or long."""

    values: int
    place: int
    number: int


def _walk(file: BinaryIO) -> Iterator[dict[int, _Entry]]:
    """The entries of each directory of the file's chain."""
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    word, length, size = ("Q", 8, 20) if big else ("I", 4, 12)
    counter = "Q" if big else "H"
    at = struct.unpack_from(order + word, head, 8 if big else 4)[0]
    seen: set[int] = set()
    while at and at not in seen and len(seen) < _MAX_DIRECTORIES:
        seen.add(at)
        file.seek(at)
        count = struct.unpack(order + counter, file.read(struct.calcsize(counter)))[0]
        if count > _MAX_ENTRIES:
            return
        table, link = file.read(count * size), file.read(length)
        found = {}
        for start in range(0, len(table) - size + 1, size):
            tag, kind = struct.unpack_from(order + "HH", table, start)
            values = struct.unpack_from(order + word, table, start + 4)[0]
            inline = start + 4 + length
            wide = values * _SIZES.get(kind, 1)
            # Short values stand in the entry itself.
            place = at + struct.calcsize(counter) + inline
            if wide > length:
                place = struct.unpack_from(order + word, table, inline)[0]
            number = 0
            if kind in _NUMBERS:
                number = struct.unpack_from(order + _NUMBERS[kind], table, inline)[0]
                if wide > length and tag == _BITS_PER_SAMPLE:
                    after = file.tell()
                    file.seek(place)
                    data = file.read(_SIZES[kind])
                    number = struct.unpack(order + _NUMBERS[kind], data)[0] if data else 0
                    file.seek(after)
            found[tag] = _Entry(values, place, number)
        yield found
        at = struct.unpack(order + word, link)[0] if len(link) == length else 0
