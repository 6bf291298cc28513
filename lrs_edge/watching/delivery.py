"""Giving answers out: files, a line of standard output, the hook; and errors in words."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lrs_edge.errors import ImageError, JournalError, LrsEdgeError, OutOfMemoryError
from lrs_edge.watching.hook import Hook
from lrs_edge.watching.journal import AnswerRow, Journal
from lrs_edge.watching.results import Results


def no_step(_: str) -> None:
    """Nobody is told of steps."""


@dataclass(frozen=True)
class Delivery:
    """Takes answers from the journal to those who want them, noting how far each one is.

    Attributes:
        _root: The watched folder.
        _journal: Where answers are kept.
        _results: Writes their files.
        _hook: Run for each; None for none.
        _write: Writes a line of standard output.
        _tell: Tells people how it goes.
        _step: Told the name of every step.
    """

    _root: Path
    _journal: Journal
    _results: Results
    _hook: Hook | None
    _write: Callable[[str], None]
    _tell: Callable[[str], None]
    _step: Callable[[str], None] = no_step

    def deliver_all(self) -> None:
        """Give out what an earlier run, or a full disk, left in the journal."""
        for row in self._journal.undelivered():
            self.deliver(row)

    def deliver(self, row: AnswerRow) -> None:
        """Files, then standard output, then the hook."""
        state = row.state
        if state == "answered":
            self._results.write(row)
            self._step("files")
            self._journal.written(row.id)
            self._step("written")
            state = "written"
        if state == "written":
            self._write_line(row.line)
            self._step("line")
            self._journal.told(row.id)
            self._step("told")
        code = self._run_hook(row)
        self._step("hook")
        self._journal.delivered(row.id, code)
        self._step("delivered")

    def _write_line(self, line: str) -> None:
        try:
            self._write(line)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise JournalError(f"standard output cannot be written ({error.strerror})") from error

    def _run_hook(self, row: AnswerRow) -> int | None:
        hook = self._hook
        if hook is None:
            return None
        json, geojson = self._results.paths(row.path, row.digest, row.question_id, row.question_key)
        code = hook.run(
            {
                "json": str(json),
                "geojson": str(geojson) if geojson.exists() else "",
                "product": os.path.abspath(self._root / row.path),
                "question_id": row.question_id,
            }
        )
        if code:
            self._tell(f"{row.path}: the hook ended with exit code {code}")
        return code


def described(error: Exception) -> tuple[str, int]:
    """What a record says of an error, and the exit code that stands for it."""
    if isinstance(error, LrsEdgeError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror or error})", ImageError.exit_code
    if isinstance(error, MemoryError):
        return "out of memory", OutOfMemoryError.exit_code
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"this is a bug in lrs-edge: {what}", LrsEdgeError.exit_code
