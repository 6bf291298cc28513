"""Scripts of models/nano, which are no packages and import each other by bare names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

NANO = Path(__file__).parent.parent / "models" / "nano"
TRAIN = NANO / "train"
REAL_SCENES = NANO / "real_scenes"

Importer = Callable[[str], ModuleType]
"""Imports a script by its name."""


@contextmanager
def scripts(folder: Path) -> Iterator[Importer]:
    """Imports the scripts of a folder; they are forgotten afterwards."""
    names = {path.stem for path in folder.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        try:
            yield importlib.import_module
        finally:
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(before)
