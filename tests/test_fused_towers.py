"""The flavour `fused` of vision graphs: the usual numbers, by onnxruntime's own operators."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import onnx

from lrs_edge.bundle.graphs import check_graph
from lrs_edge.engines.runtime import ort
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.checkpoints.towers import (
    ClipTower,
    InternVitTower,
    SiglipTower,
    TransformerTower,
)
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.graphs.vision_graph import write_vision
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization.precision import Plan
from tests.cuda_partition import copies

ONES = (1.0, 1.0, 1.0)
WIDTH, HEADS, WIDE, PATCH, GRID = 48, 3, 80, 4, 6


class Made:
    """Tensors of whatever shapes a part of a model asks for, at random."""

    def __init__(self) -> None:
        self._tensors: dict[str, np.ndarray] = {}

    def require(self, shapes: Mapping[str, tuple[int, ...]], _what: str) -> None:
        draw = np.random.default_rng(len(self._tensors))
        for name, shape in shapes.items():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            size = 0.3 if len(shape) == 1 else 1.5 / np.sqrt(np.prod(shape[1:]))
            value = around + size * draw.standard_normal(shape)
            self._tensors[name] = value.astype(np.float32)

    def refuse_others(self, _pattern: str, _known: Collection[str], _what: str) -> None:
        """There are no others."""

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


def clip() -> TransformerTower:
    return ClipTower(*common(), 1e-5, "quick_gelu")


def common() -> tuple[Any, ...]:
    return Made(), 3, WIDTH, HEADS, WIDE, PATCH, GRID


def siglip(activation: str = "gelu_tanh", *, final: bool = True) -> TransformerTower:
    return SiglipTower(*common(), 1e-6, activation, final_norm=final)


def intern(**given: bool) -> TransformerTower:
    return InternVitTower(*common(), 1e-6, "gelu", **given)


def qwen(**given: Any) -> TransformerTower:
    return QwenTower(*common(), 1e-6, given.pop("activation", "quick_gelu"), **given)


def qwen2_5() -> TransformerTower:
    return qwen(activation="silu", rms_norm=True, gated=True, window=2, full_layers=(1,))


TOWERS: dict[str, Callable[[], TransformerTower]] = {
    "clip": clip,
    "siglip": siglip,
    "siglip, a hidden state": lambda: siglip(final=False),
    "a tower of erf": lambda: siglip("gelu"),
    "internvit": intern,
    "internvit of 6B": lambda: intern(qkv_bias=False, qk_norm=True, rms=True, final_norm=True),
    "qwen2": qwen,
    "qwen2.5": qwen2_5,
    "qwen3": lambda: qwen(activation="gelu_tanh", stem_bias=True, table_grid=4, taps=(0, 1)),
}


@pytest.fixture(params=TOWERS)
def stage(request: pytest.FixtureRequest) -> VisionStage:
    tower = TOWERS[request.param]()
    taps = getattr(tower, "taps", ())
    projectors = [Projector(Made()) for _ in range(1 + len(taps))]  # type: ignore[arg-type]
    projectors = [replace(p, name=f"projector{i or ''}") for i, p in enumerate(projectors)]
    deep = tuple(projectors[1:])
    made = VisionStage(tower, projectors[0], WIDTH, 32, PATCH * GRID, 1, ONES, ONES, deepstack=deep)
    made.check()
    return made


def written(stage: VisionStage, folder: Path, plan: Plan) -> tuple[Path, Path]:
    usual, fused = folder / "vision.onnx", folder / "vision_fused.onnx"
    with WeightFile(folder / "vision.onnx.data", plan) as weights:
        write_vision(stage, usual, weights)
        size = weights.path.stat().st_size
        write_vision(stage, fused, weights, fused=True)
        # Positions that hold the class token; no weight a second time.
        added = (weights.path.stat().st_size - size) / size
    assert added < 0.15
    return usual, fused


def tokens(path: Path, pixels: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["tokens"], {"pixel_values": pixels})
    return np.asarray(found)


@pytest.fixture
def pixels() -> np.ndarray:
    shape = 3, 3, PATCH * GRID, PATCH * GRID
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def test_both_flavours_agree(stage: VisionStage, pixels: np.ndarray, tmp_path: Path) -> None:
    usual, fused = written(stage, tmp_path, Plan())
    wanted, found = tokens(usual, pixels), tokens(fused, pixels)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert np.abs(tokens(fused, pixels[1:2]) - wanted[1:2]).max() <= 1e-4 * np.abs(wanted).max()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    check_graph(tmp_path, fused.name, sizes)


@pytest.mark.parametrize("precision", ["fp16", "int8-weight"])
def test_they_agree_as_cuda_gets_them(
    stage: VisionStage, pixels: np.ndarray, tmp_path: Path, precision: Any
) -> None:
    usual, fused = written(stage, tmp_path, Plan(precision, target="cuda"))
    wanted, found = tokens(usual, pixels), tokens(fused, pixels)
    assert np.abs(found - wanted).max() <= 2e-2 * np.abs(wanted).max()
    assert copies(fused) == []


def test_what_it_is_made_of(stage: VisionStage, tmp_path: Path) -> None:
    """One operator for each layer's attention, and one for every sum that a norm follows."""
    _, fused = written(stage, tmp_path, Plan("fp16", target="cuda"))
    nodes = onnx.load(fused, load_external_data=False).graph.node
    count = lambda *ops: sum(node.op_type in ops for node in nodes)  # noqa: E731
    layers, tower = stage.tower.layers, stage.tower
    assert isinstance(tower, TransformerTower)
    sums = 2 * layers - (0 if tower.last_norm else 1)
    assert count("Attention", "MultiHeadAttention") == layers
    assert count("SkipLayerNormalization", "SkipSimplifiedLayerNormalization") == sums
    assert count("Softmax") == count("Sigmoid") == 0


def test_what_is_made_of_constants_is_made_once(tmp_path: Path) -> None:
    """onnxruntime joins and scales weights when it loads the graph, in every type."""
    for number, tower in enumerate((clip(), intern())):
        stage = VisionStage(tower, Projector(Made()), WIDTH, 32, PATCH * GRID, 1, ONES, ONES)  # type: ignore[arg-type]
        stage.check()
        for precision in ("fp16", "int8-weight"):
            folder = tmp_path / f"{number}{precision}"
            folder.mkdir()
            _, fused = written(stage, folder, Plan(precision, target="cuda"))  # type: ignore[arg-type]
            options = ort.SessionOptions()
            options.optimized_model_filepath = str(folder / "loaded.onnx")
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            # As the runtime loads vision graphs.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            ort.InferenceSession(str(fused), options, providers=["CPUExecutionProvider"])
            left = {node.op_type for node in onnx.load(folder / "loaded.onnx").graph.node}
            assert left.isdisjoint({"Concat", "DequantizeLinear"})
