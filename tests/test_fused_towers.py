"""The flavour `fused` of vision graphs: the usual numbers, by onnxruntime's own operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import onnx

from lrs_edge.bundle.graphs import check_graph
from lrs_edge.engines.runtime import ort
from lrs_edge_export.checkpoints.towers import TransformerTower
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.graphs.vision_graph import write_vision
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization.precision import Plan
from tests.cuda_partition import copies
from tests.towers import GRID, PATCH, TOWERS, stage_of


@pytest.fixture(params=TOWERS)
def stage(request: pytest.FixtureRequest) -> VisionStage:
    return stage_of(request.param)


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
    for number, name in enumerate(("clip", "internvit")):
        stage = stage_of(name)
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
