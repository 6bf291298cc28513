"""Telling the caller how far a question is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lrs_edge.answer.answer import Progress

OnProgress = Callable[[Progress], None]
StepName = Literal["read", "encode", "score", "prefill", "decode"]


class ProgressTeller:
    """Keeps count and calls the caller's function; knows nothing of the request.

    Args:
        on_progress: The caller's function, None to tell nobody.
        levels: Levels that the search may visit.
        check: Called at every step; raises where the work should stop.
    """

    def __init__(
        self,
        on_progress: OnProgress | None,
        levels: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self._on_progress = on_progress
        self._levels = levels
        self._level: int | None = None
        self._read = self._encoded = 0
        # The global view.
        self._total = 1

    def on_level(self, index: int, tiles: int) -> None:
        """A level is about to be searched."""
        self._level = index
        self._total += tiles
        self.tell("score")

    def on_tile(self, step: Literal["read", "encode"], read: int, encoded: int) -> None:
        """A tile was read, or encoded."""
        self._read, self._encoded = read, encoded
        self.tell(step)

    def tell(self, step: StepName) -> None:
        """Say what happens now."""
        self._check()
        if self._on_progress is None:
            return
        searching = step in ("read", "encode", "score")
        self._on_progress(
            Progress(
                stage=step,
                level=self._level if searching else None,
                levels=self._levels,
                tiles_read=self._read,
                tiles_encoded=self._encoded,
                tiles_total=self._total,
            )
        )
