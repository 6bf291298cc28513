"""Where pixel windows lie on the globe: outlines, centres, and what has no place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.warp import transform
from shapely.geometry import LinearRing, MultiPolygon, Point, Polygon

from lrs_edge.answer.evidence import can_be_placed, unplaced_warning
from lrs_edge.errors import ImageError
from lrs_edge.pyramid.levels import build_pyramid
from lrs_edge.raster.georeference import Georeference, Place
from lrs_edge.raster.raster import Raster
from tests.rasters import UTM, noise, write
from tests.test_report import SQUARE, make_region

GEOS = "+proj=geos +h=35786023 +lon_0=-75 +sweep=x +ellps=GRS80"
SINUSOIDAL = "+proj=sinu +R=6371007.181 +units=m"
LOCAL = 'LOCAL_CS["site",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'

Affine = tuple[float, float, float, float, float, float]
Window = tuple[float, float, float, float]


def located(crs: str, affine: Affine, window: Window) -> Place:
    with rasterio.Env():
        place = Georeference(CRS.from_user_input(crs), affine).place(window)
    assert place is not None
    return place


def outline(crs: str, affine: Affine, window: Window) -> MultiPolygon:
    """The window's geometry, checked for what RFC 7946 and GEOS ask of every geometry."""
    place = located(crs, affine, window)
    assert place.geometry_wgs84 is not None
    assert place.polygon_wgs84 is not None
    parts = [Polygon(rings[0], rings[1:]) for rings in place.geometry_wgs84]
    for part in parts:
        assert part.exterior.is_ccw
        assert not any(LinearRing(hole).is_ccw for hole in part.interiors)
    found = MultiPolygon(parts)
    assert found.is_valid
    west, south, east, north = found.bounds
    assert -180 <= west < east <= 180
    assert -90 <= south < north <= 90
    assert all(-180 <= x <= 180 and -90 <= y <= 90 for x, y in place.polygon_wgs84)
    assert place.polygon_wgs84[0] == place.polygon_wgs84[-1]
    assert place.centre_wgs84 is not None
    assert found.distance(Point(place.centre_wgs84)) < 1e-6
    return found


def boxes(found: MultiPolygon) -> list[tuple[float, ...]]:
    return [tuple(round(edge, 6) + 0.0 for edge in part.bounds) for part in found.geoms]


WHOLE = (-180, -90, 180, 90)
FIJI = [(179.8, 9.7, 180, 10), (-180, 9.7, -179.8, 10)]
ONE_CELL = [(179.95, 9.9, 180, 10), (-180, 9.9, -179.95, 10)]


@pytest.mark.parametrize(
    ("affine", "window", "expected"),
    [
        # World maps: a tile of 180 degrees and more crosses nothing.
        ((1, 0, -180, 0, -1, 90), (0, 0, 360, 180), [WHOLE]),
        ((0.9, 0, -180, 0, -0.5, 75), (0, 0, 300, 300), [(-180, -75, 90, 75)]),
        # Grids from 0 to 360, in halves and as a whole.
        ((1, 0, 0, 0, -1, 90), (0, 0, 360, 180), [WHOLE]),
        ((1, 0, 0, 0, -1, 90), (0, 0, 180, 180), [(0, -90, 180, 90)]),
        ((1, 0, 0, 0, -1, 90), (180, 0, 360, 180), [(-180, -90, 0, 90)]),
        ((1, 0, 0, 0, -1, 90), (0, 0, 300, 180), [(0, -90, 180, 90), (-180, -90, -60, 90)]),
        # Grids of cell centres reach half a cell beyond -180 and the poles.
        ((0.25, 0, -0.125, 0, -0.25, 90.125), (0, 0, 1440, 721), [WHOLE]),
        ((1, 0, -180.5, 0, -1, 90), (0, 0, 361, 180), [WHOLE]),
        ((0.1, 0, -180.05, 0, -0.1, 10), (0, 0, 1, 1), ONE_CELL),
        # Wholly beyond 180, or across it.
        ((0.001, 0, 190, 0, -0.001, 10), (0, 0, 400, 300), [(-170, 9.7, -169.6, 10)]),
        ((0.001, 0, 179.8, 0, -0.001, 10), (0, 0, 400, 300), FIJI),
        ((0.001, 0, -180.2, 0, -0.001, 10), (0, 0, 400, 300), FIJI),
        # South-up.
        ((1, 0, -180, 0, 1, -90), (0, 0, 90, 90), [(-180, -90, -90, 0)]),
    ],
)  # fmt: skip
def test_windows_in_degrees(
    affine: Affine, window: Window, expected: list[tuple[float, ...]]
) -> None:
    found = outline("EPSG:4326", affine, window)
    assert boxes(found) == expected
    assert found.area == pytest.approx(sum((e - w) * (n - s) for w, s, e, n in expected))


