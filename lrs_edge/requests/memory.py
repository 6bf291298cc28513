"""Memory of this process: its peak, errors that mean its end, and giving back what is free."""

from __future__ import annotations

import ctypes
import errno
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


#: How libraries say that there is no memory left where they raise no MemoryError: the loader of
#: shared libraries, threads, C++, Rust.
_SIGNS = (
    "cannot allocate memory",
    "failed to map segment",
    "can't start new thread",
    "bad_alloc",
    "failed to allocate",
    "out of memory",
    "bfcarena",
)


def means_no_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory has run out."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError):
            # Its text names a file, which may be called anything.
            if error.errno == errno.ENOMEM:
                return True
        elif any(sign in str(error).lower() for sign in _SIGNS):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def peak_memory() -> int:
    """Largest resident memory of the process so far in bytes; 0 where the system does not tell."""
    if _STATUS.is_file():
        # Linux hands `ru_maxrss` down from the parent process; this figure starts with our own.
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Return memory that was freed to the system, where the C library holds it (glibc).

    What ONNX Runtime, GDAL and numpy free lies in heaps of several threads, and stays resident: of
    800 MB at the end of a long question, 550. Takes milliseconds; for when a scene closes.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # Another C library, such as musl's.
        return
    trim(0)


def machine_memory() -> tuple[int | None, int | None]:
    """Total and available bytes; a container's limit counts as the machine's.

    None where the system does not tell.
    """
    fields: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            fields[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    limit = _cgroup_number("memory.max")
    if limit is None or total is None or limit >= total:
        return total, available
    free = limit - (_cgroup_number("memory.current") or 0)
    return limit, free if available is None else min(free, available)


def _cgroup_number(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):
        return None
