"""A device of its own that a CPU plays: what crosses between it and the host is counted.

Its tensors keep their numbers to themselves until somebody asks for them, and its graphs take host
arrays only by copying them up. Everything is computed by the engine on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lrs_edge.engines.base import Feed, Graph, KVBuffers, Tensor, TensorSpec
from lrs_edge.engines.onnx import OnnxGraph

DEVICE = "fake"

REAL_LOAD = OnnxGraph.load.__func__  # type: ignore[attr-defined]


@dataclass
class Copies:
    """What crossed: (what for, bytes), and how often key/value buffers moved."""

    up: list[tuple[str, int]] = field(default_factory=list)
    down: list[tuple[str, int]] = field(default_factory=list)
    moves: int = 0

    def since(self, before: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Bytes of each copy up and down after `count` gave `before`."""
        return [n for _, n in self.up[before[0] :]], [n for _, n in self.down[before[1] :]]

    def count(self) -> tuple[int, int]:
        """Copies up and down so far."""
        return len(self.up), len(self.down)


class FakeTensor:
    """A tensor on the device."""

    device = DEVICE

    def __init__(self, array: NDArray[Any], copies: Copies, name: str) -> None:
        self._array, self._copies, self._name = array, copies, name
        self.shape = array.shape

    def numpy(self) -> NDArray[Any]:
        """Its numbers, copied down."""
        self._copies.down.append((self._name, self._array.nbytes))
        return self._array


class FakeBuffers:
    """Key and value buffers on the device."""

    def __init__(self, inner: KVBuffers, copies: Copies) -> None:
        self.inner, self._copies = inner, copies

    doubling = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def gather(self, indices: NDArray[np.int64], capacity: int) -> None:
        """One call for all buffers; the places go up."""
        self._copies.moves += 1
        self._copies.up.append(("places", indices.nbytes))
        self.inner.gather(indices, capacity)

    def copy(self, length: int, capacity: int) -> FakeBuffers:
        """One call for all buffers."""
        self._copies.moves += 1
        return FakeBuffers(self.inner.copy(length, capacity), self._copies)


class FakeGraph:
    """A graph on the device."""

    device = DEVICE
    nodes: Mapping[str, int] = {}

    def __init__(self, inner: Graph, copies: Copies) -> None:
        self._inner, self._copies = inner, copies
        self.name = inner.name

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        return self._inner.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        return self._inner.outputs

    def run(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[NDArray[np.float32]]:
        """Inputs of the host go up, outputs come down."""
        return [tensor.numpy() for tensor in self.run_on_device(feeds, outputs, buffers)]

    def run_on_device(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[Tensor]:
        """Inputs of the host go up."""
        given = {name: self._here(feed, name) for name, feed in feeds.items()}
        inner = None
        if buffers is not None:
            assert isinstance(buffers, FakeBuffers)
            inner = buffers.inner
        found = self._inner.run(given, outputs, inner)
        return [
            FakeTensor(array.copy(), self._copies, name)
            for array, name in zip(found, outputs, strict=True)
        ]

    def _here(self, feed: Feed, name: str) -> NDArray[Any]:
        if isinstance(feed, FakeTensor):
            return feed._array
        array = feed if isinstance(feed, np.ndarray) else feed.numpy()
        self._copies.up.append((name, array.nbytes))
        return array

    def new_buffers(self, names: Sequence[str]) -> FakeBuffers:
        """Buffers there."""
        return FakeBuffers(self._inner.new_buffers(names), self._copies)

    def upload(self, array: NDArray[Any]) -> FakeTensor:
        """A copy there."""
        self._copies.up.append(("upload", array.nbytes))
        return FakeTensor(array.copy(), self._copies, "upload")

    def gather_rows(self, tables: Sequence[Feed], places: NDArray[np.int64]) -> FakeTensor:
        """Rows of tables that are there already; the places go up."""
        assert all(isinstance(table, FakeTensor) for table in tables)
        self._copies.up.append(("places", places.nbytes))
        arrays = [table._array for table in tables if isinstance(table, FakeTensor)]
        found = self._inner.gather_rows(arrays, places).numpy()
        return FakeTensor(np.array(found), self._copies, "rows")

    def beside(self, model: bytes) -> FakeGraph:
        """A small graph there."""
        return FakeGraph(self._inner.beside(model), self._copies)


@contextmanager
def fake_device(on_host: Sequence[str] = ()) -> Iterator[Copies]:
    """Graphs loaded meanwhile run on the device; yields what crosses.

    Args:
        on_host: How names of graphs begin that run on the host all the same.
    """
    copies = Copies()

    def fake(cls: type[OnnxGraph], *arguments: Any) -> Graph:
        graph: OnnxGraph = REAL_LOAD(cls, *arguments)
        return graph if graph.name.startswith(tuple(on_host)) else FakeGraph(graph, copies)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxGraph, "load", classmethod(fake))
        yield copies
