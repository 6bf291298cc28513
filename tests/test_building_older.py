"""Graphs for TensorRT 10.3 compute what the bundle's own do, of operators that it has."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from lrs_edge.building.older import OPERATORS
from lrs_edge.building.stage_graphs import write_std_graph, write_vision_graph
from lrs_edge.bundle.bundle import Bundle, default_bundle_path, open_bundle
from lrs_edge_export.quantization.precision import Precision
from tests.golden_data import checkpoint
from tests.rewritten_bundles import rewritten
from tests.std_parity import CAPACITY, assert_agree, unlinked
from tests.tensorrt_builder import built


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return open_bundle(default_bundle_path())


@pytest.mark.parametrize("variant", ["qwen", "llama"])
def test_decoders_compute_what_gqa_does(
    golden_bundles: dict[str, Path], variant: str, tmp_path: Path
) -> None:
    if variant not in golden_bundles:
        pytest.skip("the golden checkpoint is not here")
    bundle = open_bundle(golden_bundles[variant])
    for stage, spec in (("rfm", bundle.manifest.rfm), ("llm", bundle.manifest.llm)):
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path, floats="float32", older=True)
        _assert_known(graph.path)
        assert_agree(graph.path, bundle.graph(spec.path("gqa")))
    graph = write_std_graph(
        bundle, "rfm", CAPACITY, tmp_path, masked=True, floats="float32", older=True
    )
    assert_agree(graph.path, bundle.graph(bundle.manifest.rfm.path("masked")), masked=True)


@pytest.mark.parametrize(("precision", "opset"), [("int8-weight", 20), ("int4-weight", 21)])
def test_weights_in_blocks_are_what_they_were(
    golden_bundles: dict[str, Path], precision: Precision, opset: int, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    if source is None:
        pytest.skip("the golden checkpoint is not here")
    bundle = rewritten(source, golden_bundles["llama"], tmp_path / "bundle", precision, "fp32")
    graph = write_std_graph(bundle, "llm", CAPACITY, tmp_path, floats="float32", older=True)
    _assert_known(graph.path, opset)
    assert_agree(graph.path, bundle.graph(bundle.manifest.llm.path("gqa")))


@pytest.mark.parametrize("stage", ["vision", "rfm", "llm"])
def test_embedded_bundle_holds_known_operators_and_builds(
    embedded: Bundle, stage: str, tmp_path: Path
) -> None:
    """TensorRT-RTX, which knows the older operators too, stands for TensorRT 10.3."""
    if stage == "vision":
        graph = write_vision_graph(embedded, tmp_path, older=True)
    else:
        graph = write_std_graph(embedded, stage, CAPACITY, tmp_path, older=True)
    _assert_known(graph.path)
    assert built(graph)


def _assert_known(path: Path, opset: int = 20) -> None:
    model = onnx.load(str(path), load_external_data=False)
    assert {node.op_type for node in model.graph.node} <= OPERATORS
    assert not any(node.domain for node in model.graph.node)
    assert [entry.version for entry in model.opset_import] == [opset]
    onnx.checker.check_model(str(unlinked(path)), full_check=True)
