"""Writing a file so that it appears whole or not at all, and by one process at a time."""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from lrs_edge.errors import ImageError

#: Names of `part_name`, by which what a killed process left is known.
PART_NAMES = ".lrs-edge-*.part"

#: Names of a descriptor of this process; opening them anew would write from the file's start.
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/(?:fd/(\d{1,9})|(stdout|stderr))")
_STANDARD = {"stdout": 1, "stderr": 2}


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Open a new file beside the target; it takes the target's place when the block ends well.

    What was there before is left as it was when the block fails. A file that was there keeps its
    permissions, a new one gets those of any new file of the user. A link stays, and the file that
    it names is replaced. A device, a named pipe, or a descriptor such as `/dev/stdout` is written
    to as it is.

    Raises:
        OSError: The target, or its directory, cannot be written to.
    """
    direct = _direct(target)
    if direct is not None:
        with direct as stream:
            yield stream
        return
    place = Path(os.path.realpath(target))
    temporary, handle = _new_beside(place)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            _keep_permissions(place, stream.fileno())
        os.replace(temporary, place)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def check_replaceable(target: Path) -> None:
    """See whether `replacing` could write a file, without leaving a trace.

    A disk that fills up later cannot be foreseen.

    Raises:
        OSError: The directory is missing or cannot be written to, the name cannot be a file's, or
            the target is a directory.
    """
    # Not Path's methods: they take a name that is too long for one that is not there.
    place = os.path.realpath(target)
    with suppress(FileNotFoundError):
        mode = os.stat(place).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if not stat.S_ISREG(mode) or _DESCRIPTOR.fullmatch(str(target)):
            if not os.access(place, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
            return
    temporary, handle = _new_beside(Path(place))
    os.close(handle)
    temporary.unlink()


def hold_lock(stream: IO[bytes]) -> bool:
    """Take an open file's lock, which is held until the file is closed or the process ends.

    Returns:
        False where another process holds it. Where the system or the file system knows no such
        locks nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:  # Windows.
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def _direct(target: Path) -> BinaryIO | None:
    """A stream into a target that must not be replaced; None for files and what is not there."""
    found = _DESCRIPTOR.fullmatch(str(target))
    if found is not None:
        return os.fdopen(os.dup(int(found[1]) if found[1] else _STANDARD[found[2]]), "wb")
    try:
        mode = os.stat(target).st_mode
    except OSError:
        return None
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else target.open("wb")


def part_name() -> str:
    """A name that nobody else takes, for a file or folder that is being written.

    A process's id would do neither in containers that share a folder nor between threads. The name
    has nothing of the final one, which may be as long as names can be.
    """
    return PART_NAMES.replace("*", uuid.uuid4().hex)


def _new_beside(place: Path) -> tuple[Path, int]:
    """A new empty file in the directory of another."""
    try:
        mode = stat.S_IMODE(os.stat(place).st_mode) & 0o666
    except FileNotFoundError:
        mode = 0o666
    temporary = place.with_name(part_name())
    return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def _keep_permissions(place: Path, handle: int) -> None:
    """Give a new file the mode, and where that is allowed the owner, of the one it replaces."""
    try:
        old = os.stat(place)
    except FileNotFoundError:
        return
    if not hasattr(os, "fchmod"):
        return
    new = os.fstat(handle)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with suppress(OSError):
            os.fchown(handle, old.st_uid, old.st_gid)
    os.fchmod(handle, stat.S_IMODE(old.st_mode))


def refuse_address(name: str) -> None:
    """Refuse what is not a path of a local file, before anything takes it for one.

    Raises:
        ImageError: A URL or a GDAL virtual path.
    """
    if "://" in name or name.startswith(("/vsi", "\\vsi")):
        raise ImageError(f"{name} is not a local file; download it first and give its path")
