"""Files with several images, harmless JPEG warnings, and codecs that are not there."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster.raster import Raster, RasterLimits
from tests.rasters import noise, write


def read_all(path: Path, **options: Any) -> np.ndarray:
    with Raster.open(path, **options) as raster:
        size = (raster.height, raster.width)
        return raster.read(size, LevelWindow(0, 0, *size))


def test_the_largest_image_of_a_tiff_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "a#1 b.tif"
    large = np.moveaxis(noise(3, 90, 120), 0, -1)
    small = Image.fromarray(large).resize((30, 20))
    exif = Image.Exif()
    exif[0x112] = 3
    small.save(path, save_all=True, append_images=[Image.fromarray(large), small], exif=exif)
    with Raster.open(path) as raster:
        assert (raster.width, raster.height, raster.info.page) == (120, 90, 2)
        assert "holds 3 images; number 2, the largest" in raster.warnings[0]
    np.testing.assert_allclose(read_all(path, orientation="stored"), large / 255, atol=1e-6)
    with Raster.open(path, page=3) as raster:
        assert (raster.width, raster.warnings) == (30, ())
    for page in (0, 4, "2"):
        with pytest.raises(ImageError, match="holds 3, counted from 1"):
            Raster.open(path, page=page)  # type: ignore[arg-type]


def test_channels_as_pages_are_told(tmp_path: Path) -> None:
    pages = [Image.fromarray(plane) for plane in noise(3, 40, 50)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with Raster.open(tmp_path / "a.tif") as raster:
        assert "number 1, the first of 3" in raster.warnings[0]


def test_overviews_and_masks_are_no_images(tmp_path: Path) -> None:
    mask = np.full((200, 200), 255, np.uint8)
    path = write(tmp_path / "a.tif", noise(3, 200, 200), mask=mask, overviews=(2, 4))
    with Raster.open(path, page=1) as raster:
        assert raster.warnings == ()


@pytest.mark.parametrize("kept", [True, False])
def test_stray_bytes_in_a_jpeg_are_read_over(tmp_path: Path, kept: bool) -> None:
    """Some cameras write them; libjpeg only warns."""
    image = Image.fromarray(np.moveaxis(noise(3, 60, 80), 0, -1))
    image.save(tmp_path / "clean.jpg", quality=90)
    data = (tmp_path / "clean.jpg").read_bytes()
    cut = data.find(b"\xff\xda")
    (tmp_path / "stray.jpg").write_bytes(data[:cut] + b"\x00\x12\x34\x00" + data[cut:])
    limits = RasterLimits(in_memory_bytes=(1 << 20) if kept else 100)
    clean = read_all(tmp_path / "clean.jpg", limits=limits)
    np.testing.assert_array_equal(read_all(tmp_path / "stray.jpg", limits=limits), clean)


def test_large_truncated_jpegs_are_refused(tmp_path: Path) -> None:
    """Those that GDAL decodes: the default of its libjpeg driver suffices."""
    image = Image.fromarray(np.moveaxis(noise(3, 400, 500), 0, -1))
    image.save(tmp_path / "a.jpg", quality=90)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match="truncated or damaged"):
        read_all(tmp_path / "a.jpg", limits=RasterLimits(in_memory_bytes=100))


def test_a_missing_codec_is_no_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(1, 64, 64), compress="deflate")
    data = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    for entry in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] == 259:
            struct.pack_into("<H", data, entry + 8, 12345)
    path.write_bytes(data)
    with pytest.raises(ImageError, match="not damaged: this build of GDAL lacks") as caught:
        Raster.open(path)
    assert "copy it again" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "name"), [(b"\xff\x0a", "JPEG XL"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"GRIB", "GRIB")]
)
def test_formats_that_are_not_read_are_named(tmp_path: Path, start: bytes, name: str) -> None:
    (tmp_path / "a").write_bytes(start + bytes(range(200)))
    with pytest.raises(ImageError, match=name):
        Raster.open(tmp_path / "a")
