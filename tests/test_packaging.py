"""What `pip install` puts on a machine: every package of the sources."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

#: Folders of Python packages, and the names they have when installed.
FOLDERS = {"lrs_edge": "lrs_edge", "export": "lrs_edge.export"}


def test_every_package_is_installed() -> None:
    """An editable install, which tests run on, finds packages that a wheel would leave out."""
    listed = re.search(r"^packages = \[(.*?)\]", PYPROJECT, re.DOTALL | re.MULTILINE)
    assert listed is not None
    names = set(re.findall(r'"([\w.]+)"', listed[1]))
    found = set()
    for folder, name in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *parts)))
    assert "lrs_edge.pruning" in found
    assert names == found | {"lrs_edge.models"}
