"""Files of an untrusted folder: opened only where they are plain files, read up to a limit, found.

A bundle's folder may hold anything: pipes, devices, links that lead out of it or to themselves,
linked folders. Nothing here follows a linked folder, waits for a pipe, or reads without a bound.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Event
from typing import BinaryIO

from lrs_edge.errors import BundleError

#: A folder with more entries than this is not a bundle; the walk ends there.
MAX_ENTRIES = 100_000

#: Never waits for the other end of a pipe, and never makes a terminal the process's own.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading.

    Raises:
        OSError: It is not there, cannot be read, or is a pipe, device, socket or folder.
    """
    # Looked at before it is opened, since opening a device can do something; and after, since the
    # name may stand for something else by then.
    _require_plain(os.stat(path).st_mode)
    descriptor = os.open(path, _FLAGS)
    try:
        _require_plain(os.fstat(descriptor).st_mode)
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def _require_plain(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(0, "it is not a plain file")


def read_limited(path: Path, limit: int) -> bytes:
    """Content of a plain file.

    Raises:
        BundleError: It has more than `limit` bytes.
        OSError: As `open_plain`.
    """
    with open_plain(path) as stream:
        if os.fstat(stream.fileno()).st_size > limit:
            raise BundleError(f"{path} is larger than {limit} bytes; copy or export it again")
        data = bytearray()
        # A file that grows meanwhile, or lies about its size (/proc), is read no further either.
        while piece := stream.read(limit + 1 - len(data)):
            data += piece
            if len(data) > limit:
                raise BundleError(f"{path} is larger than {limit} bytes; copy or export it again")
    return bytes(data)


def sha256_of(path: Path, size: int, stop: Event) -> str:
    """SHA-256, in hex, of a plain file of `size` bytes.

    Raises:
        OSError: As `open_plain`, or `stop` was set meanwhile.
    """
    digest = hashlib.sha256()
    # One buffer that stays in the processor's cache.
    buffer = memoryview(bytearray(256 << 10))
    with open_plain(path) as stream:
        # One byte more would be read from a file that has grown: then the hash differs.
        left = size + 1
        while left > 0 and (count := stream.readinto(buffer[:left])):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
            left -= count
            if stop.is_set():
                raise OSError(0, "interrupted")
    return digest.hexdigest()


def is_inside(name: str) -> bool:
    """True for a plain relative path in both path syntaxes, without `..`."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return (
        bool(posix.parts)
        and name.isprintable()
        and not posix.is_absolute()
        and not windows.is_absolute()
        and not windows.drive
        and ".." not in posix.parts
        and ".." not in windows.parts
    )


def leads_out(root: Path, name: str) -> bool:
    """Whether links take a path of the bundle to somewhere outside of it."""
    # Unlike Path.resolve, realpath does not raise at a link to itself.
    real = os.path.realpath(root / name)
    return not Path(real).is_relative_to(os.path.realpath(root))


def walk(root: Path) -> Iterator[tuple[str, bool]]:
    """Everything below a folder that is not itself a folder.

    Returns:
        Relative path, and whether it is a linked folder, whose content the walk does not see.

    Raises:
        BundleError: A folder cannot be listed, or there is far too much in it.
    """
    waiting, seen = [""], 0
    while waiting:
        below = waiting.pop()
        folder = root / below
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MAX_ENTRIES:
                        raise BundleError(
                            f"{root} holds more than {MAX_ENTRIES} files; name the directory that "
                            "`lrs-edge export` wrote"
                        )
                    name = f"{below}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{name}/")
                    else:
                        yield name, os.path.isdir(entry.path)
        except OSError as error:
            raise BundleError(
                f"{folder} cannot be listed ({error.strerror}), so unlisted files could hide in "
                "it; remove it, or make it readable"
            ) from error
