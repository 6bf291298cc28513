"""A ticket: one submitted request, as its readers see it and as the worker sees it.

The worker tells events (pieces of text, progress) and ends with a result or an error. Readers take
the events in any thread or event loop, and cancel from anywhere. All tickets of a queue share the
queue's lock, which is held for moments only.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from lrs_edge.errors import CancelledError

Event = TypeVar("Event")
Result = TypeVar("Result")

#: Seconds after which a waiting thread looks up: not every system interrupts a wait for Ctrl-C.
SLICE = 1.0

#: Seconds for which nobody has looked, once the main thread has ended, after which nobody will.
UNREAD_AT_EXIT = 2.5


@dataclass(frozen=True)
class Work(Generic[Event, Result]):
    """What a ticket stands for.

    Attributes:
        run: Does the work in the worker; gets the ticket to tell events to, and to ask whether
            anybody still wants the result.
        too_late: The result of a request whose deadline passed before its turn came; quick.
        deadline: By `time.monotonic`, None for none.
    """

    run: Callable[[Ticket[Event, Result]], Result]
    too_late: Callable[[], Result]
    deadline: float | None = None


class Ticket(Generic[Event, Result]):
    """One request in a queue; made by `RequestQueue.submit`.

    Attributes:
        owner: Whose it is, such as a scene: `RequestQueue.cancel` ends all of an owner's.
    """

    def __init__(
        self, lock: threading.RLock, work: Work[Event, Result], owner: object | None
    ) -> None:
        self.owner = owner
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._work: Work[Event, Result] | None = work
        self._events: deque[Event] = deque()
        self._wakers: list[Callable[[], None]] = []
        self._done = False
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._process = os.getpid()
        self._looked = time.monotonic()

    # What the worker does.

    def run(self) -> None:
        """Do the work, unless nobody wants it any more."""
        with self._lock:
            work, self._work = self._work, None
        if work is None:
            return  # A reader ended it at its deadline.
        if self.is_given_up:
            self.cancel("nobody waits for this answer any more")
            return
        try:
            late = work.deadline is not None and time.monotonic() >= work.deadline
            result = work.too_late() if late else work.run(self)
        except BaseException as error:
            self._end(None, error)
        else:
            self._end(result, None)

    def tell(self, event: Event) -> None:
        """Add an event for the readers; never waits for them."""
        with self._lock:
            if not self._done:
                self._events.append(event)
                self._notify()

    @property
    def is_given_up(self) -> bool:
        """True when nobody will read the rest: it was cancelled, or its stream is gone.

        At the end of the program a stream that is still held, but not read, counts as gone: the
        interpreter waits for the worker.
        """
        if self._abandoned or (self._done and self._error is not None):
            return True
        unread = time.monotonic() - self._looked
        return unread > UNREAD_AT_EXIT and not threading.main_thread().is_alive()

    @property
    def error(self) -> BaseException | None:
        """Why it failed; None while it has not."""
        return self._error

    def _end(self, result: Result | None, error: BaseException | None) -> None:
        with self._lock:
            if not self._done:
                self._done, self._result, self._error = True, result, error
            self._work = None
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    # What readers do.

    @property
    def is_waiting(self) -> bool:
        """True until the worker, or the deadline, takes the ticket out of the queue."""
        return self._work is not None

    def cancel(self, reason: str) -> None:
        """End the ticket for its readers at once; the worker stops at its next step.

        Args:
            reason: What readers are told by a `CancelledError`.
        """
        self._end(None, CancelledError(reason))

    def abandon(self) -> None:
        """Note that no reader is left; takes no lock, so that a garbage collector may call it."""
        self._abandoned = True

    def poll(self) -> Event | None:
        """The next event, or None where there is none at the moment or at the end (`is_over`).

        Raises:
            LrsEdgeError: The work failed or was cancelled, and all events before that were taken.
        """
        if os.getpid() != self._process:
            # The worker is in the other process, and the lock may have been held during the fork.
            raise CancelledError(
                "this question was asked before a fork; read it where it was asked"
            )
        self._looked = time.monotonic()
        self._expire()
        with self._lock:
            if self._events:
                return self._events.popleft()
            if self._error is not None:
                raise self._error
            return None

    @property
    def is_over(self) -> bool:
        """True when the result is there and all events were taken."""
        with self._lock:
            return self._done and self._error is None and not self._events

    def wait(self) -> None:
        """Wait until `poll` has something to say."""
        with self._lock:
            if self._events or self._done:
                return
            self._changed.wait(min(SLICE, self.seconds_waiting()))

    def wake(self, waker: Callable[[], None]) -> bool:
        """Call `waker` once, from any thread, as soon as `poll` has something to say.

        Returns:
            False where it has already; the waker is not called then.
        """
        with self._lock:
            if self._events or self._done:
                return False
            self._wakers.append(waker)
            return True

    def seconds_waiting(self) -> float:
        """Seconds after which a reader must poll again if nothing happens."""
        work = self._work
        if work is None or work.deadline is None:
            return SLICE
        return max(work.deadline - time.monotonic(), 0.0)

    def _expire(self) -> None:
        """A reader ends what waits for its turn at the deadline: the worker may be busy longer."""
        with self._lock:
            work = self._work
            if work is None or work.deadline is None or time.monotonic() < work.deadline:
                return
            self._work = None
        try:
            self._end(work.too_late(), None)
        except BaseException as error:
            self._end(None, error)
            raise

    def result(self) -> Result:
        """The result; only when `is_over`."""
        if self._result is None:
            raise CancelledError("the request has no result: it was cancelled or failed")
        return self._result
