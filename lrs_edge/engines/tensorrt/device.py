"""A GPU's memory, by way of cuda-bindings: allocating, copying, waiting. One stream for everything.

Everything happens in the order in which it is asked for, so memory that was given back may be given
out again at once, and nobody waits but who reads on the host.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.errors import BackendError, OutOfMemoryError, out_of_memory

#: Blocks are cut in multiples of this, as CUDA aligns them; TensorRT wants 256.
_GRAIN = 512
_STAGING = 32 << 20
#: Bytes of blocks that are kept for their sizes, at most, where another size is wanted. A Jetson
#: would end the process rather than refuse memory.
_MOST_KEPT = 256 << 20
_NO_MEMORY = 2  # cudaErrorMemoryAllocation
_DRIVER_VERSION = Path("/sys/module/nvidia/version")
_TEGRA = Path("/etc/nv_tegra_release")


@dataclass(frozen=True)
class Gpu:
    """One GPU: name, compute capability (`sm_87`), driver, whether it shares the host's memory."""

    name: str
    capability: str
    driver: str
    shares_memory: bool


class Device:
    """The first GPU.

    Args:
        runtime: `cuda.bindings.runtime`, or what stands for it.

    Raises:
        BackendError: No GPU answers.
    """

    def __init__(self, runtime: Any) -> None:
        self._cuda = runtime
        count = self._call("cudaGetDeviceCount")
        if not count:
            raise BackendError("CUDA finds no GPU here")
        self.gpu = self._facts()
        self.stream = int(self._call("cudaStreamCreate"))
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._staging = self._staging_size = self._staged = 0

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            status, *found = getattr(self._cuda, name)(*arguments)
        except RuntimeError as error:
            # cuda-python 12.6 and older, where the driver's library is not found.
            raise BackendError(f"CUDA failed ({name}: {error}); see `lrs-edge doctor`") from error
        if int(status) != 0:
            text = self._cuda.cudaGetErrorString(status)[1]
            reason = text.decode() if isinstance(text, bytes) else str(text)
            if int(status) == _NO_MEMORY:
                raise out_of_memory("the GPU's memory is full", MemoryError(reason))
            raise BackendError(f"CUDA failed ({name}: {reason}); see `lrs-edge doctor`")
        return found[0] if found else None

    def _facts(self) -> Gpu:
        found = self._call("cudaGetDeviceProperties", 0)
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        driver = _driver_version() or f"CUDA {self._call('cudaDriverGetVersion')}"
        capability = f"sm_{found.major}{found.minor}"
        return Gpu(name.strip("\0 "), capability, driver, bool(found.integrated))

    def free_memory(self) -> int:
        """Bytes that are free on the GPU; on a Jetson, of the machine."""
        (status, free, _total) = self._cuda.cudaMemGetInfo()
        return 0 if int(status) else int(free)

    def allocate(self, nbytes: int) -> Block:
        """Memory of at least `nbytes`, given back when nothing refers to it any more.

        Raises:
            OutOfMemoryError: There is none.
        """
        size = max(-(-nbytes // _GRAIN) * _GRAIN, _GRAIN)
        if self._free[size]:
            return Block(self, self._free[size].pop(), size)
        if sum(size * len(addresses) for size, addresses in list(self._free.items())) > _MOST_KEPT:
            self.trim()
        try:
            return Block(self, int(self._call("cudaMalloc", size)), size)
        except OutOfMemoryError:
            if not self.trim():
                raise
        return Block(self, int(self._call("cudaMalloc", size)), size)

    def give_back(self, address: int, size: int) -> None:
        """Keep a block for the next that asks for its size."""
        self._free[size].append(address)

    def trim(self) -> int:
        """Return blocks that nobody uses to the GPU; how many bytes that were."""
        given = 0
        # Meanwhile others may be given back, by whatever Python collects.
        free, self._free = self._free, defaultdict(list)
        for size, addresses in free.items():
            for address in addresses:
                self._call("cudaFree", address)
                given += size
        return given

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a host array to the device, by way of pinned memory; the array is free at once."""
        array = np.ascontiguousarray(array)
        if array.nbytes == 0:
            return
        start = self._stage(array.nbytes)
        ctypes.memmove(self._staging + start, array.ctypes.data, array.nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        place = self._staging + start
        self._call("cudaMemcpyAsync", address, place, array.nbytes, kind, self.stream)

    def _stage(self, nbytes: int) -> int:
        """Offset of pinned memory that no copy under way reads."""
        size = -(-nbytes // _GRAIN) * _GRAIN
        if self._staged + size > self._staging_size:
            self.wait()
        if size > self._staging_size:
            if self._staging:
                self._call("cudaFreeHost", self._staging)
                self._staging = self._staging_size = 0
            wanted = max(size, _STAGING)
            self._staging = int(self._call("cudaMallocHost", wanted))
            self._staging_size = wanted
        start, self._staged = self._staged, self._staged + size
        return start

    def download(self, address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """A copy of device memory on the host; waits for it."""
        found = np.empty(shape, dtype)
        if found.nbytes:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            place = found.ctypes.data
            self._call("cudaMemcpyAsync", place, address, found.nbytes, kind, self.stream)
        self.wait()
        return found

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Copy on the device; the two may not overlap."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if nbytes:
            self._call("cudaMemcpyAsync", target, source, nbytes, kind, self.stream)

    def copy_rows(
        self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int
    ) -> None:
        """Copy `rows` rows of `width` bytes that lie a pitch apart, on the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if width and rows:
            pitches = (target, target_pitch, source, source_pitch)
            self._call("cudaMemcpy2DAsync", *pitches, width, rows, kind, self.stream)

    def zero(self, address: int, nbytes: int) -> None:
        """Fill with zeros."""
        self._call("cudaMemsetAsync", address, 0, nbytes, self.stream)

    def wait(self) -> None:
        """Wait until everything that was asked for is done."""
        self._call("cudaStreamSynchronize", self.stream)
        self._staged = 0


class Block:
    """Device memory that gives itself back."""

    def __init__(self, device: Device, address: int, size: int) -> None:
        self.device = device
        self.address = address
        self.size = size
        self._release = weakref.finalize(self, device.give_back, address, size)
        # When the program ends, CUDA takes everything back by itself.
        self._release.atexit = False


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor in a GPU's memory, contiguous; see `lrs_edge.engines.base.Tensor`.

    Attributes:
        block: Where it lies.
        shape: Its shape.
        dtype: Its element type.
        device: What its graph calls the place.
        offset: Bytes from the block's start.
    """

    block: Block
    shape: tuple[int, ...]
    dtype: str
    device: str
    offset: int = 0

    @property
    def address(self) -> int:
        """Where its first number lies."""
        return self.block.address + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def numpy(self) -> NDArray[Any]:
        """A copy of it on the host."""
        return self.block.device.download(self.address, self.shape, self.dtype)


@cache
def open_device() -> Device:
    """The GPU of this machine.

    Raises:
        BackendError: cuda-bindings is not installed, or no GPU answers.
    """
    try:
        runtime = _runtime()
    except ImportError as error:
        raise BackendError(
            "the package cuda-bindings is not installed, which TensorRT's engines run with; run, "
            "where lrs-edge was installed from: pip install '.[tensorrt-rtx]' (or '.[tensorrt]')"
        ) from error
    try:
        return Device(runtime)
    except BackendError as error:
        raise BackendError(_no_answer(runtime, error)) from error


def _no_answer(runtime: Any, error: BackendError) -> str:
    """Why no GPU answers, and what to do, as far as versions tell."""
    found, wanted = (_version(runtime, of) for of in ("Driver", "Runtime"))
    if (0, 0) < found < wanted and (found[0] < wanted[0] or _on_tegra()):
        return (
            f"cuda-bindings {_dotted(wanted)} is newer than this machine's driver, which knows "
            f"CUDA {_dotted(found)}; run: pip uninstall -y cuda-bindings; pip install "
            f"{_package_for(found)}"
        )
    reason = str(error) if found[0] else "there is no NVIDIA driver"
    whose = (
        ": a Jetson has JetPack's, for users of the groups video and render" if _on_tegra() else ""
    )
    return (
        f"no NVIDIA GPU answers ({reason}); TensorRT needs one with its driver{whose}. Without one "
        "use --device cpu"
    )


def _package_for(driver: tuple[int, int]) -> str:
    """What pip is to install for a driver: on a Jetson its own version, elsewhere a later minor."""
    if not _on_tegra():
        return f"'cuda-bindings=={driver[0]}.*'"
    # Of 12.6, which JetPack 6.2 has, there is no cuda-bindings, but its predecessor.
    return f"'{'cuda-bindings' if driver >= (12, 8) else 'cuda-python'}=={_dotted(driver)}.*'"


def _on_tegra() -> bool:
    """Whether this is a Jetson, whose driver takes no later minor version of CUDA."""
    return _TEGRA.is_file()


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _version(runtime: Any, of: str) -> tuple[int, int]:
    """CUDA's version that the driver knows, or that cuda-bindings is of; (0, 0) for no driver."""
    try:
        status, version = getattr(runtime, f"cuda{of}GetVersion")()
    except RuntimeError:
        return 0, 0
    return (0, 0) if int(status) else (int(version) // 1000, int(version) % 1000 // 10)


def _runtime() -> Any:
    """CUDA's runtime in Python, which older versions of cuda-python call otherwise."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return importlib.import_module("cuda.cudart")


def find_gpu() -> tuple[Gpu | None, str]:
    """The GPU of this machine, or None, and why there is none."""
    try:
        return open_device().gpu, ""
    except BackendError as error:
        return None, str(error)


def _driver_version() -> str:
    try:
        return _DRIVER_VERSION.read_text(encoding="ascii").strip()
    except OSError:
        return ""
