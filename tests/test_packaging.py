"""What `pip install` puts on a machine: every package of the sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parent.parent

#: Where setuptools looks for packages (pyproject.toml).
FOLDERS = {"lrs_edge": ROOT, "lrs_edge_export": ROOT / "export", "lrs_edge_models": ROOT / "models"}


def test_every_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install, which tests run on, finds packages that a wheel would leave out."""
    monkeypatch.chdir(ROOT)
    found = read_configuration("pyproject.toml")["tool"]["setuptools"]["packages"]
    wanted = set()
    for name, folder in FOLDERS.items():
        for init in (folder / name).rglob("__init__.py"):
            wanted.add(".".join(init.parent.relative_to(folder).parts))
    assert "lrs_edge.search" in wanted
    assert set(found) == wanted
