"""The tables of docs/moved.md: what they name is there, and the imports that were promised work."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = re.findall(
    r"^\| `?([\w./-]+)`? \| `?([\w./-]+)`? \|$",
    (ROOT / "docs" / "moved.md").read_text(),
    re.MULTILINE,
)
PATHS = [(old, new) for old, new in ROWS if "/" in new]
MODULES = [(old, new) for old, new in ROWS if "." in old and "/" not in new]


def test_the_tables_are_read() -> None:
    assert len(MODULES) > 150
    assert len(PATHS) >= 4


@pytest.mark.parametrize("new", [new for _, new in MODULES])
def test_new_modules_are_there(new: str) -> None:
    assert find_spec(new) is not None


@pytest.mark.parametrize("new", [new for _, new in PATHS])
def test_new_places_are_there(new: str) -> None:
    assert (ROOT / new).exists()


def test_old_modules_are_gone_or_are_the_folder_of_the_new_one() -> None:
    for old, new in MODULES:
        folder = new.startswith(f"{old}.")
        assert folder or not any(
            (ROOT / top / Path(*old.split("."))).with_suffix(".py").exists()
            for top in ("", "export", "models")
        ), old


def test_promised_imports_work() -> None:
    from lrs_edge.pyramid import LevelWindow
    from lrs_edge.raster import Raster

    assert (Raster.__module__, LevelWindow.__module__) == (
        "lrs_edge.raster.raster",
        "lrs_edge.pyramid.levels",
    )