@pytest.mark.parametrize(
    ("crs", "affine"),
    [
        ("EPSG:32660", (1000, 0, 600000, 0, -1000, -1700000)),
        ("EPSG:32601", (1000, 0, 100000, 0, -1000, 1700000)),
        ("EPSG:32601", (700, 700, 0, 700, -700, 1700000)),
        ("EPSG:3857", (1000, 0, 19900000, 0, -1000, 1000000)),
        ("EPSG:3338", (10000, 0, -2200000, 0, -10000, 2400000)),
        ("+proj=geos +h=35786023 +lon_0=180 +ellps=GRS80", (6000, 0, -1e6, 0, -6000, 1e6)),
    ],
)
def test_projected_windows_across_the_antimeridian_are_cut(crs: str, affine: Affine) -> None:
    found = outline(crs, affine, (0, 0, 336, 200))
    assert len(found.geoms) == 2
    assert (found.geoms[0].bounds[2], found.geoms[1].bounds[0]) == (180, -180)
    assert found.geoms[0].bounds[0] > 90
    assert found.geoms[1].bounds[2] < -90


@pytest.mark.parametrize(
    ("crs", "sign"),
    [("EPSG:3413", 1), ("EPSG:3995", 1), ("EPSG:3031", -1), ("EPSG:3571", 1), ("EPSG:6932", -1)],
)
@pytest.mark.parametrize(
    "window",
    [
        (0, 0, 336, 300),  # the pole inside
        (0, 0, 200, 150),  # on a corner
        (200, 150, 400, 300),
        (0, 0, 200, 300),  # on an edge
        (0, 150, 400, 300),
        (0, 0, 200.0004, 300),  # next to an edge, either side
        (0, 0, 199.9996, 300),
        (0, 0, 199.9, 300),
        (0, 0, 100, 100),  # outside
        (199, 149, 201, 151),
    ],
)
def test_polar_windows_hold_what_lies_in_them(crs: str, sign: int, window: Window) -> None:
    affine = (1000, 0, -200000, 0, -1000, 150000)
    found = outline(crs, affine, window)
    x0, y0, x1, y1 = window
    rng = np.random.default_rng(0)
    points = rng.uniform((-100, -100), (500, 400), (300, 2))
    inside = (points > (x0, y0)).all(1) & (points < (x1, y1)).all(1)
    # Chords leave the curve by a thousandth of an edge.
    near = 0.003 * max(x1 - x0, y1 - y0) + 0.01
    edge = Polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]).exterior
    with rasterio.Env():
        lons, lats = transform(
            CRS.from_user_input(crs),
            CRS.from_epsg(4326),
            (affine[0] * points[:, 0] + affine[2]).tolist(),
            (affine[4] * points[:, 1] + affine[5]).tolist(),
        )[:2]
    for point, lon, lat, wanted in zip(points, lons, lats, inside, strict=True):
        if edge.distance(Point(point)) > near:
            assert found.covers(Point(lon, lat)) == wanted, (point, lon, lat)
    if x0 < 199.999 and x1 > 200.001 and y0 < 149 and y1 > 151:
        assert all(found.covers(Point(lon, sign * 89.999)) for lon in range(-180, 181, 10))


def test_the_centre_is_the_windows_own() -> None:
    place = located("EPSG:3413", (1000, 0, -200000, 0, -1000, 150000), (0, 0, 300, 300))
    assert place.centre_wgs84 == pytest.approx((-135, 89.538438), abs=1e-5)


def test_both_poles_inside() -> None:
    affine = (30000, 0, -12e6, 0, -30000, 12e6)
    found = outline("+proj=aeqd +lat_0=0 +lon_0=0 +R=6371000", affine, (0, 0, 800, 800))
    assert found.covers(Point(0, 90))
    assert found.covers(Point(100, -90))
    assert not found.covers(Point(180, 0))


