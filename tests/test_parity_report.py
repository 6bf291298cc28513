"""Parity: whole stages and layer by layer agree, what fails is named, what stays is nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

from lrs_edge.bundle.parity import Figure
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs.decoder_graph import LanguageHead, write_llm, write_rfm
from lrs_edge_export.graphs.vision_graph import write_vision
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.parity import check as parity
from lrs_edge_export.parity import graphs as parity_graphs
from lrs_edge_export.quantization.precision import PRECISIONS, Plan, Precision

#: Calibration is another test's.
UNCALIBRATED: list[Precision] = [p for p in PRECISIONS if not p.endswith("static")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(find_checkpoint(str(write_qwen(tmp_path_factory.mktemp("qwen")))))


@contextlib.contextmanager
def exported(model: Model, folder: Path, precision: Precision) -> Iterator[parity.Graphs]:
    """Graphs in a folder, their data files still open."""
    paths = {name: folder / f"{name}.onnx" for name in ("vision", "rfm", "llm")}
    files = {name: folder / f"{name}.onnx.data" for name in paths}
    plan = Plan(precision)
    with (
        WeightFile(files["vision"]) as vision,
        WeightFile(files["rfm"], plan) as rfm,
        WeightFile(files["llm"], plan) as llm,
    ):
        write_vision(model.vision, paths["vision"], vision)
        write_rfm(model.region_focus, "gqa", paths["rfm"], rfm)
        write_llm(model.llm, LanguageHead(model.vocabulary, model.lm_head), paths["llm"], llm)
        yield parity.Graphs(**paths, rfm_weights=rfm, llm_weights=llm)


@pytest.mark.parametrize("precision", UNCALIBRATED)
def test_layer_by_layer_finds_what_the_whole_stage_finds(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    with exported(model, tmp_path, precision) as graphs:
        before = {path: path.stat().st_size for path in tmp_path.iterdir()}
        precisions: tuple[Precision, Precision, Precision] = ("fp32", precision, precision)
        whole = parity.compare(model, graphs, precisions)
        monkeypatch.setattr(parity_graphs, "LARGE", 0)
        layers = parity.compare(model, graphs, precisions)
        # Layers' graphs are gone, and no weight was written a second time.
        assert {path: path.stat().st_size for path in tmp_path.iterdir()} == before
    assert [stage.mode for stage in whole.stages] == ["whole"] * 4
    assert [stage.mode for stage in layers.stages] == ["whole", *["layer by layer"] * 3]
    for a, b in zip(whole.stages, layers.stages, strict=True):
        assert [x.measure for x in a.figures] == [x.measure for x in b.figures]
    a, b = whole.stage("rfm"), layers.stage("rfm")
    assert b.value("cosine") == pytest.approx(a.value("cosine"), abs=2e-3)
    assert b.value("relative error") <= 2 * a.value("relative error") + 1e-5
    llm = layers.stage("llm")
    assert all(figure.passed for figure in llm.figures if figure.measure == "cosine")
    if precision == "fp32":
        assert layers.passed
        assert llm.value("relative error") < 1e-4


def test_a_wrong_layer_fails(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_graphs, "LARGE", 0)
    with exported(model, tmp_path, "fp32") as graphs:
        stored = graphs.llm_weights
        assert stored is not None
        place = next(
            int(entry.value)
            for tensor in stored.matrix("layers.1.mlp.up_proj", lambda: np.empty(0)).tensors
            for entry in tensor.external_data
            if entry.key == "offset"
        )
        with (tmp_path / "llm.onnx.data").open("r+b") as stream:
            stream.seek(place)
            stream.write(bytes(4096))
        report = parity.compare(model, graphs, ("fp32", "fp32", "fp32"))
    failed = {x.stage for x in report.stages for figure in x.figures if not figure.passed}
    assert failed == {"llm", "pipeline"}
    with pytest.raises(ExportError, match=r"llm relative error .* \(must be <= 0.001\)"):
        parity.raise_if_failed(report)


def test_a_value_that_is_no_number_fails() -> None:
    for sign in ("<=", ">="):
        assert not Figure("cosine", float("nan"), sign, 0.5).passed
