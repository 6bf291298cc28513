"""TensorRT-RTX's builder makes engines of all graphs, as they are meant; no card has run one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")

from lrs_edge.building.editable import EditableGraph
from lrs_edge.building.stage_graphs import StageGraph, write_std_graph, write_vision_graph
from lrs_edge.bundle.bundle import Bundle, default_bundle_path, open_bundle
from lrs_edge_export.quantization.precision import Precision, Target
from tests.golden_data import checkpoint
from tests.rewritten_bundles import rewritten
from tests.tensorrt_builder import BuiltEngine, built

CAPACITY = 1024


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return open_bundle(default_bundle_path())


def products(graph: StageGraph) -> set[str]:
    """Names of the matrix products with weights of int8 or int4, for an even number of outputs.

    The builder fuses none that has an odd one, such as the head of a golden checkpoint.
    """
    found = EditableGraph(graph.path)
    weights = {
        n.output[0]
        for n in found.nodes
        if n.op_type == "DequantizeLinear" and found.shape(n.input[0])[1] % 2 == 0
    }
    return {n.name for n in found.nodes if n.op_type == "MatMul" and n.input[1] in weights}


def assert_in_place(graph: StageGraph, engine: BuiltEngine) -> None:
    """Every buffer is updated where it lies: no layer reads what it was before."""
    assert set(engine.updated) == set(graph.buffers)
    read = {name for layer in engine.layers for name in layer.inputs}
    assert not [name for name in read if name.startswith(("past_key", "past_value"))]
    assert {f"present_{name}" for name in graph.buffers} <= read


@pytest.mark.parametrize("stage", ["rfm", "llm"])
def test_the_embedded_decoders(embedded: Bundle, stage: str, tmp_path: Path) -> None:
    graph = write_std_graph(embedded, stage, CAPACITY, tmp_path)
    engine = built(graph)
    assert_in_place(graph, engine)
    # Products have weights of integers, unpacked nowhere before they run.
    assert len(products(graph)) > 8
    assert products(graph) <= engine.nodes_with("Int8") | engine.nodes_with("Int4")
    assert engine.nodes_with("Int4") & products(graph) == (
        {"lm_head.high", "lm_head.low"} if stage == "llm" else set()
    )


def test_the_embedded_decoder_of_the_reference_policy(embedded: Bundle, tmp_path: Path) -> None:
    graph = write_std_graph(embedded, "rfm", CAPACITY, tmp_path, masked=True)
    assert_in_place(graph, built(graph))


@pytest.mark.slow
def test_the_embedded_tower(embedded: Bundle, tmp_path: Path) -> None:
    built(write_vision_graph(embedded, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "vision", "target"),
    [
        ("fp32", "fp32", "cpu"),
        ("fp16", "fp16", "cuda"),
        ("int8-dynamic", "int8-dynamic", "cpu"),
        ("int8-weight", "int8-weight", "cuda"),
        ("int4-weight", "int4-weight", "cpu"),
        ("int8-dynamic", "int8-static", "cpu"),
    ],
)
def test_golden_bundles_of_every_precision(
    golden_bundles: dict[str, Path],
    precision: Precision,
    vision: Precision,
    target: Target,
    tmp_path: Path,
) -> None:
    source = checkpoint("qwen")
    if source is None:
        pytest.skip("the golden checkpoint is not here")
    made = golden_bundles["qwen"], tmp_path / "bundle"
    bundle = rewritten(source, *made, precision, vision, target)
    built(write_vision_graph(bundle, tmp_path))
    for stage, masked in (("rfm", False), ("rfm", True), ("llm", False)):
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path, masked=masked)
        engine = built(graph)
        assert_in_place(graph, engine)
        if precision.startswith("int"):
            assert products(graph) <= engine.nodes_with("Int8") | engine.nodes_with("Int4")


@pytest.mark.slow
def test_clip_with_symmetric_activations(golden_bundles: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoint("llama")
    if source is None:
        pytest.skip("the golden checkpoint is not here")
    made = golden_bundles["llama"], tmp_path / "bundle"
    bundle = rewritten(source, *made, "fp32", "int8-static", symmetric=True)
    engine = built(write_vision_graph(bundle, tmp_path))
    assert engine.nodes_with("Int8")
