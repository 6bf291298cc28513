"""Time, and waiting for something to happen in a folder: the only module here that sleeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Milliseconds for which changes are collected before they wake the loop.
_DEBOUNCE_MS = 400


class Waking:
    """Clocks, and waits that a change of the folder or a stop ends early.

    Tests replace it by one whose time passes when it is told to wait.
    """

    def __init__(self) -> None:
        self._woken = threading.Event()

    def now(self) -> float:
        """Seconds since 1970, which the journal keeps."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds of a clock that nobody sets, for durations."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Wait for so long, or until `wake`."""
        self._woken.wait(max(seconds, 0))
        self._woken.clear()

    def wake(self) -> None:
        """End a wait, from any thread or a signal's handler."""
        self._woken.set()


@contextmanager
def notices(folder: Path, waking: Waking) -> Iterator[str]:
    """Wake the loop at once when something changes in the folder, where that can be noticed.

    Args:
        folder: The folder, with all below it.
        waking: What is woken.

    Yields:
        How changes are noticed, for people.
    """
    try:
        from watchfiles import watch
    except ImportError:
        yield "by looking (install the extra `watch` to be told by the system)"
        return
    stop = threading.Event()

    def listen() -> None:
        try:
            for _ in watch(
                folder,
                watch_filter=None,
                debounce=_DEBOUNCE_MS,
                rust_timeout=500,
                stop_event=stop,
                ignore_permission_denied=True,
            ):
                waking.wake()
        except Exception:
            # Too many folders for the system, or a file system that tells nothing.
            return

    # A daemon: an end of the process within a second waits for nobody.
    thread = threading.Thread(target=listen, name="lrs-edge-watch", daemon=True)
    thread.start()
    try:
        yield "as the system tells, and by looking"
    finally:
        stop.set()
        thread.join(timeout=1)
