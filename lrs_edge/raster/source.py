"""Native pixels of one image file: what the file says about itself, and blocks of raw numbers.

Knows nothing about colours, levels or stretching. A `Source` reads windows of raw pixels from the
image or from one of its overviews: `gdal_source.py` from the file, `MemorySource` from an array
that was decoded once. Boxes are in pixels of what is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.box import PixelBox
from lrs_edge.raster.codecs import unopened_format
from lrs_edge.raster.georeference import Georeference
from lrs_edge.raster.orientation import EXIF_ORIENTATION, valid_orientation

#: Raw pixels [bands, rows, cols] and the file's mask [rows, cols] (None: no mask).
Pixels = tuple[NDArray[Any], "NDArray[np.bool_] | None"]

_PILLOW_FORMATS = ("JPEG", "JPEG2000", "PNG", "TIFF", "BMP", "GIF", "WEBP", "AVIF", "PPM", "TGA")


@dataclass(frozen=True)
class ImageHeader:
    """What a file says about itself.

    Attributes:
        driver: GDAL's name of the format, or `Pillow:` and Pillow's.
        height: Rows in pixels.
        width: Columns in pixels.
        dtypes: Data type of each band.
        colours: Colour interpretation of each band, rasterio's names.
        nodata: Nodata value of each band, or None.
        names: Description of each band, or None; empty where the format has none.
        wavelengths: Central wavelength of each band in nanometres, or None; may be empty.
        tags: Tags of the file.
        bits: Bits in use of each band, where the file says that they are fewer than its type's.
        white_is_zero: Whether the first band, shown as grey, counts down from white.
        has_mask: Whether a mask beside the bands says which pixels are visible.
        masked_bands: Bands (1-based) that GDAL masks each by itself.
        page: Which of the file's images this is, from 1.
        orientation: EXIF orientation, 1 to 8: how a viewer turns the stored pixels.
        palette: [entries, 4] uint8 red, green, blue, alpha of band 1's colour table, or None.
        tiled: Whether blocks are narrower than the image.
        sequential: Whether reading backwards decodes from the start again.
        block_shape: Rows and columns of a block.
        block_bytes: Memory that decoding one block takes.
        overviews: Decimation factors, ascending.
        georeference: CRS and transform, or None.
        affine: Transform from pixels to x and y where the file has a usable one, else None.
        unlocated: Why there is no georeference; empty where nothing tells.
        warnings: What a reader of the answer should know.
        backwards: Whether rows, and columns, are better read from the last to the first.
    """

    driver: str
    height: int
    width: int
    dtypes: tuple[str, ...]
    colours: tuple[str, ...]
    nodata: tuple[float | None, ...]
    names: tuple[str | None, ...] = ()
    wavelengths: tuple[float | None, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    bits: tuple[int | None, ...] = ()
    white_is_zero: bool = False
    has_mask: bool = False
    masked_bands: tuple[int, ...] = ()
    page: int = 1
    orientation: int = 1
    palette: NDArray[np.uint8] | None = None
    tiled: bool = False
    sequential: bool = False
    block_shape: tuple[int, int] = (1, 1)
    block_bytes: int = 0
    overviews: tuple[int, ...] = ()
    georeference: Georeference | None = None
    affine: tuple[float, float, float, float, float, float] | None = None
    unlocated: str = ""
    warnings: tuple[str, ...] = ()
    backwards: tuple[bool, bool] = (False, False)

    @property
    def full(self) -> PixelBox:
        """The whole image."""
        return (0, 0, self.width, self.height)

    def nbytes(self, bands: Sequence[int]) -> int:
        """Bytes of some bands (1-based) of the whole image, decoded."""
        return self.height * self.width * len(bands) * self.dtype(bands).itemsize

    def dtype(self, bands: Sequence[int]) -> np.dtype[Any]:
        """The type that holds the values of all of these bands (1-based)."""
        return np.result_type(*(self.dtypes[band - 1] for band in bands))


class Source(Protocol):
    """Raw pixels of one open image. Not safe for threads; `Raster` locks around it."""

    header: ImageHeader

    @property
    def bytes_read(self) -> int:
        """Bytes of raw pixels taken out of the file so far, masks included."""

    def size(self, overview: int | None) -> tuple[int, int] | None:
        """Height and width of the image (None) or of overview 0, 1, ...; None if unusable."""

    def read(
        self,
        bands: Sequence[int],
        box: PixelBox,
        *,
        overview: int | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Pixels:
        """Raw pixels of a window.

        Args:
            bands: Bands, 1-based.
            box: The window, in pixels of the overview where one is given.
            overview: Index into `header.overviews`, or None for the image itself.
            shape: Rows and columns to decimate the window to (nearest), or None.

        Raises:
            ImageError: The file's blocks cannot be decoded.
        """

    def close(self) -> None:
        """Releases the file; more than once does nothing."""


class MemorySource:
    """Bands that were decoded once, with their mask."""

    def __init__(
        self,
        header: ImageHeader,
        bands: Sequence[int],
        pixels: Pixels,
        bytes_read: int = 0,
        file: Source | None = None,
    ) -> None:
        """Keeps pixels.

        Args:
            header: Of the file they came from.
            bands: Bands kept, 1-based.
            pixels: Raw pixels [bands, height, width] and mask.
            bytes_read: What it took to get them.
            file: The file they came from, closed here: it is not needed any more.
        """
        self.header = header
        self.bytes_read = bytes_read
        self._places = {band: place for place, band in enumerate(bands)}
        self._raw, self._mask = pixels
        if file is not None:
            file.close()

    def size(self, overview: int | None) -> tuple[int, int] | None:
        """See `Source.size`. Overviews are not used: the pixels are at hand."""
        return (self.header.height, self.header.width) if overview is None else None

    def read(
        self,
        bands: Sequence[int],
        box: PixelBox,
        *,
        overview: int | None = None,  # noqa: ARG002 (size() offers none)
        shape: tuple[int, int] | None = None,
    ) -> Pixels:
        """See `Source.read`."""
        x0, y0, x1, y1 = box
        rows, cols = slice(y0, y1), slice(x0, x1)
        if shape is not None:
            rows = slice(y0, y1, -(-(y1 - y0) // shape[0]))
            cols = slice(x0, x1, -(-(x1 - x0) // shape[1]))
        raw = self._raw[[self._places[band] for band in bands], rows, cols]
        return raw, None if self._mask is None else self._mask[rows, cols]

    def close(self) -> None:
        """See `Source.close`."""
        self._raw, self._mask = self._raw[:, :0, :0], None


def open_with_pillow(path: Path, in_memory_bytes: int) -> MemorySource:
    """Decodes an image that GDAL has no codec for.

    Args:
        path: A plain local file.
        in_memory_bytes: Twice the most bytes of 8-bit RGBA that it may decode to: codecs and
            Pillow hold several copies meanwhile.

    Raises:
        ImageError: Pillow does not know it either, it is damaged, or too large.
    """
    Image.init()
    # A fixed list: some of Pillow's other formats run external programs.
    formats = [name for name in _PILLOW_FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=formats) as image:
                if image.width * image.height * 8 > in_memory_bytes:
                    raise ImageError(
                        f"{path} is {image.width}x{image.height} pixels of {image.format}, which "
                        "can only be decoded as a whole; convert it to a Cloud-Optimized GeoTIFF"
                    )
                alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
                pixels = np.asarray(image.convert("RGBA" if alpha else "RGB"))
                kind = f"Pillow:{image.format}"
                orientation = valid_orientation(image.getexif().get(EXIF_ORIENTATION))
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file breaks in them
        known = unopened_format(path)
        if known is not None and "truncated" not in str(error):
            raise ImageError(
                f"{path} looks like {known}, which is not supported, or which the "
                "libraries installed lack, or it is damaged; convert it with "
                "gdal_translate -of COG"
            ) from error
        reason = "a damaged image" if "truncated" in str(error) else "no image that can be read"
        raise ImageError(
            f"{path} is {reason}; give a GeoTIFF, COG, JPEG 2000, NITF, VRT, PNG or JPEG file"
        ) from error
    height, width, count = pixels.shape
    header = ImageHeader(
        driver=kind,
        height=height,
        width=width,
        dtypes=("uint8",) * count,
        colours=("red", "green", "blue", "alpha")[:count],
        nodata=(None,) * count,
        bits=(None,) * count,
        orientation=orientation,
        block_shape=(height, width),
    )
    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    return MemorySource(header, range(1, count + 1), (planes, None), planes.nbytes)


def is_plain_jpeg(header: ImageHeader) -> bool:
    """True for a JPEG of 8-bit grey or RGB without a mask."""
    plain = len(header.dtypes) in (1, 3) and set(header.dtypes) == {"uint8"}
    return header.driver == "JPEG" and plain and not header.has_mask
