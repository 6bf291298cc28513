"""One thread per open image, in which all of GDAL's work on it is done.

A call into GDAL cannot be interrupted: no signal and no deadline reaches it. So it is made in a
thread of its own, and the caller waits for it in steps that a deadline, a cancellation or Ctrl-C
can end. The call that was given up goes on until GDAL returns; the pieces after it do not start.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from lrs_edge.errors import ImageError, ReadStoppedError

Result = TypeVar("Result")
#: Asked between the pieces of a read: whether it shall be given up.
Stop = Callable[[], bool]

#: Seconds between two looks at the deadline while GDAL works.
_STEP = 0.05


_current = threading.local()


def check_stopped() -> None:
    """Ends the work that this thread is doing if it was given up; called between its pieces.

    Does nothing in a thread that is no `ImageThread`'s.

    Raises:
        ReadStoppedError: It was given up.
    """
    task: _Task[Any] | None = getattr(_current, "task", None)
    if task is not None and task.is_over():
        raise ReadStoppedError("the read was given up between two pieces")


class _Task(Generic[Result]):
    """One piece of work on its way through the thread."""

    def __init__(self, work: Callable[[], Result], stop: Stop | None) -> None:
        self.work = work
        self.stop = stop
        self.given_up = False
        self.done = threading.Event()
        self.result: Result | None = None
        self.error: BaseException | None = None

    def is_over(self) -> bool:
        return self.given_up or (self.stop is not None and self.stop())


class ImageThread:
    """Runs work on one image, one piece after another, in the order in which it was asked for.

    Args:
        name: The image, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._state = _State()
        self._lock = threading.Lock()
        self._ended = False
        self._tasks: queue.SimpleQueue[_Task[Any] | None] = queue.SimpleQueue()
        # A daemon: a call that hangs must not keep the process alive.
        thread = threading.Thread(
            target=_serve, args=(self._tasks, self._state), name="lrs-edge-gdal", daemon=True
        )
        thread.start()
        self._end = weakref.finalize(self, self._tasks.put, None)
        self._end.atexit = False

    def run(self, work: Callable[[], Result], stop: Stop | None = None) -> Result:
        """The result of `work`, done in the thread.

        Args:
            work: May call `check_stopped` between its pieces.
            stop: Asked every few hundredths of a second; a True gives the work up.

        Raises:
            ReadStoppedError: `stop` said so before the work was done.
            ImageError: The thread has ended.
            Exception: Whatever `work` raises.
        """
        task = _Task(work, stop)
        with self._lock:
            if self._ended:
                raise ImageError(f"{self._name} was closed; open it again to read from it")
            self._tasks.put(task)
        try:
            # Waiting with a limit lets signals through on every platform.
            while not task.done.wait(_STEP if stop is not None else 1.0):
                if stop is not None and stop():
                    raise self._stopped()
        finally:
            task.given_up = True
            # A traceback would keep the task, and the task its result.
            error, task.error = task.error, None
        if isinstance(error, ReadStoppedError):
            raise self._stopped() from None
        if error is not None:
            raise error
        return task.result  # type: ignore[return-value]

    def end(self, last: Callable[[], None]) -> None:
        """Does one last piece of work when the others are done, and ends the thread.

        Waits for it, but not for a call that was given up and has not returned.
        """
        task = _Task(last, None)
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._end.detach()
            busy = self._state.task
            self._tasks.put(task)
            self._tasks.put(None)
        while not task.done.wait(_STEP):
            if busy is not None and busy.given_up and self._state.task is busy:
                return

    def _stopped(self) -> ReadStoppedError:
        return ReadStoppedError(
            f"{self._name} could not be read within the time limit; give it more time, or convert "
            "it to a Cloud-Optimized GeoTIFF (gdal_translate -of COG)"
        )


class _State:
    """What the thread is doing; shared with it, while the owner may be forgotten."""

    task: _Task[Any] | None = None


def _serve(tasks: queue.SimpleQueue[_Task[Any] | None], state: _State) -> None:
    while (task := tasks.get()) is not None:
        if not task.given_up:
            state.task = _current.task = task
            try:
                task.result = task.work()
            except BaseException as error:
                task.error = error
            state.task = _current.task = None
        task.done.set()
        del task
