"""What a file says about its place: CRS and geotransform, or why it has none that can be used."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader

from lrs_edge.errors import ImageError
from lrs_edge.raster.georeference import Georeference
from lrs_edge.raster.proj_data import database_problem

Affine = tuple[float, float, float, float, float, float]

NOT_GEOREFERENCED = "it is not georeferenced"
#: Columns and rows of the grid of pixels that says how much of an image has a place.
_SAMPLES = 9
#: `EPSG:32632`, `ESRI:102003` or `IAU_2015:49900`; compounds as `EPSG:32632+5773`.
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_]{1,15}:[0-9]{1,9}(\+[0-9]{1,9})?")
_WKT = re.compile(r"[A-Z][A-Z0-9_]{3,20}\s*\[.*\]", re.DOTALL)
_LONGEST_CRS = 10_000


@dataclass(frozen=True)
class Located:
    """What a file says about its place.

    Attributes:
        georeference: CRS and transform, or None.
        affine: The transform where the file has a usable one, else None.
        unlocated: Why there is no georeference, to follow a colon; empty where there is one.
    """

    georeference: Georeference | None
    affine: Affine | None
    unlocated: str


@dataclass(frozen=True)
class Description:
    """What there is to say about an image's place.

    Attributes:
        georeference: CRS and transform, or None.
        crs: `EPSG:n` or WKT, or None.
        gsd: Metres on the ground per pixel at the centre, or None.
        centre: Longitude and latitude of the centre, or None.
        unlocated: Why nothing of it has a place in WGS 84, to follow a colon, or None.
        warnings: What a reader of the answer should know.
    """

    georeference: Georeference | None
    crs: str | None
    gsd: float | None
    centre: tuple[float, float] | None
    unlocated: str | None
    warnings: tuple[str, ...]


def locate(dataset: DatasetReader) -> Located:
    """What an open dataset says about its place; call inside `gdal_env.environment()`."""
    a, b, c, d, e, f = (float(value) for value in tuple(dataset.transform)[:6])
    affine: Affine | None = (a, b, c, d, e, f)
    broken = ""
    # The identity is what rasterio says where a file has no transform.
    if (a, b, c, d, e, f) == (1, 0, 0, 0, 1, 0):
        affine = None
    elif not _is_usable((a, b, c, d, e, f)):
        broken = f"its geotransform {(c, a, b, f, d, e)} gives pixels no size"
        affine = None
    crs: CRS | None = dataset.crs
    if affine is not None and crs:
        return Located(Georeference(crs, affine), affine, "")
    if affine is not None:
        reason = (
            "it has a position and a pixel size (as of a world file), but no coordinate reference "
            "system; say which with --crs, such as --crs EPSG:32632"
        )
    elif broken:
        reason = broken
    elif dataset.gcps[0] or dataset.rpcs:
        kind = "ground control points" if dataset.gcps[0] else "RPCs"
        reason = (
            f"it is georeferenced by {kind} only, which are ignored; gdalwarp makes an image that "
            "has coordinates"
        )
    elif crs:
        reason = "it names a coordinate reference system, but no position in it"
    else:
        reason = NOT_GEOREFERENCED
    return Located(None, affine, reason)


def _is_usable(affine: Affine) -> bool:
    a, b, _, d, e, _ = affine
    size = a * e - b * d
    return all(map(math.isfinite, affine)) and math.isfinite(size) and size != 0


def named_crs(text: str) -> CRS:
    """The CRS that a user names: a code such as `EPSG:32632`, a PROJ string, or WKT.

    GDAL would also take the name of a file, or an address.

    Raises:
        ImageError: It is none of these, or unknown.
    """
    name = text.strip()
    shape = (
        _CODE.fullmatch(name)
        or _WKT.fullmatch(name)
        or (name.startswith("+") and re.search(r"\+proj=", name))
    )
    problem = "it is not written as a code (EPSG:32632), a PROJ string or WKT"
    if shape and len(name) <= _LONGEST_CRS:
        try:
            found = CRS.from_string(name)
            if found:
                return found
            problem = "it is empty"
        except (RasterioError, CPLE_BaseError, ValueError, RuntimeError) as error:
            problem = " ".join(str(error.__cause__ or error).split())[:200]
    raise ImageError(
        f"{name[:80]!r} is not a known coordinate reference system ({problem}); "
        "give a code such as EPSG:32632, a PROJ string or WKT"
    )


def describe(path: Path, found: Located, size: tuple[int, int], crs: str | None) -> Description:
    """What there is to say about an image's place; call inside `gdal_env.environment()`.

    Args:
        path: For messages.
        found: What the file says.
        size: Width and height in pixels.
        crs: The CRS that the user names, as in `named_crs`, or None.

    Raises:
        ImageError: That CRS is unknown, or the file has no position in any.
    """
    place, notes = found.georeference, []
    if crs is not None:
        before, place = place, _with_crs(path, found, crs)
        if before is not None and before.crs != place.crs:
            notes.append(f"the file says {before.short_name()}; {place.short_name()} was asked for")
    if place is None:
        reason = found.unlocated or NOT_GEOREFERENCED
        if reason != NOT_GEOREFERENCED:
            notes.append(f"regions have no coordinates: {reason}")
        return Description(None, None, None, None, reason, tuple(notes))
    reason, note = coverage(place, *size)
    whole = place.place((0, 0, *size))
    centre = None if whole is None else whole.centre_wgs84
    notes += [note] if note else []
    return Description(place, place.name(), place.gsd(*size), centre, reason or None, tuple(notes))


def _with_crs(path: Path, found: Located, crs: str) -> Georeference:
    named = named_crs(crs)
    if found.affine is None:
        raise ImageError(
            f"{path} has no position that --crs {crs} could be for ({found.unlocated}); leave it "
            "out, or put a world file beside the image"
        )
    return Georeference(named, found.affine)


def coverage(place: Georeference, width: int, height: int) -> tuple[str, str]:
    """How much of an image has a place in WGS 84.

    Args:
        place: Its georeference.
        width: Columns in pixels.
        height: Rows in pixels.

    Returns:
        Why nothing of it has one, to follow a colon, or an empty string; and a warning where
        something has none, or an empty string.
    """
    shares = [(step + 0.5) / _SAMPLES for step in range(_SAMPLES)]
    points = [(width * across, height * down) for down in shares for across in shares]
    located = place.located(points)
    if located == len(points):
        return "", ""
    if not located:
        reason = database_problem() or (
            f"its coordinate reference system ({place.short_name()}) or its position in it leads "
            "to no place in WGS 84"
        )
        return reason, f"regions have no longitude and latitude: {reason}"
    missing = (len(points) - located) / len(points)
    return "", (
        f"about {missing:.0%} of the image has no place in WGS 84 ({place.short_name()} does not "
        "reach it): regions that lie there, or partly, have no polygon in WGS 84"
    )
