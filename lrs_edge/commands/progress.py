"""The line on stderr that says what the search is doing."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from lrs_edge.answer.answer import Progress

_WORDS = {
    "read": "reading tiles",
    "encode": "encoding tiles",
    "score": "choosing regions",
    "prefill": "reading the question",
    "decode": "answering",
}


class ProgressDisplay:
    """A transient line with the level, the tiles read and the tiles encoded.

    Args:
        enabled: False shows nothing, for `-q` and for a stderr that is not a terminal.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._bar: Bar | None = _bar() if enabled else None
        self._task = (
            self._bar.add_task("opening the model", total=None, tiles="") if self._bar else None
        )

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def update(self, progress: Progress) -> None:
        """Show a step."""
        if self._bar is None or self._task is None:
            return
        searching = progress.level is not None
        level = f"level {progress.level}/{progress.levels - 1}: " if searching else ""
        self._bar.update(
            self._task,
            description=level + _WORDS[progress.stage],
            completed=progress.tiles_encoded,
            total=progress.tiles_total or None,
            tiles=f"{progress.tiles_read} read, {progress.tiles_encoded} encoded",
        )

    def stop(self) -> None:
        """Take the line away; more than once does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[tiles]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
