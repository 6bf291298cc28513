"""Time: the deadline of one question, and the seconds its steps take."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lrs_edge.answer.answer import Timings


class Clock:
    """Started when the question is submitted; measures steps and knows the deadline.

    Args:
        timeout: Seconds the question may take, None for no limit.
        now: Monotonic clock in seconds.
        start: When the question was submitted, by that clock; None for this moment.
    """

    def __init__(
        self,
        timeout: float | None,
        now: Callable[[], float] = time.monotonic,
        start: float | None = None,
    ) -> None:
        self._now = now
        self._start = now() if start is None else start
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.timeout = timeout
        #: True when nobody wants the answer any more, which ends everything as the deadline does.
        self.is_given_up: Callable[[], bool] = lambda: False

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a step, such as `prefill`."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def seconds(self, name: str) -> float:
        """Seconds spent in a step so far."""
        return self._seconds[name]

    def timings(self) -> Timings:
        """What an answer tells of it."""
        return Timings(
            read=self.seconds("read"),
            encode=self.seconds("encode"),
            score=self.seconds("prefix") + self.seconds("score"),
            prefill=self.seconds("prefill"),
            decode=self.seconds("decode"),
            total=self.elapsed,
        )

    @property
    def elapsed(self) -> float:
        """Seconds since the question was submitted; waiting in the queue counts."""
        return self._now() - self._start

    @property
    def left(self) -> float:
        """Seconds until the deadline, below 0 after it; infinite without one."""
        return math.inf if self.timeout is None else self.timeout - self.elapsed

    @property
    def deadline(self) -> float | None:
        """When the time limit is over, by the clock's time; None without one."""
        return None if self.timeout is None else self._start + self.timeout

    def expired(self) -> bool:
        """True when the time limit is over, or nobody wants the answer any more."""
        return self.is_given_up() or self.left <= 0
