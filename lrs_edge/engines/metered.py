"""Counting what graphs compute: one meter per engine, one count per graph.

Every computation of an engine goes through `Graph.run`, so the counts hold exactly what was really
computed: tokens of remembered tiles and reused prefixes are not in them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import Feed, Graph, KVBuffers, Tensor, TensorSpec, on_host
from lrs_edge.requests.rates import Rates


@dataclass(frozen=True)
class GraphWork:
    """What one graph has computed.

    Attributes:
        runs: Times it ran.
        tiles: Tiles that went through it (vision graphs).
        tokens: New tokens that went through it (decoder graphs; projectors of their own).
        pairs: Keys that the new tokens could attend to, summed over the tokens: each sees all keys
            before it and its own.
    """

    runs: int = 0
    tiles: int = 0
    tokens: int = 0
    pairs: int = 0

    def __add__(self, other: GraphWork) -> GraphWork:
        return GraphWork(
            self.runs + other.runs,
            self.tiles + other.tiles,
            self.tokens + other.tokens,
            self.pairs + other.pairs,
        )

    def __sub__(self, other: GraphWork) -> GraphWork:
        return GraphWork(
            self.runs - other.runs,
            self.tiles - other.tiles,
            self.tokens - other.tokens,
            self.pairs - other.pairs,
        )


class Meter:
    """Counts of all graphs of an engine since it was loaded.

    Attributes:
        rates: How fast they were lately.
    """

    def __init__(self) -> None:
        self.rates = Rates()
        self._work: defaultdict[str, GraphWork] = defaultdict(GraphWork)

    def add(self, graph: str, work: GraphWork) -> None:
        """Add work to a graph's count."""
        self._work[graph] += work

    def read(self) -> dict[str, GraphWork]:
        """The counts so far, by the graph's path in the bundle."""
        return dict(self._work)

    def since(self, before: Mapping[str, GraphWork]) -> dict[str, GraphWork]:
        """The work done since `before` was read, by the graph's path in the bundle."""
        return {
            graph: work - before.get(graph, GraphWork())
            for graph, work in self._work.items()
            if work != before.get(graph)
        }


class MeteredGraph:
    """A graph whose runs are counted; otherwise it is the graph itself.

    Args:
        graph: The graph.
        name: Its path in the bundle.
        meter: Counts its runs.
    """

    def __init__(self, graph: Graph, name: str, meter: Meter) -> None:
        self._graph = graph
        self._name = name
        self._meter = meter

    @property
    def name(self) -> str:
        """Its path in the bundle."""
        return self._name

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        return self._graph.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        return self._graph.outputs

    @property
    def device(self) -> str:
        """Where the graph runs."""
        return self._graph.device

    @property
    def nodes(self) -> Mapping[str, int]:
        """Nodes by what runs them."""
        return self._graph.nodes

    def run(
        self,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str],
        buffers: KVBuffers | None = None,
    ) -> list[NDArray[np.float32]]:
        """Run the graph once and count it; see `Graph.run`."""
        start = time.perf_counter()
        results = self._graph.run(feeds, outputs, buffers)
        self._count(feeds, time.perf_counter() - start)
        return results

    def run_on_device(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[Tensor]:
        """Run the graph once and count it; see `Graph.run_on_device`.

        Where the device works on after the call returns, the time counts for what waits for it.
        """
        start = time.perf_counter()
        results = self._graph.run_on_device(feeds, outputs, buffers)
        self._count(feeds, time.perf_counter() - start)
        return results

    def _count(self, feeds: Mapping[str, Feed], seconds: float) -> None:
        work = _work(feeds)
        self._meter.add(self._name, work)
        self._meter.rates.measured(self._name, seconds, tiles=work.tiles, tokens=work.tokens)

    def new_buffers(self, names: Sequence[str]) -> KVBuffers:
        """Empty buffers on the graph's device."""
        return self._graph.new_buffers(names)

    def upload(self, array: NDArray[Any]) -> Tensor:
        """See `Graph.upload`."""
        return self._graph.upload(array)

    def gather_rows(self, tables: Sequence[Feed], places: NDArray[np.int64]) -> Tensor:
        """See `Graph.gather_rows`."""
        return self._graph.gather_rows(tables, places)

    def beside(self, model: bytes) -> Graph:
        """See `Graph.beside`; its runs are not counted."""
        return self._graph.beside(model)


def _work(feeds: Mapping[str, Feed]) -> GraphWork:
    """What one run computes, by the inputs that graphs of a role have (`bundle/manifest.py`)."""
    if "pixel_values" in feeds:
        return GraphWork(runs=1, tiles=feeds["pixel_values"].shape[0])
    if "features" in feeds:
        tiles, tokens = feeds["features"].shape[:2]
        return GraphWork(runs=1, tokens=tiles * tokens)
    if "position_ids" not in feeds:
        return GraphWork(runs=1)
    past = int(on_host(feeds["past_length"]).item())
    new = feeds["position_ids"].shape[1]
    return GraphWork(runs=1, tokens=new, pairs=new * past + new * (new + 1) // 2)
