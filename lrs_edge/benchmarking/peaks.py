"""The machine's peaks: matrix products through ONNX Runtime, and memory bandwidth.

Measured on the provider and with the threads that the stages ran with; the best of many runs
counts, because a neighbour can only slow a run down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from lrs_edge.benchmarking.floor import Arithmetic, Peaks
from lrs_edge.benchmarking.machine import cpu_count, largest_cache
from lrs_edge.engines.cores import thread_count
from lrs_edge.engines.one_node_model import one_node_model
from lrs_edge.engines.providers import provider as device_provider
from lrs_edge.engines.runtime import ort

#: Sides of the matrices: the fastest counts. Those of a CPU stay inside its caches.
_SIDES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
#: Devices whose peaks can be measured.
MEASURED = tuple(_SIDES)
_PRODUCTS: dict[Arithmetic, tuple[str, str, str, str]] = {
    "fp32": ("MatMul", "float32", "float32", "float32"),
    "fp16": ("MatMul", "float16", "float16", "float16"),
    "int8": ("MatMulInteger", "uint8", "int8", "int32"),
}
#: Sizes in bytes between which bandwidth is measured; the last one is far beyond any cache but
#: those of the largest servers, which get four times their cache.
_SMALLEST, _BEYOND_CACHES, _LARGEST = 1 << 20, 256 << 20, 1 << 30
_SECONDS = 0.5


def measure_peaks(
    provider: str,
    threads: int | None,
    kinds: Iterable[Arithmetic],
    working_sets: Iterable[int],
    *,
    seconds: float = _SECONDS,
) -> Peaks:
    """Measure what the machine does at best.

    Args:
        provider: `cpu` or `cuda`.
        threads: Threads of one operation; None lets the engine choose.
        kinds: Kinds of arithmetic wanted; those that the provider cannot run are left out.
        working_sets: Bytes that runs of graphs touch; bandwidth is measured for about as much.
        seconds: Time for each figure.
    """
    compute: dict[Arithmetic, float] = {}
    for kind in sorted(set(kinds)):
        speed = _product_speed(kind, provider, threads, seconds)
        if speed is not None:
            compute[kind] = speed
    if provider != "cpu":
        return Peaks(compute, _device_bandwidth(provider, seconds))
    return Peaks(
        compute, _host_bandwidth(thread_count(threads) or cpu_count(), working_sets, seconds)
    )


def _best(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of as many runs as fit into some time, the first left out."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def _session(model: bytes, provider: str, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    count = thread_count(threads)
    if count is not None:
        options.intra_op_num_threads = count
    # As the stages' sessions: an operator that a device lacks would quietly run on the CPU.
    arguments = device_provider(provider).add_to(options, strict=provider != "cpu")
    return ort.InferenceSession(model, options, **arguments)


def _product_speed(
    kind: Arithmetic, provider: str, threads: int | None, seconds: float
) -> float | None:
    """Operations per second of the fastest matrix product; None where there is no kernel."""
    operator, left, right, out = _PRODUCTS[kind]
    rng = np.random.default_rng(0)
    speeds = []
    for side in _SIDES[provider]:
        a, b = (_matrix(rng, side, dtype) for dtype in (left, right))
        # On a CPU the engine packs constant weights when it loads them, as it does in a bundle's
        # graphs; on a device the weights only have to be there.
        constants = {"b": b} if provider == "cpu" else {}
        model = one_node_model(operator, ["a", "b"], {"a": left, "b": right, "y": out}, constants)
        try:
            run = _bound(_session(model, provider, threads), {"a": a, "b": b}, side, out, provider)
            speeds.append(2 * side**3 / _best(run, seconds / len(_SIDES[provider])))
        # The engine's errors share no class of their own; a missing kernel leaves the figure out.
        except Exception:
            return None
    return max(speeds)


def _matrix(rng: np.random.Generator, side: int, dtype: str) -> NDArray[np.generic]:
    if dtype.startswith("float"):
        return rng.standard_normal((side, side), np.float32).astype(dtype)
    bounds = np.iinfo(dtype)
    return rng.integers(bounds.min, bounds.max, (side, side), dtype, endpoint=True)


def _bound(
    session: ort.InferenceSession,
    inputs: dict[str, NDArray[np.generic]],
    side: int,
    out: str,
    provider: str,
) -> Callable[[], None]:
    """A run whose inputs and output lie on the device already."""
    binding = session.io_binding()
    wanted = {node.name for node in session.get_inputs()}
    for name, value in inputs.items():
        if name in wanted:
            placed = ort.OrtValue.ortvalue_from_numpy(value, provider, 0)
            binding.bind_ortvalue_input(name, placed)
    result = ort.OrtValue.ortvalue_from_shape_and_type((side, side), np.dtype(out), provider, 0)
    binding.bind_ortvalue_output("y", result)
    return lambda: session.run_with_iobinding(binding)


def _device_bandwidth(provider: str, seconds: float) -> dict[int, float]:
    """Bytes per second read and written by `y = -a` on a device; empty where that fails."""
    side = 8192
    a = np.ones((side, side), np.float32)
    model = one_node_model("Neg", ["a"], {"a": "float32", "y": "float32"}, {})
    try:
        run = _bound(_session(model, provider, None), {"a": a}, side, "float32", provider)
        return {a.nbytes: 2 * a.nbytes / _best(run, seconds)}
    # See `_product_speed`.
    except Exception:
        return {}


def _host_bandwidth(threads: int, working_sets: Iterable[int], seconds: float) -> dict[int, float]:
    """Bytes per second by size: of reading (maximum) or copying, whichever is faster.

    Small models fit into a processor's caches and are read faster than memory is: each size has a
    figure of its own.
    """
    largest = min(max(_BEYOND_CACHES, 1 << (4 * largest_cache() - 1).bit_length()), _LARGEST)
    wanted = {1 << (min(max(size, _SMALLEST), largest).bit_length() - 1) for size in working_sets}
    memory = np.ones(largest // 4, np.float32)
    with ThreadPoolExecutor(threads) as pool:
        return {
            size: _sweep_speed(pool, threads, memory[: size // 4], seconds)
            for size in sorted(wanted | {largest})
        }


def _sweep_speed(
    pool: ThreadPoolExecutor, threads: int, memory: NDArray[np.float32], seconds: float
) -> float:
    parts = np.array_split(memory, threads)
    # So many sweeps in one call that starting the threads does not show.
    sweeps = max((64 << 20) // memory.nbytes, 1)

    def read(part: NDArray[np.float32]) -> None:
        for _ in range(sweeps):
            part.max()

    def copy(part: NDArray[np.float32]) -> None:
        half = len(part) // 2
        for _ in range(sweeps):
            np.copyto(part[half : 2 * half], part[:half])

    # Both move the same bytes: a copy reads one half and writes the other.
    reading = _best(lambda: list(pool.map(read, parts)), seconds / 2)
    copying = _best(lambda: list(pool.map(copy, parts)), seconds / 2)
    return sweeps * memory.nbytes / min(reading, copying)
