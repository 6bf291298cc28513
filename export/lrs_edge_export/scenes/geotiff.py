"""A planned scene as a GeoTIFF or a cloud-optimised GeoTIFF, drawn and written block by block.

The place on Earth is invented: a UTM zone, an origin and a ground sample distance drawn from the
scene's name, so that everything that works on georeferenced images works on scenes. The file's
description says that it is composed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
import rasterio.shutil
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.session import DummySession
from rasterio.transform import Affine
from rasterio.windows import Window

from lrs_edge.errors import LrsEdgeError
from lrs_edge.files import part_name
from lrs_edge.raster.gdal_env import CACHE_BYTES, environment
from lrs_edge_export.scenes.plan import ScenePlan
from lrs_edge_export.scenes.render import SceneRenderer
from lrs_edge_export.scenes.tiles import TileCache

ImageFormat = Literal["cog", "tif"]
Compression = Literal["jpeg", "deflate"]

#: Side of a block of the file in pixels.
_BLOCK = 512
#: Tag that holds the fingerprint of what the scene was made from.
FINGERPRINT = "LRS_EDGE_SCENE"
_DESCRIPTION = "Composed from labelled tiles by lrs-edge; not a real place."
_GSD = (0.3, 0.5, 0.5, 0.6, 1.0)


@dataclass(frozen=True)
class Encoding:
    """How scenes are stored.

    Attributes:
        format: "cog" has overviews and their order in the file; "tif" is tiled, without overviews.
        compression: "jpeg" loses a little; "deflate" nothing, and takes about five times the space.
        quality: Of JPEG, 50 to 100.
    """

    format: ImageFormat = "cog"
    compression: Compression = "jpeg"
    quality: int = 90


@dataclass(frozen=True)
class InventedPlace:
    """Where a scene is said to lie.

    Attributes:
        epsg: Code of a UTM zone.
        x: Easting of the upper left corner in metres.
        y: Northing of the upper left corner in metres.
        gsd: Side of a pixel in metres.
    """

    epsg: int
    x: float
    y: float
    gsd: float


def invented_place(plan: ScenePlan) -> InventedPlace:
    """A place for a scene, always the same for the same name."""
    draw = random.Random(f"place of {plan.name}")  # noqa: S311 - nothing secret
    north = draw.random() < 0.7
    epsg = (32600 if north else 32700) + draw.randint(1, 60)
    x = draw.randrange(300_000, 680_000, 10)
    y = draw.randrange(1_000_000, 6_500_000, 10) if north else draw.randrange(4_000_000, 9_000_000)
    return InventedPlace(epsg, float(x), float(y), draw.choice(_GSD))


def read_fingerprint(path: Path) -> str | None:
    """The fingerprint of a file that `write_scene` made; None for any other file."""
    try:
        with environment(path, "opened"), rasterio.open(path, driver="GTiff") as file:
            found = file.tags().get(FINGERPRINT)
    except LrsEdgeError:
        return None
    return str(found) if found is not None else None


def write_scene(
    plan: ScenePlan,
    path: Path,
    encoding: Encoding,
    fingerprint: str,
    *,
    cache: TileCache | None = None,
    on_block: Callable[[float], None] | None = None,
) -> None:
    """Draw a scene into a file that appears when it is complete.

    Args:
        plan: The scene.
        path: The file; what is there is replaced.
        encoding: How it is stored.
        fingerprint: Kept in the file, for `read_fingerprint`.
        cache: Decoded tiles, to be shared by scenes of one library.
        on_block: Told the finished share, 0 to 1, after each row of blocks.

    Raises:
        ImageError: A tile cannot be decoded.
        LrsEdgeError: The file cannot be written.
    """
    # Names that no other run into the same folder takes.
    part, drawn = (path.with_name(part_name()) for _ in range(2))
    with ExitStack() as cleanup:
        for temporary in (part, drawn):
            cleanup.callback(temporary.unlink, missing_ok=True)
        if encoding.format == "tif":
            _draw(plan, part, _stored(encoding), fingerprint, cache, on_block)
        else:
            # The COG driver copies; what it copies from is compressed quickly and without loss.
            quick = {"compress": "deflate", "zlevel": 1}
            _draw(plan, drawn, quick, fingerprint, cache, on_block)
            with _writing(path):
                rasterio.shutil.copy(drawn, part, driver="COG", **_cog_options(encoding))
        try:
            part.replace(path)
        except OSError as error:
            raise LrsEdgeError(
                f"{path} cannot be written ({error.strerror}); name another folder"
            ) from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """GDAL's settings while a file is written, errors translated."""
    try:
        # A dummy session: the default one would import boto3 where AWS keys are in the environment.
        with rasterio.Env(session=DummySession(), GDAL_CACHEMAX=CACHE_BYTES):
            yield
    except (RasterioError, CPLE_BaseError, OSError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise LrsEdgeError(
            f"{path} cannot be written ({cause}); check the free space and the permissions"
        ) from error


def _stored(encoding: Encoding) -> dict[str, Any]:
    if encoding.compression == "jpeg":
        return {"compress": "jpeg", "photometric": "ycbcr", "jpeg_quality": encoding.quality}
    return {"compress": "deflate", "predictor": 2}


def _cog_options(encoding: Encoding) -> dict[str, Any]:
    options: dict[str, Any] = {"blocksize": _BLOCK, "overview_resampling": "average"}
    if encoding.compression == "jpeg":
        return options | {"compress": "jpeg", "quality": encoding.quality}
    return options | {"compress": "deflate", "predictor": "yes"}


def _draw(
    plan: ScenePlan,
    path: Path,
    options: dict[str, Any],
    fingerprint: str,
    cache: TileCache | None,
    on_block: Callable[[float], None] | None,
) -> None:
    """Write the pixels at full resolution, one block at a time."""
    place = invented_place(plan)
    profile = {
        "driver": "GTiff",
        "width": plan.width,
        "height": plan.height,
        "count": 3,
        "dtype": "uint8",
        "crs": f"EPSG:{place.epsg}",
        "transform": Affine(place.gsd, 0, place.x, 0, -place.gsd, place.y),
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        "bigtiff": "if_safer",
    }
    renderer = SceneRenderer(plan, cache)
    with _writing(path), rasterio.open(path, "w", **profile, **options) as file:
        file.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        file.update_tags(TIFFTAG_IMAGEDESCRIPTION=_DESCRIPTION, **{FINGERPRINT: fingerprint})
        for top in range(0, plan.height, _BLOCK):
            rows = min(_BLOCK, plan.height - top)
            for left in range(0, plan.width, _BLOCK):
                columns = min(_BLOCK, plan.width - left)
                window = (left, top, left + columns, top + rows)
                pixels = renderer.read(*window, columns, rows)
                block = np.ascontiguousarray(pixels.transpose(2, 0, 1))
                file.write(block, window=Window(left, top, columns, rows))
            if on_block is not None:
                on_block((top + rows) / plan.height)
