"""What an export that is killed has finished, so that the next one need not do it again.

Results are files named after a hash of everything that they depend on: the checkpoint's contents,
the calibration data, the precision, the layer. So a folder can serve several exports, and a result
of anything else is never taken. Each file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.errors import ExportError
from lrs_edge.files import PART_NAMES, replacing

#: Part of every hash: results of another way to quantize are other results.
FORMAT = 2

_SUFFIX = ".npz"


class WorkFolder:
    """Results by name, in a folder.

    Args:
        path: The folder; it is made when the first result is kept.
        key: What all results depend on.

    Attributes:
        taken: Results that were found.
        kept: Results that were added.
    """

    def __init__(self, path: Path, *key: str) -> None:
        self.path = path
        self._key = key
        self._mine: set[Path] = set()
        self.taken = 0
        self.kept = 0

    def get(self, *name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays kept under a name; None where there are none that can be read."""
        place = self._place(name)
        try:
            # Opened here: numpy leaves a damaged file open.
            with place.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
                found = {key: data[key] for key in data}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        self._mine.add(place)
        self.taken += 1
        return found

    def put(self, arrays: Mapping[str, NDArray[Any]], *name: str) -> None:
        """Keep arrays under a name.

        Raises:
            ExportError: The folder cannot be written to.
        """
        place, named = self._place(name), dict[str, Any](arrays)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(place) as stream:
                np.savez(stream, **named)
        except OSError as error:
            raise ExportError(
                f"{self.path} cannot be written to ({error}); free some space, or name another "
                "folder with --work"
            ) from error
        self._mine.add(place)
        self.kept += 1

    def remove(self) -> None:
        """Remove what was taken or kept here, and the folder if nothing else is in it."""
        for place in self._mine:
            place.unlink(missing_ok=True)
        self._mine.clear()
        for part in self.path.glob(PART_NAMES):
            # Of a process that was killed while it wrote.
            part.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def _place(self, name: tuple[str, ...]) -> Path:
        text = "\0".join((str(FORMAT), *self._key, "", *name))
        return self.path / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}{_SUFFIX}"


def digest_of_files(folder: Path) -> str:
    """Names, sizes and times of a folder's files: whether calibration data are the same ones.

    Raises:
        ExportError: It cannot be read.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; name one that holds calibration images")
    lines = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_file():
            found = entry.stat()
            lines.append(f"{entry.name}\0{found.st_size}\0{found.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
