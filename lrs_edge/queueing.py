"""One request at a time: the queue in front of an engine that threads share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lrs_edge.errors import UsageError


class RequestQueue:
    """Requests of other threads wait; a second one of the same thread would wait for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def is_mine(self) -> bool:
        """True while this thread's own request is under way."""
        return self._owner == threading.get_ident()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the other requests, then go ahead.

        Raises:
            UsageError: This thread has a request under way, such as an unfinished stream.
        """
        if self.is_mine:
            raise UsageError(
                "this thread still streams another answer; exhaust or close that stream first"
            )
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
