"""The least time that a stage could take on this machine: by its operations, and by its bytes.

    floor = max(operations / peak operations per second, bytes / peak bytes per second)

A bound from below, not a prediction: an engine that reached it would do nothing but multiply at the
speed of the best matrix product, and would read every weight exactly once per run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lrs_edge.bundle.bundle import Bundle
from lrs_edge.engines.metered import GraphWork
from lrs_edge.evaluation.flops import GraphCost

#: Kinds of arithmetic whose peak is measured.
Arithmetic = Literal["fp32", "fp16", "int8"]

#: Precisions whose matrix products have int8 on both sides.
_INT8_COMPUTE = ("int8-dynamic", "int8-static")


@dataclass(frozen=True)
class Work:
    """What one repetition of a stage has to do.

    Attributes:
        operations: Multiplications and additions; 0 for a stage that only moves bytes.
        moved: Bytes read and written, each as often as no engine could avoid.
        working_set: Bytes touched in one run of a graph: what decides whether caches help.
        arithmetic: Ways to compute that the engine may choose from.
    """

    operations: int
    moved: int
    working_set: int
    arithmetic: tuple[Arithmetic, ...] = ()


@dataclass(frozen=True)
class Peaks:
    """What the machine does at best.

    Attributes:
        compute: Operations per second of a large matrix product, by arithmetic; those that the
            provider cannot run are left out.
        bandwidth: Bytes per second, by the size in bytes of the memory gone through again and
            again. The largest size is far beyond all caches.
    """

    compute: Mapping[Arithmetic, float]
    bandwidth: Mapping[int, float]

    def bandwidth_of(self, working_set: int) -> float | None:
        """Bytes per second at which this much memory can be read at best; None if not measured."""
        if not self.bandwidth:
            return None
        smaller = [size for size in self.bandwidth if size <= working_set]
        size = max(smaller, default=min(self.bandwidth))
        # A larger set is never faster, except by noise: take the better figure.
        return max(speed for other, speed in self.bandwidth.items() if other >= size)


@dataclass(frozen=True)
class Floor:
    """The least seconds of a repetition, and which of the two limits it is."""

    seconds: float
    bound: Literal["compute", "memory"]


def floor_of(work: Work, peaks: Peaks) -> Floor | None:
    """The floor of some work; None where a peak that it needs could not be measured."""
    speeds = [peaks.compute[kind] for kind in work.arithmetic if kind in peaks.compute]
    bandwidth = peaks.bandwidth_of(work.working_set)
    if bandwidth is None or (work.operations and not speeds):
        return None
    compute = work.operations / max(speeds) if speeds else 0.0
    memory = work.moved / bandwidth
    return Floor(compute, "compute") if compute > memory else Floor(memory, "memory")


def decoder_arithmetic(precision: str) -> tuple[Arithmetic, ...]:
    """How a decoder graph of some precision may be computed; the fastest of these is the bound.

    ONNX Runtime turns weights that are only stored as integers into MatMulNBits, and that quantizes
    activations as it goes: its prefill is faster than any fp32 product, so fp32 does not bound it.
    """
    if precision in _INT8_COMPUTE:
        return ("int8",)
    if precision == "fp32":
        return ("fp32",)
    return ("fp32", "fp16") if precision == "fp16" else ("fp32", "fp16", "int8")


def vision_arithmetic(precision: str) -> tuple[Arithmetic, ...]:
    """How a vision graph may be computed: weights alone become floats when it is loaded."""
    known = precision in ("fp32", *_INT8_COMPUTE)
    return decoder_arithmetic(precision) if known else ("fp32", "fp16")


def weight_bytes(bundle: Bundle, graph: str) -> int:
    """Bytes of the data files that a graph names. Constants inside the graph's file do not count.

    Raises:
        BundleError: The manifest does not list the graph.
        OSError: The graph cannot be read.
    """
    path = bundle.file(graph)
    content = path.read_bytes()
    files = bundle.manifest.files
    return sum(
        entry.size
        for name, entry in files.items()
        if name != graph and not name.endswith(".onnx") and _data_name(graph, name) in content
    )


def _data_name(graph: str, file: str) -> bytes:
    """A file as a graph names it: relative to the graph's own folder."""
    folder = graph.rpartition("/")[0]
    return (file.removeprefix(f"{folder}/") if folder else file).encode()


def graph_work(
    done: GraphWork,
    cost: GraphCost,
    *,
    weights: int,
    arithmetic: tuple[Arithmetic, ...],
    place: int = 0,
    data: int = 0,
) -> Work:
    """What a graph had to do, from what the meter counted.

    Args:
        done: What was computed.
        cost: Operations of the graph per unit of work.
        weights: Bytes of its weights, which every run reads.
        arithmetic: Ways to compute.
        place: Bytes of one token in the graph's KV cache.
        data: Bytes of inputs and outputs besides.
    """
    # Every run reads, at the least, the keys and values that its average new token sees: exact for
    # decoding, where a run has one token, and below what any attention reads in prefill.
    seen = round(done.pairs * done.runs / done.tokens) if done.tokens else 0
    moved = done.runs * weights + place * (seen + done.tokens) + data
    return Work(cost.of(done), moved, moved // max(done.runs, 1), arithmetic)
