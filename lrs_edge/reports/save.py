"""Writing reports: the file's ending says the form; what cannot be written is refused early."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lrs_edge.answer.answer import Answer
from lrs_edge.answer.report import ImageFacts, to_geojson
from lrs_edge.errors import UsageError
from lrs_edge.files import check_replaceable, replacing
from lrs_edge.reports.views import Views

if TYPE_CHECKING:
    from lrs_edge.raster.raster import Raster


def _png(answer: Answer, _facts: ImageFacts, views: Views) -> bytes:
    from lrs_edge.reports.picture import to_png

    return to_png(answer, views)


def _html(answer: Answer, facts: ImageFacts, views: Views) -> bytes:
    from lrs_edge.reports.page import to_html

    return to_html(answer, facts, views).encode(errors="replace")


def _geojson(answer: Answer, facts: ImageFacts, _views: Views) -> bytes:
    return to_geojson(answer, facts).encode(errors="replace")


def _geopackage(answer: Answer, facts: ImageFacts, views: Views) -> bytes:
    from lrs_edge.reports.geopackage import to_geopackage

    return to_geopackage(answer, facts, views.raster)


#: What writes a report, by the ending of its file's name.
FORMS: dict[str, Callable[[Answer, ImageFacts, Views], bytes]] = {
    ".png": _png,
    ".html": _html,
    ".geojson": _geojson,
    ".gpkg": _geopackage,
}


def check_reports(paths: Iterable[Path]) -> None:
    """Refuse reports that cannot be written, before any work is done.

    Raises:
        UsageError: An ending is unknown, a file is named twice, or it cannot be written.
    """
    seen: set[str] = set()
    for path in paths:
        if path.suffix.lower() not in FORMS:
            raise UsageError(
                f"the report {str(path)!r} has an ending that says no form; "
                f"use {', '.join(list(FORMS)[:-1])} or {list(FORMS)[-1]}"
            )
        try:
            place = os.path.realpath(path)
            check_replaceable(path)
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise UsageError(
                f"the report {str(path)!r} cannot be written ({reason}); name a file in a folder "
                "that can"
            ) from error
        if place in seen:
            raise UsageError(f"two reports are to be written to {path}; name two files")
        seen.add(place)


def check_places(paths: Iterable[Path], raster: Raster, can_be_placed: Callable[[], bool]) -> None:
    """Refuse maps of an image that has no place on one, before the question is asked.

    Args:
        paths: Of the reports.
        raster: The image.
        can_be_placed: Whether a tile may have a polygon in WGS 84; asked for GeoJSON only.

    Raises:
        UsageError: GeoJSON needs a place in WGS 84, a GeoPackage a CRS.
    """
    for path in paths:
        reason, form = "", path.suffix.lower()
        if form == ".geojson":
            reason = raster.info.unlocated or ("" if can_be_placed() else NOWHERE)
        elif form == ".gpkg" and raster.info.crs is None:
            reason = raster.info.unlocated or "it is not georeferenced"
        if reason:
            raise UsageError(
                f"there is no {form} report of {raster.info.path}: {reason}; "
                "report it as .png or .html"
            )


NOWHERE = "every tile reaches to where the image's CRS leads to no place on the earth"


def save_report(
    answer: Answer,
    path: Path,
    facts: ImageFacts,
    views: Views,
) -> None:
    """Write one report; it appears whole or not at all.

    Args:
        answer: What to report.
        path: Its file; the ending says the form.
        facts: Of the image, with the name to show.
        views: Of the same image; its `notes` say what the report lacks.

    Raises:
        UsageError: The form is unknown, the image has no place for it, or the answer is one about
            another image.
        OSError: The file cannot be written.
    """
    raster = views.raster
    if answer.image_size != (raster.width, raster.height):
        width, height = answer.image_size
        raise UsageError(
            f"the answer is about an image of {width}x{height} pixels, this one has "
            f"{raster.width}x{raster.height}; report it with its own image"
        )
    data = FORMS[path.suffix.lower()](answer, facts, views)
    with replacing(path) as stream:
        stream.write(data)
