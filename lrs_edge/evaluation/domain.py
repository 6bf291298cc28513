"""What a set of images is like: the domain of a calibration, from images like those of training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lrs_edge.bundle.calibration import MAX_RANGES, MAX_RESOLUTION, MIN_RESOLUTION, Domain
from lrs_edge.bundle.manifest import Manifest
from lrs_edge.errors import ImageError, UsageError
from lrs_edge.pyramid.levels import TileIndex, build_pyramid
from lrs_edge.vision.colours import Colours, colours_of, fit_colours

#: Endings of files that are looked at in a folder.
ENDINGS = frozenset(
    (*(".tif", ".tiff", ".png", ".jpg", ".jpeg", ".webp"), *(".jp2", ".ntf", ".nitf", ".vrt"))
)
#: Of more images so many are looked at, evenly over their names.
MOST_IMAGES = 4000
#: Fewer say nothing about colours.
LEAST_IMAGES = 20

Range = tuple[float, float]


def image_files(places: Iterable[Path]) -> list[Path]:
    """Images in folders, at any depth, and single files; at most `MOST_IMAGES`.

    Raises:
        UsageError: There are too few, or a place is not there.
    """
    found: set[Path] = set()
    for place in places:
        if not os.path.exists(place):
            raise UsageError(f"{place} does not exist; name images, or folders of images")
        found.update(_images_in(place) if place.is_dir() else [place])
    if len(found) < LEAST_IMAGES:
        raise UsageError(
            f"{len(found)} images were found, at least {LEAST_IMAGES} are needed; name more"
        )
    ordered = sorted(found)
    step = max(len(ordered) / MOST_IMAGES, 1.0)
    return [ordered[int(place * step)] for place in range(min(len(ordered), MOST_IMAGES))]


def _images_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)


def fit_domain(
    manifest: Manifest, images: Sequence[Path], tell: Callable[[str], None]
) -> tuple[Domain, int]:
    """Colours of images and, where some are georeferenced, the range of their ground resolution.

    Args:
        manifest: Of the bundle: an image's colours are those of its global view.
        images: The images.
        tell: Told about images that cannot be read.

    Returns:
        The domain, and how many images it is of.

    Raises:
        UsageError: Too few of them can be read.
    """
    colours: list[Colours] = []
    resolutions: list[float] = []
    for path in images:
        try:
            found, gsd = _looks(path, manifest)
        except ImageError as error:
            tell(f"left out: {error}")
            continue
        if found is not None:
            colours.append(found)
        if gsd is not None and MIN_RESOLUTION <= gsd <= MAX_RESOLUTION:
            resolutions.append(gsd)
    if len(colours) < LEAST_IMAGES:
        raise UsageError(
            f"{len(colours)} of {len(images)} images can be read and seen, at least {LEAST_IMAGES} "
            "are needed; name more"
        )
    ranges = ((min(resolutions), max(resolutions)),) if resolutions else ()
    return Domain(ranges, fit_colours(np.stack(colours))), len(colours)


def _looks(path: Path, manifest: Manifest) -> tuple[Colours | None, float | None]:
    # GDAL takes a tenth of a second to import.
    from lrs_edge.raster.raster import Raster

    raster = Raster.open(path)
    try:
        view = build_pyramid(
            raster.height,
            raster.width,
            tile=manifest.vision.tile,
            base_side=manifest.search.base_side,
            stretched=manifest.vision.stretched,
        ).global_view
        window = view.tile_window(TileIndex(0, 0))
        return colours_of(raster.read((view.height, view.width), window)), raster.info.gsd
    finally:
        raster.close()


def joined_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ranges of ground resolution in ascending order, those that touch as one.

    Raises:
        UsageError: There are too many, or one is no range of metres a pixel.
    """
    found: list[Range] = []
    for low, high in sorted(ranges):
        if not MIN_RESOLUTION <= low <= high <= MAX_RESOLUTION:
            raise UsageError(
                f"{low:g},{high:g} is not a range of metres a pixel; the lower comes first, and "
                f"both are within {MIN_RESOLUTION:g} to {MAX_RESOLUTION:g}"
            )
        if found and low <= found[-1][1]:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    if len(found) > MAX_RANGES:
        raise UsageError(f"there are {len(found)} ranges, at most {MAX_RANGES} are allowed")
    return tuple(found)
