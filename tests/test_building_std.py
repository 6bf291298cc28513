"""Graphs for TensorRT compute what the bundle's own do, and its parser and builder take them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lrs_edge.building.editable import EditableGraph
from lrs_edge.building.stage_graphs import (
    write_std_graph,
    write_vision_graph,
)
from lrs_edge.bundle.bundle import Bundle, default_bundle_path, open_bundle
from lrs_edge.errors import UsageError
from lrs_edge_export.quantization.precision import Precision
from tests.golden_data import checkpoint
from tests.rewritten_bundles import rewritten
from tests.std_parity import CAPACITY, assert_agree


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return open_bundle(default_bundle_path())


@pytest.mark.parametrize("variant", ["qwen", "llama"])
def test_std_computes_what_gqa_does(
    golden_bundles: dict[str, Path], variant: str, tmp_path: Path
) -> None:
    if variant not in golden_bundles:
        pytest.skip("the golden checkpoint is not here")
    bundle = open_bundle(golden_bundles[variant])
    for stage, spec in (("rfm", bundle.manifest.rfm), ("llm", bundle.manifest.llm)):
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path, floats="float32")
        assert graph.capacity == CAPACITY
        assert len(graph.buffers) == 2 * spec.layers + (stage == "rfm")
        assert_agree(graph.path, bundle.graph(spec.path("gqa")))
    spec = bundle.manifest.rfm
    graph = write_std_graph(bundle, "rfm", CAPACITY, tmp_path, masked=True, floats="float32")
    own = bundle.graph(spec.path("masked"))
    assert_agree(graph.path, own, masked=True)
    # What is hidden is so in float16, too, which does not hold the smallest float32.
    graph = write_std_graph(bundle, "rfm", CAPACITY, tmp_path / "float16", masked=True)
    assert_agree(graph.path, own, masked=True, limit=2e-2)


@pytest.mark.parametrize(
    "precision", ["int8-weight", pytest.param("int4-weight", marks=pytest.mark.slow)]
)
def test_weights_in_blocks_are_what_they_were(
    golden_bundles: dict[str, Path], precision: Precision, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    if source is None:
        pytest.skip("the golden checkpoint is not here")
    made = golden_bundles["llama"], tmp_path / "bundle"
    bundle = rewritten(source, *made, precision, "fp32")
    for stage, spec in (("rfm", bundle.manifest.rfm), ("llm", bundle.manifest.llm)):
        own = bundle.graph(spec.path("gqa"))
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path / "float32", floats="float32")
        assert_agree(graph.path, own)
        # Blocks of int8 are rounded once more, to channels.
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path / "float16")
        assert_agree(graph.path, own, limit=6e-2)


def test_bundles_for_cuda_have_graphs_of_another_form(
    golden_bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Their places and tables are made on the device, and told by one input more."""
    source = checkpoint("llama")
    if source is None:
        pytest.skip("the golden checkpoint is not here")
    made = golden_bundles["llama"], tmp_path / "bundle"
    bundle, single = rewritten(source, *made, "fp16", "fp16", "cuda"), open_bundle(made[0])
    assert "total_length" in EditableGraph(bundle.graph("llm.onnx")).inputs
    for stage in ("rfm", "llm"):
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path / "std")
        assert "total_length" not in {binding.name for binding in graph.inputs}
        assert_agree(graph.path, single.graph(f"{stage}.onnx"), limit=2e-2)


def test_embedded_bundle_is_described(embedded: Bundle, tmp_path: Path) -> None:
    rfm = write_std_graph(embedded, "rfm", 4096, tmp_path)
    llm = write_std_graph(embedded, "llm", 4096, tmp_path)
    # The language model goes on from the RFM, which is its first layers.
    assert {b.name: b.shape for b in rfm.outputs if not b.name.startswith("present_")} == {
        "logits": (9, 4096),
        "hidden_states": (1, "L", 576),
        "attended": (1, "L", 576),
    }
    assert llm.buffers == ("key_3", "value_3", "key_4", "value_4")
    kinds = {b.name: b.dtype for b in (*llm.inputs, *llm.outputs)}
    assert {kind for name, kind in kinds.items() if name.endswith("_3")} == {"float16"}
    assert kinds["inputs_embeds"] == kinds["attended"] == kinds["logits"] == "float32"
    assert kinds["position_ids"] == kinds["past_length"] == "int64"
    assert llm.profile()["attended"] == ((1, 1, 576), (1, 256, 576), (1, 256, 576))
    assert "past_key_3" not in llm.profile()
    vision = write_vision_graph(embedded, tmp_path)
    assert vision.profile() == {"pixel_values": tuple((n, 3, 384, 384) for n in (1, 16, 16))}
    assert vision.buffers == ()


def test_weights_of_the_embedded_bundle_stay_where_they_are(
    embedded: Bundle, tmp_path: Path
) -> None:
    before = {path.name: path.stat() for path in embedded.path.iterdir()}
    stages = [write_std_graph(embedded, stage, 1024, tmp_path) for stage in ("rfm", "llm")]
    stages.append(write_vision_graph(embedded, tmp_path))
    new = sum(p.stat().st_size for p in tmp_path.iterdir() if not p.is_symlink())
    assert new < 0.25 * sum(path.st_size for path in before.values())
    assert {path.name: path.stat() for path in embedded.path.iterdir()} == before
    # The integers themselves are the bundle's.
    graph, own = EditableGraph(stages[1].path), EditableGraph(embedded.graph("llm.onnx"))
    name = "layers.4.mlp.gate_proj.weight.int8"
    node = next(node for node in graph.nodes if name in node.input)
    assert node.op_type == "DequantizeLinear"
    assert np.array_equal(graph.array(name), own.array(name))
    # Of the head, which one token is multiplied by, in halves.
    head = own.array("lm_head.weight.int8").astype(np.int16)
    high, low = (graph.array(f"lm_head.weight.int8.{part}") for part in ("high", "low"))
    assert np.array_equal(16 * high.astype(np.int16) + low + 8, head)
    scales = own.array(name.replace("int8", "scale"))
    assert np.allclose(graph.array(node.input[1]), scales, rtol=1e-3)


def test_a_capacity_has_to_be_one(embedded: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="capacity of 0"):
        write_std_graph(embedded, "llm", 0, tmp_path)
