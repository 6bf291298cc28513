"""Where new tokens lie in the key/value buffers, as GroupQueryAttention wants to be told.

The operator takes the last filled place, how many are filled, and for RoPE tables with a row for
every key: they hold the angles of the new tokens at their places in the cache, and what other rows
hold nothing reads. CUDA's kernels take the rows of the places, whatever rows they are given.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from lrs_edge_export.graphs.onnx_writer import GraphWriter


class Places:
    """Places told by the length of the past.

    Args:
        graph: The graph.
        positions: Its input position_ids [k, L].
        past: Its input past_length [1].

    Attributes:
        end: The place after the last filled one, int64 [1].
        last: The last filled place, int32 [1].
        total: Filled places, for the host, int32.
    """

    def __init__(self, graph: GraphWriter, positions: str, past: str) -> None:
        self._graph = graph
        self._past = past
        new = graph.node("Shape", positions, start=1, end=2)
        self.end = graph.node("Add", past, new)
        total = graph.node("Cast", self.end, to=TensorProto.INT32)
        self.last = graph.node("Sub", total, graph.constant([1], np.int32))
        self.total = graph.node("Squeeze", total)

    def tables(self, cosine: str, sine: str, _buffer: str) -> tuple[str, str, str]:
        """Tables [total, head_dim / 2], and the rows [1, L] of the new tokens in them.

        Args:
            cosine: Of the new tokens' angles, [1, L, head_dim / 2].
            sine: The same.
            _buffer: One of the buffers [1, kv_heads, S, head_dim].
        """
        graph = self._graph
        in_front = graph.node("Concat", self._past, graph.constant([0, 0, 0]), axis=0)
        first = graph.constant([0])
        tables = [
            graph.node("Pad", graph.node("Squeeze", rows, first), in_front)
            for rows in (cosine, sine)
        ]
        ends = [graph.node("Squeeze", end) for end in (self._past, self.end)]
        rows = graph.node("Range", *ends, graph.constant(1))
        return tables[0], tables[1], graph.node("Unsqueeze", rows, first)


class DevicePlaces:
    """Places for CUDA: no tensor is made on the host and read on the device, nor the other way.

    onnxruntime would copy such a tensor in every run, wait for it, and refuse to capture a CUDA
    graph. How many places are filled is an input of its own, `total_length`, since the operator
    reads that on the host; the length of the past stays on the device. What is made of shapes may
    be on the host: within a captured graph shapes do not change.

    Attributes:
        last: The last filled place, int32 [1].
        total: The input.
    """

    def __init__(self, graph: GraphWriter, positions: str, past: str) -> None:
        self._graph = graph
        self._past = past
        self.total = graph.input("total_length", (1,), np.int32)
        self._numbers = self._counted(graph.node("Shape", positions, start=1, end=2))
        self._places = graph.node("Add", self._numbers, past)
        last = graph.node("Gather", self._places, graph.constant([-1]), axis=0)
        self.last = graph.node("Cast", last, to=TensorProto.INT32)

    def tables(self, cosine: str, sine: str, buffer: str) -> tuple[str, str, str]:
        """As `Places.tables`, with a row for each of the S places of the buffer.

        How many rows are in front of the new tokens' is known on the device only, so nothing can be
        padded: every place takes the row of the new token that is nearest to it.
        """
        graph, first = self._graph, self._graph.constant([0])
        after = graph.node(
            "Sub", self._counted(graph.node("Shape", buffer, start=2, end=3)), self._past
        )
        end = graph.node("Gather", self._numbers, graph.constant([-1]), axis=0)
        nearest = graph.node("Min", graph.node("Max", after, first), end)
        tables = [
            graph.node("Gather", graph.node("Squeeze", rows, first), nearest, axis=0)
            for rows in (cosine, sine)
        ]
        return tables[0], tables[1], graph.node("Unsqueeze", self._places, first)

    def _counted(self, count: str) -> str:
        """0, 1, ... int64 [count] on the device, of a count [1] on the host."""
        graph = self._graph
        end = graph.node("Squeeze", count, graph.constant([0]))
        return graph.node("Range", graph.constant(0), end, graph.constant(1))
