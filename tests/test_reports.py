"""Reports of answers: a picture, a page, maps; of images with and without a place."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rasterio.crs import CRS
from rasterio.transform import Affine

import lrs_edge
from lrs_edge.answer.answer import Answer
from lrs_edge.answer.report import ImageFacts, to_geojson
from lrs_edge.commands.main import run
from lrs_edge.errors import UsageError
from lrs_edge.raster.raster import Raster
from lrs_edge.reports.picture import to_png
from lrs_edge.reports.save import save_report
from lrs_edge.reports.views import Views, compass, heat, scale_bar, shown
from lrs_edge.scene import Scene
from tests.rasters import noise, write

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "Is there a </title><script>alert('x')</script> \"ship\" & \x1b[31m?"
UTM = Affine(2, 0, 500_000, 0, -2, 5_000_000)
#: A Mercator of somebody's own: no code names it.
OWN = CRS.from_proj4("+proj=tmerc +lat_0=10 +lon_0=20 +k=0.9 +x_0=7 +y_0=9 +ellps=WGS84")


@pytest.fixture(scope="module")
def engine() -> Iterator[lrs_edge.Engine]:
    with lrs_edge.load() as loaded:
        yield loaded


def image_file(folder: Path, name: str, **options: Any) -> Path:
    return write(folder / name, noise(3, 700, 900), tiled=True, **options)


@pytest.fixture(scope="module")
def placed(
    engine: lrs_edge.Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Scene, Answer]]:
    folder = tmp_path_factory.mktemp("placed")
    path = image_file(folder, "a<b>&'.tif", crs="EPSG:32632", transform=UTM)
    with engine.open(path) as scene:
        yield scene, scene.ask(HOSTILE)


@pytest.fixture(scope="module")
def placeless(
    engine: lrs_edge.Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Scene, Answer]]:
    path = image_file(tmp_path_factory.mktemp("placeless"), "plain.tif")
    with engine.open(path) as scene:
        yield scene, scene.ask("Is there a ship?")


def test_kept_tokens_lie_in_their_tiles(placed: tuple[Scene, Answer]) -> None:
    _, answer = placed
    assert [kept.level for kept in answer.kept] == [level.level for level in answer.levels]
    for kept in answer.kept:
        tiles = [region for region in answer.regions if region.level == kept.level]
        assert len(kept.bounds) == sum(region.tokens_kept for region in tiles) > 0
        assert list(kept.scores) == sorted(kept.scores, reverse=True)
        for x0, y0, x1, y1 in kept.bounds:
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            assert any(
                a <= x <= c and b <= y <= d for a, b, c, d in (tile.bounds for tile in tiles)
            )
    assert pickle.loads(pickle.dumps(answer)) == answer


@pytest.mark.parametrize("which", ["placed", "placeless"])
def test_a_picture_and_a_page_of_any_image(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    scene, answer = request.getfixturevalue(which)
    scene.save_report(answer, tmp_path / "out.png")
    scene.save_report(answer, str(tmp_path / "out.HTML"))
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
        # Evidence is outlined in its own colour, and kept tokens are coloured.
        colours = {colour for _, colour in picture.getcolors(1 << 24)}
        assert (0, 220, 255) in colours
    page = (tmp_path / "out.HTML").read_text(encoding="utf-8")
    assert ("North arrow" in page) == (which == "placed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.HTML", "out.png"]


class Tags(HTMLParser):
    """Tags of a page with their attributes, and the text in each kind of tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        last = self.found[-1][0] if self.found else ""
        self.text[last] = self.text.get(last, "") + data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_a_page_loads_nothing_and_escapes_what_others_wrote(
    placed: tuple[Scene, Answer], tmp_path: Path
) -> None:
    scene, answer = placed
    answer = replace(
        answer, text="<img src=x onerror=alert(1)>", warnings=("<b>odd</b>",), model="<i>m</i>"
    )
    scene.save_report(answer, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert len(tags.of("script")) == len(tags.of("style")) == 1
    assert not tags.of("img") + tags.of("b") + tags.of("link")
    assert "http://" not in page
    assert "https://" not in page
    assert "\x1b" not in page
    for _, attributes in tags.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert (attributes.get("href") or "data:").startswith("data:")
    assert all(
        (picture["href"] or "").startswith("data:image/jpeg;base64,")
        for picture in tags.of("image")
    )
    policy = next(meta["content"] for meta in tags.of("meta") if "http-equiv" in meta) or ""
    assert "default-src 'none'" in policy
    for name in ("page.css", "page.js"):
        text = files("lrs_edge.reports").joinpath(name).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
        assert text in page


def test_geojson_is_that_of_the_format_option(placed: tuple[Scene, Answer], tmp_path: Path) -> None:
    scene, answer = placed
    scene.save_report(answer, tmp_path / "out.geojson")
    info = scene.raster.info
    facts = ImageFacts(info.path, info.width, info.height, info.crs, info.gsd)
    text = (tmp_path / "out.geojson").read_text(encoding="utf-8")
    assert text == to_geojson(answer, facts)
    assert len(json.loads(text)["features"]) == len(answer.regions)


def rings(database: sqlite3.Connection, layer: str) -> list[tuple[int, list[tuple[float, ...]]]]:
    """Id of the CRS and points of every polygon of a layer, by the format's own description."""
    found = []
    for (blob,) in database.execute(f"SELECT geom FROM {layer}"):
        magic, version, flags, srs, x0, x1, y0, y1 = struct.unpack_from("<2sBBi4d", blob)
        assert (magic, version, flags) == (b"GP", 0, 3)
        order, kind, parts, count = struct.unpack_from("<BIII", blob, 40)
        assert (order, kind, parts) == (1, 3, 1)
        points = list(struct.iter_unpack("<2d", blob[53:]))
        assert len(points) == count
        assert points[0] == points[-1]
        assert (x0, x1) == (min(x for x, _ in points), max(x for x, _ in points))
        assert (y0, y1) == (min(y for _, y in points), max(y for _, y in points))
        found.append((srs, points))
    return found


def test_a_geopackage_has_tiles_tokens_and_answer_in_the_image_s_crs(
    placed: tuple[Scene, Answer], tmp_path: Path
) -> None:
    scene, answer = placed
    scene.save_report(answer, tmp_path / "out.gpkg")
    with sqlite3.connect(tmp_path / "out.gpkg") as database:
        assert database.execute("PRAGMA application_id").fetchone() == (0x47504B47,)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
        regions, tokens = rings(database, "regions"), rings(database, "tokens")
        assert len(tokens) == sum(len(kept.bounds) for kept in answer.kept)
        assert len(regions) == len(answer.regions)
        for srs, points in (*regions, *tokens):
            assert srs == 32632
            assert all(500_000 <= x <= 501_800 for x, _ in points)
            assert all(4_998_600 <= y <= 5_000_000 for _, y in points)
        row = database.execute("SELECT question, answer, confidence FROM answer").fetchone()
        assert row == (answer.question, answer.text, answer.confidence)
        (wkt,) = database.execute(
            "SELECT definition FROM gpkg_spatial_ref_sys WHERE srs_id = 32632"
        ).fetchone()
        assert CRS.from_wkt(wkt).to_epsg() == 32632
    database.close()


def test_a_crs_without_a_code_stands_in_a_geopackage_by_its_definition(
    engine: lrs_edge.Engine, tmp_path: Path
) -> None:
    path = image_file(tmp_path, "own.tif", crs=OWN, transform=Affine(2, 0, 9, 0, -2, 9))
    with engine.open(path) as scene:
        scene.save_report(scene.ask("Is there a ship?"), tmp_path / "out.gpkg")
    with sqlite3.connect(tmp_path / "out.gpkg") as database:
        (srs,) = {srs for srs, _ in rings(database, "regions")}
        organization, wkt = database.execute(
            "SELECT organization, definition FROM gpkg_spatial_ref_sys WHERE srs_id = ?", (srs,)
        ).fetchone()
    database.close()
    assert (srs, organization) == (100_000, "NONE")
    assert CRS.from_wkt(wkt) == OWN


@pytest.mark.parametrize("name", ["out.geojson", "out.gpkg"])
def test_an_image_without_a_place_is_on_no_map(
    placeless: tuple[Scene, Answer], tmp_path: Path, name: str
) -> None:
    scene, answer = placeless
    with pytest.raises(UsageError, match=r"not georeferenced; report it as \.png or \.html"):
        scene.save_report(answer, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_about_another_image_is_refused(
    placed: tuple[Scene, Answer], tmp_path: Path
) -> None:
    scene, answer = placed
    with pytest.raises(UsageError, match="its own image"):
        scene.save_report(replace(answer, image_size=(5, 5)), tmp_path / "out.png")


def test_what_cannot_be_read_in_time_is_grey_and_noted(
    placed: tuple[Scene, Answer], tmp_path: Path
) -> None:
    scene, answer = placed
    facts = ImageFacts("image.tif", 900, 700)
    views = Views(scene.raster, seconds=-1.0)
    save_report(answer, tmp_path / "out.html", facts, views)
    notes = views.notes
    assert len(notes) == 1
    assert "lacks a part of the image" in notes[0]
    assert notes[0].split(":")[0] in (tmp_path / "out.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", [(1, 1), (6, 3000), (3000, 6)])
def test_tiny_and_narrow_images_have_pictures(
    engine: lrs_edge.Engine, tmp_path: Path, shape: tuple[int, int]
) -> None:
    path = write(tmp_path / "image.tif", noise(3, *shape), crs="EPSG:32632", transform=UTM)
    with engine.open(path) as scene:
        answer = scene.ask("Is there a ship?")
        for name in ("out.png", "out.html", "out.gpkg"):
            scene.save_report(answer, tmp_path / name)


def test_long_words_and_no_levels_fit_in_a_picture(placeless: tuple[Scene, Answer]) -> None:
    scene, answer = placeless
    empty = replace(
        answer, question="x" * 5000, text="", regions=(), levels=(), kept=(), confidence=None
    )
    with Image.open(io.BytesIO(to_png(empty, Views(scene.raster)))) as picture:
        assert picture.width < 1000


@pytest.mark.parametrize(
    ("affine", "north"),
    [
        (UTM, 0),
        # Rows run to the east, columns to the north: the image's right is north.
        (Affine(0, 2, 500_000, 2, 0, 5_000_000), 90),
        (Affine(-2, 0, 500_000, 0, 2, 5_000_000), 180),
    ],
)
def test_north_and_size_of_a_pixel(tmp_path: Path, affine: Affine, north: float) -> None:
    path = write(tmp_path / "image.tif", noise(3, 64, 64), crs="EPSG:32632", transform=affine)
    with Raster.open(path) as raster:
        found = compass(raster)
    assert found is not None
    assert abs((found.north - north + 180) % 360 - 180) < 0.1
    assert found.metres == pytest.approx(2, rel=0.01)


def test_scale_bars_are_round() -> None:
    assert scale_bar(0.3, 100) == (pytest.approx(20 / 0.3), "20 m")
    assert scale_bar(10, 120) == (100, "1 km")
    assert scale_bar(0.001, 100) == (pytest.approx(100), "0.1 m")


def test_heat_is_relative_to_the_best() -> None:
    assert heat([0.4, 0.1, 0.0]) == [1, pytest.approx(0.5), 0]
    assert heat([0.0, 0.0]) == [1, 1]
    assert heat([]) == []


def test_untrusted_words_stand_on_one_line() -> None:
    assert shown("a\n b\x1b[1m\u202e") == "a b[1m"
    assert shown("abcdef", 4) == "abc\u2026"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["ask", str(ROOT / "examples" / "coast.tif"), "Rural?", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_reports_are_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lrs_edge, "load", None, raising=False)
    page = str(tmp_path / "a.html")
    assert ".png, .html, .geojson or .gpkg" in refused(["--report", "out.pdf"], capsys)
    assert "does not exist" in refused(["--report", str(tmp_path / "no" / "a.png")], capsys)
    assert "name two files" in refused(["--report", page, "--report", page], capsys)
    assert "name two files" in refused(["--report", page, "-o", page], capsys)
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert "directory" in refused(["--report", str(folder)], capsys)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_name_that_no_file_can_have_is_refused(
    placed: tuple[Scene, Answer], tmp_path: Path
) -> None:
    scene, answer = placed
    with pytest.raises(UsageError, match="cannot be written"):
        scene.save_report(answer, f"{tmp_path}/a\0b.html")


def test_ask_writes_several_reports(
    placed: tuple[Scene, Answer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = placed[0].raster.info.path
    names = ["a.png", "a.html", "a.geojson", "a.gpkg"]
    reports = [part for name in names for part in ("--report", str(tmp_path / name))]
    assert run(["ask", image, "Is there a ship?", "-q", "--timeout", "60", *reports]) == 0
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_ask_refuses_maps_of_what_has_no_place(
    placeless: tuple[Scene, Answer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = placeless[0].raster.info.path
    assert run(["ask", image, "Is there a ship?", "--report", str(tmp_path / "a.gpkg")]) == 2
    assert "there is no .gpkg report" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
