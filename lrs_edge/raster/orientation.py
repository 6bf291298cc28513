"""EXIF orientation: how a viewer turns the pixels of a photograph, as its file stores them.

Tag 274 (0x112) of TIFF 6.0 and EXIF 2.3: 1 as stored, 2 mirrored, 3 turned by 180 degrees, 4
upside down, 5 transposed, 6 to be turned clockwise, 7 transposed along the other diagonal, 8 to
be turned counter-clockwise.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

EXIF_ORIENTATION = 0x112
#: GDAL's name of a format whose orientation Pillow reads, and Pillow's.
_BY_PILLOW = {"PNG": "PNG", "WEBP": "WEBP", "JPEG": "JPEG"}
#: Entries of a TIFF directory looked at; real ones have a few dozen.
_MAX_ENTRIES = 4096


@dataclass(frozen=True)
class Turn:
    """What makes the shown image of the stored one: transpose first, then reverse.

    Attributes:
        transposed: Rows and columns change places.
        rows: The rows are reversed (after the transposition).
        cols: The columns are reversed (after the transposition).
    """

    transposed: bool
    rows: bool
    cols: bool

    @classmethod
    def of(cls, orientation: int) -> Turn:
        """The turn that an EXIF orientation (1 to 8) asks for."""
        return cls(orientation >= 5, orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7))


def valid_orientation(value: object) -> int:
    """The value as an orientation, or 1 where it is none."""
    try:
        number = int(str(value))
    except ValueError:
        return 1
    return number if 1 <= number <= 8 else 1


def read_orientation(path: Path, driver: str, page: int = 1) -> int:
    """EXIF orientation of a file; 1 where it has none or none that can be read.

    Args:
        path: The file.
        driver: GDAL's name of its format.
        page: Directory of a TIFF, from 1.
    """
    if driver == "GTiff":
        with path.open("rb") as file:
            try:
                return _of_tiff(file, page)
            except (struct.error, OSError):
                return 1
    if driver not in _BY_PILLOW:
        # libheif, libavif and libjxl turn the pixels themselves.
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=[_BY_PILLOW[driver]]) as image:
                # Not image.getexif(): a PNG would be decoded to look past its pixels.
                return valid_orientation(Image.Image.getexif(image).get(EXIF_ORIENTATION))
    except Exception:  # Pillow's readers raise whatever a damaged file breaks in them
        return 1


def _of_tiff(file: BinaryIO, page: int) -> int:
    """The tag in the directory `page` of a TIFF or BigTIFF."""
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None:
        return 1
    big = struct.unpack_from(order + "H", start, 2)[0] == 43
    offset_form, count_form, entry_size = ("Q", "Q", 20) if big else ("I", "H", 12)
    (offset,) = struct.unpack_from(order + offset_form, start, 8 if big else 4)
    while offset:
        page -= 1
        file.seek(offset)
        (count,) = struct.unpack(order + count_form, file.read(struct.calcsize(order + count_form)))
        if count > _MAX_ENTRIES:
            return 1
        entries = file.read(count * entry_size)
        if page <= 0:
            for place in range(0, count * entry_size, entry_size):
                if struct.unpack_from(order + "H", entries, place)[0] == EXIF_ORIENTATION:
                    value = place + (12 if big else 8)
                    return valid_orientation(struct.unpack_from(order + "H", entries, value)[0])
            return 1
        (offset,) = struct.unpack(
            order + offset_form, file.read(struct.calcsize(order + offset_form))
        )
    return 1
