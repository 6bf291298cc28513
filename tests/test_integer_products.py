"""Products in int8 are exact on every processor, whatever its kernel does with 16-bit sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import HIDDEN, write_qwen
from tests.integer_cpu import saturating_product

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import onnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

import lrs_edge
from lrs_edge_export import ExportOptions, Precisions, export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs import weight_file
from lrs_edge_export.graphs.decoder_graph import LanguageHead, write_llm
from lrs_edge_export.graphs.sessions import DecoderSession
from lrs_edge_export.graphs.weight_file import WeightFile, quantize
from lrs_edge_export.quantization import quantize_channels, saturates
from lrs_edge_export.quantization.precision import Plan

finite = st.floats(-1e3, 1e3, width=32)
weights = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=finite
)


@given(weight=weights, seed=st.integers(0, 99))
def test_products_are_exact_where_sums_have_16_bits(weight: np.ndarray, seed: int) -> None:
    integers, scales = quantize_channels(weight)
    assert not saturates(integers)
    assert np.abs(integers).max(initial=0) <= 127
    step = scales[:, None] / 2
    assert (np.abs(integers * scales[:, None] - weight) <= step * (1 + 1e-4)).all()
    # The worst inputs, and any others.
    rng = np.random.default_rng(seed)
    worst = np.where(integers > 0, 255, 0), np.where(integers < 0, 255, 0)
    x = np.concatenate([*worst, rng.integers(0, 256, (3, weight.shape[1]))]).astype(np.uint8)
    wanted = (x.astype(np.int32) - 128) @ integers.T.astype(np.int32)
    assert np.array_equal(saturating_product(x, integers.T, 128), wanted)


def test_plain_int8_is_not_exact_there() -> None:
    """What this guards against: two large neighbours of one sign."""
    integers, _ = quantize(np.array([[1.0, 1.0, 0.1]], np.float32), axis=0)
    assert saturates(integers)
    x = np.full((1, 3), 255, np.uint8)
    assert saturating_product(x, integers.T, 0)[0, 0] != (x.astype(int) @ integers.T.astype(int))[0]


def test_a_scale_is_seldom_much_larger() -> None:
    """The bound costs a third of a step of normally distributed weights, not a bit."""
    weight = np.random.default_rng(0).standard_normal((64, 576)).astype(np.float32)
    _, safe = quantize_channels(weight)
    _, plain = quantize(weight, axis=0)
    assert 1 < (safe / plain).mean() < 1.45


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model in int8-dynamic, all matrices quantized."""
    folder = tmp_path_factory.mktemp("products")
    model = read_model(find_checkpoint(str(write_qwen(folder / "checkpoint"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_file, "MIN_QUANTIZED", 1)
        with WeightFile(folder / "llm.onnx.data", Plan("int8-dynamic")) as weights:
            head = LanguageHead(model.vocabulary, model.lm_head)
            write_llm(model.llm, head, folder / "llm.onnx", weights)
    return folder / "llm.onnx"


def test_every_product_of_a_graph_is_exact(graph: Path) -> None:
    model = onnx.load(graph).graph
    held = {tensor.name: tensor for tensor in model.initializer}
    nodes = [node for node in model.node if node.op_type.startswith("MatMulInteger")]
    assert {node.op_type for node in nodes} == {"MatMulInteger", "MatMulIntegerToFloat"}
    for node in nodes:
        assert not saturates(numpy_helper.to_array(held[node.input[1]]).T), node.name


def test_a_place_with_outliers_does_not_touch_the_others_scale(tmp_path: Path) -> None:
    """Down projections: a token with huge values costs the other tokens nothing."""
    from lrs_edge_export.graphs.onnx_writer import GraphWriter
    from lrs_edge_export.graphs.sessions import open_session

    rng = np.random.default_rng(1)
    weight = rng.standard_normal((24, 32)).astype(np.float32)
    x = rng.standard_normal((1, 6, 32)).astype(np.float32)
    x[0, 0] *= 1000
    x[0, 3] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_file, "MIN_QUANTIZED", 1)
        errors = {}
        for outliers in (False, True):
            path = tmp_path / f"{outliers}.onnx"
            with WeightFile(tmp_path / f"{outliers}.data", Plan("int8-dynamic")) as weights:
                writer = GraphWriter("product", weights)
                given = writer.input("x", (1, "L", 32))
                y = writer.linear(given, "w", lambda: weight, outliers=outliers)
                writer.node("Identity", y, out="y")
                writer.output("y", (1, "L", 24))
                writer.save(path)
            (found,) = open_session(path).run(["y"], {"x": x})
            errors[outliers] = np.abs(found - x @ weight.T)[0].max(axis=1)
    assert errors[True][3] == 0
    ordinary = [1, 2, 4, 5]
    assert errors[True][ordinary].max() < 0.3
    assert errors[False][ordinary].min() > 1


def test_tokens_decoded_alone_or_together_agree(graph: Path) -> None:
    """Scales of whole chunks are left for most products: this says how far they may differ."""
    embeds = np.random.default_rng(2).standard_normal((12, HIDDEN)).astype(np.float32)
    together = DecoderSession(graph, capacity=12).run(embeds)
    session = DecoderSession(graph, capacity=12)
    for place in range(12):
        alone = session.run(embeds[place : place + 1])
    assert np.abs(alone - together).max() < 0.1 * np.abs(together).max()


def test_bundles_in_int8_are_loaded(tmp_path: Path) -> None:
    """Every operator of such a graph is one that bundles may use."""
    checkpoint = write_qwen(tmp_path / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_file, "MIN_QUANTIZED", 1)
        options = ExportOptions(precisions=Precisions.all("int8-dynamic"), parity=False)
        export_bundle(str(checkpoint), tmp_path / "bundle", options)
    with lrs_edge.load(tmp_path / "bundle", provider="cpu") as engine:
        assert engine.manifest.exact_integers
        assert engine._loaded().warnings == ()
