"""Which nodes of a graph compute with nothing but numbers that the host has anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrs_edge.bundle.graphs import GraphFacts

#: Whatever tensor they read, they give out its size.
_SIZES = frozenset(("Shape", "Size"))


def host_nodes(facts: GraphFacts) -> frozenset[str]:
    """Names of nodes that read shapes, lengths and positions, never pixels, states, keys or values.

    A graph's inputs of integers and truth values are the host's; what is computed of them alone is
    too, tables of angles included. A node of constants alone is not: it would be folded, or is a
    weight.
    """
    known = {name for name in facts.inputs if name in facts.integers}
    found = set()
    for node in facts.nodes:
        given = [name for name in node.inputs if name and name not in facts.constants]
        if node.op in _SIZES or (given and known.issuperset(given)):
            known.update(node.outputs)
            found.add(node.name)
    return frozenset(found - {""})