@pytest.mark.parametrize(
    ("crs", "affine"),
    [
        (GEOS, (27000, 0, -5434894, 0, -27000, 5434894)),  # reaches beyond the earth's edge
        (SINUSOIDAL, (926, 0, 18900000, 0, -926, 8000000)),  # PROJ would wrap it round
        ("ESRI:54009", (50000, 0, -18040000, 0, -50000, 9020000)),
        ("EPSG:3034", (10000, 0, 0, 0, -10000, 9000000)),  # a cone's open side
        (LOCAL, (0.5, 0, 1000, 0, -0.5, 2000)),
        ("IAU_2015:49900", (0.1, 0, 3, 0, -0.1, 5)),  # Mars
        ("EPSG:4978", (1, 0, 4e6, 0, -1, 5e5)),  # geocentric
        ("EPSG:3857", (1e20, 0, 1e20, 0, -1e20, 1e20)),
        ("EPSG:4326", (1e20, 0, 1e20, 0, -1e20, 1e20)),
        ("EPSG:4326", (1, 0, 0, 0, -1, 200)),
        ("EPSG:32632", (1e7, 0, 1e12, 0, -1e7, 1e12)),
        ("+proj=longlat +nadgrids=/dev/zero +ellps=clrk66", (1, 0, 0, 0, -1, 20)),
    ],
)
def test_what_has_no_place_keeps_its_polygon_in_the_crs(crs: str, affine: Affine) -> None:
    place = located(crs, affine, (0, 0, 336, 336))
    assert len(place.polygon) == 5
    assert (place.polygon_wgs84, place.geometry_wgs84) == (None, None)


@pytest.mark.parametrize(
    ("crs", "affine"),
    [
        ("EPSG:32632+5773", (0.5, 0, 364000, 0, -0.5, 5621000)),
        ("EPSG:4979", (1e-5, 0, 7.07, 0, -1e-5, 50.72)),
        ("EPSG:32632", (0.3, 0.4, 364000, 0.4, -0.3, 5621000)),
        ("EPSG:32632", (0.5, 0, 364000, 0, 0.5, 5621000)),
        ("EPSG:4807", (1e-5, 0, 5.26, 0, -1e-5, 56.36)),  # grads from Paris
    ],
)
def test_compound_rotated_and_south_up(crs: str, affine: Affine) -> None:
    found = outline(crs, affine, (0, 0, 336, 336))
    assert len(found.geoms) == 1
    assert len(found.geoms[0].exterior.coords) == 5
    assert found.distance(Point(7.074, 50.724)) < 0.02


@settings(max_examples=60, deadline=None)
@given(
    west=st.floats(-540, 540),
    north=st.floats(-89, 90),
    size=st.floats(1e-4, 1),
    cols=st.integers(1, 360),
    rows=st.integers(1, 90),
)
def test_area_in_degrees_is_kept(
    west: float, north: float, size: float, cols: int, rows: int
) -> None:
    rows = min(rows, max(int((north + 90) / size), 1))
    place = located("EPSG:4326", (size, 0, west, 0, -size, north), (0, 0, cols, rows))
    if place.geometry_wgs84 is None:
        # The middle of the window may lie beyond the pole where one pixel reaches over it.
        assert north - rows * size < -90
        return
    found = outline("EPSG:4326", (size, 0, west, 0, -size, north), (0, 0, cols, rows))
    south = max(north - rows * size, -90)
    wanted = min(cols * size, 360) * (north - south)
    assert found.area == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_ground_resolution_at_a_pole(tmp_path: Path) -> None:
    polar = rasterio.Affine(1000, 0, -30500, 0, -1000, 30200)
    path = write(tmp_path / "a.tif", noise(1, 60, 60), crs="EPSG:3413", transform=polar)
    with Raster.open(path) as raster:
        assert raster.info.gsd == pytest.approx(1030, rel=0.02)


