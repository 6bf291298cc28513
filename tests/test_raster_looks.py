"""What is seen of an image: masks, alpha, nodata, MINISWHITE, band names and EXIF orientation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.io import DatasetReader

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster.raster import Raster
from lrs_edge.raster.stretch import is_nodata
from tests.rasters import UTM, noise, quiet, write

RGBA = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)


def read_all(path: Path, **options: Any) -> np.ndarray:
    """The image at its own size."""
    with Raster.open(path, **options) as raster:
        size = (raster.height, raster.width)
        return raster.read(size, LevelWindow(0, 0, *size))


def info(path: Path, **options: Any) -> Any:
    with Raster.open(path, **options) as raster:
        return raster.info


# Masks


@pytest.mark.parametrize("side", [2048, 1999])
@pytest.mark.parametrize("internal", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_mask_hides_at_every_level(tmp_path: Path, internal: bool, when: str, side: int) -> None:
    """A mask that is older than the overviews has overviews of its own; a younger one has not."""
    data, mask = np.full((3, side, side), 90, np.uint8), np.full((side, side), 255, np.uint8)
    data[:, :800], mask[:800] = 255, 0
    path = write(tmp_path / "a.tif", data, tiled=True)
    with quiet(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        for step in ("mask", "overviews") if when == "before" else ("overviews", "mask"):
            with rasterio.open(path, "r+") as file:
                if step == "mask":
                    file.write_mask(mask)
                else:
                    file.build_overviews([2, 4, 8], Resampling.average)
    with Raster.open(path) as raster:
        for scale in (1, 2, 4, 8):
            rows = side // scale
            read = raster.read((rows, rows), LevelWindow(0, 0, rows, rows))
            edge = 800 * rows / side
            assert read[: int(edge) - 1].max() == 0
            assert read[int(edge) + 2 :].min() > 0.3
            part = raster.read((rows, rows), LevelWindow(rows // 3, 7, rows // 5, 90))
            np.testing.assert_allclose(
                part, read[rows // 3 : rows // 3 + rows // 5, 7:97], atol=2e-6
            )


def test_bands_with_masks_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", np.full((1, 64, 64), 200, np.uint8))
    hide = np.full((1, 64, 64), 255, np.uint8)
    hide[:, :20] = 0
    write(tmp_path / "m.tif", hide)
    source = '<SimpleSource><SourceFilename relativeToVRT="1">{}</SourceFilename></SimpleSource>'
    (tmp_path / "a.vrt").write_text(
        '<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1">'
        + source.format("a.tif")
        + '<MaskBand><VRTRasterBand dataType="Byte">'
        + source.format("m.tif")
        + "</VRTRasterBand></MaskBand></VRTRasterBand></VRTDataset>",
        encoding="utf-8",
    )
    read = read_all(tmp_path / "a.vrt")
    assert read[:20].max() == 0
    assert read[20:].min() > 0.7
    assert read_all(tmp_path / "a.vrt", transparency="ignore").min() > 0.7


# Alpha


@pytest.mark.parametrize("kind", ["dark", "varied", "named", "collar"])
def test_near_infrared_marked_as_alpha_hides_nothing(tmp_path: Path, kind: str) -> None:
    data = noise(4, 120, 160)
    data[3] = 60 if kind == "dark" else data[3]
    if kind == "collar":
        data[:, :40] = 0
    path = write(tmp_path / "a.tif", data, colours=RGBA, **UTM)
    if kind == "named":
        with rasterio.open(path, "r+") as file:
            file.set_band_description(4, "NIR")
    shown = np.moveaxis(data[:3], 0, -1) / 255
    np.testing.assert_allclose(read_all(path), shown, atol=1e-6)
    assert any("band 4 is marked as alpha" in text for text in info(path).warnings)
    np.testing.assert_allclose(read_all(path, transparency="ignore"), shown, atol=1e-6)
    if kind == "dark":
        assert read_all(path, transparency="apply").max() == 0
        assert "hides everything" in info(path, transparency="apply").warnings[0]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_real_alpha_is_believed_without_a_warning(tmp_path: Path, dtype: str) -> None:
    data = noise(4, 100, 100, dtype=dtype)
    y, x = np.mgrid[:100, :100]
    full = np.iinfo(dtype).max
    # Soft edges, as a warped image has them.
    data[3] = np.clip((60 - np.hypot(x - 50, y - 50)) / 4, 0, 1) * full
    path = write(tmp_path / "a.tif", data, colours=RGBA)
    read = read_all(path)
    assert read[data[3] == 0].max() == 0
    assert read[data[3] == full].max() > 0.5
    assert info(path).warnings == ()


@pytest.mark.parametrize("how", ["alpha", "mask", "nodata"])
@pytest.mark.parametrize("rows", [0, 1])
def test_little_to_see_is_told(tmp_path: Path, how: str, rows: int) -> None:
    data, seen = noise(4, 100, 100) // 2 + 100, np.zeros((100, 100), np.uint8)
    seen[:rows] = 255
    data[3] = seen
    path = tmp_path / "a.tif"
    if how == "alpha":
        write(path, data, colours=RGBA)
    elif how == "mask":
        write(path, data[:3], mask=seen)
    else:
        write(path, np.where(seen, data[:3], 90), nodata=90)
    (warning,) = info(path).warnings
    assert ("only 1.00% of the image" if rows else "no valid pixel") in warning
    assert how in warning
    assert info(path, transparency="ignore").warnings == ()
    assert read_all(path, transparency="ignore").max() > 0.3


def test_dark_class_maps_are_told_whatever_their_nodata(tmp_path: Path) -> None:
    classes = noise(1, 100, 100) // 32 + 1
    classes[:, :10] = 255
    assert "nearly black" in info(write(tmp_path / "a.tif", classes, nodata=255)).warnings[0]


def test_unknown_words(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(1, 8, 8))
    with pytest.raises(ImageError, match="'auto', 'apply' or 'ignore'"):
        Raster.open(path, transparency="no")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="'exif' or 'stored'"):
        Raster.open(path, orientation="up")  # type: ignore[arg-type]


# Nodata


@pytest.mark.parametrize(
    ("dtype", "nodata", "pixels"),
    [
        ("float32", -3.402823e38, (-3.4028234663852886e38, -3.4e38, -1e38, 0, 700)),
        ("float32", -9999, (-9999, -9999.001, -9999.01, -9998, 9999)),
        ("float32", 0, (0, 1e-30, -0.0, 5)),
        ("float32", np.nan, (np.nan, 1, 2)),
        ("float32", 1e-20, (1e-20, 1.0000001e-20, 2e-20, 0)),
        ("float64", -1.7976931348623157e308, (-1.7976931348623157e308, -1.7e308, 0, 5)),
        ("float64", -9999.9, (-9999.9, -9999.900000000001, -9999.8)),
        ("uint8", 254.5, (253, 254, 255)),
        ("uint8", 255, (0, 254, 255)),
        ("int16", -32768, (-32768, -32767, 0)),
        ("uint16", 65535, (0, 65534, 65535)),
    ],
)
def test_nodata_is_compared_as_gdal_compares_it(
    tmp_path: Path, dtype: str, nodata: float, pixels: tuple[float, ...]
) -> None:
    values = np.array(pixels, dtype="float64").astype(dtype)
    path = write(tmp_path / "a.tif", np.tile(values, (4, 1))[None], nodata=nodata)
    with quiet(), rasterio.open(path) as file:
        visible, held = file.read_masks(1)[0] > 0, file.nodata
    mine = np.isnan(values) if np.isnan(held) else is_nodata(values, held)
    np.testing.assert_array_equal(~mine, visible)


def test_rounded_nodata_stays_out_of_the_stretch(tmp_path: Path) -> None:
    dem = np.linspace(100, 600, 10_000, dtype="float32").reshape(1, 100, 100)
    dem[:, :39] = np.float32(-3.4e38)
    path = write(tmp_path / "a.tif", dem, nodata=-3.4028234663852886e38)
    ((low, high),) = info(path).stretch
    assert 290 < low < high < 600
    assert read_all(path)[:39].max() == 0


def test_nodata_beyond_the_type_hides_nothing(tmp_path: Path) -> None:
    data = noise(1, 20, 20)
    with quiet(), rasterio.open(write(tmp_path / "a.tif", data), "r+") as file:
        file.update_tags(x="y")
    (tmp_path / "a.vrt").write_text(
        '<VRTDataset rasterXSize="20" rasterYSize="20"><VRTRasterBand dataType="Byte" band="1">'
        "<NoDataValue>-9999</NoDataValue>"
        '<SimpleSource><SourceFilename relativeToVRT="1">a.tif</SourceFilename></SimpleSource>'
        "</VRTRasterBand></VRTDataset>",
        encoding="utf-8",
    )
    read = read_all(tmp_path / "a.vrt")
    np.testing.assert_allclose(read[..., 0], data[0] / 255, atol=1e-6)


# MINISWHITE


@pytest.mark.parametrize("kind", ["1", "2", "4", "uint8", "uint16", "alpha", "nodata"])
def test_white_is_zero(tmp_path: Path, kind: str) -> None:
    grey, options = noise(1, 64, 64, dtype="uint16" if kind == "uint16" else "uint8"), {}
    top = 65535 if kind == "uint16" else 255
    if kind.isdigit():
        options, top = {"nbits": int(kind)}, 2 ** int(kind) - 1
        grey = (grey // (256 >> int(kind))).astype("uint8")
    white = top - grey
    if kind == "alpha":
        opaque = np.full_like(grey, 255)
        grey, white = np.concatenate([grey, opaque]), np.concatenate([white, opaque])
        options = {"alpha": "yes"}
    one = write(tmp_path / "a.tif", grey, photometric="MINISBLACK", **options)
    two = write(tmp_path / "b.tif", white, photometric="MINISWHITE", **options)
    if kind == "nodata":
        hide = np.arange(64) < 20
        grey = grey.clip(10, 240)
        white = 255 - grey
        grey[:, hide], white[:, hide] = 3, 3
        one = write(tmp_path / "c.tif", grey, photometric="MINISBLACK", nodata=3)
        two = write(tmp_path / "d.tif", white, photometric="MINISWHITE", nodata=3)
        assert read_all(two)[hide].max() == 0
    assert np.ptp(read_all(one)) > 0.3
    np.testing.assert_allclose(read_all(two), read_all(one), atol=2e-3)
    if kind == "uint8":
        np.testing.assert_allclose(
            read_all(two, value_range=(55, 255)), read_all(one, value_range=(0, 200)), atol=1e-5
        )


# Band names


S2_ALL = [f"B{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8)] + ["B8A", "B9", "B11", "B12"]


@pytest.mark.parametrize(
    ("names", "bands"),
    [
        (["red", "green", "blue"], (1, 2, 3)),
        (["blue", "green", "red", "nir"], (3, 2, 1)),
        (
            ["coastal_blue", "blue", "green_i", "green", "yellow", "red", "rededge", "nir"],
            (6, 4, 2),
        ),
        (["Blue", "Green", "Red"], (3, 2, 1)),
        (["BLUE", "GREEN", "RED", "NIR", "RedEdge"], (3, 2, 1)),
        (["blue_band", "green_band", "red_band"], (3, 2, 1)),
        (["Band 2 - Blau", "Band 3 - Grün", "Band 4 - Rot", "NIR"], (3, 2, 1)),
        (["bleu", "vert", "rouge", "pir"], (3, 2, 1)),
        (["B", "G", "R", "N"], (3, 2, 1)),
        (["B02", "B03", "B04", "B08"], (3, 2, 1)),
        (["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12"], (3, 2, 1)),
        (S2_ALL, (4, 3, 2)),
        (
            ["B8, central wavelength 842 nm", "B4 (665 nm)", "B3 (560 nm)", "B2 (0.49 um)"],
            (2, 3, 4),
        ),
        (["SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B6", "SR_B7"], (4, 3, 2)),
        (["SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B7"], (3, 2, 1)),
    ],
)
def test_bands_named_red_green_blue(
    tmp_path: Path, names: list[str], bands: tuple[int, ...]
) -> None:
    path = write(
        tmp_path / "a.tif", noise(len(names), 8, 8, dtype="uint16"), photometric="MINISBLACK"
    )
    with quiet(), rasterio.open(path, "r+") as file:
        file.descriptions = names
    found = info(path)
    assert (found.bands, found.warnings) == (bands, ())


@pytest.mark.parametrize(
    "names",
    [
        ["B1", "B2", "B3", "B4"],
        ["SR_B4", "SR_B3", "SR_B2"],
        ["Band 4", "Band 3", "Band 2", "Band 1"],
        ["nir", "red", "green"],
        ["near infra red", "red", "green", "red edge"],
        [f"B{n:02}" for n in range(1, 17)],
    ],
)
def test_names_that_are_not_certain_are_told(tmp_path: Path, names: list[str]) -> None:
    path = write(
        tmp_path / "a.tif", noise(len(names), 8, 8, dtype="uint16"), photometric="MINISBLACK"
    )
    with quiet(), rasterio.open(path, "r+") as file:
        file.descriptions = names
    found = info(path)
    assert found.bands == (1, 2, 3)
    (warning,) = found.warnings
    assert names[0] in warning
    assert "does not say" not in warning


def test_a_satellite_in_the_tags_decides_what_codes_mean(tmp_path: Path) -> None:
    for satellite, bands in (("LANDSAT_8", (4, 3, 2)), ("Landsat 5", (3, 2, 1))):
        path = write(tmp_path / "a.tif", noise(5, 8, 8, dtype="uint16"))
        with quiet(), rasterio.open(path, "r+") as file:
            file.descriptions = ["B1", "B2", "B3", "B4", "B5"]
            file.update_tags(SPACECRAFT_ID=satellite)
        assert (info(path).bands, info(path).warnings) == (bands, ())


def test_names_outweigh_colours_that_the_writer_assumed(tmp_path: Path) -> None:
    """GDAL marks four bands of 8 bits as red, green, blue, alpha where nothing is said."""
    data = noise(4, 30, 30)
    path = write(tmp_path / "a.tif", data)
    with quiet(), rasterio.open(path, "r+") as file:
        file.descriptions = ["B02", "B03", "B04", "B08"]
    found = info(path)
    assert found.bands == (3, 2, 1)
    assert "the names are believed" in found.warnings[0]
    np.testing.assert_allclose(read_all(path), np.moveaxis(data[2::-1], 0, -1) / 255, atol=1e-6)


# EXIF orientation

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kept", [True, False])
def test_photographs_are_turned(
    tmp_path: Path, form: str, orientation: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded once and kept, or read window by window by GDAL."""
    monkeypatch.setattr("lrs_edge.raster.window.STRIP_VALUES", 3000)
    from lrs_edge.raster.raster import RasterLimits

    stored = np.moveaxis(noise(3, 100, 140), 0, -1)
    exif = Image.Exif()
    exif[0x112] = orientation
    options = (
        {"quality": 95, "lossless": True}
        if form == "WEBP"
        else {"quality": 100, "subsampling": 0}
        if form == "JPEG"
        else {}
    )
    Image.fromarray(stored).save(tmp_path / "a", form, exif=exif, **options)
    expected = TURNS[orientation](stored) / 255
    limits = RasterLimits() if kept else RasterLimits(in_memory_bytes=1000)
    if form == "WEBP" and not kept:
        limits = RasterLimits(in_memory_bytes=1 << 20)
    with Raster.open(tmp_path / "a", limits=limits) as raster:
        size = (raster.height, raster.width)
        assert size == expected.shape[:2]
        assert raster.info.orientation == orientation
        read = raster.read(size, LevelWindow(0, 0, *size))
        part = raster.read(size, LevelWindow(11, 23, 50, 40))
        half = raster.read((size[0] // 2, size[1] // 2), LevelWindow(5, 3, 20, 30))
    np.testing.assert_allclose(part, read[11:61, 23:63], atol=2e-6)
    assert np.abs(read - expected).mean() < (0.03 if form == "JPEG" else 1e-6)
    means = read.reshape(size[0] // 2, 2, size[1] // 2, 2, 3).mean((1, 3))[5:25, 3:33]
    np.testing.assert_allclose(half, means, atol=0.08 if form == "JPEG" else 1e-5)
    as_stored = read_all(tmp_path / "a", orientation="stored")
    assert as_stored.shape == stored.shape


def test_images_with_a_place_are_not_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(np.moveaxis(noise(3, 20, 30), 0, -1)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.jgw").write_text("1\n0\n0\n-1\n500000\n5000000\n", encoding="ascii")
    assert info(tmp_path / "a.jpg").width == 30


def test_gdal_is_asked_for_masks_of_the_image(tmp_path: Path) -> None:
    """The shares that are hidden are GDAL's own, at odd factors too."""
    mask = (np.random.default_rng(0).random((301, 403)) > 0.4).astype(np.uint8) * 255
    mask = np.kron(mask, np.ones((4, 4), np.uint8))
    path = write(tmp_path / "a.tif", noise(1, *mask.shape), mask=mask, overviews=(2, 4))
    with quiet(), DatasetReader(path, overview_level=0) as file:
        own = file.read_masks(1) > 0
    with Raster.open(path) as raster:
        source = raster._source
        size = source.size(0)
        assert size == own.shape
        _, seen = source.read([1], (0, 0, size[1], size[0]), overview=0)
        _, part = source.read([1], (17, 31, 333, 201), overview=0)
    np.testing.assert_array_equal(seen, own)
    np.testing.assert_array_equal(part, own[31:201, 17:333])
