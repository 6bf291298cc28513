"""Bands, types, stretch, nodata and alpha of an open raster."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rasterio.enums import ColorInterp

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster.raster import Raster, RasterInfo
from tests.rasters import UTM, noise, write

RGBA = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)


def read_all(raster: Raster, **options: Any) -> np.ndarray:
    """The image at its own size."""
    size = (raster.height, raster.width)
    return raster.read(size, LevelWindow(0, 0, *size), **options)


def test_info_of_a_cog_like_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tif",
        noise(3, 300, 400),
        tiled=True,
        blockxsize=128,
        blockysize=64,
        overviews=(2, 4),
        photometric="RGB",
        **UTM,
    )
    with Raster.open(str(path)) as raster:
        info = raster.info
        assert (raster.width, raster.height) == (400, 300)
    assert info == RasterInfo(
        path=str(path),
        driver="GTiff",
        width=400,
        height=300,
        band_count=3,
        dtype="uint8",
        bands=(1, 2, 3),
        crs="EPSG:32632",
        gsd=pytest.approx(0.5, rel=0.01),
        nodata=None,
        has_alpha=False,
        tiled=True,
        block_shape=(64, 128),
        overviews=(2, 4),
        stretch=None,
        warnings=(),
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.width = 1  # type: ignore[misc]


@pytest.mark.parametrize("resampling", ["area", "reference"])
@pytest.mark.parametrize("driver", ["GTiff", "PNG", "JP2OpenJPEG"])
def test_eight_bit_is_divided_by_255(tmp_path: Path, driver: str, resampling: str) -> None:
    data = noise(3, 120, 150)
    options = {"QUALITY": "100", "REVERSIBLE": "YES"} if driver.startswith("JP2") else {}
    path = write(tmp_path / "image", data, driver=driver, **options)
    with Raster.open(path) as raster:
        read = read_all(raster, resampling=resampling)
        assert raster.info.driver == driver
    np.testing.assert_allclose(read, np.moveaxis(data, 0, -1) / 255, atol=1e-6)


def test_jpeg_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: left so, as in the reference
    image = Image.fromarray(np.moveaxis(noise(3, 200, 300), 0, -1))
    # Halved chroma: GDAL's libjpeg would enlarge it differently.
    image.save(path, quality=80, subsampling="4:2:0", exif=exif)
    with Raster.open(path, orientation="stored") as raster:
        read = read_all(raster)
    np.testing.assert_allclose(read, np.asarray(Image.open(path)) / 255, atol=1e-6)


def test_nitf(tmp_path: Path) -> None:
    data = noise(1, 64, 64)
    with Raster.open(write(tmp_path / "a.ntf", data, driver="NITF")) as raster:
        np.testing.assert_allclose(read_all(raster)[..., 2], data[0] / 255, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_default_bands(tmp_path: Path, count: int) -> None:
    data = noise(count, 20, 30)
    with Raster.open(write(tmp_path / "a.tif", data, photometric="MINISBLACK")) as raster:
        read = read_all(raster)
        assert raster.info.bands == ((1, 2, 3) if count >= 3 else (1,))
        assert len(raster.warnings) == (count not in (1, 3))
    shown = data[:3] if count >= 3 else data[[0, 0, 0]]
    np.testing.assert_allclose(read, np.moveaxis(shown, 0, -1) / 255, atol=1e-6)


def test_bands_follow_the_colour_interpretation(tmp_path: Path) -> None:
    data = noise(4, 20, 30)
    colours = (ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined)
    path = write(tmp_path / "a.tif", data, colours=colours, photometric="MINISBLACK")
    with Raster.open(path) as raster:
        assert raster.info.bands == (3, 2, 1)
        assert raster.warnings == ()
    with Raster.open(path, bands=[4, 4, 2]) as raster:
        read = read_all(raster)
        assert raster.info.bands == (4, 4, 2)
    np.testing.assert_allclose(read, np.moveaxis(data[[3, 3, 1]], 0, -1) / 255, atol=1e-6)
    with Raster.open(path, bands=(2,)) as raster:
        np.testing.assert_allclose(read_all(raster)[..., 0], data[1] / 255, atol=1e-6)


def test_alpha_can_be_looked_at(tmp_path: Path) -> None:
    data = noise(4, 20, 30)
    with Raster.open(write(tmp_path / "a.tif", data, colours=RGBA), bands=[4]) as raster:
        np.testing.assert_allclose(read_all(raster)[..., 0], data[3] / 255, atol=1e-6)


@pytest.mark.parametrize(
    "bands", [(), (1, 2), (0,), (1, 2, 5), (1, 2, 3, 4), (-1,), ("1",), (1.0,)]
)
def test_impossible_bands(tmp_path: Path, bands: Any) -> None:
    path = write(tmp_path / "a.tif", noise(4, 20, 30), colours=RGBA)
    with pytest.raises(ImageError, match=r"1 \(red\), 2 \(green\), 3 \(blue\), 4 \(alpha\)"):
        Raster.open(path, bands=bands)


@pytest.mark.parametrize(
    "dtype", ["uint16", "int16", "uint32", "int32", "float32", "float64", "int8"]
)
def test_other_types_are_stretched_between_percentiles(tmp_path: Path, dtype: str) -> None:
    values = np.linspace(-100 if dtype == "int8" else 10, 100, 10_000).reshape(1, 100, 100)
    data = values.astype(dtype)
    data[0, 0, 0] = 127  # an outlier must not count
    with Raster.open(write(tmp_path / "a.tif", data)) as raster:
        read = read_all(raster)
        assert raster.info.stretch is not None
        ((low, high),) = raster.info.stretch
        assert raster.info.dtype == dtype
    np.testing.assert_allclose((low, high), np.percentile(data, (2, 98)))
    expected = np.clip((data[0].astype(float) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(read[..., 1], expected, atol=1e-6)


def test_stretch_is_per_band_and_the_same_for_all_windows(tmp_path: Path) -> None:
    data = noise(1, 200, 300, dtype="uint16") * np.array([1, 2, 3], "uint16")[:, None, None]
    path = write(tmp_path / "a.tif", data, tiled=True, blockxsize=64, blockysize=64)
    with Raster.open(path) as raster:
        full = read_all(raster)
        part = raster.read((200, 300), LevelWindow(50, 60, 70, 80))
        ranges = np.array(raster.info.stretch)
    np.testing.assert_allclose(part, full[50:120, 60:140], atol=1e-6)
    np.testing.assert_allclose(ranges[2], ranges[0] * 3)


def test_large_files_are_sampled_in_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrs_edge.raster.window._PATCHED_PIXELS", 100_000)
    data = noise(3, 1500, 2000, dtype="uint16")
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    with Raster.open(write(tmp_path / "a.tif", data, **options)) as raster:
        assert raster.bytes_read < data.nbytes / 2
        found = np.array(raster.info.stretch)
    expected = np.percentile(data.reshape(3, -1), (2, 98), axis=1).T
    np.testing.assert_allclose(found, expected, rtol=0.03)


def test_large_offsets_keep_their_digits(tmp_path: Path) -> None:
    data = 1e9 + np.linspace(0, 1, 2500).reshape(1, 50, 50)
    with Raster.open(write(tmp_path / "a.tif", data), value_range=(1e9, 1e9 + 1)) as raster:
        np.testing.assert_allclose(read_all(raster)[..., 0], data[0] - 1e9, atol=1e-6)


def test_value_range_overrides(tmp_path: Path) -> None:
    data = noise(3, 20, 30)
    with Raster.open(write(tmp_path / "a.tif", data), value_range=(100, 200)) as raster:
        read = read_all(raster)
        assert raster.info.stretch == ((100.0, 200.0),) * 3
    expected = np.clip((np.moveaxis(data, 0, -1).astype(float) - 100) / 100, 0, 1)
    np.testing.assert_allclose(read, expected, atol=1e-6)


@pytest.mark.parametrize(
    "value_range", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1), (1,), (1, 2, 3), "ab", (None, 1)]
)
def test_impossible_ranges(tmp_path: Path, value_range: Any) -> None:
    path = write(tmp_path / "a.tif", noise(1, 8, 8))
    with pytest.raises(ImageError, match="low < high"):
        Raster.open(path, value_range=value_range)


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_constant_band(tmp_path: Path, value: int) -> None:
    path = write(tmp_path / "a.tif", np.full((1, 40, 40), value, "uint16"))
    with Raster.open(path) as raster:
        np.testing.assert_allclose(read_all(raster), 0.5, atol=1e-5)


def test_mostly_constant_band_is_stretched_to_its_extremes(tmp_path: Path) -> None:
    data = np.zeros((1, 100, 100), "uint16")
    data[0, 0, :50] = 9
    with Raster.open(write(tmp_path / "a.tif", data)) as raster:
        assert raster.info.stretch == ((0.0, 9.0),)


@pytest.mark.parametrize("dtype", ["int16", "float32", "float64"])
@pytest.mark.parametrize("nodata", [-9999.0, np.nan])
def test_nodata_is_black_and_left_out_of_the_stretch(
    tmp_path: Path, dtype: str, nodata: float
) -> None:
    if dtype == "int16" and np.isnan(nodata):
        pytest.skip("no integer is NaN")
    data = (1000 + noise(1, 60, 60, dtype="uint16")).astype(dtype)
    data[0, :30] = nodata
    with Raster.open(write(tmp_path / "a.tif", data, nodata=nodata)) as raster:
        read = read_all(raster)
        assert raster.info.stretch is not None
        assert raster.info.stretch[0][0] >= 1000
    assert (read[:30] == 0).all()
    assert read[30:].mean() > 0.3


def test_infinities_are_black(tmp_path: Path) -> None:
    data = noise(3, 60, 60, dtype="float32")
    data[:, 0, 0], data[:, 0, 1], data[1, 5, 5] = np.inf, -np.inf, np.nan
    with Raster.open(write(tmp_path / "a.tif", data)) as raster:
        for resampling in ("area", "reference"):
            read = read_all(raster, resampling=resampling)
            assert np.isfinite(read).all()
            assert (read[0, :2] == 0).all()
            assert read[5, 5, 1] == 0


def test_a_pixel_is_nodata_only_where_all_bands_are(tmp_path: Path) -> None:
    data = np.full((3, 2, 2), 100, np.uint8)
    data[:, 0, 0] = 0
    data[2, 1, 1] = 0
    with Raster.open(write(tmp_path / "a.tif", data, nodata=0)) as raster:
        read = raster.read((1, 1), LevelWindow(0, 0, 1, 1))
    np.testing.assert_allclose(read[0, 0] * 255, [100, 100, 200 / 3], atol=1e-3)


def test_nothing_but_nodata(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.full((1, 40, 40), 5, "uint16"), nodata=5)
    with Raster.open(path) as raster:
        assert (read_all(raster) == 0).all()
        assert any("no valid pixel" in warning for warning in raster.warnings)


@pytest.mark.parametrize("driver", ["GTiff", "PNG"])
@pytest.mark.parametrize("count", [2, 4])
def test_alpha_hides(tmp_path: Path, count: int, driver: str) -> None:
    data = noise(count, 50, 50)
    data[-1] = np.where(np.arange(50) < 25, 127, 128)
    colours = RGBA if count == 4 else (ColorInterp.gray, ColorInterp.alpha)
    options: dict[str, Any] = {"colours": colours} if driver == "GTiff" else {}
    with Raster.open(write(tmp_path / "a", data, driver=driver, **options)) as raster:
        read = read_all(raster)
        assert raster.info.has_alpha
        assert raster.info.bands == ((1, 2, 3) if count == 4 else (1,))
    assert (read[:, :25] == 0).all()
    shown = np.moveaxis(data[: 3 if count == 4 else 1], 0, -1)
    np.testing.assert_allclose(read[:, 25:], np.broadcast_to(shown, read.shape)[:, 25:] / 255)


def test_any_opacity_counts_in_a_deep_alpha(tmp_path: Path) -> None:
    """Some writers put 255, not 65535, into the alpha of 16-bit images."""
    data = noise(4, 50, 50, dtype="uint16")
    data[3] = np.where(np.arange(50) < 25, 0, 255)
    with Raster.open(write(tmp_path / "a.tif", data, colours=RGBA)) as raster:
        read = read_all(raster)
    assert (read[:, :25] == 0).all()
    assert (read[:, 25:].max(axis=-1) > 0).mean() > 0.9


def test_colour_table_is_expanded(tmp_path: Path) -> None:
    data = (np.arange(100) % 4).reshape(1, 10, 10).astype(np.uint8)
    table = {0: (10, 20, 30, 255), 1: (200, 100, 0, 255), 2: (9, 9, 9, 0), 3: (0, 0, 255, 255)}
    path = write(tmp_path / "a.png", data, driver="PNG", colormap=table)
    with Raster.open(path) as raster:
        read = read_all(raster)
        assert raster.warnings == ()
    assert np.rint(read[0, :4] * 255).tolist() == [
        [10, 20, 30],
        [200, 100, 0],
        [0] * 3,
        [0, 0, 255],
    ]


def test_one_bit_images_are_not_black(tmp_path: Path) -> None:
    data = (np.arange(64) % 2).reshape(1, 8, 8).astype(np.uint8)
    with Raster.open(write(tmp_path / "a.tif", data, nbits=1)) as raster:
        np.testing.assert_array_equal(read_all(raster)[..., 0], data[0])
        assert raster.warnings == ()


def test_class_maps_are_shown_dark_with_a_warning(tmp_path: Path) -> None:
    with Raster.open(write(tmp_path / "a.tif", noise(1, 50, 50) // 200)) as raster:
        assert "value range" in raster.warnings[0]
