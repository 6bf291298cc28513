"""Time: the deadline of one question, and the seconds its stages take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Share of a time limit that the search may use; the rest is for prefill and the answer.
SEARCH_SHARE = 0.6


class Clock:
    """Started with the question; measures stages and knows the deadline.

    Args:
        timeout: Seconds the question may take, None for no limit.
        now: Monotonic clock in seconds.
    """

    def __init__(self, timeout: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start = now()
        self._timeout = timeout
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def seconds(self, name: str) -> float:
        """Seconds spent in a stage so far."""
        return self._seconds[name]

    @property
    def elapsed(self) -> float:
        """Seconds since the question was asked."""
        return self._now() - self._start

    def expired(self) -> bool:
        """True when the time limit is over."""
        return self._timeout is not None and self.elapsed >= self._timeout

    def search_expired(self) -> bool:
        """True when the search has used its share of the time limit."""
        return self._timeout is not None and self.elapsed >= SEARCH_SHARE * self._timeout
