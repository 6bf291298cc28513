"""Foreign PROJ and GDAL data in the environment, addresses, and folders that are gone."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from lrs_edge.commands.checks import run_checks
from lrs_edge.commands.main import run
from lrs_edge.errors import ImageError
from lrs_edge.raster.gdal_env import local_file
from lrs_edge.raster.proj_data import own_data
from lrs_edge.raster.raster import Raster
from tests.rasters import UTM, noise, write


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with a database of another PROJ."""
    folder = tmp_path / "otherproj"
    folder.mkdir()
    database = sqlite3.connect(folder / "proj.db")
    database.execute("create table metadata(key text, value text)")
    rows = [("DATABASE.LAYOUT.VERSION.MAJOR", "1"), ("DATABASE.LAYOUT.VERSION.MINOR", "0")]
    database.executemany("insert into metadata values(?, ?)", rows)
    database.commit()
    database.close()
    return folder


@pytest.mark.skipif(own_data() is None, reason="this rasterio has no data of its own")
@pytest.mark.parametrize("variable", ["PROJ_LIB", "PROJ_DATA", "GDAL_DATA"])
def test_foreign_data_change_nothing(
    tmp_path: Path, foreign: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", noise(1, 40, 40), **UTM)
    with Raster.open(path) as raster:
        before = raster.info, raster.place((0, 0, 40, 40))
    assert before[0].crs == "EPSG:32632"
    monkeypatch.setenv(variable, str(foreign))
    with Raster.open(path) as raster:
        assert (raster.info, raster.place((0, 0, 40, 40))) == before
    told = {check.name: check for check in run_checks()}["PROJ"]
    assert told.status == "warn"
    assert variable in told.detail


def test_a_database_that_cannot_be_used_is_told(tmp_path: Path, foreign: Path) -> None:
    path = write(tmp_path / "a.tif", noise(1, 40, 40), **UTM)
    # In a process of its own: PROJ remembers what it has looked up once.
    program = (
        "import sys, lrs_edge.raster.proj_data as data\n"
        "data.own_data = lambda: None\n"
        "from lrs_edge.raster import Raster\n"
        "print(Raster.open(sys.argv[1]).info.unlocated)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "PROJ_DATA": str(foreign)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "PROJ cannot use its database" in done.stdout
    assert "PROJ_DATA" in done.stdout


@pytest.mark.parametrize("command", [["ask"], ["info"]])
@pytest.mark.parametrize(
    "name",
    ["https://example.org/a.tif", "s3://b/a.tif", "file:///data/a.tif", "zip://a.zip!a.tif",
     "/vsicurl/https://example.org/a.tif"],
)  # fmt: skip
def test_addresses_are_named_as_they_were_typed(
    command: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, name, *(["What?"] if command == ["ask"] else [])]) == 3
    assert f"error: {name} is not a local file" in capsys.readouterr().err


def test_click_does_not_call_an_unreadable_image_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", noise(1, 40, 40), **UTM)
    # Whether the file may be read is found out by opening it, and then the exit code is 3.
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert run(["info", str(path)]) == 0


@pytest.mark.skipif(os.name == "nt", reason="a folder in use cannot be removed")
def test_the_current_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        with pytest.raises(ImageError, match="current folder no longer exists"):
            local_file("small.tif")
    finally:
        os.chdir(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_name_that_is_not_utf8(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.tif"
    plain = write(tmp_path / "a.tif", noise(1, 40, 40))
    try:
        os.rename(os.fsencode(plain), path)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert run(["info", os.fsdecode(path), "--format", form]) == 3
    assert "not UTF-8" in capsys.readouterr().err
