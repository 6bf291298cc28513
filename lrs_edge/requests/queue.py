"""The queue in front of an engine: one worker, one request at a time, in the order of submission.

Nothing depends on which thread submits, reads, cancels or closes. The worker is a thread that lives
as long as there is something to do: an idle engine has none, so that nothing must be shut down when
the interpreter ends, nothing stays when a program forgets to close the engine, and a fork
of an idle process finds no thread missing.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections import deque
from typing import Any, TypeVar

from lrs_edge.errors import BackendError, QueueFullError, UsageError
from lrs_edge.requests.ticket import SLICE, Ticket, Work

Event = TypeVar("Event")
Result = TypeVar("Result")

#: Requests that may wait, besides the one under way.
MAX_WAITING = 64


class RequestQueue:
    """Requests that wait, and the thread that works on them.

    Args:
        max_waiting: Requests that may wait besides the one under way; the next is refused.
    """

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self._max_waiting = max_waiting
        # Re-entrant: a garbage collection inside may run code that ends another ticket.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[Ticket[Any, Any]] = deque()
        self._running: Ticket[Any, Any] | None = None
        self._worker: threading.Thread | None = None
        self._process = os.getpid()
        self._closed = False

    @property
    def is_forked(self) -> bool:
        """True in a child process: threads do not survive a fork, nor do an engine's."""
        return os.getpid() != self._process

    def submit(
        self, work: Work[Event, Result], owner: object | None = None
    ) -> Ticket[Event, Result]:
        """Put a request at the end of the queue. Returns at once.

        Raises:
            QueueFullError: Too many requests wait already.
            UsageError: The queue is closed, or the process was forked after it was made.
            BackendError: The system gives no thread to work in.
        """
        if self.is_forked:
            raise UsageError(
                f"this engine was loaded in process {self._process} and cannot be used after a "
                "fork; load an engine in each process"
            )
        with self._lock:
            self._waiting = deque(ticket for ticket in self._waiting if _is_wanted(ticket))
            if self._closed:
                raise UsageError("the engine is closed; load it again")
            if len(self._waiting) + (self._running is not None) > self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} questions wait already, which is the limit; ask again "
                    "later, or load the engine with a larger max_waiting"
                )
            ticket = Ticket(self._lock, work, owner)
            self._waiting.append(ticket)
            if self._worker is None:
                self._start()
            return ticket

    def _start(self) -> None:
        self._worker = threading.Thread(target=self._serve, name="lrs-edge-worker")
        try:
            self._worker.start()
        except RuntimeError as error:
            self._worker = None
            self._waiting.clear()
            raise BackendError(
                f"no thread can be started for the answer ({error}); "
                "end other threads of this process"
            ) from error

    def _serve(self) -> None:
        """Work until nothing waits."""
        while True:
            with self._lock:
                while self._waiting and not _is_wanted(self._waiting[0]):
                    self._waiting.popleft()
                if not self._waiting:
                    self._worker = None
                    return
                self._running = ticket = self._waiting.popleft()
            ticket.run()
            if ticket.error is not None:
                # Frames of a failed request hold its arrays, and the ticket that holds the error.
                traceback.clear_frames(ticket.error.__traceback__)
            del ticket
            with self._lock:
                self._running = None
                self._changed.notify_all()

    def cancel(self, owner: object | None, reason: str) -> None:
        """End the tickets of an owner, or all for None, and wait until the worker left them.

        Args:
            owner: As given to `submit`.
            reason: What their readers are told.
        """
        if self.is_forked:
            # Nobody works on anything here, and the lock may have been held during the fork.
            return
        with self._changed:
            for ticket in [*self._waiting, self._running]:
                if ticket is not None and _belongs(ticket, owner):
                    ticket.cancel(reason)
            self._waiting = deque(ticket for ticket in self._waiting if _is_wanted(ticket))
            while self._running is not None and _belongs(self._running, owner):
                self._changed.wait(SLICE)

    def close(self) -> None:
        """Refuse new requests, end all others, and wait for the worker's end."""
        if self.is_forked:
            return
        with self._lock:
            self._closed = True
            worker = self._worker
        self.cancel(None, "the engine was closed before the answer was there")
        if worker is not None:
            worker.join()


def _is_wanted(ticket: Ticket[Any, Any]) -> bool:
    return ticket.is_waiting and not ticket.is_given_up


def _belongs(ticket: Ticket[Any, Any], owner: object | None) -> bool:
    return owner is None or ticket.owner is owner
