"""How large the tensors of a graph get, and how much a run computes, found without running it.

The graph is gone through once, at sizes that its role is run at: every tensor has a shape, and
integers that shapes are made of have values. A graph whose shapes cannot be told this way depends
on its data, which those of `lrs_edge_export` never do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lrs_edge.bundle.graph_products import COSTS, PRODUCTS
from lrs_edge.bundle.graph_values import MAX_ELEMENTS, MOVES, Value, elementwise
from lrs_edge.bundle.wire_format import WireError

if TYPE_CHECKING:
    from lrs_edge.bundle.graphs import GraphFacts, Node

#: New tokens and places filled before them, at which decoders are gone through.
SITUATIONS = ((256, 768), (1, 0))
#: A projector that has no fixed number of tokens gets those of a large tile.
_FEATURES = 2048
#: Elements of all tensors that are alive at a time (2 GiB as float32).
_MAX_ALIVE = 1 << 29
#: What a run may compute besides what its weights account for.
_FREE_PRODUCTS = 1 << 36
_FREE_ELEMENTS = 1 << 31
_FREE_FOLDED = 1 << 24
_MAX_RANK = 16
#: Operators of those below whose output is their input's memory, and others whose output is not:
#: engines write what goes element by element in place.
_VIEWS = frozenset(("Flatten", "Reshape", "Squeeze", "Unsqueeze"))
_COPIES = frozenset(("Softmax",))
#: Operators whose outputs are not element by element.
_FUNCTIONS = {**MOVES, **PRODUCTS}


def check_sizes(facts: GraphFacts) -> None:
    """Go through a graph at each of the sizes that it is run at.

    Raises:
        WireError: Shapes depend on data, tensors get too large, or a run computes far more than the
            weights account for.
        ValueError: Shapes do not fit together.
    """
    situations = SITUATIONS if "past_length" in facts.inputs else SITUATIONS[:1]
    for new, past in situations:
        _Pass(facts, new, past).run()


def peak_elements(facts: GraphFacts, new: int, past: int) -> int:
    """Elements of all tensors that are alive at a time, without inputs and constants.

    Args:
        facts: The graph.
        new: New tokens, of a decoder.
        past: Places that are filled before them.

    Raises:
        WireError: As `check_sizes`.
        ValueError: Shapes do not fit together.
    """
    one = _Pass(facts, new, past)
    one.run()
    return one.peak


class _Pass:
    """One pass over a graph at fixed sizes."""

    def __init__(self, facts: GraphFacts, new: int, past: int) -> None:
        self._facts = facts
        self._new, self._past = new, past
        self._names = {"N": 1, "L": new, "T": past + new, "S": past + new, "M": _FEATURES}
        self._values: dict[str, Value] = {"": Value(())}
        self._weights = sum(prod(c.shape) for c in facts.constants.values())
        self._products = self._elements = self._folded = self._alive = 0
        self.peak = 0

    def run(self) -> None:
        facts = self._facts
        for name, shape in facts.inputs.items():
            self._values[name] = self._input(name, shape)
        for name, constant in facts.constants.items():
            self._values[name] = Value(constant.shape, constant.values, True, constant.kind)
        last = {name: i for i, node in enumerate(facts.nodes) for name in node.inputs}
        for i, node in enumerate(facts.nodes):
            self._step(node, i, last)
        for name in facts.outputs:
            if name not in self._values:
                raise WireError(f"nothing makes the output {name[:60]!r}")

    def _input(self, name: str, shape: tuple[int | str, ...]) -> Value:
        sizes = []
        for dim in shape:
            if isinstance(dim, str) and dim not in self._names:
                raise WireError(f"{name[:60]!r} has a dimension {dim[:60]!r} that no graph has")
            sizes.append(self._names[dim] if isinstance(dim, str) else dim)
        if prod(sizes) > MAX_ELEMENTS:
            raise WireError(f"the input {name[:60]!r} is too large")
        lengths = {"past_length": self._past, "total_length": self._past + self._new}
        known = np.array([lengths[name]], np.int64) if name in lengths else None
        return Value(tuple(sizes), known)

    def _step(self, node: Node, place: int, last: Mapping[str, int]) -> None:
        inputs = []
        for name in node.inputs:
            if name not in self._values:
                raise WireError(f"{node.op} takes {name[:60]!r}, which nothing has made")
            inputs.append(self._values[name])
        made = self._shapes(node, inputs)
        if len(node.outputs) > len(made):
            raise WireError(f"{node.op} has {len(node.outputs)} outputs")
        constant = all(self._values[name].constant for name in node.inputs if name)
        for name, value in zip(node.outputs, made, strict=False):
            self._keep(node, name, replace(value, constant=constant), used=name in last)
        if node.op in _COPIES or (node.op in _FUNCTIONS and node.op not in _VIEWS):
            self.peak = max(self.peak, self._alive)
        for name in dict.fromkeys(node.inputs):
            if last[name] == place and name and not self._values[name].constant:
                self._alive -= self._values[name].size
        self.peak = max(self.peak, self._alive)

    def _keep(self, node: Node, name: str, value: Value, *, used: bool) -> None:
        if name and name in self._values:
            raise WireError(f"{name[:60]!r} is made twice")
        if min(value.shape, default=0) < 0 or len(value.shape) > _MAX_RANK:
            raise WireError(f"{node.op} makes a tensor of shape {value.shape}")
        # Weights as other types are as large as the files make them.
        free = value.constant and node.op in ("DequantizeLinear", "Cast", "Transpose", "Identity")
        if value.size > MAX_ELEMENTS and not free:
            raise WireError(f"{node.op} makes a tensor of {value.size} elements")
        if name:
            self._values[name] = value
        self._count(value.size, constant=value.constant, kept=used)

    def _count(self, size: int, *, constant: bool, kept: bool) -> None:
        if constant:
            self._folded += size
        else:
            self._elements += size
            self._alive += size if kept else 0
        if self._alive > _MAX_ALIVE:
            raise WireError("its tensors are too large together")
        if (
            self._products > _FREE_PRODUCTS + 16 * self._weights * _tokens(self._new)
            or self._elements > _FREE_ELEMENTS + 2 * self._weights
            or self._folded > _FREE_FOLDED + 4 * self._weights
        ):
            raise WireError("a run computes far more than the weights account for")

    def _shapes(self, node: Node, inputs: Sequence[Value]) -> list[Value]:
        function = _FUNCTIONS.get(node.op)
        found = [elementwise(node, inputs)] if function is None else function(node, inputs)
        if node.op in COSTS:
            self._products += COSTS[node.op](node, inputs, found[0])
        if node.op == "GroupQueryAttention":
            self._check_attention(node, inputs)
        return found

    def _check_attention(self, node: Node, inputs: Sequence[Value]) -> None:
        """What the operator trusts in: places and lengths that lie inside of its buffers."""
        total = self._past + self._new
        ends, whole = inputs[5].values, inputs[6].values
        sound = ends is not None and ends.tolist() == [total - 1]
        sound = sound and whole is not None and whole.ravel().tolist() == [total]
        if len(inputs) > 7 and node.inputs[7]:
            tables, rows = inputs[7:9], inputs[9].values
            sound = sound and rows is not None and rows.shape == (1, self._new)
            sound = sound and rows is not None and 0 <= rows.min() <= rows.max() < total
            sound = sound and all(t.shape == (total, tables[0].shape[-1]) for t in tables)
        if not sound:
            raise WireError("GroupQueryAttention is given other lengths than the cache has")


def _tokens(new: int) -> int:
    return max(new, 256)
