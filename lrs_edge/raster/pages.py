"""Files that hold several images: which one is shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rasterio.io import DatasetReader

from lrs_edge.errors import ImageError

_NAME = re.compile(r"GTIFF_DIR:(\d+):")
_SIZE = re.compile(r"(\d+)P x (\d+)L x (\d+)B")


@dataclass(frozen=True)
class PageChoice:
    """Which image of a file is opened.

    Attributes:
        page: Its number among the file's images, from 1.
        directory: TIFF directory to be opened in place of the first; None for the file as it is.
        warning: What a reader of the answer should know, or None.
    """

    page: int
    directory: int | None
    warning: str | None


def choose_page(path: Path, dataset: DatasetReader, page: int | None) -> PageChoice:
    """The image asked for, or the largest one of a TIFF; thumbnails often come first.

    Args:
        path: For messages.
        dataset: The file as GDAL opens it: at its first image.
        page: Number asked for, from 1, or None.

    Raises:
        ImageError: There is no such image.
    """
    tags = dataset.tags(ns="SUBDATASETS")
    names = [tags[key] for key in sorted(tags, key=_number) if key.endswith("_NAME")]
    sizes = [tags[key] for key in sorted(tags, key=_number) if key.endswith("_DESC")]
    # A JPEG's further images are thumbnails and thermal data; a viewer shows the main one.
    count = 1 if dataset.driver == "JPEG" else max(len(names), 1)
    if page is not None and not (isinstance(page, int) and 1 <= page <= count):
        raise ImageError(
            f"{path} has no image number {page!r}; it holds {count}, counted from 1: "
            "name one of those"
        )
    if count == 1 or dataset.count == 0:
        return PageChoice(1, None, None)
    directories = [_NAME.match(name) for name in names]
    if dataset.driver != "GTiff" or not all(directories):
        if page not in (None, 1):
            raise ImageError(
                f"{path} is a {dataset.driver} file, of which only the first image can be shown; "
                "extract the others with gdal_translate"
            )
        return PageChoice(1, None, f"the file holds {count} images; only the first is shown")
    areas = [_area(text) for text in sizes]
    chosen = page or areas.index(max(areas)) + 1
    match = directories[chosen - 1]
    directory = int(match[1]) if match is not None and chosen > 1 else None
    if page is not None:
        return PageChoice(chosen, directory, None)
    alike = areas.count(max(areas))
    which = "the largest" if alike == 1 else f"the first of {alike} of the largest size"
    return PageChoice(
        chosen,
        directory,
        f"the file holds {count} images; number {chosen}, {which}, is shown (choose another with "
        "page; images that are bands of one can be joined with gdal_merge.py -separate)",
    )


def _number(key: str) -> tuple[int, str]:
    digits = "".join(char for char in key if char.isdigit())
    return int(digits or 0), key


def _area(description: str) -> int:
    match = _SIZE.search(description)
    return int(match[1]) * int(match[2]) if match else 0
