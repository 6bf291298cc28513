"""What a benchmark must say about the machine: processor, versions, bytes read from files."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lrs_edge.engines.cores import available_cores

_CPUINFO = Path("/proc/cpuinfo")
_IO = Path("/proc/self/io")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class FileReads:
    """Bytes of files that a process has read (Linux).

    Attributes:
        requested: Asked for by read calls (`rchar`); files that are mapped do not count.
        disk: Fetched from a disk (`read_bytes`); nothing where the system had them in memory.
    """

    requested: int
    disk: int

    def __sub__(self, other: FileReads) -> FileReads:
        return FileReads(self.requested - other.requested, self.disk - other.disk)


def file_reads() -> FileReads | None:
    """Bytes that this process has read so far; None where the system does not tell."""
    try:
        lines = _IO.read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(": ") for line in lines)
    return FileReads(int(fields["rchar"]), int(fields["read_bytes"]))


def cpu_count() -> int:
    """CPUs that this process may use."""
    return available_cores()


def cpu_name() -> str:
    """The processor's name and how many CPUs of it may be used."""
    name = platform.processor() or platform.machine()
    if _CPUINFO.is_file():
        lines = _CPUINFO.read_text(errors="replace").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = named[0] if named else name
    return f"{name}, {cpu_count()} CPUs"


def gpu_name() -> str:
    """Names of the NVIDIA GPUs, empty where the driver's tool does not tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command, found on PATH
            [tool, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(line.strip() for line in done.stdout.splitlines() if line.strip())


def largest_cache() -> int:
    """Bytes of the processor's largest cache; 0 where the system does not tell."""
    sizes = [0]
    for path in _CACHES.glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        sizes.append(int(digits) * scale if digits.isdigit() else 0)
    return max(sizes)
