"""What every backend provides: a graph that runs, and key/value buffers that live on its device.

A backend runs one graph and owns its device memory; it does not know what the graph means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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


@dataclass(frozen=True)
class BackendOptions:
    """How graphs are run.

    Attributes:
        provider: `auto` takes CUDA where it loads, else the CPU; `cpu` and `cuda` insist.
        threads: Threads of one operation; None lets the engine choose.
        unpack_weights: Dequantize weights once when the graph is loaded. Worth the memory for
            convolutions, which ONNX Runtime would dequantize again on every run.
    """

    provider: str = "auto"
    threads: int | None = None
    unpack_weights: bool = False


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
    def provider(self) -> str:
        """Where the graph runs, such as `cpu` or `cuda`."""
        ...

    def run(
        self,
        feeds: Mapping[str, NDArray[np.generic]],
        outputs: Sequence[str],
        buffers: KVBuffers | None = None,
    ) -> list[NDArray[np.float32]]:
        """Run the graph once.

        Args:
            feeds: Host arrays by input name.
            outputs: Names of the outputs to return, as host arrays.
            buffers: Bound as `past_*` and, in place, as `present_*`.

        Raises:
            BackendError: The engine refuses the inputs or fails.
            OutOfMemoryError: It runs out of memory.
        """
        ...

    def new_buffers(self, names: Sequence[str]) -> KVBuffers:
        """Empty buffers for the inputs `past_<name>`, on the graph's device."""
        ...
