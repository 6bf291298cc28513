"""Limits of the parity check lie between right and broken graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden_data import checkpoint

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.stages import LLM, RFM, VISION, StageWriter
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import DecoderStage, Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs import weight_file
from lrs_edge_export.parity import check as parity
from lrs_edge_export.quantization.precision import Plan

Change = Callable[[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def model() -> Model:
    source = checkpoint("qwen")
    if source is None:
        pytest.skip("the golden checkpoint of qwen is not here")
    return read_model(find_checkpoint(str(source)), None)


@pytest.fixture(scope="module")
def vision(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    with StageWriter(model, folder) as writer:
        writer.write("vision", Plan())
    return folder / VISION


class Changed:
    """Tensors of a stage of which some are changed on the way."""

    def __init__(self, tensors: Any, change: Change) -> None:
        self._tensors = tensors
        self._change = change

    def read(self, name: str) -> np.ndarray:
        return self._change(name, self._tensors.read(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensors, name)


def right(stage: DecoderStage) -> DecoderStage:
    return stage


def wrong_base(stage: DecoderStage) -> DecoderStage:
    """RoPE theta as some default instead of the checkpoint's."""
    return replace(stage, config=replace(stage.config, theta=stage.config.theta * 10))


def exchanged_heads(stage: DecoderStage) -> DecoderStage:
    size = stage.config.head_dim

    def change(name: str, value: np.ndarray) -> np.ndarray:
        if "layers.1.self_attn.q_proj" not in name:
            return value
        return np.concatenate([value[-size:], value[size:-size], value[:size]])

    return replace(stage, tensors=Changed(stage.tensors, change))


def wrong_scale(stage: DecoderStage) -> DecoderStage:
    def change(name: str, value: np.ndarray) -> np.ndarray:
        return value * np.float32(1.25 if "layers.0.self_attn.o_proj" in name else 1)

    return replace(stage, tensors=Changed(stage.tensors, change))


@pytest.mark.parametrize("change", [right, wrong_base, exchanged_heads, wrong_scale])
def test_a_broken_graph_fails(
    model: Model, vision: Path, tmp_path: Path, change: Callable[[DecoderStage], DecoderStage]
) -> None:
    written = replace(model, rfm=change(model.region_focus), llm=change(model.llm))
    with pytest.MonkeyPatch.context() as patch:
        # Matrices of the checkpoint are smaller than what is worth quantizing.
        patch.setattr(weight_file, "MIN_QUANTIZED", 1)
        with StageWriter(written, tmp_path) as writer:
            for stage in ("rfm", "llm"):
                writer.write(stage, Plan("int8-dynamic"))
    graphs = parity.Graphs(vision, tmp_path / RFM, tmp_path / LLM)
    report = parity.compare(model, graphs, ("fp32", "int8-dynamic", "int8-dynamic"))
    if change is right:
        parity.raise_if_failed(report)
        return
    failed = {x.stage for x in report.stages for figure in x.figures if not figure.passed}
    assert failed
    assert failed <= {"rfm", "llm", "pipeline"}
    with pytest.raises(ExportError, match="parity check failed"):
        parity.raise_if_failed(report)
