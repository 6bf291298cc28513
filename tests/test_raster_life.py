"""Georeference, life, odd files and formats of an open raster."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster.raster import Raster, RasterLimits
from lrs_edge.raster.source import open_with_pillow
from tests.rasters import UTM, noise, quiet, vrt, write


def read_all(raster: Raster, **options: Any) -> np.ndarray:
    """The image at its own size."""
    size = (raster.height, raster.width)
    return raster.read(size, LevelWindow(0, 0, *size), **options)


def test_polygon_and_ground_resolution(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(1, 100, 200), **UTM)
    with Raster.open(path) as raster:
        found = raster.polygon((10, 20, 110, 60))
        assert raster.info.gsd == pytest.approx(0.5, rel=2e-3)
    assert found is not None
    native, wgs84 = found
    assert native[0] == native[-1]
    assert wgs84[0] == wgs84[-1]
    assert len(native) == len(wgs84) == 5
    xs, ys = zip(*native, strict=True)
    assert (min(xs), max(xs)) == (364005.0, 364055.0)
    assert (min(ys), max(ys)) == (5620970.0, 5620990.0)
    assert all(7 < lon < 7.2 and 50.6 < lat < 50.8 for lon, lat in wgs84)
    # Counter-clockwise, as GeoJSON wants the outer ring.
    pairs = pairwise(wgs84)
    assert sum(ax * by - bx * ay for (ax, ay), (bx, by) in pairs) > 0


def test_edges_that_are_curves_in_wgs84_are_cut_into_pieces(tmp_path: Path) -> None:
    polar = rasterio.Affine(10_000, 0, -1e6, 0, -10_000, 1e6)
    path = write(tmp_path / "a.tif", noise(1, 60, 60), crs="EPSG:3413", transform=polar)
    with Raster.open(path) as raster:
        found = raster.polygon((0, 0, 60, 60))
    assert found is not None
    assert len(found[0]) == 5
    assert len(found[1]) > 33


def test_web_mercator_pixels_are_smaller_on_the_ground(tmp_path: Path) -> None:
    transform = rasterio.Affine(1, 0, 0, 0, -1, 8399737.9)  # 60 degrees north
    path = write(tmp_path / "a.tif", noise(1, 10, 10), crs="EPSG:3857", transform=transform)
    with Raster.open(path) as raster:
        assert raster.info.gsd == pytest.approx(0.5, rel=0.01)


def test_no_georeference(tmp_path: Path) -> None:
    with Raster.open(write(tmp_path / "a.tif", noise(1, 10, 10))) as raster:
        assert raster.polygon((0, 0, 5, 5)) is None
        assert (raster.info.crs, raster.info.gsd, raster.warnings) == (None, None, ())


def test_places_outside_the_crs_have_no_polygon(tmp_path: Path) -> None:
    transform = rasterio.Affine(1e7, 0, 1e12, 0, -1e7, 1e12)
    path = write(tmp_path / "a.tif", noise(1, 10, 10), crs="EPSG:32632", transform=transform)
    with Raster.open(path) as raster:
        assert raster.polygon((0, 0, 5, 5)) is None
        assert raster.info.gsd is None


def test_ground_control_points_are_ignored_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    points = [GroundControlPoint(r, c, 7 + c / 100, 50 - r / 100) for r in (0, 9) for c in (0, 9)]
    write(path, noise(1, 10, 10))
    with quiet(), rasterio.open(path, "r+") as file:
        file.gcps = (points, CRS.from_epsg(4326))
    with Raster.open(path) as raster:
        assert raster.polygon((0, 0, 5, 5)) is None
        assert "ground control points" in raster.warnings[0]


def test_threads_share_a_raster(tmp_path: Path) -> None:
    data = noise(3, 300, 300)
    path = write(tmp_path / "a.tif", data, tiled=True, blockxsize=64, blockysize=64)
    expected = np.moveaxis(data, 0, -1) / 255

    def check(seed: int) -> None:
        row, col = np.random.default_rng(seed).integers(0, 250, 2).tolist()
        read = raster.read((300, 300), LevelWindow(row, col, 50, 50))
        np.testing.assert_allclose(read, expected[row : row + 50, col : col + 50], atol=1e-6)

    with Raster.open(path) as raster, ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(40)))
        assert raster.windows_read == 40
        assert raster.bytes_read >= 40 * 50 * 50 * 3
    closer = threading.Thread(target=raster.close)
    closer.start()
    closer.join()


def test_closed_rasters_say_so(tmp_path: Path) -> None:
    raster = Raster.open(write(tmp_path / "a.tif", noise(3, 30, 30)))
    raster.close()
    raster.close()
    with pytest.raises(ImageError, match="closed"):
        read_all(raster)


@pytest.mark.parametrize(
    "window", [LevelWindow(0, 0, 31, 5), LevelWindow(-1, 0, 3, 3), LevelWindow(0, 28, 3, 3)]
)
def test_windows_outside_the_level(tmp_path: Path, window: LevelWindow) -> None:
    with Raster.open(write(tmp_path / "a.tif", noise(3, 30, 30))) as raster:
        with pytest.raises(ImageError, match="inside"):
            raster.read((30, 30), window)
        with pytest.raises(ImageError, match="resampling"):
            raster.read((30, 30), LevelWindow(0, 0, 3, 3), "cubic")  # type: ignore[arg-type]
        assert raster.read((30, 30), LevelWindow(30, 0, 0, 5)).shape == (0, 5, 3)


def test_the_environment_is_left_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(3, 30, 30))
    with rasterio.Env(GDAL_HTTP_TIMEOUT="77") as env:
        with Raster.open(path) as raster:
            read_all(raster)
        assert env.options["GDAL_HTTP_TIMEOUT"] == "77"
        assert rasterio.env.getenv()["GDAL_HTTP_TIMEOUT"] == "77"
        assert "GDAL_HTTP_PROXY" not in rasterio.env.getenv()
    assert not rasterio.env.hasenv()


def test_local_vrt(tmp_path: Path) -> None:
    data = noise(1, 64, 64)
    write(tmp_path / "a.tif", data)
    inner = vrt(tmp_path / "inner.vrt", "a.tif", relative=True)
    outer = vrt(tmp_path / "outer.vrt", str(inner))
    with Raster.open(outer) as raster:
        np.testing.assert_allclose(read_all(raster)[..., 0], data[0] / 255, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["a b.tif", "a#1.tif", "a?x=1.tif", "ä 图.tif", "a!b.tif", "GTIFF_DIR:1:a"]
)
def test_odd_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "plain.tif", noise(3, 30, 30)).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with Raster.open(name) as raster:
        assert raster.info.path == str(tmp_path / name)


def test_pillow_reads_what_gdal_cannot(tmp_path: Path) -> None:
    image = np.moveaxis(noise(4, 20, 30), 0, -1)
    Image.fromarray(image).save(tmp_path / "a.webp", lossless=True, exact=True)
    source = open_with_pillow(tmp_path / "a.webp", 1 << 20)
    raw, _ = source.read([1, 2, 3, 4], source.header.full)
    np.testing.assert_array_equal(np.moveaxis(raw, 0, -1), image)
    with pytest.raises(ImageError, match="30x20 pixels of WEBP"):
        open_with_pillow(tmp_path / "a.webp", 1000)


def test_sequential_files_are_decoded_once_or_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise(3, 200, 200)
    path = write(tmp_path / "a.png", data, driver="PNG")
    with Raster.open(path) as raster:
        opened = raster.bytes_read
        assert opened == data.nbytes
        kept = read_all(raster)
        assert raster.bytes_read == opened
        assert raster.warnings == ()
    monkeypatch.setattr("lrs_edge.raster.opening._BIG", 1000)
    with Raster.open(path, limits=RasterLimits(in_memory_bytes=1000)) as raster:
        assert "only decodes from the start" in raster.warnings[0]
        np.testing.assert_array_equal(read_all(raster), kept)
    strips = write(tmp_path / "a.tif", data, photometric="RGB", compress="deflate")
    with Raster.open(strips) as raster:
        assert "without overviews" in raster.warnings[0]
