"""An image that Pillow has decoded, read from Pillow's own memory: a second copy would not fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.box import PixelBox
from lrs_edge.raster.image_thread import check_stopped
from lrs_edge.raster.source import ImageHeader, Pixels, Source

#: Rows copied out at a time.
_ROWS = 256


class PillowSource:
    """8-bit bands of a decoded image; grey takes one byte per pixel, everything else four.

    Args:
        header: Of the file it came from; as many 8-bit bands as the image has.
        image: Decoded, in mode L, RGB or RGBA.
    """

    def __init__(self, header: ImageHeader, image: Image.Image) -> None:
        self.header = header
        self.bytes_read = header.width * header.height * len(header.dtypes)
        self._image: Image.Image | None = image

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
        assert self._image is not None, "the source was closed"
        x0, y0, x1, y1 = box
        down = across = 1
        if shape is not None:
            down, across = -(-(y1 - y0) // shape[0]), -(-(x1 - x0) // shape[1])
        size = (len(range(y0, y1, down)), len(range(x0, x1, across)))
        out: NDArray[Any] = np.empty((len(bands), *size), np.uint8)
        step = max(_ROWS // down, 1) * down
        for top in range(y0, y1, step):
            check_stopped()
            strip = self._image.crop((x0, top, x1, min(top + step, y1)))
            part = np.asarray(strip).reshape(strip.height, strip.width, -1)[::down, ::across]
            first = (top - y0) // down
            for place, band in enumerate(bands):
                out[place, first : first + len(part)] = part[..., band - 1]
        return out, None

    def close(self) -> None:
        """See `Source.close`."""
        self._image = None


#: Most bytes that decoding a JPEG may take in Pillow or in libjpeg.
MAX_JPEG_BYTES = 192 << 20


def decode_jpeg(path: Path, source: Source, in_memory_bytes: int) -> PillowSource | None:
    """All pixels of a plain JPEG, decoded by Pillow as the paper's authors do it.

    GDAL's wheels bring libjpeg 9, which enlarges halved chroma differently from the libjpeg-turbo
    of Pillow (up to 35 of 255 at colour edges).

    Args:
        path: The file.
        source: The same file as GDAL opened it; closed here where pixels are returned.
        in_memory_bytes: Most bytes of pixels that are kept.

    Returns:
        The pixels; None where they are too many: GDAL reads such a file line by line.

    Raises:
        ImageError: The file is damaged.
    """
    header = source.header
    mode = "L" if len(header.dtypes) == 1 else "RGB"
    stored = header.width * header.height * (1 if mode == "L" else 4)
    if header.nbytes(range(1, len(header.dtypes) + 1)) > in_memory_bytes or stored > MAX_JPEG_BYTES:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=["JPEG"]) as image:
                agrees = image.size == (header.width, header.height)
                image.load()
                kept = image if image.mode == mode else image.convert(mode)
    except Exception as error:  # see open_with_pillow
        raise ImageError(f"{path} is a damaged JPEG ({error}); get the file again") from error
    if not agrees:
        raise ImageError(f"{path} is a damaged JPEG (its parts disagree); get the file again")
    source.close()
    return PillowSource(header, kept)


def check_progressive(path: Path, header: ImageHeader) -> None:
    """Refuses a JPEG whose coefficients all have to be held until its last scan, and are too many.

    Raises:
        ImageError: It is progressive and large.
    """
    needs = header.width * header.height * 2 * len(header.dtypes)
    if header.driver != "JPEG" or needs <= MAX_JPEG_BYTES // 2:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=["JPEG"]) as image:
                progressive = bool(image.info.get("progressive"))
        except Exception:  # GDAL opened it, and will say what is wrong
            progressive = True
    if progressive:
        raise ImageError(
            f"{path} is a progressive JPEG of {header.width}x{header.height} pixels, too large to "
            "decode; convert it to a Cloud-Optimized GeoTIFF (gdal_translate -of COG)"
        )
