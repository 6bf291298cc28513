"""Several openings of one image, so that several of its windows are read at once.

GDAL reads from one opening in one thread; decoding and resampling of different windows share
nothing else. Only an engine that waits for tiles needs this: on a CPU the cores are the encoder's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lrs_edge.errors import ImageError
from lrs_edge.raster.gdal_env import image_errors
from lrs_edge.raster.image_thread import ImageThread
from lrs_edge.raster.opening import RasterLimits, open_source
from lrs_edge.raster.source import MemorySource, Source
from lrs_edge.raster.turned import TurnedSource
from lrs_edge.raster.window import WindowReader


@dataclass
class Handle:
    """One opening: the thread in which it is read, and a lock against reading and closing at once.

    Attributes:
        source: Its pixels.
        reader: Windows of them.
        owns: The source is closed with it.
        closed: No more can be read.
    """

    thread: ImageThread
    source: Source
    reader: WindowReader
    owns: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False

    def end(self) -> None:
        """Close it and end its thread, when what is being read is done."""
        self.thread.end(self._close)

    def _close(self) -> None:
        with self.lock:
            if not self.closed:
                self.closed = True
                if self.owns:
                    self.source.close()


def stamp_of(path: Path) -> tuple[int, ...]:
    """What tells a file from another of its name. Raises ImageError."""
    try:
        found = path.stat()
    except OSError as error:
        raise ImageError(f"{path} cannot be opened ({error.strerror})") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_again(path: Path, limits: RasterLimits, stamp: tuple[int, ...], first: Handle) -> Handle:
    """Another opening of an image; one that is in memory is read from there.

    Args:
        path: The file.
        limits: What is refused.
        stamp: Of the file when it was opened.
        first: The image as it was opened.

    Raises:
        ImageError: The file cannot be opened, or is not what it was.
    """
    known, reader = first.source.header, first.reader
    turned = isinstance(first.source, TurnedSource)
    kept = first.source.stored if isinstance(first.source, TurnedSource) else first.source
    thread = ImageThread(str(path))
    if isinstance(kept, MemorySource):
        return Handle(thread, first.source, reader, owns=False)

    def opened() -> Handle:
        with image_errors(path, "opened"):
            source = open_source(path, limits, known.page)
            source = TurnedSource(source) if turned else source
            if stamp_of(path) != stamp:
                source.close()
                raise ImageError(f"{path} was changed while it was open")
        again = WindowReader(source, reader.bands, reader.alpha, masked=reader.masked)
        return Handle(thread, source, again)

    try:
        return thread.run(opened)
    except BaseException:
        thread.end(lambda: None)
        raise


class Handles:
    """Hands out openings that nobody reads from, and opens more while there may be more.

    Args:
        first: The opening that is there.
        again: Opens the image that the first opened once more. Raises ImageError.
    """

    def __init__(self, first: Handle, again: Callable[[Handle], Handle]) -> None:
        self._first = first
        self._again = again
        self._lock = threading.Lock()
        self._free = deque([first])
        self._all = [first]
        self._most = 1
        # Openings that are there, that are being made, and that could not be made.
        self._asked = 1
        self._ended = False

    def allow(self, most: int) -> None:
        """Let there be so many openings; never fewer than before."""
        with self._lock:
            self._most = max(self._most, most)

    @property
    def bytes_read(self) -> int:
        """Bytes of raw pixels taken out of the file through all of them."""
        with self._lock:
            sources = {id(handle.source): handle.source for handle in self._all}
        return sum(source.bytes_read for source in sources.values())

    @contextmanager
    def taken(self) -> Iterator[Handle]:
        """An opening to read from; where none is free, the first, which reads one by one."""
        handle, alone = self._take()
        try:
            yield handle
        finally:
            if alone:
                with self._lock:
                    self._free.append(handle)

    def _take(self) -> tuple[Handle, bool]:
        """An opening, and whether nobody else has it."""
        with self._lock:
            if self._free:
                return self._free.popleft(), True
            if self._ended or self._asked >= self._most:
                return self._first, False
            # Counted before it is there: opening takes longer than the lock is held.
            self._asked += 1
        try:
            handle = self._again(self._first)
        except ImageError:
            # What is open already can be read.
            return self._first, False
        with self._lock:
            self._all.append(handle)
        self._end_late(handle)
        return handle, True

    def _end_late(self, handle: Handle) -> None:
        """Close an opening that was made while all were closed."""
        if self._ended:
            handle.end()

    def end(self) -> None:
        """Close all, and end their threads."""
        with self._lock:
            self._ended = True
            handles = list(self._all)
        # The first may own what the others read.
        for handle in reversed(handles):
            handle.end()
