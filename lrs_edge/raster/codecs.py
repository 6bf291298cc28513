"""Tells a file that this installation has no codec for from a damaged one."""

from __future__ import annotations

import re
from pathlib import Path

_MISSING = re.compile(
    r"missing codec(?: of code)? ?(?P<codec>[\w-]*)|"
    r"(?:compression|scheme|codec|decoder)[^.]{0,40}(?:not (?:been )?(?:configured|supported|"
    r"available|implemented|compiled)|unsupported)|unsupported (?:compression|jpeg)|"
    r"not (?:built|compiled) (?:in|with)",
    re.IGNORECASE,
)
#: First bytes (from an offset) of formats that GDAL or Pillow may have been built without, and of
#: those that are not opened.
_SIGNATURES = (
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftyphev", "HEIF"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"msid", "MrSID"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"CDF", "netCDF"),
    (0, b"GRIB", "GRIB"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"%PDF", "PDF"),
    (128, b"DICM", "DICOM"),
)


def missing_codec(message: str) -> str | None:
    """What to say and do where GDAL's message tells of a codec that it lacks; None elsewhere."""
    match = _MISSING.search(message)
    if match is None:
        return None
    codec = match["codec"]
    return (
        f"the file is not damaged: this build of GDAL lacks the codec {codec}".rstrip()
        + "; convert it where GDAL has the codec (gdal_translate -of COG -co COMPRESS=DEFLATE), or "
        "install a rasterio built with it"
    )


def unopened_format(path: Path) -> str | None:
    """Name of the format of a file that could not be opened, if it is one known by its start."""
    with path.open("rb") as file:
        start = file.read(160)
    for offset, signature, name in _SIGNATURES:
        if start[offset : offset + len(signature)] == signature:
            return name
    return None
