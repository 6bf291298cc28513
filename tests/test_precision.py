"""Precisions of exported stages: what is in the files, and what engines make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import HIDDEN, write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import onnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

import lrs_edge
from lrs_edge.commands.main import run
from lrs_edge.errors import ExportError, UsageError
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export import ExportOptions, Precisions, export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs import weight_file
from lrs_edge_export.graphs.decoder_graph import LanguageHead, write_llm
from lrs_edge_export.graphs.sessions import DecoderSession
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization import DecoderCalibrator, dequantize, round_to_nearest
from lrs_edge_export.quantization.choice import Candidate, ranked
from lrs_edge_export.quantization.kv_scales import kv_scales
from lrs_edge_export.quantization.precision import (
    INT4_BLOCK,
    INT8_BLOCK,
    N_BITS,
    PRECISIONS,
    Plan,
    Precision,
)
from lrs_edge_export.quantization.sensitivity import LayerError, kept_higher
from lrs_edge_export.quantization.static_choice import Variant, best_variant

LENGTH = 24

#: Largest difference of logits over the largest of them; a mistake in layout gives about 1.
TOLERANCE: dict[Precision, float] = {
    "fp32": 1e-6,
    "fp16": 5e-3,
    "int8-dynamic": 0.1,
    "int8-static": 0.1,
    "int8-weight": 0.1,
    "int4-weight": 0.3,
}


@pytest.fixture(scope="module", autouse=True)
def everything_is_quantized() -> Iterator[None]:
    """Matrices of the tiny checkpoints are smaller than what is worth quantizing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_file, "MIN_QUANTIZED", 1)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(find_checkpoint(str(write_qwen(tmp_path_factory.mktemp("qwen")))))


@pytest.fixture(scope="module")
def embeds() -> np.ndarray:
    return np.random.default_rng(6).standard_normal((LENGTH, HIDDEN)).astype(np.float32)


def text(embeds: np.ndarray) -> TokenSequence:
    """Embeddings at positions from 0."""
    labels = make_tokens(np.arange(len(embeds), dtype=np.int64), TokenKind.QUESTION)
    return TokenSequence(embeds, labels)


def plan_of(precision: Precision, model: Model, embeds: np.ndarray) -> Plan:
    calibrator = DecoderCalibrator(model.llm, [text(embeds)], second_moments=True, head=True)
    return Plan(precision, calibrator=lambda: calibrator)


def write(model: Model, folder: Path, plan: Plan, **more: object) -> Path:
    path = folder / "llm.onnx"
    with WeightFile(folder / "llm.onnx.data", plan) as weights:
        write_llm(model.llm, LanguageHead(model.vocabulary, model.lm_head), path, weights, **more)
    return path


