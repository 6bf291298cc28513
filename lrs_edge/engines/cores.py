"""How many cores this process may use, which is often fewer than the machine has."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import SupportsIndex

from lrs_edge.errors import UsageError

_CGROUPS = Path("/sys/fs/cgroup")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def available_cores() -> int:
    """Cores that this process may use: its CPU affinity, and a container's quota rounded up."""
    quotas = [math.ceil(quota) for quota in _quotas()]
    return max(1, min([len(_allowed()), *quotas]))


def thread_count(wanted: int | None) -> int | None:
    """Threads that an engine is given.

    Args:
        wanted: What the user asked for; None for the usual.

    Returns:
        At most one per core that may be used: more would wait for each other, for minutes where
        they spin. None where the engine's own choice, one thread per physical core of the machine,
        is right.

    Raises:
        UsageError: It is not a whole number of at least 1.
    """
    if wanted is None:
        allowed = _allowed()
        limit = available_cores()
        if len(allowed) == os.cpu_count() and limit >= _physical(allowed):
            return None
        return min(limit, _physical(allowed))
    whole = isinstance(wanted, SupportsIndex) and not isinstance(wanted, bool)
    if not whole or operator.index(wanted) < 1:
        raise UsageError(
            f"threads is {wanted!r}; it must be a whole number of at least 1 (leave it out for one "
            "thread per core)"
        )
    return min(operator.index(wanted), available_cores())


def _allowed() -> set[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical(processors: set[int]) -> int:
    """Physical cores among processors; every processor is one where the system does not tell."""
    siblings = set()
    for number in processors:
        try:
            siblings.add(Path(_TOPOLOGY.format(number)).read_text().strip())
        except OSError:
            siblings.add(str(number))
    return max(1, len(siblings))


def _quotas() -> Iterator[float]:
    """Limits on processor time in cores, of this process's control groups (versions 1 and 2)."""
    for folder in _group_folders():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            pass
        try:
            microseconds = int((folder / "cpu.cfs_quota_us").read_text())
            if microseconds > 0:
                yield microseconds / int((folder / "cpu.cfs_period_us").read_text())
        except (OSError, ValueError, ZeroDivisionError):
            pass


def _group_folders() -> Iterator[Path]:
    """The folders of this process's control groups and of those above them."""
    roots = (_CGROUPS, _CGROUPS / "cpu", _CGROUPS / "cpu,cpuacct")
    yield from roots
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in roots if controllers else roots[:1]:
            below = Path(path.lstrip("/"))
            yield from (root / part for part in (below, *below.parents) if part != Path("."))
