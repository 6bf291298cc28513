"""TensorRT-RTX's real builder, which needs no GPU: parse a graph, build it for named cards.

An engine can be inspected only where there is a GPU to load it. But the builder tells the same of
each engine that it has made, layer by layer, in its log.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from lrs_edge.building.stage_graphs import StageGraph

#: Ampere and Ada.
CARDS = ("86", "89")

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), "
    r"Constants: (?P<constants>.*?), Outputs: (?P<outputs>.*?), TacticName: .*?"
    r"Metadata: (?P<metadata>.*)"
)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        inputs: Names of what it reads that is computed, or given.
        weights: Types of its constants, such as `Int8`.
        nodes: Names of the graph's nodes that it is made of.
    """

    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class BuiltEngine:
    """What an engine is made of; the layers are those of the first card."""

    size: int
    layers: tuple[EngineLayer, ...]
    #: Buffers whose update in place the parser has found.
    updated: tuple[str, ...]

    def nodes_with(self, kind: str) -> set[str]:
        """Nodes of the graph in layers with weights of a type."""
        return {node for layer in self.layers if kind in layer.weights for node in layer.nodes}


def built(graph: StageGraph, cards: Sequence[str] = CARDS) -> BuiltEngine:
    """Build an engine; fails the test where the parser or the builder refuses the graph."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

    said: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            del severity
            said.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    taken = parser.parse_from_file(str(graph.path))
    assert taken, f"{graph.path.name}: {parser.get_error(0).desc()}"
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(cards)
    for number, card in enumerate(cards):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{card}"), number)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for name, shapes in graph.profile().items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    updated = tuple(
        update.get_output(0).name.removeprefix("present_")
        for update in updates
        if update.get_input(0).is_network_input and update.get_output(0).is_network_output
    )
    said.clear()
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, f"{graph.path.name} does not build: {said[-3:]}"
    found = [_LAYER.match(line) for message in said for line in message.splitlines()]
    return BuiltEngine(plan.nbytes, tuple(_layer(m) for m in found if m), updated)


def _layer(match: re.Match[str]) -> EngineLayer:
    return EngineLayer(
        inputs=tuple(re.findall(r"\{ Name: (.*?), Dim", match["inputs"])),
        weights=tuple(re.findall(r"Datatype: (\w+)", match["constants"])),
        nodes=tuple(re.findall(r"\[ONNX Layer: (.*?)\]", match["metadata"])),
    )
