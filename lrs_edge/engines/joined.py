"""Two graphs that are one decoder: the language model whose first layers are also the RFM.

The first graph runs the RFM's layers and the attention of its scoring layer, the second goes on
from there. Each weight is in memory once, and the buffers of the first graph hold keys and values
that the RFM can take over (`JoinedBuffers.front`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import Feed, Graph, KVBuffers, Tensor, TensorSpec

#: What the first graph gives to the second (`lrs_edge.bundle.manifest`).
STATES, ATTENDED = "hidden_states", "attended"


class JoinedBuffers:
    """Key and value buffers of both graphs, which grow and move together.

    Args:
        front: Of the first graph.
        rest: Of the second; None where it has none (the scoring layer is the last).
    """

    def __init__(self, front: KVBuffers, rest: KVBuffers | None) -> None:
        self.front = front
        self.rest = rest
        self._parts = [front] if rest is None else [front, rest]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all buffers."""
        return tuple(name for part in self._parts for name in part.names)

    @property
    def capacity(self) -> int:
        """Places of each buffer."""
        # A move that failed may have left one part larger than the other.
        return min(part.capacity for part in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(part.nbytes for part in self._parts)

    @property
    def doubling(self) -> bool:
        """As those of the first graph."""
        return self.front.doubling

    def gather(self, indices: NDArray[np.int64], capacity: int) -> None:
        """See `lrs_edge.engines.base.KVBuffers.gather`."""
        for part in self._parts:
            part.gather(indices, capacity)

    def copy(self, length: int, capacity: int) -> JoinedBuffers:
        """See `lrs_edge.engines.base.KVBuffers.copy`."""
        rest = None if self.rest is None else self.rest.copy(length, capacity)
        return JoinedBuffers(self.front.copy(length, capacity), rest)

    def read(self, name: str) -> NDArray[np.float32]:
        """A float32 copy of one buffer."""
        part = next(part for part in self._parts if name in part.names)
        return part.read(name)


class JoinedGraph:
    """One graph made of two; see `lrs_edge.engines.base.Graph`.

    Args:
        front: Gives `hidden_states` and `attended` besides its own results.
        rest: Takes both, `hidden_states` as `inputs_embeds`.
    """

    def __init__(self, front: Graph, rest: Graph) -> None:
        self._front = front
        self._rest = rest
        taken = {"inputs_embeds", ATTENDED}
        more = {name: spec for name, spec in rest.inputs.items() if name not in taken}
        self._inputs = {**more, **front.inputs}
        kept = {k: spec for k, spec in front.outputs.items() if k.startswith("present_")}
        self._outputs = {**kept, **rest.outputs}

    @property
    def name(self) -> str:
        """File of the second graph, whose results these are."""
        return self._rest.name

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs of both, but for what the first gives to the second."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs of the second, and the first's buffers."""
        return self._outputs

    @property
    def device(self) -> str:
        """Where both run."""
        return self._rest.device

    @property
    def nodes(self) -> Mapping[str, int]:
        """Nodes of the second graph by what runs them; the first is a graph of its own."""
        return self._rest.nodes

    def run(
        self,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str],
        buffers: KVBuffers | None = None,
    ) -> list[NDArray[np.float32]]:
        """Run both; see `lrs_edge.engines.base.Graph.run`."""
        both = self._own(buffers)
        return self._rest.run(self._passed_on(feeds, both), outputs, both.rest)

    def run_on_device(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[Tensor]:
        """Run both; see `lrs_edge.engines.base.Graph.run_on_device`."""
        both = self._own(buffers)
        return self._rest.run_on_device(self._passed_on(feeds, both), outputs, both.rest)

    def _passed_on(self, feeds: Mapping[str, Feed], buffers: JoinedBuffers) -> dict[str, Feed]:
        """What the second graph is fed, after a run of the first."""
        given = {name: feed for name, feed in feeds.items() if name in self._front.inputs}
        found = self._front.run_on_device(given, [STATES, ATTENDED], buffers.front)
        states, attended = found
        rest = {name: feed for name, feed in feeds.items() if name in self._rest.inputs}
        return {**rest, "inputs_embeds": states, ATTENDED: attended}

    def _own(self, buffers: KVBuffers | None) -> JoinedBuffers:
        if not isinstance(buffers, JoinedBuffers):
            raise TypeError(f"{type(buffers).__name__} does not belong to two joined graphs")
        return buffers

    def upload(self, array: NDArray[Any]) -> Tensor:
        """See `lrs_edge.engines.base.Graph.upload`."""
        return self._front.upload(array)

    def gather_rows(self, tables: Sequence[Feed], places: NDArray[np.int64]) -> Tensor:
        """See `lrs_edge.engines.base.Graph.gather_rows`."""
        return self._front.gather_rows(tables, places)

    def beside(self, model: bytes) -> Graph:
        """See `lrs_edge.engines.base.Graph.beside`."""
        return self._front.beside(model)

    def new_buffers(self, names: Sequence[str]) -> JoinedBuffers:
        """Empty buffers for the inputs `past_<name>` of both."""
        front, rest = (
            [name for name in names if f"past_{name}" in graph.inputs]
            for graph in (self._front, self._rest)
        )
        return JoinedBuffers(
            self._front.new_buffers(front), self._rest.new_buffers(rest) if rest else None
        )
