"""Weights laid out for MatMulNBits: numbers of DequantizeLinear and MatMul, one copy of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import HIDDEN, LAYERS, write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lrs_edge
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.bundle.graphs import check_graph
from lrs_edge.bundle.memory import of_bundle
from lrs_edge.engines.runtime import ort
from lrs_edge_export import ExportOptions, Precisions, export_bundle
from lrs_edge_export.bundle.stages import LLM, LLM_REST, RFM, RFM_MASKED, VISION, StageWriter
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs import weight_file
from lrs_edge_export.graphs.block_layout import packed
from lrs_edge_export.graphs.onnx_writer import GraphWriter
from lrs_edge_export.graphs.sessions import DecoderSession, open_session
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization import dequantize, round_to_nearest
from lrs_edge_export.quantization.precision import N_BITS, Plan, Precision

WEIGHT_ONLY: tuple[Precision, ...] = ("int8-weight", "int4-weight")
BITS = {"int8-weight": (8, 128), "int4-weight": (4, 32)}
LENGTH = 20


@pytest.fixture(scope="module", autouse=True)
def everything_is_quantized() -> Iterator[None]:
    """Matrices of the tiny checkpoints are smaller than what is worth quantizing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_file, "MIN_QUANTIZED", 1)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return read_model(find_checkpoint(str(checkpoint)))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def places(path: Path) -> dict[int, str]:
    """Parts of weight files that a graph reads."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found[int(entries["offset"])] = entries["location"]
    return found


def product(folder: Path, weight: np.ndarray, plan: Plan, *, n_bits: bool) -> Path:
    """A graph that multiplies x [n, K] by one weight."""
    path = folder / f"{n_bits}.onnx"
    with WeightFile(folder / f"{path.name}.data", plan) as weights:
        graph = GraphWriter("product", weights, n_bits=n_bits)
        x = graph.input("x", ("n", weight.shape[1]))
        graph.node("Identity", graph.linear(x, "w", lambda: weight), out="y")
        graph.output("y", ("n", len(weight)))
        graph.save(path)
    return path


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 24).map(lambda half: 2 * half),
    cols=st.integers(1, 300),
    precision=st.sampled_from(WEIGHT_ONLY),
)
def test_a_product_is_that_of_the_rounded_weight(
    tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int, precision: Precision
) -> None:
    """Inputs that int8 holds exactly, so that nothing but the layout can make a difference."""
    folder = tmp_path_factory.mktemp("product")
    numbers = np.random.default_rng(rows * cols)
    weight = numbers.standard_normal((rows, cols)).astype(np.float32)
    x = numbers.integers(-127, 128, (5, cols)).astype(np.float32)
    x[:, :: BITS[precision][1]] = 127
    found = {}
    for n_bits in (True, False):
        path = product(folder, weight, Plan(precision), n_bits=n_bits)
        assert ("MatMulNBits" in operators(path)) == n_bits
        (found[n_bits],) = open_session(path).run(["y"], {"x": x})
    bits, block = BITS[precision]
    rounded = round_to_nearest(weight, bits, block, zero_points=bits == 4)
    wanted = x @ dequantize(rounded, block).T
    tolerance = 1e-5 * np.abs(x).sum(1).max()
    np.testing.assert_allclose(found[True], wanted, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found[True], found[False], rtol=0, atol=tolerance)


def test_an_odd_number_of_outputs_and_a_block_that_is_not_whole() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    made = round_to_nearest(weight, 4, 32, zero_points=True)
    blocks, scales, zeros = packed(made, 4, 32)
    assert blocks.shape == (3, 3, 16)
    assert scales.shape == (3, 3)
    assert zeros.shape == (3, 2)
    halves = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(3, 96)
    assert np.array_equal(halves[:, :70].astype(int) - 8, made.integers)
    # What fills up is nothing, whatever is read with it.
    assert (halves[:, 70:] == 8).all()
    points = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(3, 4)
    assert made.zeros is not None
    assert np.array_equal(points[:, :3].astype(int) - 8, made.zeros)


def test_only_blocks_have_two_layouts(tmp_path: Path) -> None:
    weight = np.ones((4, 64), np.float32)
    for precision in ("fp32", "int8-dynamic", *WEIGHT_ONLY):
        with WeightFile(tmp_path / "w.data", Plan(precision)) as weights:
            first, second = (weights.matrix("w", lambda: weight, n_bits=x) for x in (True, False))
        assert (first is second) == (precision not in WEIGHT_ONLY)
        assert not second.n_bits


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_a_language_model_computes_what_it_did(
    model: Model, tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds = np.random.default_rng(1).standard_normal((LENGTH, HIDDEN)).astype(np.float32)
    logits = {}
    for n_bits in (True, False):
        monkeypatch.setitem(N_BITS, "cpu", n_bits)
        folder = tmp_path / str(n_bits)
        folder.mkdir()
        with StageWriter(model, folder) as writer:
            writer.write("llm", Plan(precision))
        found = operators(folder / LLM)
        assert ("MatMulNBits" in found, "DequantizeLinear" in found) == (n_bits, not n_bits)
        logits[n_bits] = DecoderSession(folder / LLM, capacity=LENGTH).run(embeds)
    # The engine makes the same operator of both; onnxruntime 1.23 does not of 8 bits, and
    # multiplies them by floats that are not rounded to int8.
    error = np.abs(logits[True] - logits[False]).max() / np.abs(logits[False]).max()
    assert error < (0.05 if ort.__version__.startswith("1.23.") else 1e-5)


def test_cuda_and_vision_have_weights_that_the_engine_unpacks(model: Model, tmp_path: Path) -> None:
    for target, folder in (("cuda", tmp_path / "cuda"), ("cpu", tmp_path / "cpu")):
        folder.mkdir()
        with StageWriter(model, folder) as writer:
            writer.write("vision", Plan("int8-weight", target=target))
            writer.write("llm", Plan("int8-weight", target=target))
        assert "MatMulNBits" not in operators(folder / VISION)
        assert ("MatMulNBits" in operators(folder / LLM)) == (target == "cpu")


@pytest.mark.parametrize("precision", WEIGHT_ONLY)
def test_flavours_read_one_copy(checkpoint: Path, tmp_path: Path, precision: Precision) -> None:
    options = ExportOptions(
        precisions=Precisions(llm=precision),
        keep_higher=0.0,
        parity=False,
        rfm_layers=1,
        int8_kv=True,
        attention_layers=(1,),
    )
    bundle = tmp_path / "bundle"
    manifest = export_bundle(str(checkpoint), bundle, options).manifest
    graphs = {file.path for spec in manifest.decoders for file in spec.graphs}
    graphs |= {segment.graph for segment in manifest.llm.segments}
    assert {LLM, LLM_REST, RFM, RFM_MASKED} < graphs
    assert len(graphs) >= 7
    whole = places(bundle / LLM)
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    for graph in graphs:
        assert "DequantizeLinear" not in operators(bundle / graph)
        check_graph(bundle, graph, sizes)
    first, rest = places(bundle / RFM), places(bundle / LLM_REST)
    masked = places(bundle / RFM_MASKED)
    assert first.keys() | rest.keys() | masked.keys() <= whole.keys() | masked.keys()
    assert set(whole.values()) == set(rest.values()) == set(first.values()) == {f"{LLM}.data"}
    # A layer's seven matrices are five where query, key and value are one; and the head.
    assert operators(bundle / LLM).count("MatMulNBits") == 5 * LAYERS + 1


def test_a_bundle_of_before_still_answers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    image = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    answers, held = [], []
    for n_bits in (True, False):
        monkeypatch.setitem(N_BITS, "cpu", n_bits)
        bundle = tmp_path / str(n_bits)
        precisions = Precisions(rfm="int8-weight", llm="int8-weight")
        export_bundle(str(checkpoint), bundle, ExportOptions(precisions=precisions, parity=False))
        with lrs_edge.load(bundle) as engine:
            answers.append(engine.open(image).ask("What is this?").tokens)
        stage = of_bundle(open_bundle(bundle)).stages[-1]
        held.append(stage.weights / stage.file)
    assert answers[0].sent == answers[1].sent > 0
    # Of the one of before it is reckoned that its weights are held twice.
    assert held[0] < 0.7 * held[1]
