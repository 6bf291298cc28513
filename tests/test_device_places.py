"""The language model's graph for CUDA: no copy between host and device, and the usual numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import HIDDEN, write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import lrs_edge
from lrs_edge.bundle.graphs import check_graph
from lrs_edge_export import ExportOptions, Precisions, export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs.decoder_graph import LanguageHead, write_llm, write_llm_rest
from lrs_edge_export.graphs.sessions import DecoderSession
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization.precision import Plan
from tests.cuda_partition import copies
from tests.rasters import noise
from tests.rasters import write as write_image

LENGTH, CAPACITY = 40, 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(find_checkpoint(str(write_qwen(tmp_path_factory.mktemp("qwen")))))


def write(model: Model, path: Path, plan: Plan, *, on_device: bool = True, **given: object) -> Path:
    head = LanguageHead(model.vocabulary, model.lm_head)
    with WeightFile(path.with_name(f"{path.name}.data"), plan) as weights:
        write_llm(model.llm, head, path, weights, on_device=on_device, **given)  # type: ignore[arg-type]
    return path


def steps(graph: DecoderSession, embeds: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """A prompt in two parts, tokens one by one, some places dropped, and more tokens."""
    parts = [(0, 13), (13, 25), *((i, i + 1) for i in range(25, 31))]
    found = [graph.run(embeds[a:b], places[a:b]) for a, b in parts]
    graph.keep(np.arange(0, 31, 2))
    return found + [graph.run(embeds[i : i + 1], places[i : i + 1]) for i in range(31, LENGTH)]


@pytest.fixture
def embeds() -> np.ndarray:
    return np.random.default_rng(6).standard_normal((LENGTH, HIDDEN)).astype(np.float32)


@pytest.fixture
def places() -> np.ndarray:
    chosen = np.random.default_rng(5).choice(1_000_000, LENGTH, replace=False)
    return np.sort(chosen).astype(np.int64)


@pytest.mark.parametrize("precision", ["fp32", "int8-weight", "int4-weight"])
def test_numbers_are_the_usual_ones(
    model: Model, embeds: np.ndarray, places: np.ndarray, tmp_path: Path, precision: str
) -> None:
    """To the last bit, also after places were dropped."""
    found = [
        steps(DecoderSession(write(model, tmp_path / name, Plan(precision), on_device=device),  # type: ignore[arg-type]
                             capacity=CAPACITY), embeds, places)
        for name, device in (("usual.onnx", False), ("device.onnx", True))
    ]  # fmt: skip
    for usual, device in zip(*found, strict=True):
        assert np.array_equal(usual, device)


def test_a_captured_graph_is_told_the_whole_buffer(
    model: Model, embeds: np.ndarray, places: np.ndarray, tmp_path: Path
) -> None:
    """What all replays of a CUDA graph have: attention ends where the past does all the same."""
    path = write(model, tmp_path / "llm.onnx", Plan())
    whole = DecoderSession(path, capacity=CAPACITY, total=CAPACITY)
    for usual, found in zip(
        steps(DecoderSession(path, capacity=CAPACITY), embeds, places),
        steps(whole, embeds, places),
        strict=True,
    ):
        np.testing.assert_allclose(found, usual, rtol=0, atol=1e-5 * np.abs(usual).max())


def test_nothing_is_copied_within_a_run(model: Model, tmp_path: Path) -> None:
    plan = Plan("fp16", target="cuda")
    scales = {
        f"{part}_{layer}": np.full(2 * 16, 0.05, np.float32)
        for layer in range(model.llm.config.layers)
        for part in ("key", "value")
    }
    graphs = [
        write(model, tmp_path / "llm.onnx", plan),
        write(model, tmp_path / "llm_int8_kv.onnx", plan, kv_scales=scales),
    ]
    rest = tmp_path / "llm_rest.onnx"
    with WeightFile(tmp_path / "llm_rest.onnx.data", plan) as weights:
        head = LanguageHead(model.vocabulary, model.lm_head)
        write_llm_rest(model.llm, head, 1, rest, weights, on_device=True)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    for path in (*graphs, rest):
        assert copies(path) == []
        check_graph(tmp_path, path.name, sizes)
    assert copies(write(model, tmp_path / "usual.onnx", plan, on_device=False))


def test_bundles_for_cuda_have_it(tmp_path: Path) -> None:
    """And answer with it on the CPU as the same weights do in the usual graph."""
    checkpoint, image = write_qwen(tmp_path / "checkpoint"), tmp_path / "scene.tif"
    write_image(image, noise(3, 96, 128))
    answers = []
    for target, precisions in (("cpu", Precisions.all("fp16")), ("cuda", Precisions())):
        options = ExportOptions(precisions=precisions, target=target, parity=False)  # type: ignore[arg-type]
        export_bundle(str(checkpoint), tmp_path / target, options)
        with lrs_edge.load(tmp_path / target, provider="cpu") as engine:
            answers.append(engine.open(image).ask("What is here?", max_tokens=6).token_ids)
    assert list(answers[0]) == list(answers[1])
    assert copies(tmp_path / "cuda" / "llm.onnx") == []
