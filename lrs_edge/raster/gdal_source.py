"""Raw pixels and header of one file that GDAL opens. See `source.py` for the contract."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.io import DatasetReader
from rasterio.windows import Window

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.box import PixelBox
from lrs_edge.raster.gdal_env import CACHE_BYTES, environment, open_dataset, overviews_of
from lrs_edge.raster.image_thread import check_stopped
from lrs_edge.raster.locating import locate
from lrs_edge.raster.orientation import read_orientation
from lrs_edge.raster.pages import choose_page
from lrs_edge.raster.references import check_overviews
from lrs_edge.raster.source import ImageHeader, Pixels

#: Codecs that decode from the first line on: going back means starting again.
_SEQUENTIAL = {"PNG", "JPEG", "GIF", "BIGGIF", "WEBP", "JPEGXL", "AVIF", "HEIF"}

#: Uncompressed strips are read where the window's rows stand; else GDAL reads the whole strip.
_DIRECT = {"GTIFF_DIRECT_IO": "YES", "GDAL_ENABLE_TIFF_SPLIT": "NO"}
_DIRECT_TYPES = {"uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"}


class GdalSource:
    """A file opened with GDAL, its overviews opened as they are asked for."""

    def __init__(self, path: Path, max_bands: int, page: int | None = None) -> None:
        """Opens the file and reads its header.

        Args:
            path: A plain local file, checked by `local_file` and `check_references`.
            max_bands: More bands than this are refused before they are looked at.
            page: Which of a TIFF's images, from 1; None for the largest.

        Raises:
            ImageError: GDAL does not know the format, or cannot read its header.
        """
        self.path = path
        self.bytes_read = 0
        self._stack = ExitStack()
        self._directory: int | None = None
        self._overviews: dict[int, DatasetReader | None] = {}
        self._settings: dict[str, str | int] = {}
        try:
            with environment(path, "opened"):
                self._dataset = self._open()
                # Before anything is asked that has GDAL look for overviews.
                check_overviews(path, overviews_of(self._dataset))
                chosen = choose_page(path, self._dataset, page)
                if chosen.directory is not None:
                    self._directory = chosen.directory
                    self._dataset = self._open()
                    check_overviews(path, overviews_of(self._dataset))
                header = _header(path, self._dataset, max_bands, chosen.directory or 1)
                notes = (
                    header.warnings
                    if chosen.warning is None
                    else (chosen.warning, *header.warnings)
                )
                self.header = replace(header, page=chosen.page, warnings=notes)
            self._masks = self.header.has_mask or bool(self.header.masked_bands)
            if self._directory is None and _is_one_strip(self._dataset):
                self._settings = dict(_DIRECT)
                with environment(path, "opened", **self._settings):
                    self._dataset = self._open()
            elif self.header.block_bytes > CACHE_BYTES // 4:
                # A block, and the next, stay until all windows in them are read.
                self._settings["GDAL_CACHEMAX"] = CACHE_BYTES + self.header.block_bytes
        except BaseException:
            self._stack.close()
            raise

    def _open(self, **options: int) -> DatasetReader:
        dataset = open_dataset(self.path, self._directory, **options)
        self._stack.callback(dataset.close)
        return dataset

    def size(self, overview: int | None) -> tuple[int, int] | None:
        """See `Source.size`."""
        dataset = self._at(overview)
        return None if dataset is None else (dataset.height, dataset.width)

    def _at(self, overview: int | None) -> DatasetReader | None:
        if overview is None:
            return self._dataset
        if overview not in self._overviews:
            factor = self.header.overviews[overview]
            with environment(self.path, "opened"):
                dataset = self._open(overview_level=overview)
                # JPEG offers its EXIF thumbnail, whose shape can differ, as an overview.
                fits = (
                    abs(dataset.height * factor - self.header.height) <= 2 * factor
                    and abs(dataset.width * factor - self.header.width) <= 2 * factor
                    and dataset.count == len(self.header.dtypes)
                )
            self._overviews[overview] = dataset if fits else None
        return self._overviews[overview]

    def read(
        self,
        bands: Sequence[int],
        box: PixelBox,
        *,
        overview: int | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Pixels:
        """See `Source.read`."""
        check_stopped()
        dataset = self._at(overview)
        if dataset is None:
            raise ImageError(f"{self.path} has no usable overview {overview}; read the image")
        x0, y0, x1, y1 = box
        window = Window(x0, y0, x1 - x0, y1 - y0)
        size = shape or (y1 - y0, x1 - x0)
        raw: NDArray[Any] = np.empty((len(bands), *size), dtype=self.header.dtype(bands))
        mask: NDArray[np.bool_] | None = None
        with environment(self.path, "decoded", **self._settings):
            dataset.read(list(bands), out=raw, window=window)
            self.bytes_read += raw.nbytes
            if self._masks:
                mask = self._visible(bands, self._in_image(box, overview), size)
        return raw, mask

    def _in_image(self, box: PixelBox, overview: int | None) -> Window:
        """A window of an overview as a window of the image."""
        x0, y0, x1, y1 = box
        height, width = self.size(overview) or (self.header.height, self.header.width)
        down, right = self.header.height / height, self.header.width / width
        return Window(x0 * right, y0 * down, (x1 - x0) * right, (y1 - y0) * down)

    def _visible(
        self, bands: Sequence[int], window: Window, size: tuple[int, int]
    ) -> NDArray[np.bool_] | None:
        """What GDAL's masks show of a window of the image, decimated to `size`.

        Always asked of the image: an overview that was made before the mask has none, and GDAL
        shows all of it; where the mask has overviews of its own, GDAL reads them.
        """
        if self.header.has_mask:
            masks = [bands[0]]
        else:
            masks = [band for band in bands if self.header.colours[band - 1] != "alpha"]
            if not set(masks) <= set(self.header.masked_bands):
                return None
        coverage = self._dataset.read_masks(masks, window=window, out_shape=(len(masks), *size))
        self.bytes_read += coverage.nbytes
        return np.asarray(np.any(coverage, axis=0))

    def close(self) -> None:
        """See `Source.close`."""
        with environment(self.path, "closed"):
            self._stack.close()


def _header(path: Path, dataset: DatasetReader, max_bands: int, directory: int) -> ImageHeader:
    count = dataset.count
    if not 1 <= count <= max_bands:
        raise ImageError(
            f"{path} has {count} bands, not 1 to {max_bands}; "
            + ("give one of its subdatasets as a file" if count == 0 else "extract some bands")
        )
    colours = tuple(colour.name for colour in dataset.colorinterp)
    flags, masked = dataset.mask_flag_enums, _self_masked(dataset)
    georeferenced = bool(
        dataset.crs or dataset.gcps[0] or dataset.rpcs or not dataset.transform.is_identity
    )
    block = dataset.block_shapes[0]
    tiled = block[1] < dataset.width
    structure = dataset.tags(ns="IMAGE_STRUCTURE")
    compressed = structure.get("COMPRESSION", "NONE").upper() != "NONE"
    overviews = dataset.overviews(1)
    located = locate(dataset)
    return ImageHeader(
        driver=dataset.driver,
        height=dataset.height,
        width=dataset.width,
        dtypes=tuple(dataset.dtypes),
        colours=colours,
        nodata=tuple(
            None if band in masked else value for band, value in enumerate(dataset.nodatavals, 1)
        ),
        names=tuple(dataset.descriptions),
        wavelengths=tuple(_wavelength(dataset, band) for band in range(1, count + 1)),
        tags={**dataset.tags(), **dataset.tags(ns="IMAGERY")},
        bits=tuple(_bits(dataset, band) for band in range(1, count + 1)),
        white_is_zero=structure.get("MINISWHITE", "") == "YES",
        has_mask=MaskFlags.per_dataset in flags[0] and MaskFlags.alpha not in flags[0],
        masked_bands=masked,
        orientation=1 if georeferenced else read_orientation(path, dataset.driver, directory),
        palette=_palette(dataset) if dataset.colorinterp[0] == ColorInterp.palette else None,
        tiled=tiled,
        # GDAL shows a TIFF that is one long compressed strip as blocks of one row.
        sequential=dataset.driver in _SEQUENTIAL or (block[0] == 1 and not tiled and compressed),
        block_shape=(int(block[0]), int(block[1])),
        block_bytes=_block_bytes(dataset),
        overviews=tuple(int(factor) for factor in overviews),
        georeference=located.georeference,
        affine=located.affine,
        unlocated=located.unlocated,
    )


def _is_one_strip(dataset: DatasetReader) -> bool:
    """Whether a TIFF keeps each band in one uncompressed strip, which GDAL shows as rows."""
    structure = dataset.tags(ns="IMAGE_STRUCTURE")
    return (
        dataset.driver == "GTiff"
        and dataset.count > 1
        and dataset.block_shapes[0] == (1, dataset.width)
        and structure.get("COMPRESSION", "NONE").upper() == "NONE"
        and structure.get("INTERLEAVE", "").upper() == "BAND"
        and set(dataset.dtypes) <= _DIRECT_TYPES
        and not any(_bits(dataset, band) for band in dataset.indexes)
        and dataset.get_tag_item("BLOCK_OFFSET_0_1", "TIFF", bidx=1) is None
    )


def _block_bytes(dataset: DatasetReader) -> int:
    rows, cols = dataset.block_shapes[0]
    interleave = dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE", "PIXEL").upper()
    bands = dataset.count if interleave == "PIXEL" else 1
    digits = "".join(char for char in dataset.dtypes[0] if char.isdigit())
    return int(rows * cols * bands * int(digits or 8) // 8)


def _self_masked(dataset: DatasetReader) -> tuple[int, ...]:
    """Bands (1-based) with a mask of their own that numpy cannot make from a nodata value."""
    return tuple(
        band
        for band, flags in enumerate(dataset.mask_flag_enums, 1)
        # rasterio tells nodata as float64, which does not hold every 64-bit integer.
        if not flags
        or (MaskFlags.nodata in flags and dataset.dtypes[band - 1] in ("int64", "uint64"))
    )


def _wavelength(dataset: DatasetReader, band: int) -> float | None:
    """Central wavelength of a band in nanometres, as GDAL (IMAGERY) or ENVI headers give it."""
    tags = dataset.tags(band)
    micrometres = dataset.tags(band, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM")
    text = micrometres or tags.get("wavelength", "")
    units = "um" if micrometres else tags.get("wavelength_units", "").lower()
    try:
        value = float(text)
    except ValueError:
        return None
    scale = 1000 if units.startswith(("um", "micro", "µm")) else 1
    return value * scale if scale == 1000 or units.startswith(("nm", "nano")) else None


def _bits(dataset: DatasetReader, band: int) -> int | None:
    bits = dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "")
    return int(bits) if bits.isdigit() and int(bits) > 0 else None


def _palette(dataset: DatasetReader) -> NDArray[np.uint8] | None:
    try:
        entries = dataset.colormap(1)
    except ValueError:
        return None
    palette = np.zeros((max(entries) + 1, 4), dtype=np.uint8)
    for index, colour in entries.items():
        palette[index] = colour
    return palette
