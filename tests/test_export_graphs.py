"""Exported graphs: attention over buffers, positions with gaps, quantized weights, towers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import HIDDEN, write_nano, write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import onnx
import torch

from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs.decoder_graph import LanguageHead, write_llm, write_rfm
from lrs_edge_export.graphs.heads import inverse_frequencies
from lrs_edge_export.graphs.sessions import DecoderSession, open_session
from lrs_edge_export.graphs.vision_graph import write_vision
from lrs_edge_export.graphs.weight_file import WeightFile, quantize
from lrs_edge_export.torch_model import stages, vision

Open = Callable[..., DecoderSession]

LENGTH, CAPACITY = 40, 48

#: Far apart, far out, and not evenly spaced, as a cache looks after pruning.
GAPS = np.sort(np.random.default_rng(5).choice(1_000_000, LENGTH, replace=False)).astype(np.int64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(find_checkpoint(str(write_qwen(tmp_path_factory.mktemp("qwen")))))


@pytest.fixture(scope="module")
def opened(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Open:
    folder = tmp_path_factory.mktemp("graphs")
    with WeightFile(folder / "rfm.onnx.data") as weights:
        write_rfm(model.region_focus, "gqa", folder / "rfm.onnx", weights)
        write_rfm(model.region_focus, "masked", folder / "masked.onnx", weights)
    with WeightFile(folder / "llm.onnx.data") as weights:
        head = LanguageHead(model.vocabulary, model.lm_head)
        write_llm(model.llm, head, folder / "llm.onnx", weights)

    def open_graph(name: str, capacity: int = CAPACITY) -> DecoderSession:
        return DecoderSession(folder / f"{name}.onnx", capacity=capacity)

    return open_graph


@pytest.fixture(scope="module")
def embeds() -> np.ndarray:
    return np.random.default_rng(6).standard_normal((LENGTH, HIDDEN)).astype(np.float32)


def expected(model: Model, name: str, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    x, places = torch.from_numpy(embeds), torch.from_numpy(positions)
    if name == "llm":
        return stages.llm_logits(model.llm, model.lm_head(), x, 1, places).numpy()
    return stages.rfm_logits(model.region_focus, x, places).numpy()


def causal(queries: int, keys: int) -> np.ndarray:
    """Bias for `queries` new tokens at the end of `keys`."""
    return np.triu(np.full((queries, keys), -3e4, np.float32), keys - queries + 1)


def close(found: np.ndarray, wanted: np.ndarray, limit: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= limit * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["llm", "rfm"])
def test_positions_may_have_gaps(model: Model, opened: Open, embeds: np.ndarray, name: str) -> None:
    plain = opened(name).run(embeds)
    close(plain, expected(model, name, embeds, np.arange(LENGTH)))
    gaps = opened(name).run(embeds, GAPS)
    # Angles of 1e6 rad have an ulp of 0.06 rad in float32; both sides round them alike.
    close(gaps, expected(model, name, embeds, GAPS), 1e-4)
    assert np.abs(gaps - plain).max() > 1e-2


@pytest.mark.parametrize("name", ["llm", "rfm"])
@pytest.mark.parametrize("split", [1, 13, LENGTH - 1])
def test_chunks_equal_one_pass(opened: Open, embeds: np.ndarray, name: str, split: int) -> None:
    graph = opened(name)
    graph.run(embeds[:split], GAPS[:split])
    close(graph.run(embeds[split:], GAPS[split:]), opened(name).run(embeds, GAPS))


def test_rope_rows_are_places_in_the_cache(
    model: Model, embeds: np.ndarray, tmp_path: Path
) -> None:
    """CUDA's kernel indexes tables by place; the CPU's by the rows it is given. Both must do."""
    path = tmp_path / "llm.onnx"
    with WeightFile(tmp_path / "llm.onnx.data") as weights:
        write_llm(model.llm, LanguageHead(model.vocabulary, model.lm_head), path, weights)
    shown = onnx.load(path, load_external_data=False)
    fused = next(n for n in shown.graph.node if n.op_type == "GroupQueryAttention")
    cosine, _, rows = fused.input[7:10]
    for name in (cosine, rows):
        shown.graph.output.add(name=name)
    onnx.save(shown, path)
    session = open_session(path)
    past, new = 7, 5
    positions = GAPS[past : past + new]
    feeds = {
        value.name: np.zeros((1, 2, CAPACITY, 16), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    feeds["inputs_embeds"] = embeds[None, past : past + new]
    feeds["position_ids"] = positions[None]
    feeds["past_length"] = np.array([past], np.int64)
    table, places = session.run([cosine, rows], feeds)
    assert places.tolist() == [list(range(past, past + new))]
    assert table.shape[0] == past + new
    frequencies = inverse_frequencies(model.llm.config)
    angles = positions[:, None].astype(np.float32) * frequencies
    np.testing.assert_allclose(table[past:], np.cos(angles), atol=1e-5)


def test_a_full_buffer_is_enough(opened: Open, embeds: np.ndarray) -> None:
    for name in ("llm", "rfm"):
        close(opened(name, LENGTH).run(embeds), opened(name).run(embeds))


def test_compacted_buffers_equal_masked_attention(opened: Open, embeds: np.ndarray) -> None:
    kept = np.sort(np.random.default_rng(7).choice(30, 11, replace=False))
    hidden = np.setdiff1d(np.arange(30), kept)
    graph = opened("rfm")
    graph.run(embeds[:30], GAPS[:30])
    graph.keep(kept)
    found = graph.run(embeds[30:], GAPS[30:])

    masked = opened("masked")
    masked.run(embeds[:30], GAPS[:30], causal(30, 30))
    bias = causal(10, 40)
    bias[:, hidden] = -3e4
    wanted = masked.run(embeds[30:], GAPS[30:], bias)
    close(found, np.delete(wanted, hidden, axis=1))


def test_both_flavours_agree(opened: Open, embeds: np.ndarray) -> None:
    masked = opened("masked")
    masked.run(embeds[:9], bias=causal(9, 9))
    close(masked.run(embeds[9:], bias=causal(LENGTH - 9, LENGTH)), opened("rfm").run(embeds))


def test_decoding_step_by_step(model: Model, opened: Open, embeds: np.ndarray) -> None:
    graph = opened("llm")
    graph.run(embeds[:20])
    steps = [graph.run(embeds[i : i + 1]) for i in range(20, 26)]
    wanted = stages.llm_logits(
        model.llm, model.lm_head(), torch.from_numpy(embeds[:26]), last=6
    ).numpy()
    close(np.concatenate(steps), wanted)


def test_nan_behind_the_filled_places_is_not_seen(opened: Open, embeds: np.ndarray) -> None:
    for name in ("llm", "rfm"):
        graph = opened(name)
        graph.run(embeds)
        graph.keep(np.arange(5))  # The rest becomes NaN.
        found = graph.run(embeds[5:])
        close(found, opened(name).run(embeds))


@pytest.mark.parametrize("write", [write_qwen, write_nano])
def test_vision_towers(write: Callable[[Path], Path], tmp_path: Path) -> None:
    stage = read_model(find_checkpoint(str(write(tmp_path / "checkpoint")))).vision
    with WeightFile(tmp_path / "vision.onnx.data") as weights:
        write_vision(stage, tmp_path / "vision.onnx", weights)
    session = open_session(tmp_path / "vision.onnx")
    shape = (3, 3, stage.tile, stage.tile)
    pixels = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
    found = session.run(["tokens"], {"pixel_values": pixels})[0]
    close(found, vision.vision_tokens(stage, torch.from_numpy(pixels)).numpy(), 1e-4)
    alone = session.run(["tokens"], {"pixel_values": pixels[1:2]})[0]
    close(alone, found[1:2])


def test_efficientnet_equals_its_package(tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the `train` extra")
    stage = read_model(find_checkpoint(str(write_nano(tmp_path)))).vision
    tower = package.EfficientNet.from_name("efficientnet-lite0").eval()
    state = {n: torch.from_numpy(stage.tower.tensors.read(n)) for n in stage.tower.tensors.names()}
    missing, unexpected = tower.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("_fc") or "num_batches" in name for name in missing)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = tower.extract_features(pixels).flatten(2).transpose(1, 2)
        found = vision._efficientnet(stage.tower, pixels)
    close(found.numpy(), wanted.numpy())


def test_int8_is_symmetric_and_per_channel() -> None:
    weight = np.random.default_rng(9).standard_normal((6, 5)).astype(np.float32)
    weight[2] = 0.0
    integers, scale = quantize(weight, axis=0)
    assert integers.dtype == np.int8
    assert scale.shape == (6,)
    assert np.abs(integers).max(axis=1).tolist() == [127, 127, 0, 127, 127, 127]
    assert np.abs(integers * scale[:, None] - weight).max() <= scale.max() / 2 + 1e-6
    assert np.array_equal(quantize(weight.T, axis=1)[0], integers.T)
