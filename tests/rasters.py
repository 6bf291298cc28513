"""Small rasters written for the tests: every format, type and defect that they need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

#: A place near Bonn in UTM zone 32N, half a metre per pixel.
UTM = {"crs": "EPSG:32632", "transform": Affine(0.5, 0, 364000.0, 0, -0.5, 5621000.0)}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def noise(bands: int, height: int, width: int, *, dtype: str = "uint8", seed: int = 0) -> Any:
    """Smooth shapes under noise, [bands, height, width]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = 0.5 + 0.3 * np.sin(x / 9 + y / 23) + 0.2 * rng.random((bands, height, width))
    top = 255 if dtype == "uint8" else 4000
    return (np.clip(base, 0, 1) * top).astype(dtype)


def write(
    path: Path,
    data: NDArray[Any],
    *,
    driver: str = "GTiff",
    colours: tuple[ColorInterp, ...] | None = None,
    overviews: tuple[int, ...] = (),
    mask: NDArray[Any] | None = None,
    colormap: dict[int, tuple[int, int, int, int]] | None = None,
    **options: Any,
) -> Path:
    """Writes [bands, height, width] to a file.

    Args:
        path: Where.
        data: Pixels.
        driver: GDAL's name of the format.
        colours: Colour interpretation of each band.
        overviews: Decimation factors of averaged overviews.
        mask: [height, width] mask beside the bands, 0 or 255.
        colormap: Colour table of band 1.
        options: Further creation options and profile entries.

    Returns:
        `path`.
    """
    count, height, width = data.shape
    profile: dict[str, Any] = {"driver": driver, "count": count, "dtype": data.dtype.name}
    profile |= {"height": height, "width": width}
    with quiet(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(path, "w", **profile, **options) as file:
            if colours is not None:
                file.colorinterp = colours
            if colormap is not None:
                file.write_colormap(1, colormap)
            file.write(data)
            if mask is not None:
                file.write_mask(mask)
        if overviews:
            with rasterio.open(path, "r+") as file:
                file.build_overviews(overviews, Resampling.average)
    return path


def box_filter(image: NDArray[Any], level_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Exact area averages of [height, width, channels], by summed-area table."""
    out = image.astype(np.float64)
    for axis, target in enumerate(level_hw):
        source = out.shape[axis]
        total = np.concatenate([np.zeros_like(out.take([0], axis)), out.cumsum(axis)], axis)
        edges = np.arange(target + 1) * source / target
        low = np.minimum(edges.astype(int), source - 1)
        shape = [1] * out.ndim
        shape[axis] = -1
        part = (edges - low).reshape(shape)
        at = total.take(low, axis) * (1 - part) + total.take(low + 1, axis) * part
        out = np.diff(at, axis=axis) * target / source
    return out


def vrt(path: Path, source: str, *, relative: bool = False, size: int = 64) -> Path:
    """Writes a VRT of one band over one source, given word for word."""
    path.write_text(
        f'<VRTDataset rasterXSize="{size}" rasterYSize="{size}">'
        '<VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="{int(relative)}">{source}</SourceFilename>'
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>",
        encoding="utf-8",
    )
    return path
