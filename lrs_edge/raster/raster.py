"""A large image in one file, read as windows of any size. The whole image is never in memory.

    with Raster.open("image.tif") as raster:
        pixels = raster.read((2048, 2048), LevelWindow(row0=0, col0=0, rows=336, cols=336))

`read` gives float32 [rows, cols, 3] in 0..1: the window of the image as if the whole image had
been resized to a level. `area` averages, starting from the best overview of the file; `reference`
is bilinear on the full-resolution pixels, as the paper's authors resize. Both read strip by strip
and only where the window lies. What cannot be seen (nodata, not finite, masked, an 8-bit alpha
below 128, a deeper alpha of 0) is black; `area` averages the visible pixels only.

Formats that decode from the first line on (PNG, JPEG, a TIFF of one compressed strip) are decoded
once and kept when they fit `RasterLimits.in_memory_bytes`; larger ones decode again for each
window, and say so in `warnings`. Knows nothing about models.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lrs_edge.errors import ImageError
from lrs_edge.raster.appearance import Transparency, check_transparency, find_appearance
from lrs_edge.raster.bands import choose_bands
from lrs_edge.raster.footprint import Ring
from lrs_edge.raster.gdal_env import environment, image_errors, local_file
from lrs_edge.raster.georeference import Place
from lrs_edge.raster.handles import Handle, Handles, open_again, stamp_of
from lrs_edge.raster.image_thread import ImageThread, Stop
from lrs_edge.raster.locating import Located, describe
from lrs_edge.raster.opening import DEFAULT_LIMITS, RasterLimits, check_dtype, open_source, settle
from lrs_edge.raster.processor import FILTERS
from lrs_edge.raster.source import MemorySource, Source
from lrs_edge.raster.stretch import check_range
from lrs_edge.raster.turned import TurnedSource
from lrs_edge.raster.window import Resampling

if TYPE_CHECKING:
    from types import TracebackType

    from lrs_edge.pyramid.levels import LevelWindow

__all__ = ["Raster", "RasterInfo", "RasterLimits"]

#: Whether EXIF orientation is followed.
Orientation = Literal["exif", "stored"]


@dataclass(frozen=True)
class RasterInfo:
    """What is known about an open image.

    Attributes:
        path: Absolute path.
        driver: GDAL's name of the format, or `Pillow:` and Pillow's.
        width: Columns in pixels.
        height: Rows in pixels.
        band_count: Bands in the file.
        dtype: Data type of the bands shown.
        bands: Bands shown as red, green, blue, or one shown as grey; 1-based.
        crs: `EPSG:n` or WKT; None where the image is not georeferenced.
        gsd: Metres on the ground per pixel at the image's centre, or None.
        centre_wgs84: Longitude and latitude of the image's centre, or None.
        unlocated: Why no part of the image has a place in WGS 84, to follow a colon; None where
            some has.
        nodata: Nodata value of the first band shown, or None.
        has_alpha: Whether an alpha band or a mask hides pixels (and is not ignored).
        tiled: Whether the file is stored in tiles.
        block_shape: Rows and columns of a stored block.
        overviews: Decimation factors of the file's overviews, ascending.
        stretch: Black and white of each band shown, in the file's units (black is the larger where
            the file says that 0 is white); None for 8-bit images shown as they are.
        warnings: What a reader of the answer should know, one line each.
        orientation: EXIF orientation by which the image was turned; 1 where it was not.
        page: Which of the file's images this is, from 1.
    """

    path: str
    driver: str
    width: int
    height: int
    band_count: int
    dtype: str
    bands: tuple[int, ...]
    crs: str | None
    gsd: float | None
    nodata: float | None
    has_alpha: bool
    tiled: bool
    block_shape: tuple[int, int]
    overviews: tuple[int, ...]
    stretch: tuple[tuple[float, float], ...] | None
    warnings: tuple[str, ...]
    orientation: int = 1
    page: int = 1
    centre_wgs84: tuple[float, float] | None = field(default=None, compare=False)
    unlocated: str | None = None


@dataclass(frozen=True)
class _View:
    """How an image is to be shown: the arguments of `Raster.open`, checked."""

    bands: Sequence[int] | None
    value_range: tuple[float, float] | None
    transparency: Transparency
    orientation: Orientation
    page: int | None
    crs: str | None


class Raster:
    """An open image; a context manager. Safe to share between threads (reads queue).

    Attributes:
        info: What is known about it.
        bytes_read: Bytes of raw pixels taken out of the file so far.
        windows_read: Calls of `read` so far.
    """

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        bands: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
        crs: str | None = None,
        transparency: Transparency = "auto",
        orientation: Orientation = "exif",
        page: int | None = None,
        limits: RasterLimits = DEFAULT_LIMITS,
        stop: Stop | None = None,
    ) -> Raster:
        """Opens a plain local file.

        Args:
            path: The file. URLs and GDAL's virtual paths are refused, and so is a VRT that names
                anything but local files.
            bands: One band (grey) or three (red, green, blue), 1-based. By default those that the
                file names or marks as red, green and blue, else the first three, else the first.
            value_range: Values shown as black and white, in the file's units. By default 8-bit
                images are shown as they are, all others between the 2nd and 98th percentile of
                each band in a sample of the whole image.
            crs: Coordinate reference system of the file's position, where the file does not say
                it: a code such as `EPSG:32632`, a PROJ string or WKT.
            transparency: What hides pixels. `auto`: alpha, masks and nodata, but no band marked as
                alpha that holds data; `apply`: that one too; `ignore`: nothing.
            orientation: `exif` turns photographs (images without a place on the ground) as their
                files ask; `stored` leaves them as the paper's authors do.
            page: Which of a TIFF's images, from 1; None for the largest.
            limits: What is refused.
            stop: Asked while the file is looked at; a True gives it up. Any thread may call it.

        Raises:
            ReadStoppedError: `stop` said so.
            ImageError: The file is missing, no image, damaged, unsupported or beyond a limit; or
                `bands`, `value_range` or `crs` do not fit it. Damage inside a large file may come
                up only when `read` reaches it.
        """
        file = local_file(path)
        wanted = None if value_range is None else check_range(value_range)
        check_transparency(transparency)
        if orientation not in get_args(Orientation):
            raise ImageError(f"orientation {orientation!r} is unknown; use 'exif' or 'stored'")
        view = _View(bands, wanted, transparency, orientation, page, crs)
        stamp, thread = stamp_of(file), ImageThread(str(file))
        try:
            raster = thread.run(partial(cls._open, file, view, limits), stop)
        except BaseException:
            thread.end(_nothing)
            raise
        raster._handles = Handles(
            Handle(thread, raster._source, raster._reader), partial(open_again, file, limits, stamp)
        )
        return raster

    @classmethod
    def _open(
        cls,
        file: Path,
        view: _View,
        limits: RasterLimits,
    ) -> Raster:
        """What `open` does in the image's thread."""
        with image_errors(file, "opened"):
            source = open_source(file, limits, view.page)
            try:
                return cls(file, source, view, limits)
            except BaseException:
                source.close()
                raise

    _handles: Handles

    def read_at_once(self, windows: int) -> None:
        """Let so many windows be read at once, by as many threads that call `read`.

        Each takes an opening of the file of its own, and the memory of reading a window. Of a file
        that only decodes from its start, one window is read at a time.
        """
        if not self._one_by_one:
            self._handles.allow(windows)

    def __init__(
        self,
        path: Path,
        source: Source,
        view: _View,
        limits: RasterLimits,
    ) -> None:
        """Use `Raster.open`."""
        header = source.header
        choice = choose_bands(
            header.colours, view.bands, header.names, header.wavelengths, header.tags
        )
        needed = dict.fromkeys((*choice.shown, *((choice.alpha,) if choice.alpha else ())))
        check_dtype(path, header, list(needed))
        dtype = header.dtype(choice.shown)
        notes = [note for note in (choice.warning, *header.warnings) if note]
        self._source, cost = settle(path, source, list(needed), limits)
        in_memory = isinstance(self._source, MemorySource)
        turned = view.orientation == "exif" and header.orientation != 1
        if turned:
            self._source = TurnedSource(self._source)
        header = self._source.header
        look = find_appearance(self._source, choice, view.value_range, view.transparency)
        self._reader, self._tone = look.reader, look.tone
        notes += [*cost, *look.warnings]
        self._path, self._header = path, header
        self._one_by_one = header.sequential and not in_memory
        self._lock = threading.Lock()
        self.windows_read = 0
        planes = [self._reader.bands.index(band) for band in choice.shown]
        self._channels = [0, 1, 2] if self._tone.palette is not None else (planes * 3)[:3]
        found = Located(header.georeference, header.affine, header.unlocated)
        with environment(path, "located"):
            located = describe(path, found, (header.width, header.height), view.crs)
        self._georeference = located.georeference
        notes += located.warnings
        self.info = RasterInfo(
            path=str(path),
            driver=header.driver,
            width=header.width,
            height=header.height,
            band_count=len(header.dtypes),
            dtype=dtype.name,
            bands=choice.shown,
            crs=located.crs,
            gsd=located.gsd,
            unlocated=located.unlocated,
            centre_wgs84=located.centre,
            nodata=self._tone.nodata[0],
            has_alpha=self._reader.alpha is not None
            or (self._reader.masked and (header.has_mask or bool(header.masked_bands))),
            tiled=header.tiled,
            block_shape=header.block_shape,
            overviews=header.overviews,
            stretch=self._tone.ranges if look.stretched else None,
            warnings=tuple(notes),
            orientation=header.orientation if turned else 1,
            page=header.page,
        )

    @property
    def width(self) -> int:
        """Columns of the image in pixels."""
        return self._header.width

    @property
    def height(self) -> int:
        """Rows of the image in pixels."""
        return self._header.height

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the answer should know, one line each."""
        return self.info.warnings

    @property
    def bytes_read(self) -> int:
        """Bytes of raw pixels taken out of the file so far, masks included."""
        return self._handles.bytes_read

    def read(
        self,
        level_hw: tuple[int, int],
        window: LevelWindow,
        resampling: Resampling = "area",
        stop: Stop | None = None,
    ) -> NDArray[np.float32]:
        """The window of the image as if the whole image were resized to a level.

        Args:
            level_hw: Height and width of the resized image in pixels; may exceed the image's.
            window: The part wanted, in pixels of the resized image.
            resampling: `area`: mean of the visible pixels that an output covers, from the
                coarsest overview that is fine enough; bilinear where the level is larger than
                the image. `reference`: bilinear between full-resolution pixels, not antialiased.
                `bilinear`, `bicubic`, `lanczos`: as Pillow resizes 8-bit pixels, bit for bit.
            stop: Asked between pieces and while GDAL works; a True gives the read up. Any thread
                may call it.

        Returns:
            float32 [rows, cols, 3], red, green, blue in 0..1. Black where nothing can be seen.

        Raises:
            ReadStoppedError: `stop` said so.
            ImageError: The window is not inside the level, the raster is closed, or the file's
                blocks cannot be decoded.
        """
        _check_window(level_hw, window, resampling)
        with self._handles.taken() as handle:
            work = partial(self._read, handle, level_hw, window, resampling)
            return handle.thread.run(work, stop)

    def _read(
        self,
        handle: Handle,
        level_hw: tuple[int, int],
        window: LevelWindow,
        resampling: Resampling,
    ) -> NDArray[np.float32]:
        """What `read` does in the thread of one of the image's openings."""
        with self._lock:
            self.windows_read += 1
        with handle.lock, image_errors(self._path, "read"):
            if handle.closed:
                raise ImageError(f"{self._path} was closed; open it again to read from it")
            if not window.rows or not window.cols:
                return np.zeros((window.rows, window.cols, 3), dtype=np.float32)
            values = handle.reader.resample(self._tone, level_hw, window, resampling)
        return np.ascontiguousarray(np.moveaxis(values[self._channels], 0, -1))

    def polygon(self, bounds: tuple[float, float, float, float]) -> tuple[Ring, Ring] | None:
        """Closed rings around a pixel window: ((x, y), ...) in the CRS and (lon, lat) in WGS 84.

        Args:
            bounds: x0, y0, x1, y1 in pixels of the image, from its outer top left corner.

        Returns:
            `polygon` and `polygon_wgs84` of `place`; None where one of them is missing.
        """
        place = self.place(bounds)
        if place is None or place.polygon_wgs84 is None:
            return None
        return place.polygon, place.polygon_wgs84

    def place(self, bounds: tuple[float, float, float, float]) -> Place | None:
        """Where a pixel window lies, in the image's CRS and in WGS 84.

        Args:
            bounds: x0, y0, x1, y1 in pixels of the image, from its outer top left corner.

        Returns:
            None where the image is not georeferenced.
        """
        georeference = self._georeference
        if georeference is None:
            return None
        with environment(self._path, "located"):
            return georeference.place(bounds)

    def native_ring(self, bounds: tuple[float, float, float, float]) -> Ring | None:
        """A pixel window as a closed ring in the image's CRS, as `place` gives it, and quicker.

        Args:
            bounds: x0, y0, x1, y1 in pixels of the image, from its outer top left corner.

        Returns:
            None where the image is not georeferenced.
        """
        return None if self._georeference is None else self._georeference.ring(bounds)

    def close(self) -> None:
        """Closes the file; more than once does nothing.

        Waits for reads that others wait for, not for one that was given up.
        """
        self._handles.end()

    def __enter__(self) -> Raster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _nothing() -> None:
    """Work that does nothing."""


def _check_window(level_hw: tuple[int, int], window: LevelWindow, resampling: str) -> None:
    height, width = level_hw
    inside = (
        window.row0 >= 0
        and window.col0 >= 0
        and window.rows >= 0
        and window.cols >= 0
        and window.row0 + window.rows <= height
        and window.col0 + window.cols <= width
    )
    if height < 1 or width < 1 or not inside:
        raise ImageError(
            f"{window} is not inside a level of {width}x{height} pixels; "
            "ask for windows that the pyramid lists"
        )
    known = ("area", "reference", *FILTERS)
    if resampling not in known:
        raise ImageError(f"resampling {resampling!r} is unknown; use one of {', '.join(known)}")
