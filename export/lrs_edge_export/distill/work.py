"""The folder in which a distillation keeps what it has done, so that it can go on after a break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrs_edge.errors import UsageError
from lrs_edge.files import replacing

_STAMP = "distill-work.json"


class Work:
    """A work folder that belongs to one checkpoint, one data set and one way of sampling.

    Args:
        path: Made if it is not there.
        stamp: What it belongs to.

    Raises:
        UsageError: It belongs to something else, or is not a work folder.
    """

    def __init__(self, path: Path, stamp: dict[str, Any]) -> None:
        self.path = path
        file = path / _STAMP
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is not a directory; name another one with --work")
        if file.is_file():
            self._check(read_json(file), stamp)
            return
        if path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path} is not empty, and not from `distill`; name another --work")
        path.mkdir(parents=True, exist_ok=True)
        self.write(_STAMP, stamp)

    def _check(self, found: Any, stamp: dict[str, Any]) -> None:
        # Through JSON, which knows no tuples.
        wanted = json.loads(json.dumps(stamp))
        if not isinstance(found, dict) or found != wanted:
            keys = {*wanted, *(found if isinstance(found, dict) else ())}
            other = [key for key in sorted(keys) if _of(found, key) != _of(wanted, key)]
            raise UsageError(
                f"{self.path} was begun with another {', '.join(other)}; name another --work, or "
                "remove it to start again"
            )

    def read(self, name: str) -> Any:
        """A JSON file of the folder; None if it is not there. Raises UsageError when damaged."""
        file = self.path / name
        return read_json(file) if file.is_file() else None

    def write(self, name: str, values: object) -> None:
        """Write a JSON file of the folder in one step."""
        with replacing(self.path / name) as stream:
            stream.write((json.dumps(values, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Any JSON file of a work folder. Raises UsageError when damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it and start again") from error


def _of(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, dict) else None