def test_partial_coverage_is_told_when_the_image_is_opened(tmp_path: Path) -> None:
    half = 5434894
    disc = rasterio.Affine(2 * half / 400, 0, -half, 0, -2 * half / 400, half)
    crs = CRS.from_proj4(GEOS)
    path = write(tmp_path / "a.tif", noise(1, 400, 400), crs=crs, transform=disc)
    with Raster.open(path) as raster:
        assert "of the image has no place in WGS 84" in raster.warnings[0]
        assert raster.info.unlocated is None
        pyramid = build_pyramid(400, 400, tile=336, base_side=336)
        assert not can_be_placed(pyramid, raster.place)
        assert can_be_placed(build_pyramid(400, 400, tile=30, base_side=90), raster.place)


def test_a_local_crs_is_told_when_the_image_is_opened(tmp_path: Path) -> None:
    site = rasterio.Affine(0.5, 0, 1000, 0, -0.5, 2000)
    path = write(tmp_path / "a.tif", noise(1, 40, 40), crs=CRS.from_wkt(LOCAL), transform=site)
    with Raster.open(path) as raster:
        assert "site" in str(raster.info.unlocated)
        assert raster.info.crs is not None
        place = raster.place((0, 0, 10, 10))
        assert place is not None
        assert place.polygon[0] == (1000, 2000)


def test_unplaced_regions_are_counted() -> None:
    placed = make_region(polygon=SQUARE, polygon_wgs84=SQUARE)
    assert unplaced_warning((placed, make_region())) == ()
    (warning,) = unplaced_warning((placed, make_region(polygon=SQUARE)))
    assert "1 of 2 regions" in warning


def world_file(folder: Path) -> Path:
    path = write(folder / "a.tif", noise(1, 40, 40))
    path.with_suffix(".tfw").write_text("0.5\n0\n0\n-0.5\n364000.25\n5620999.75\n")
    return path


def test_a_world_file_needs_a_crs(tmp_path: Path) -> None:
    path = world_file(tmp_path)
    with Raster.open(path) as raster:
        assert raster.info.crs is None
        assert "--crs" in raster.warnings[0]
        assert "--crs" in str(raster.info.unlocated)
        assert raster.place((0, 0, 9, 9)) is None
    with Raster.open(path, crs="EPSG:32632") as raster:
        assert (raster.info.crs, raster.warnings) == ("EPSG:32632", ())
        found = raster.place((0, 0, 40, 40))
    with Raster.open(write(tmp_path / "b.tif", noise(1, 40, 40), **UTM)) as raster:
        assert raster.place((0, 0, 40, 40)) == found


def test_a_named_crs_that_differs_is_used_and_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(1, 40, 40), **UTM)
    with Raster.open(path, crs="EPSG:32633") as raster:
        assert raster.info.crs == "EPSG:32633"
        assert "EPSG:32632" in raster.warnings[0]
    with Raster.open(path, crs="EPSG:32632") as raster:
        assert raster.warnings == ()


@pytest.mark.parametrize(
    "crs",
    ["", "EPSG:0", "EPSG:99999999", "32632x", "http://example.com/a.prj", "/etc/passwd", "a.prj",
     "UTM", "+proj=nowhere", 'PROJCS["x"]', "EPSG:32632\0"],
)  # fmt: skip
def test_crs_that_are_none(tmp_path: Path, crs: str) -> None:
    with pytest.raises(ImageError, match="not a known coordinate reference system"):
        Raster.open(world_file(tmp_path), crs=crs)


def test_a_crs_without_a_position(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="has no position"):
        Raster.open(write(tmp_path / "a.tif", noise(1, 40, 40)), crs="EPSG:32632")


@pytest.mark.parametrize(
    "numbers",
    ["0, 0, 0, 0, 0, 0", "10, 1, 0, 50, 0, 0", "10, nan, 0, 50, 0, -1", "10, 1, 1, 50, 1, 1",
     "inf, 1, 0, 50, 0, -1", "10, 1e200, 0, 50, 0, -1e200"],
)  # fmt: skip
def test_geotransforms_that_give_pixels_no_size(tmp_path: Path, numbers: str) -> None:
    write(tmp_path / "b.tif", noise(1, 40, 40))
    path = tmp_path / "a.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="40" rasterYSize="40"><SRS>EPSG:4326</SRS><GeoTransform>{numbers}'
        '</GeoTransform><VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename '
        'relativeToVRT="1">b.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource>'
        "</VRTRasterBand></VRTDataset>"
    )
    with Raster.open(path) as raster:
        assert raster.info.gsd is None
        assert raster.polygon((0, 0, 10, 10)) is None
        assert raster.warnings
