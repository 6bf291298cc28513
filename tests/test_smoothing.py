"""Decoders with int8 activations for TensorRT: smoothed, symmetric, built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import HIDDEN, write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import onnx
import torch

from lrs_edge.building.stage_graphs import write_std_graph
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export import ExportOptions, Precisions, export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import DecoderStage, Model
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs.decoder_graph import LanguageHead, write_llm
from lrs_edge_export.graphs.sessions import DecoderSession
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization.calibrators import DecoderCalibrator
from lrs_edge_export.quantization.precision import Plan
from lrs_edge_export.quantization.probe import relative_error
from lrs_edge_export.quantization.smoothing import smoothed
from lrs_edge_export.torch_model import stages
from tests.tensorrt_builder import built

LENGTH = 60


class Uneven:
    """A decoder's tensors, of which norms make some channels far larger than the others."""

    def __init__(self, tensors: Scoped) -> None:
        self._tensors = tensors
        self.names, self.shape = tensors.names, tensors.shape
        self.rows, self.stored = tensors.rows, tensors.stored

    def read(self, name: str) -> np.ndarray:
        value = self._tensors.read(name).copy()
        if name.endswith("layernorm.weight"):
            value[::7] *= 60
        return value


@pytest.fixture(scope="module", autouse=True)
def all_weights_are_large_enough() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrs_edge_export.graphs.weight_file.MIN_QUANTIZED", 1)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    found = read_model(find_checkpoint(str(write_qwen(tmp_path_factory.mktemp("qwen")))))
    uneven = replace(found.llm, tensors=Scoped(Uneven(found.llm.tensors), ""))
    return replace(found, llm=uneven)


@pytest.fixture(scope="module")
def embeds() -> np.ndarray:
    return np.random.default_rng(6).standard_normal((LENGTH, HIDDEN)).astype(np.float32)


def logits(model: Model, stage: DecoderStage, embeds: np.ndarray) -> np.ndarray:
    x, places = torch.from_numpy(embeds), torch.arange(len(embeds))
    return np.asarray(stages.llm_logits(stage, model.lm_head(), x, 1, places))


def data(embeds: np.ndarray) -> list[TokenSequence]:
    labels = make_tokens(np.arange(len(embeds), dtype=np.int64), TokenKind.QUESTION)
    return [TokenSequence(embeds, labels)]


def test_it_is_the_same_model(model: Model, embeds: np.ndarray) -> None:
    found = smoothed(model.llm, data(embeds))
    wanted = logits(model, model.llm, embeds)
    assert np.abs(logits(model, found, embeds) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    name = "layers.0.mlp.up_proj.weight"
    whole = found.tensors.read(name)
    assert not np.array_equal(whole, model.llm.tensors.read(name))
    np.testing.assert_array_equal(found.tensors.rows(name, 3, 9), whole[3:9])


def test_channels_become_alike(model: Model, embeds: np.ndarray) -> None:
    spreads = []
    for stage in (model.llm, smoothed(model.llm, data(embeds))):
        calibrator = DecoderCalibrator(stage, data(embeds), second_moments=False)
        peaks = calibrator.inputs("layers.1.mlp.gate_proj").peaks
        spreads.append(peaks.max() / np.median(peaks))
    assert spreads[1] < spreads[0] / 3


def written(model: Model, stage: DecoderStage, plan: Plan, folder: Path, data: list) -> Path:
    folder.mkdir()
    calibrator = DecoderCalibrator(stage, data, second_moments=False, head=True)
    plan = replace(plan, calibrator=lambda: calibrator)
    with WeightFile(folder / "llm.onnx.data", plan) as weights:
        head = LanguageHead(model.vocabulary, model.lm_head)
        write_llm(stage, head, folder / "llm.onnx", weights)
    return folder / "llm.onnx"


def test_integers_are_nearer_to_floats(model: Model, embeds: np.ndarray, tmp_path: Path) -> None:
    plan = Plan("int8-static", symmetric=True)
    wanted = logits(model, model.llm, embeds)
    errors = []
    for name, stage in (("plain", model.llm), ("smooth", smoothed(model.llm, data(embeds)))):
        path = written(model, stage, plan, tmp_path / name, data(embeds))
        found = DecoderSession(path, capacity=LENGTH).run(embeds)
        errors.append(relative_error([found], [wanted]))
    assert errors[1] < 0.8 * errors[0]
    zeros = [
        tensor
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.data_type == onnx.TensorProto.UINT8
    ]
    assert not zeros


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the released layout, its decoders in int8 with int8 activations, for TensorRT."""
    folder = tmp_path_factory.mktemp("w8a8")
    asked = Precisions("fp16", "int8-static", "int8-static")
    options = ExportOptions(precisions=asked, target="tensorrt", keep_higher=0.0, parity=False)
    return export_bundle(str(write_qwen(folder / "checkpoint")), folder / "bundle", options).path


@pytest.mark.parametrize("stage", ["rfm", "llm"])
def test_tensorrt_builds_it(bundle: Path, tmp_path: Path, stage: str) -> None:
    """Every product but that of a level's last query has integers on both sides."""
    graph = write_std_graph(open_bundle(bundle), stage, 256, tmp_path)  # type: ignore[arg-type]
    nodes = onnx.load(graph.path, load_external_data=False).graph.node
    makers = {name: node.op_type for node in nodes for name in node.output}
    integers = {
        node.name
        for node in nodes
        if node.op_type == "MatMul"
        and [makers.get(name) for name in node.input] == ["DequantizeLinear"] * 2
    }
    layers = 2 if stage == "rfm" else 3
    parts = (
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    assert {f"layers.{n}.{part}" for n in range(layers) for part in parts} <= integers
    assert built(graph).size > 0
