"""Calibration data, statistics of inputs, and a statically quantized vision graph."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import write_nano, write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import torch

from lrs_edge.engines.runtime import ort
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.tensors import Array, Scoped
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.quantization import (
    CalibrationData,
    DecoderCalibrator,
    VisionCalibrator,
    load_calibration,
    static_vision,
)
from lrs_edge_export.quantization.calibration import read_data, written_data
from lrs_edge_export.quantization.statistics import InputObserver
from lrs_edge_export.torch_model import stages
from lrs_edge_export.torch_model.decoder import Observer
from lrs_edge_export.torch_model.vision import vision_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(find_checkpoint(str(write_qwen(tmp_path_factory.mktemp("qwen")))))


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(find_checkpoint(str(write_nano(tmp_path_factory.mktemp("nano")))))


@pytest.fixture(scope="module")
def data(model: Model, tmp_path_factory: pytest.TempPathFactory) -> CalibrationData:
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        write_image(folder / f"{i}.png", seed=i)
    return load_calibration(folder, model)


def write_image(path: Path, seed: int = 0, side: int = 80) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def observed(run: object) -> dict[str, list[np.ndarray]]:
    """Inputs by name, as an observer sees them in one pass of the model."""
    seen: dict[str, list[np.ndarray]] = {}

    def observe(name: str, x: torch.Tensor) -> None:
        seen.setdefault(name, []).append(x.numpy().reshape(-1, x.shape[-1]).copy())

    run(observe)  # type: ignore[operator]
    return seen


def check(found: list[Array], wanted: list[np.ndarray]) -> None:
    x = np.concatenate(wanted)
    assert np.allclose(np.vstack(found), x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_observing_changes_nothing_and_names_every_linear(model: Model) -> None:
    embeds = torch.from_numpy(model.embed_tokens()[:12])
    head = model.lm_head()
    plain = stages.llm_logits(model.llm, head, embeds, 2)
    names: list[str] = []
    found = stages.llm_logits(
        model.llm, head, embeds, 2, observe=lambda name, _: names.append(name)
    )
    assert torch.equal(plain, found)
    assert names[-1] == "lm_head"
    weights = {f"{name}.weight" for name in names[:-1]}
    own = {name for name in model.llm.tensors.names() if name.startswith("layers.")}
    assert weights == {name for name in own if name.endswith("_proj.weight")}
    assert len(names) == len(set(names))


def test_decoder_statistics_are_those_of_one_pass(model: Model, data: CalibrationData) -> None:
    head = model.lm_head()

    def run(observe: Observer) -> None:
        for x in data.pruned:
            text = torch.from_numpy(x.values)
            stages.llm_logits(model.llm, head, text, min(64, len(x)), observe=observe)

    wanted = observed(run)
    calibrator = DecoderCalibrator(model.llm, data.pruned, second_moments=True, head=True)
    for name, inputs in wanted.items():
        found = calibrator.inputs(name)
        check(found.second_moments, inputs)
        low, high = min(part.min() for part in inputs), max(part.max() for part in inputs)
        assert 1.01 * min(low, 0) <= found.low <= 0 <= found.high <= 1.01 * max(high, 0)
    assert np.array_equal(
        calibrator.inputs("layers.0.mlp.up_proj").second_moments[0],
        DecoderCalibrator(model.llm, data.pruned, second_moments=True)
        .inputs("layers.0.mlp.gate_proj")
        .second_moments[0],
    )


def test_rfm_statistics_include_the_scoring_layer(model: Model, data: CalibrationData) -> None:
    def run(observe: Observer) -> None:
        for x in data.sequences:
            stages.rfm_logits(model.region_focus, torch.from_numpy(x.values), observe=observe)

    wanted = observed(run)
    calibrator = DecoderCalibrator(model.region_focus, data.sequences, second_moments=True)
    last = f"layers.{model.region_focus.config.layers}.self_attn"
    for part in ("q_proj", "k_proj"):
        check(calibrator.inputs(f"{last}.{part}").second_moments, wanted[f"{last}.k_proj"])
    check(
        calibrator.inputs("layers.0.mlp.down_proj").second_moments,
        wanted["layers.0.mlp.down_proj"],
    )
    for name in (f"{last}.v_proj", "lm_head", "layers.9.mlp.up_proj", "nonsense"):
        with pytest.raises(KeyError, match="not a linear"):
            calibrator.inputs(name)


def test_vision_statistics_are_those_of_one_pass(model: Model, data: CalibrationData) -> None:
    wanted = observed(
        lambda observe: vision_tokens(model.vision, torch.from_numpy(data.tiles), observe)
    )
    calibrator = VisionCalibrator(model.vision, data.tiles, second_moments=True)
    assert "encoder.layers.0.self_attn.out_proj" in wanted
    for name, inputs in wanted.items():
        check(calibrator.inputs(name).second_moments, inputs)
    assert (
        not VisionCalibrator(model.vision, data.tiles, second_moments=False)
        .inputs("projector.0")
        .second_moments
    )
    for name in ("encoder.layers.7.mlp.fc1", "projector.1", "nonsense"):
        with pytest.raises(KeyError, match="not a linear"):
            calibrator.inputs(name)


def test_every_weight_is_read_once(model: Model, data: CalibrationData) -> None:
    reads: list[str] = []

    class Counting:
        def names(self) -> list[str]:
            return model.llm.tensors.names()

        def shape(self, name: str) -> tuple[int, ...]:
            return model.llm.tensors.shape(name)

        def read(self, name: str) -> Array:
            reads.append(name)
            return model.llm.tensors.read(name)

        def rows(self, name: str, start: int, stop: int) -> Array:
            return model.llm.tensors.rows(name, start, stop)

    stage = replace(model.llm, tensors=Scoped(Counting(), ""))
    calibrator = DecoderCalibrator(stage, data.pruned, second_moments=False, head=True)
    calibrator.inputs("layers.0.self_attn.q_proj")
    assert {name.split(".")[1] for name in reads} == {"0"}
    calibrator.inputs("lm_head")
    assert len(reads) == len(set(reads))


def test_blocks_of_second_moments_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrs_edge_export.quantization.statistics.MAX_BLOCK", 4)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 10)).astype(np.float32))
    observer = InputObserver(second_moments=True)
    observer.add(x[:20])
    observer.add(x[20:].reshape(3, 10, 10))
    found = observer.result().second_moments
    assert [part.shape for part in found] == [(4, 4), (4, 4), (2, 2)]
    assert np.allclose(found[1], (x[:, 4:8].T @ x[:, 4:8] / 50).numpy(), atol=1e-5)


def test_range_cuts_off_what_is_rare_and_keeps_what_is_not() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(200_000).astype(np.float32)
    values[0] = 20.0
    observer = InputObserver(second_moments=False)
    observer.add(torch.from_numpy(values))
    found = observer.result()
    assert 3.5 < found.high < 19
    assert -6 < found.low < -3.0

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        levels = np.clip(np.rint((values - low) / step), 0, 255)
        return float(np.square(levels * step + low - values).mean())

    assert error(found.low, found.high) < 0.8 * error(float(values.min()), float(values.max()))
    positive = InputObserver(second_moments=False)
    positive.add(torch.from_numpy(np.abs(values[1:])))
    assert positive.result().low == 0.0
    with pytest.raises(ExportError, match="not finite"):
        positive.add(torch.tensor([1.0, float("inf")]))


def test_shipped_calibration_data_fits_any_model(model: Model) -> None:
    found = load_calibration(None, model, most_images=2)
    side = min(max(model.base_side // model.vision.tile, 1), 3)
    assert found.tiles.shape == (2 * (1 + side**2), 3, model.vision.tile, model.vision.tile)
    assert found.tiles.dtype == np.float32
    assert np.isfinite(found.tiles).all()
    assert found.tiles.std() > 0.1
    assert len(found.sequences) == len(found.pruned) == 2
    assert all(len(b) < len(a) for a, b in zip(found.sequences, found.pruned, strict=True))


@pytest.mark.parametrize(("room", "views"), [(10.5, 10), (9.5, 5), (2.5, 2), (0.1, 2)])
def test_images_are_seen_in_fewer_tiles_where_a_tile_has_many_features(
    model: Model, monkeypatch: pytest.MonkeyPatch, room: float, views: int
) -> None:
    features = model.vision.tower.grid**2
    wide = replace(model, base_side=3 * model.vision.tile)
    name = "lrs_edge_export.quantization.calibration.MOST_FEATURES"
    monkeypatch.setattr(name, int(2 * room * features))
    assert len(load_calibration(None, wide, most_images=2).tiles) == 2 * views


def test_questions_go_with_their_images(model: Model, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    row = {"image": "x/b.png", "text": "What? " * 20, "ground_truth": "1", "category": "count"}
    (tmp_path / "questions.jsonl").write_text(
        json.dumps({**row, "image": "a.png", "text": "Hm?"}) + "\n" + json.dumps(row)
    )
    short, long = (len(part) for part in load_calibration(tmp_path, model).sequences)
    assert long - short == len("What? " * 20) - len("Hm?")
    (tmp_path / "questions.jsonl").unlink()
    (tmp_path / "questions.txt").write_text("One?\n\nTwo of them?\n")
    one, two = (len(part) for part in load_calibration(tmp_path, model).sequences)
    assert two - one == len("Two of them?") - len("One?")


def test_folders_that_are_of_no_use_are_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ExportError, match=match):
            load_calibration(tmp_path, model)

    with pytest.raises(ExportError, match="not a folder"):
        load_calibration(tmp_path / "none", model)
    refused("holds no images")
    (tmp_path / "a.png").write_bytes(b"no image")
    refused(r"calibration image: .*a\.png")
    write_image(tmp_path / "a.png")
    (tmp_path / "questions.txt").write_bytes(b"\xff\xfe")
    refused("UTF-8")
    (tmp_path / "questions.txt").write_text("\n \n")
    refused("holds no question")
    (tmp_path / "questions.txt").write_text("why" * 1000)
    refused("3000 characters")
    (tmp_path / "questions.txt").write_bytes(b"a" * ((1 << 20) + 1))
    refused("larger than")
    (tmp_path / "questions.jsonl").write_text("{}")
    refused("questions.jsonl")
    monkeypatch.setattr("lrs_edge_export.quantization.calibration.MOST_ENTRIES", 1)
    refused("more than 1 entries")


@pytest.fixture(scope="module")
def vision(nano: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lrs_edge_export.graphs.vision_graph import write_vision
    from lrs_edge_export.graphs.weight_file import WeightFile
    from lrs_edge_export.quantization.precision import Plan

    folder = tmp_path_factory.mktemp("vision")
    with WeightFile(folder / "vision.onnx.data", Plan()) as weights:
        write_vision(nano.vision, folder / "vision.onnx", weights)
    return folder / "vision.onnx"


@pytest.mark.parametrize("symmetric", [False, True])
def test_static_vision_is_near_the_graph_it_comes_from(
    nano: Model, vision: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], symmetric: bool
) -> None:
    import onnx

    tile = nano.vision.tile
    rng = np.random.default_rng(0)
    tiles = rng.standard_normal((3, 3, tile, tile)).astype(np.float32)
    handlers = list(logging.getLogger().handlers)
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        target = tmp_path / name / "vision.onnx"
        exclude = {"_conv_stem", "_blocks.0._depthwise_conv"}
        static_vision(vision, tiles[:2], target, exclude=exclude, symmetric=symmetric)
        assert sorted(p.name for p in target.parent.iterdir()) == [
            "vision.onnx",
            "vision.onnx.data",
        ]
        files.append([p.read_bytes() for p in sorted(target.parent.iterdir())])
    assert files[0] == files[1]
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")
    model = onnx.load(target)
    inputs = {value for node in model.graph.node if node.op_type == "Conv" for value in node.input}
    assert {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= inputs
    assert "_blocks.3._expand_conv.weight" not in inputs
    found, wanted = (
        ort.InferenceSession(str(path)).run(None, {"pixel_values": tiles})[0].ravel()
        for path in (target, vision)
    )
    cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert 0.9 < cosine < 1 - 1e-9
    size = sum(p.stat().st_size for p in target.parent.iterdir())
    assert size < 0.5 * sum(p.stat().st_size for p in vision.parent.iterdir())


@pytest.fixture(scope="module")
def symmetric_vision(nano: Model, vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("symmetric") / "vision.onnx"
    rng = np.random.default_rng(0)
    tiles = rng.standard_normal((2, 3, nano.vision.tile, nano.vision.tile)).astype(np.float32)
    static_vision(vision, tiles, target, symmetric=True)
    return target


def test_symmetric_vision_has_what_tensorrt_takes(symmetric_vision: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(symmetric_vision)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 20
    for node in pairs:
        zero_point = constants[node.input[2]]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
    assert {v.dtype.name for v in constants.values()} <= {"int8", "float32", "int64"}


def test_tensorrt_builds_an_engine_of_symmetric_vision(symmetric_vision: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(symmetric_vision)), parser.get_error(0).desc()
    config = builder.create_builder_config()
    pixels = network.get_input(0)
    sizes = [(count, *pixels.shape[1:]) for count in (1, 1, 16)]
    profile = builder.create_optimization_profile()
    profile.set_shape(pixels.name, *sizes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    assert builder.build_serialized_network(network, config) is not None


def test_static_vision_refuses_what_it_cannot_do(vision: Path, nano: Model, tmp_path: Path) -> None:
    tiles = np.zeros((1, 3, nano.vision.tile, nano.vision.tile), np.float32)
    with pytest.raises(ExportError, match="no layer 'nothing'"):
        static_vision(vision, tiles, tmp_path / "v.onnx", exclude=["nothing"])
    with pytest.raises(ExportError, match="no tiles"):
        static_vision(vision, tiles[:0], tmp_path / "v.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="cannot be read"):
        static_vision(tmp_path / "bad.onnx", tiles, tmp_path / "v.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.onnx"]


def test_what_is_kept_for_another_run_is_what_it_was(data: CalibrationData, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **written_data(data))
    with np.load(tmp_path / "data.npz") as kept:
        found = read_data(dict(kept))
    assert np.array_equal(found.tiles, data.tiles)
    assert found.described == data.described
    for a, b in zip(found.sequences + found.pruned, data.sequences + data.pruned, strict=True):
        assert np.array_equal(a.embeds, b.embeds)
        assert np.array_equal(a.positions, b.positions)
