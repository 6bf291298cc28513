"""The line on stderr that says how far an evaluation is, with the accuracy so far."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class EvalProgress:
    """A transient bar over the questions.

    Args:
        total: Questions of the run, those answered before included.
        enabled: False shows nothing.
    """

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._done = self._correct = self._failed = 0
        self._bar: Bar | None = _bar() if enabled else None
        self._task = self._bar.add_task("asking", total=total, score="") if self._bar else None

    def __enter__(self) -> EvalProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def summary(self) -> str:
        """Accuracy so far, and failures if there are any."""
        share = self._correct / self._done if self._done else 0.0
        failed = f", {self._failed} failed" if self._failed else ""
        return f"accuracy {share:.1%}{failed}"

    def add(self, *, correct: bool, failed: bool) -> None:
        """Count one answer."""
        self._done += 1
        self._correct += correct
        self._failed += failed
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, score=self.summary)


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[score]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
