"""Parity of the whole pipeline: what no single stage shows fails at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints import write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

from lrs_edge.bundle.parity import Figure, ParityReport, StageParity
from lrs_edge.commands.main import run
from lrs_edge.errors import ExportError
from lrs_edge_export import ExportOptions, export_bundle
from lrs_edge_export.bundle.stages import LLM, RFM, VISION
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.parity import check as parity
from lrs_edge_export.parity import pipeline
from lrs_edge_export.parity.limits import PIPELINE_LIMITS, PipelineLimits

FP32: Any = ("fp32", "fp32", "fp32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("checkpoints") / "tiny-qwen")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return read_model(find_checkpoint(str(checkpoint)))


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundles") / "bundle"
    export_bundle(str(checkpoint), target, ExportOptions(parity=False))
    return target


def graphs(bundle: Path, embeddings: Path, vision: Path | None = None) -> parity.Graphs:
    return parity.Graphs(
        vision=vision or bundle / VISION,
        rfm=bundle / RFM,
        llm=bundle / LLM,
        embeddings=embeddings,
        tokenizer=bundle / "tokenizer.json",
    )


def failed(report: ParityReport) -> set[str]:
    return {x.stage for x in report.stages for figure in x.figures if not figure.passed}


def test_a_bundle_goes_the_whole_way(model: Model, bundle: Path) -> None:
    report = parity.compare(model, graphs(bundle, bundle / "embeddings.safetensors"), FP32)
    parity.raise_if_failed(report)
    whole = report.stage("pipeline")
    measures = [figure.measure for figure in whole.figures]
    assert measures == ["cosine", "divergence", "greedy agreement", "top-k overlap"]
    assert whole.value("divergence") < 1e-6
    assert whole.bytes == sum(report.stage(name).bytes or 0 for name in ("vision", "rfm", "llm"))


def test_embeddings_of_another_order_fail_here_only(
    model: Model, bundle: Path, tmp_path: Path
) -> None:
    tables = load_file(bundle / "embeddings.safetensors")
    tables["embed_tokens"] = np.ascontiguousarray(np.roll(tables["embed_tokens"], 1, axis=0))
    save_file(tables, tmp_path / "embeddings.safetensors")
    report = parity.compare(model, graphs(bundle, tmp_path / "embeddings.safetensors"), FP32)
    assert failed(report) == {"pipeline"}
    with pytest.raises(ExportError, match=r"pipeline cosine .*\(must be >= "):
        parity.raise_if_failed(report)


def test_errors_that_every_stage_may_have_fail_at_the_end(
    model: Model, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A vision encoder as far off as a stage in int8-static may be; the others as they should be.
    rng = np.random.default_rng(0)
    compare_vision = parity._compare_vision

    def noisy(*arguments: Any) -> Any:
        tokens, figures = compare_vision(*arguments)
        spread = [0.9 * float(x.std()) for x in tokens]
        return [
            (x + s * rng.standard_normal(x.shape)).astype(np.float32)
            for x, s in zip(tokens, spread, strict=True)
        ], figures

    monkeypatch.setattr(parity, "_compare_vision", noisy)
    found = graphs(bundle, bundle / "embeddings.safetensors")
    report = parity.compare(model, found, ("int8-static", "fp32", "fp32"))
    assert failed(report) == {"pipeline"}
    assert report.stage("pipeline").precision == "int8-static"


def test_the_export_fails_with_it(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    strict = PipelineLimits(cosine=1.1, divergence=1.0, greedy=0.0, overlap=0.0)
    monkeypatch.setitem(PIPELINE_LIMITS, "fp32", strict)
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "bundle"), "-q"]) != 0
    assert "the parity check failed: pipeline cosine 1 (must be >= 1.1)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_divergence_is_that_of_the_next_token() -> None:
    wanted = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)) + np.float32(3)
    exact = (0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert pipeline.divergence(found, wanted) == pytest.approx(exact, abs=1e-6)
    assert np.isnan(pipeline.divergence(found * np.float32("nan"), wanted))


@pytest.mark.parametrize(
    ("stages", "advice"),
    [
        ([("llm", "int8-dynamic")], "--llm fp32"),
        ([("vision", "int8-static"), ("pipeline", "int8-static")], "--vision fp32"),
        ([("pipeline", "int8-weight")], "--precision fp32"),
        ([("llm-kv", "fp32")], "leave --int8-kv out"),
        ([("llm", "fp32"), ("pipeline", "fp32")], "nothing is rounded at fp32"),
    ],
)
def test_what_helps_against_a_failure(stages: list[tuple[str, str]], advice: str) -> None:
    figure = Figure("cosine", 0.1, ">=", 0.9)
    report = ParityReport("", tuple(StageParity(name, (figure,), of) for name, of in stages))
    with pytest.raises(ExportError, match=advice) as found:
        parity.raise_if_failed(report)
    if stages[0][1] == "fp32":
        assert "--precision fp32" not in str(found.value)
