"""What every engine provides: a graph that runs on one device, tensors and key/value buffers there.

An engine runs one graph and owns its device memory; it does not know what the graph means. What a
graph takes and gives may stay on the device as a `Tensor`; numpy is the host's form of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type (`float32`, `int64`, ...) and shape of a graph's input or output.

    A dimension is None where the graph leaves it open.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Tensor(Protocol):
    """What one graph gives and another takes, wherever it lies."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def device(self) -> str:
        """Where it lies: `cpu`, `cuda`, ..."""
        ...

    def numpy(self) -> NDArray[Any]:
        """It on the host: without a copy where it lies there, so not to be written to."""
        ...


@dataclass(frozen=True)
class HostTensor:
    """A tensor on the host: an array, not copied."""

    array: NDArray[Any]
    device = "cpu"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    def numpy(self) -> NDArray[Any]:
        """The array itself."""
        return self.array


#: What an input can be given as. An engine takes other engines' tensors by way of the host.
Feed = NDArray[Any] | Tensor


def on_host(feed: Feed) -> NDArray[Any]:
    """An input on the host: without a copy where it lies there, so not to be written to."""
    return feed if isinstance(feed, np.ndarray) else feed.numpy()


@dataclass(frozen=True)
class HostNodes:
    """Names of a graph's nodes that may run on the CPU while it runs elsewhere, and of the others.

    Those may that compute with nothing but numbers which the host has anyway: shapes, lengths and
    positions (`lrs_edge.bundle.host_nodes`).
    """

    may: Collection[str] = ()
    others: Collection[str] = ()


@dataclass(frozen=True)
class BackendOptions:
    """How graphs are run.

    Attributes:
        provider: Where all stages run: `auto` takes CUDA where it loads, else the CPU; `cpu` and
            `cuda` insist. A graph that is loaded by itself is loaded there.
        threads: Threads of one operation; None lets the engine choose.
        unpack_weights: Dequantize weights once when the graph is loaded. Worth the memory for
            convolutions, which ONNX Runtime would dequantize again on every run.
        stages: Where single stages (`vision`, `rfm`, `llm`) run instead: a device or an engine
            (`placement.py`).
        host_nodes: Of the graph that is loaded; None where they are not known. Where none may run
            on the CPU, the engine's own switch against it is used.
    """

    provider: str = "auto"
    threads: int | None = None
    unpack_weights: bool = False
    stages: Mapping[str, str] = field(default_factory=dict)
    host_nodes: HostNodes | None = None


class KVBuffers(Protocol):
    """Key and value buffers [1, kv_heads, capacity, head_dim], one per name, on the device."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the buffers without `past_`, such as `key_0`."""
        ...

    @property
    def capacity(self) -> int:
        """Places of each buffer."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        ...

    @property
    def doubling(self) -> bool:
        """Whether they had better double than grow in small steps: a move costs, memory is there.

        False where engines are built for a number of places.
        """
        ...

    def gather(self, indices: NDArray[np.int64], capacity: int) -> None:
        """Make place i of every buffer hold what place indices[i] held; later places are undefined.

        Args:
            indices: int64 [n] of old places, n at most `capacity`.
            capacity: Places of each buffer afterwards; may be larger or smaller than before.

        Raises:
            OutOfMemoryError: The new buffers do not fit into the device's memory. What the buffers
                hold is lost after any failure, but they can be used again.
        """
        ...

    def copy(self, length: int, capacity: int) -> KVBuffers:
        """Other buffers of `capacity` places that hold the first `length` places of these.

        Raises:
            OutOfMemoryError: They do not fit into the device's memory.
        """
        ...

    def read(self, name: str) -> NDArray[np.float32]:
        """A copy of one buffer, float32 [1, kv_heads, capacity, head_dim] (for tests, traces)."""
        ...


class Graph(Protocol):
    """One loaded graph."""

    @property
    def name(self) -> str:
        """Its file in the bundle, for messages and counts."""
        ...

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        ...

    @property
    def device(self) -> str:
        """Where the graph runs, such as `cpu` or `cuda`."""
        ...

    @property
    def nodes(self) -> Mapping[str, int]:
        """Nodes by what runs them, such as an execution provider; empty where it is not told."""
        ...

    def run(
        self,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str],
        buffers: KVBuffers | None = None,
    ) -> list[NDArray[np.float32]]:
        """Run the graph once.

        Args:
            feeds: Host arrays or tensors by input name.
            outputs: Names of the outputs to return, as host arrays.
            buffers: Bound as `past_*` and, in place, as `present_*`.

        Raises:
            BackendError: The engine refuses the inputs or fails.
            OutOfMemoryError: It runs out of memory.
        """
        ...

    def run_on_device(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[Tensor]:
        """Run the graph once, as `run` does; the outputs stay where they are computed."""
        ...

    def new_buffers(self, names: Sequence[str]) -> KVBuffers:
        """Empty buffers for the inputs `past_<name>`, on the graph's device."""
        ...

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A copy of a host array on the graph's device; on the host, the array itself."""
        ...

    def gather_rows(self, tables: Sequence[Feed], places: NDArray[np.int64]) -> Tensor:
        """Rows of tables, on the graph's device, as its `inputs_embeds`.

        Args:
            tables: float32 [m, D] each, of any m, on the graph's device (`upload`).
            places: int64 [n], rows of all tables laid end to end.

        Returns:
            float32 [1, n, D], in memory of its own.

        Raises:
            OutOfMemoryError: It does not fit into the device's memory.
        """
        ...

    def beside(self, model: bytes) -> Graph:
        """A small graph on the same device, for what is done to this one's inputs or outputs there.

        Args:
            model: Serialized ONNX, of inputs with open sizes.

        Raises:
            BackendError: The engine cannot run it.
        """
        ...
