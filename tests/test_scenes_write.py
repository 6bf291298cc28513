"""`lrs-edge scenes`: files of a set, resuming, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from lrs_edge.commands.main import run
from lrs_edge.errors import LrsEdgeError, UsageError
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster.raster import Raster
from lrs_edge_export.scenes import geotiff
from lrs_edge_export.scenes.geotiff import Encoding, read_fingerprint
from lrs_edge_export.scenes.library import TileLibrary, read_library
from lrs_edge_export.scenes.plan import Background, Placement, ScenePlan
from lrs_edge_export.scenes.render import SceneRenderer
from lrs_edge_export.scenes.write import SceneSetOptions, write_scenes
from tests.scene_tiles import make_tiles

SIZE = (1100, 1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiles(tmp_path_factory.mktemp("tiles") / "set")


@pytest.fixture(scope="module")
def library(folder: Path) -> TileLibrary:
    return read_library(folder, ["test"])


def options(**changes: Any) -> SceneSetOptions:
    usual: dict[str, Any] = {"count": 2, "sizes": (SIZE,), "questions": 10, "splits": ("test",)}
    return SceneSetOptions(**usual | changes)


@pytest.fixture(scope="module")
def made(library: TileLibrary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / "set"
    write_scenes(library, target, options(encoding=Encoding("cog", "deflate")))
    return target


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def plan_of(facts: dict[str, Any], library: TileLibrary) -> ScenePlan:
    """The plan that scenes.json describes."""
    tiles = {
        tile.path.relative_to(library.folder).as_posix(): tile
        for held in library.by_label.values()
        for tile in held
    }
    back = facts["background"]
    background = Background(
        tuple(tiles[file] for file in back["tiles"]),
        tuple(back["labels"]),
        back["enlarged"],
        tuple(back["gains"]),
        back["seed"],
    )
    places = tuple(
        Placement(tiles[p["tile"]], p["label"], tuple(p["box"]), p["turn"]) for p in facts["places"]
    )
    size = facts["width"], facts["height"]
    setting = facts["setting"]
    return ScenePlan(facts["name"], *size, setting, background, places, tuple(facts["absent"]))


class TestFiles:
    def test_a_set_has_images_questions_and_a_record(self, made: Path) -> None:
        names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*.*"))
        assert names == [
            "image/scenes_00000.tif", "image/scenes_00001.tif", "questions.jsonl", "scenes.json",
        ]  # fmt: skip

    def test_questions_have_the_fields_of_lrs_vqa(self, made: Path) -> None:
        found = lines(made)
        wanted = {"question_id", "image", "category", "text", "ground_truth", "hbox"}
        assert len(found) == 20
        assert all(set(line) == wanted for line in found)
        assert len({line["question_id"] for line in found}) == 20
        assert {line["question_id"].split("_")[0] for line in found} == {"scenes"}
        assert all((made / line["image"]).is_file() for line in found)

    def test_one_box_is_flat_and_several_are_a_list(self, made: Path) -> None:
        record = json.loads((made / "scenes.json").read_text())
        places = {facts["name"]: [p["box"] for p in facts["places"]] for facts in record["scenes"]}
        shapes = set()
        for line in lines(made):
            boxes = line["hbox"]
            if boxes and not isinstance(boxes[0], list):
                boxes = [boxes]
                shapes.add("flat")
            elif boxes:
                shapes.add("list")
                assert len(boxes) > 1
            assert all(box in places[Path(line["image"]).stem] for box in boxes)
            if line["ground_truth"] == "no":
                assert boxes == []
        assert shapes == {"flat", "list"}

    def test_the_record_is_enough_to_draw_the_scene_again(
        self, made: Path, library: TileLibrary
    ) -> None:
        record = json.loads((made / "scenes.json").read_text())
        for facts in record["scenes"]:
            drawn = SceneRenderer(plan_of(facts, library)).read(0, 0, *SIZE, *SIZE)
            with rasterio.open(made / "image" / f"{facts['name']}.tif") as file:
                stored = file.read().transpose(1, 2, 0)
            assert np.abs(drawn.astype(int) - stored).max() <= 3

    def test_a_cog_has_blocks_overviews_and_a_place(self, made: Path) -> None:
        with rasterio.open(made / "image" / "scenes_00000.tif") as file:
            assert file.block_shapes == [(512, 512)] * 3
            assert file.overviews(1)
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert file.crs.is_projected
            assert 0.1 < file.res[0] < 2
            assert "not a real place" in file.tags()["TIFFTAG_IMAGEDESCRIPTION"]

    def test_the_runtime_reads_it(self, made: Path) -> None:
        with Raster.open(made / "image" / "scenes_00000.tif") as raster:
            assert (raster.width, raster.height) == SIZE
            assert raster.warnings == ()
            pixels = raster.read((500, 550), LevelWindow(row0=100, col0=100, rows=200, cols=200))
            assert raster.polygon((0, 0, 10, 10)) is not None
        record = json.loads((made / "scenes.json").read_text())
        library = read_library(_tiles_of(made), ["test"])
        renderer = SceneRenderer(plan_of(record["scenes"][0], library))
        wanted = renderer.read(200, 200, 600, 600, 200, 200) / 255
        assert np.abs(pixels - wanted).mean() < 0.01

    @pytest.mark.parametrize("compression", ["jpeg", "deflate"])
    def test_a_plain_geotiff_has_no_overviews(
        self, library: TileLibrary, tmp_path: Path, compression: Any
    ) -> None:
        write_scenes(
            library, tmp_path / "set", options(count=1, encoding=Encoding("tif", compression))
        )
        with rasterio.open(tmp_path / "set" / "image" / "scenes_00000.tif") as file:
            assert file.overviews(1) == []
            assert file.profile["compress"] == compression
            assert file.profile["tiled"]

    def test_scenes_take_the_sizes_in_turn(self, library: TileLibrary, tmp_path: Path) -> None:
        sizes = ((1000, 1200), (1300, 1000))
        encoding = Encoding("tif")
        write_scenes(library, tmp_path, options(count=3, sizes=sizes, encoding=encoding))
        found = []
        for path in sorted((tmp_path / "image").glob("*.tif")):
            with rasterio.open(path) as file:
                found.append((file.width, file.height))
        assert found == [*sizes, sizes[0]]


def _tiles_of(made: Path) -> Path:
    """The folder of tiles beside which the fixtures of this module lie."""
    name = json.loads((made / "scenes.json").read_text())["tiles"]
    return next(made.parent.parent.glob(f"tiles*/{name}"))


class TestResuming:
    def test_finished_scenes_are_not_drawn_again(
        self, library: TileLibrary, tmp_path: Path
    ) -> None:
        encoding = Encoding("tif")
        first = write_scenes(library, tmp_path, options(count=2, encoding=encoding))
        assert (first.made, first.scenes) == (2, 2)
        kept = tmp_path / "image" / "scenes_00000.tif"
        (tmp_path / "image" / "scenes_00001.tif").unlink()
        (tmp_path / "questions.jsonl").unlink()
        before, drawn = kept.stat().st_mtime_ns, []
        again = write_scenes(
            library,
            tmp_path,
            options(count=3, encoding=encoding),
            on_progress=lambda progress: drawn.append(progress.name),
        )
        assert (again.made, again.scenes, again.questions) == (2, 3, 30)
        assert set(drawn) == {"scenes_00001", "scenes_00002"}
        assert kept.stat().st_mtime_ns == before

    def test_a_larger_count_keeps_the_first_questions(
        self, library: TileLibrary, tmp_path: Path
    ) -> None:
        encoding = Encoding("tif")
        write_scenes(library, tmp_path, options(count=1, encoding=encoding))
        first = lines(tmp_path)
        write_scenes(library, tmp_path, options(count=2, encoding=encoding))
        assert lines(tmp_path)[: len(first)] == first

    def test_a_failure_leaves_no_half_file_and_is_made_good(
        self, library: TileLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_arguments: object, **_options: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(geotiff.rasterio.shutil, "copy", fail)
            with pytest.raises(KeyboardInterrupt):
                write_scenes(library, tmp_path, options(count=1))
        assert list((tmp_path / "image").iterdir()) == []
        assert not (tmp_path / "questions.jsonl").exists()
        assert write_scenes(library, tmp_path, options(count=1)).made == 1
        assert read_fingerprint(tmp_path / "image" / "scenes_00000.tif")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"seed": 1}, "with other seed"),
            ({"sizes": ((1200, 1200),)}, "made with other sizes"),
            ({"encoding": Encoding("tif", "jpeg", 80)}, "with other encoding"),
            ({"count": 1}, "holds 2 scenes already"),
        ],
    )
    def test_other_options_are_refused(
        self, library: TileLibrary, made: Path, change: dict[str, Any], said: str
    ) -> None:
        wanted = {"encoding": Encoding("cog", "deflate")} | change
        with pytest.raises(UsageError, match=said):
            write_scenes(library, made, options(**wanted))

    def test_other_tiles_are_refused(self, library: TileLibrary, made: Path) -> None:
        fewer = TileLibrary(
            {label: tiles[:2] for label, tiles in library.by_label.items()}, library.folder
        )
        with pytest.raises(UsageError, match="is not the image that this run would make"):
            write_scenes(fewer, made, options(encoding=Encoding("cog", "deflate")))

    @pytest.mark.parametrize("name", ["questions.jsonl", "scenes.json", "image"])
    def test_foreign_files_are_refused(
        self, library: TileLibrary, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / name).write_text("[" * 5000)
        with pytest.raises(UsageError, match="is not from this command"):
            write_scenes(library, tmp_path, options())
        assert (tmp_path / name).read_text() == "[" * 5000

    def test_a_file_in_place_of_the_folder_is_refused(
        self, library: TileLibrary, tmp_path: Path
    ) -> None:
        target = tmp_path / "out"
        target.write_text("mine")
        with pytest.raises(UsageError, match="is a file"):
            write_scenes(library, target, options())

    def test_a_tile_that_changed_ends_the_run_and_leaves_nothing_half(self, tmp_path: Path) -> None:
        tiles = make_tiles(tmp_path / "tiles")
        library = read_library(tiles, None)
        for path in (tiles / "images").iterdir():
            path.write_bytes(b"gone")
        with pytest.raises(LrsEdgeError, match="cannot be decoded"):
            write_scenes(library, tmp_path / "out", options())
        assert list((tmp_path / "out" / "image").iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"count": 0}, "0 scenes"),
            ({"sizes": ()}, "no size"),
            ({"sizes": ((10, 10),)}, "out of range"),
            ({"questions": 0}, "at least one"),
            ({"name": "../x"}, "letters, digits and hyphens"),
            ({"kinds": ("colour",)}, "not a kind of question"),
            ({"encoding": Encoding("cog", "jpeg", 5)}, "quality 5"),
        ],
    )
    def test_options_that_cannot_be_meant_are_refused_before_anything_is_written(
        self, library: TileLibrary, tmp_path: Path, change: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(UsageError, match=said):
            write_scenes(library, tmp_path / "out", options(**change))
        assert not (tmp_path / "out").exists()


class TestCommand:
    def test_it_makes_a_set(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "out"
        arguments = ["scenes", str(folder), "-o", str(target), "--count", "1", "--size", "1000"]
        arguments += ["--split", "test", "--format", "tif", "--questions", "3", "--seed", "7"]
        arguments += ["--kind", "presence", "--rural", "desert", "--urban", "Industrial area"]
        assert run(arguments) == 0
        told = capsys.readouterr()
        assert told.out == f"{target}: 1 scenes, 3 questions\n"
        assert told.err == "scene 1/1: scenes_00000\n"
        (facts,) = json.loads((target / "scenes.json").read_text())["scenes"]
        assert facts["background"]["labels"] in (["desert"], ["industrial area"])
        tiles = facts["background"]["tiles"] + [p["tile"] for p in facts["places"]]
        assert all(int(Path(tile).stem[-1]) % 2 == 1 for tile in tiles)
        assert run(arguments) == 0
        assert capsys.readouterr().out.startswith(f"{target}: 1 scenes (1 were there already)")

    @pytest.mark.parametrize("size", ["big", "-5", "10x", "1000x1000x3"])
    def test_sizes_that_are_none(
        self, folder: Path, tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["scenes", str(folder), "-o", str(tmp_path), f"--size={size}"]) == 2
        assert "neither a side such as 8000" in capsys.readouterr().err

    def test_a_folder_without_tiles(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["scenes", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
        assert "has no labels.jsonl" in capsys.readouterr().err

    def test_torch_is_not_needed(self) -> None:
        code = (
            "import sys; import lrs_edge_export.scenes.write, lrs_edge.commands.scenes; "
            "sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
