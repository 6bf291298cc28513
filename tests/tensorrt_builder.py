"""TensorRT-RTX's real builder, which needs no GPU: parse a graph, build it for named cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lrs_edge.building.stage_graphs import StageGraph

#: Ampere and Ada: what can be built for here.
CARDS = ("86", "89")


def built(graph: StageGraph, cards: Sequence[str] = CARDS) -> dict[str, Any]:
    """Build one engine and return what the engine inspector says of it.

    Fails the test where the parser or the builder refuses the graph.
    """
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

    logger = trt.Logger(trt.Logger.ERROR)
    builder, network, parser = _parsed(trt, logger, graph)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(cards)
    for number, card in enumerate(cards):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{card}"), number)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for name, shapes in graph.profile().items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, f"{graph.path.name} does not build"
    del parser
    return {"bytes": plan.nbytes}


def parsed(graph: StageGraph) -> Any:
    """The network that the parser makes of a graph; fails the test where it refuses it."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return _parsed(trt, trt.Logger(trt.Logger.ERROR), graph)[1:]


def _parsed(trt: Any, logger: Any, graph: StageGraph) -> tuple[Any, Any, Any]:
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    taken = parser.parse_from_file(str(graph.path))
    assert taken, f"{graph.path.name}: {parser.get_error(0).desc()}"
    return builder, network, parser