@pytest.fixture(scope="module")
def exact(model: Model, embeds: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = write(model, tmp_path_factory.mktemp("exact"), Plan())
    return DecoderSession(path, capacity=LENGTH).run(embeds)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_computes_nearly_the_same(
    model: Model, embeds: np.ndarray, exact: np.ndarray, tmp_path: Path, precision: Precision
) -> None:
    path = write(model, tmp_path, plan_of(precision, model, embeds))
    found = DecoderSession(path, capacity=LENGTH).run(embeds)
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert error <= TOLERANCE[precision]
    if precision != "fp32":
        assert error > 0
    operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert ("MatMulInteger" in operators) == (precision == "int8-dynamic")
    # Down projections have a scale for each token in int8-dynamic.
    assert ("MatMulIntegerToFloat" in operators) == (precision == "int8-dynamic")
    assert ("QuantizeLinear" in operators) == (precision == "int8-static")
    assert ("DequantizeLinear" in operators) == (precision == "int8-static")
    assert ("MatMulNBits" in operators) == precision.endswith("weight")


@pytest.mark.parametrize("precision", ["int8-weight", "int4-weight"])
def test_blocks_of_weights_read_back(
    model: Model, tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file holds is the rounded weight, transposed, in the standard's own layout."""
    monkeypatch.setitem(N_BITS, "cpu", False)
    write(model, tmp_path, Plan(precision))
    graph = onnx.load(tmp_path / "llm.onnx").graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    bits, block = (4, INT4_BLOCK) if precision == "int4-weight" else (8, INT8_BLOCK)
    name = "layers.1.mlp.down_proj.weight"
    weight = model.llm.read(1, "mlp.down_proj.weight")
    integers, scales = held[f"{name}.int{bits}"], held[f"{name}.scale{bits}"]
    assert integers.shape == weight.T.shape
    steps = integers.astype(np.float32)
    assert (f"{name}.zero{bits}" in held) == (bits == 4)
    if bits == 4:
        zeros = held[f"{name}.zero{bits}"].astype(np.float32)
        assert zeros.shape == scales.shape
        steps -= np.repeat(zeros, block, axis=0)[: len(integers)]
    rounded = steps * np.repeat(scales, block, axis=0)[: len(integers)]
    wanted = dequantize(round_to_nearest(weight, bits, block, zero_points=bits == 4), block)
    np.testing.assert_allclose(rounded.T, wanted, rtol=1e-6, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 70),
    chunk=st.integers(1, 400),
    precision=st.sampled_from(PRECISIONS),
    n_bits=st.booleans(),
)
def test_chunks_of_rows_give_the_same_file(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    cols: int,
    chunk: int,
    precision: Precision,
    n_bits: bool,
) -> None:
    # Static quantization needs inputs; of an odd number of 4-bit outputs two would share a byte.
    odd = precision == "int4-weight" and rows % 2 and not n_bits
    assume(precision != "int8-static" and not odd)
    folder = tmp_path_factory.mktemp("chunks")
    weight = np.random.default_rng(rows * cols).standard_normal((rows, cols)).astype(np.float32)
    files = []
    for size in (chunk, weight.size * 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight_file, "_CHUNK", size)
            path = folder / f"{size}.data"
            with WeightFile(path, Plan(precision)) as weights:
                weights.matrix("w", lambda: weight, n_bits=n_bits)
            files.append(path.read_bytes())
    assert files[0] == files[1]


def test_a_weight_kept_higher_is_stored_higher(
    model: Model, embeds: np.ndarray, tmp_path: Path
) -> None:
    name = "layers.0.mlp.up_proj"
    plan = plan_of("int4-weight", model, embeds)
    plan = Plan("int4-weight", higher=frozenset([name]), calibrator=plan.calibrator)
    assert plan.of(name) == "int8-weight"
    write(model, tmp_path, plan)
    graph = onnx.load(tmp_path / "llm.onnx", load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    assert f"{name}.weight.blocks8" in names
    assert f"{name}.weight.blocks4" not in names
    assert "layers.1.mlp.up_proj.weight.blocks4" in names


def test_only_one_weight_can_be_quantized() -> None:
    plan = Plan("int8-dynamic").alone("layers.0.mlp.up_proj")
    assert plan.of("layers.0.mlp.up_proj") == "int8-dynamic"
    assert plan.of("layers.1.mlp.up_proj") == "fp32"
    assert Plan("int8-weight", target="cuda").alone("a").of("b") == "fp16"


def test_an_odd_number_of_4_bit_outputs_cannot_come_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_file, "_CHUNK", 64)
    with (
        WeightFile(tmp_path / "w.data", Plan("int4-weight")) as weights,
        pytest.raises(ExportError, match="use int8"),
    ):
        weights.matrix("w", lambda: np.ones((7, 32), np.float32))


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    weight = np.full((4, 4), 1e6, np.float32)
    with (
        WeightFile(tmp_path / "w.data", Plan("fp16")) as weights,
        pytest.raises(ExportError, match="float16 cannot hold"),
    ):
        weights.matrix("w", lambda: weight)


# -- int8 key/value buffers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv")
    checkpoint = write_qwen(folder / "checkpoint")
    options = ExportOptions(parity=False, int8_kv=True)
    return export_bundle(str(checkpoint), folder / "bundle", options).path


def test_scales_reach_what_keys_and_values_reach(
    model: Model, embeds: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "llm.onnx"
    with WeightFile(tmp_path / "llm.onnx.data") as weights:
        write_llm(model.llm, LanguageHead(model.vocabulary, model.lm_head), path, weights)
        scales = kv_scales(model.llm, weights, [text(embeds[:9]), text(embeds)])
    session = DecoderSession(path, capacity=LENGTH)
    session.run(embeds)
    for name, scale in scales.items():
        held = session._buffers[name].numpy()[0]
        reached = np.abs(held).max(axis=1).ravel() / 127
        assert (scale >= reached).all()
        np.testing.assert_allclose(scale, reached * 1.1, rtol=1e-4)
    assert len(scales) == 2 * model.llm.config.layers


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_an_int8_cache_keeps_and_truncates(bundle: Path, data: st.DataObject) -> None:
    """A compacted int8 cache says what an int8 cache that never held the rest says."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    embeds = rng.standard_normal((LENGTH, HIDDEN)).astype(np.float32)
    drop = data.draw(st.integers(1, LENGTH - 2))
    with lrs_edge.load(bundle, kv_cache="int8") as engine:
        decoder = engine._loaded().llm._decoder
        labels = make_tokens(np.arange(LENGTH, dtype=np.int64), TokenKind.TILE)
        last = embeds[-1:]
        cache = decoder.new_cache()
        decoder.forward(cache, embeds[:-1], labels[:-1])
        assert cache.buffers.read("key_0").dtype == np.float32
        whole = decoder.forward(cache, last, labels[-1:])
        cache.truncate(LENGTH - 1)
        again = decoder.forward(cache, last, labels[-1:])
        np.testing.assert_allclose(again, whole, atol=1e-5)
        # Keys depend on what was before them: only the end can go without a trace.
        cache.truncate(LENGTH - 1)
        cache.keep(np.arange(LENGTH - 1 - drop, dtype=np.int64))
        kept = decoder.forward(cache, last, labels[-1:])
        fresh = decoder.new_cache()
        decoder.forward(fresh, embeds[: LENGTH - 1 - drop], labels[: LENGTH - 1 - drop])
        wanted = decoder.forward(fresh, last, labels[-1:])
    np.testing.assert_allclose(kept, wanted, atol=1e-5)


def test_an_int8_cache_takes_a_quarter_of_the_memory(bundle: Path) -> None:
    sizes = {}
    for kind in ("float", "int8"):
        with lrs_edge.load(bundle, kv_cache=kind) as engine:
            cache = engine._loaded().llm.new_cache()
            cache.reserve(512)
            sizes[kind] = cache.buffers.nbytes
    assert sizes["float"] == 4 * sizes["int8"]


def test_pruning_between_layers_needs_the_float_cache(bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / "scene.png"
    Image.new("RGB", (64, 64), (10, 90, 30)).save(image)
    with (
        lrs_edge.load(bundle, kv_cache="int8") as engine,
        pytest.raises(UsageError, match="--kv-cache float"),
    ):
        engine.open(image).ask("What is here?", prune="fastv")


def test_a_bundle_without_an_int8_cache_says_so(tmp_path: Path) -> None:
    checkpoint = write_qwen(tmp_path / "checkpoint")
    export_bundle(str(checkpoint), tmp_path / "bundle", ExportOptions(parity=False))
    with pytest.raises(UsageError, match="--int8-kv"):
        lrs_edge.load(tmp_path / "bundle", kv_cache="int8")
    with pytest.raises(UsageError, match="unknown"):
        lrs_edge.load(tmp_path / "bundle", kv_cache="fp8")


# -- choosing ------------------------------------------------------------------------------------


def test_the_first_faithful_candidate_is_chosen() -> None:
    static = Candidate("vision", "int8-static", 0.98)
    weight = Candidate("vision", "int8-weight", 0.999)
    assert ranked([static, weight], 0.97)[0] == static
    assert ranked([static, weight], 0.99)[0] == weight
    # None is faithful: the most faithful, and parity will say so.
    assert ranked([static, weight], 1.0)[0] == weight


def test_fewest_layers_stay_float_among_nearly_equal_ones() -> None:
    none, one, two = (
        Variant(frozenset(names), error) for names, error in (("", 0.2), ("a", 0.11), ("ab", 0.1))
    )
    assert best_variant([none, one, two]) == one
    assert best_variant([none, two]) == two


@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=20),
    percent=st.floats(0, 100),
    seed=st.integers(0, 99),
)
def test_what_is_kept_higher_fits_its_share(sizes: list[int], percent: float, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(sizes))
    errors = [LayerError("llm", f"layer{i}", size, float(order[i])) for i, size in enumerate(sizes)]
    kept = kept_higher(errors, percent)
    held = sum(one.elements for one in errors if one.name in kept)
    assert held <= sum(sizes) * percent / 100
    most = max(errors, key=lambda one: one.error)
    if most.elements <= sum(sizes) * percent / 100:
        assert most.name in kept


# -- the command ---------------------------------------------------------------------------------


def test_stages_have_precisions_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_qwen(tmp_path / "checkpoint")
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "-q", "--no-parity"]
    arguments += ["--precision", "int8-weight", "--vision", "fp16", "--rfm", "int8-dynamic"]
    assert run([*arguments, "--sensitivity", "--keep-higher", "30"]) == 0
    out = capsys.readouterr().out
    assert "| rfm | layers.0.mlp.down_proj |" in out
    assert "| yes |" in out
    with lrs_edge.load(tmp_path / "b") as engine:
        manifest = engine.manifest
    found = manifest.vision.precision, manifest.rfm.precision, manifest.llm.precision
    assert found == ("fp16", "int8-dynamic", "int8-weight")
    assert manifest.parity.kept_higher["rfm"]


def test_int8_of_a_decoder_is_dynamic(tmp_path: Path) -> None:
    checkpoint = write_qwen(tmp_path / "checkpoint")
    arguments = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "-q", "--no-parity"]
    assert run([*arguments, "--rfm", "int8"]) == 0
    with lrs_edge.load(tmp_path / "b") as engine:
        assert engine.manifest.rfm.precision == "int8-dynamic"
        assert engine.manifest.parity.kept_higher == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval", "q.jsonl"], "go together"),
        (["--precision", "int5"], "int5"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_qwen(tmp_path / "x")
    assert run(["export", str(tmp_path / "x"), "-o", str(tmp_path / "b"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(ExportError, match="unknown"):
        Precisions.all("int3")  # type: ignore[arg-type]
