"""Manifests of version 1 mean what they always meant."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lrs_edge.bundle.bundle import read_manifest
from lrs_edge.bundle.layout import PromptSpec, Question, TokenIds, rows_layout
from lrs_edge.bundle.manifest import SCHEMA_VERSION, Flavour, GraphFile, Manifest
from lrs_edge.bundle.parity import Choice, Figure
from lrs_edge.bundle.version1 import upgraded
from lrs_edge.errors import BundleError

#: The embedded model's manifest as the first release wrote it.
RELEASED = Path(__file__).parent / "manifests" / "version1.json"


def read(tmp_path: Path, content: Any) -> Manifest:
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    return read_manifest(tmp_path)


@pytest.fixture
def old() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RELEASED.read_text())
    assert content["schema_version"] == 1
    return content


def test_a_released_manifest_is_read(tmp_path: Path, old: dict[str, Any]) -> None:
    shutil.copy(RELEASED, tmp_path / "manifest.json")
    manifest = read_manifest(tmp_path)
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.vision.graphs == (GraphFile("vision.onnx", Flavour.PLAIN),)
    assert manifest.rfm.graphs == (
        GraphFile("rfm.onnx", Flavour.GQA),
        GraphFile("rfm_masked.onnx", Flavour.MASKED),
    )
    assert manifest.llm.graphs == (
        GraphFile("llm.onnx", Flavour.GQA),
        GraphFile("llm_int8_kv.onnx", Flavour.GQA_INT8_KV),
    )
    assert [segment.graph for segment in manifest.llm.segments] == [
        "llm_segment0.onnx",
        "llm_segment1.onnx",
    ]
    # Its products with signed integers are wrong without VNNI, which is asked when it is loaded.
    assert not manifest.exact_integers
    said = old["prompt"]
    assert manifest.prompt == PromptSpec(
        rows_layout(said["prefix"], said["suffix"], separator_id=said["separator_id"]),
        tuple(said["stop_ids"]),
    )
    # Everything else is as the file says.
    encoded = json.loads(msgspec.json.encode(manifest))
    for name, value in old.items():
        if name in ("schema_version", "vision", "rfm", "llm", "prompt", "parity"):
            continue
        # Fields that are newer than the file have defaults that mean absence.
        kept = {key: encoded[name][key] for key in value} if name == "search" else encoded[name]
        assert kept == value, name
    assert manifest.search.relative_to == ""
    for stage in ("vision", "rfm", "llm"):
        for name, value in old[stage].items():
            if "graph" not in name:
                assert encoded[stage][name] == value, name


def test_every_figure_of_a_released_manifest_is_read(tmp_path: Path, old: dict[str, Any]) -> None:
    flat, report = dict(old["parity"]), read(tmp_path, old).parity
    assert report.images == flat.pop("images")
    assert report.passed is flat.pop("passed")
    for stage in report.stages:
        name = stage.stage
        for field in ("precision", "bytes", "mode"):
            assert getattr(stage, field) == flat.pop(f"{name}_{field}")
        for figure in stage.figures:
            key = f"{name}_{figure.measure.replace(' ', '_')}"
            assert figure.value == flat.pop(key)
            assert figure.limit == flat.pop(f"{key}_limit")
            assert figure.sign == ("<=" if figure.measure == "relative error" else ">=")
    for name, linears in report.kept_higher.items():
        assert linears == tuple(flat.pop(f"{name}_kept_higher").split())
    assert report.accuracy is not None
    assert report.accuracy.share == flat.pop("accuracy")
    for field, value in msgspec.structs.asdict(report.accuracy).items():
        assert value == flat.pop(f"accuracy_{field}")
    assert flat == {}


def test_older_figures_and_choices(tmp_path: Path, old: dict[str, Any]) -> None:
    old["parity"] = {
        "choice_vision_int8-static_ms": 12.5,
        "choice_vision_int8-static_cosine": 0.99,
        "vision_max_error": 1e-6,
        "llm_relative_error": 0.25,
        "llm_relative_error_limit": 0.1,
    }
    report = read(tmp_path, old).parity
    assert report.images == "unknown images"
    assert report.choices == (Choice("vision", "int8-static", 0.99),)
    assert report.stage("vision").figures == (Figure("max error", 1e-6, "<="),)
    assert report.stage("llm").value("relative error") == 0.25
    assert not report.passed
    old["parity"] = {"rfm_kept_higher": "layers.0.mlp.down_proj lm_head"}
    report = read(tmp_path, old).parity
    assert report.images is None
    assert report.kept_higher == {"rfm": ("layers.0.mlp.down_proj", "lm_head")}


@pytest.mark.parametrize(
    "flat", [[], 3, {"images": 3}, {"llm_cosine": 1.0, "llm_mode": "x"}, {"accuracy": 1.0}]
)
def test_measurements_that_are_none_are_refused(
    tmp_path: Path, old: dict[str, Any], flat: object
) -> None:
    with pytest.raises(BundleError, match=r"not a valid manifest.*parity"):
        read(tmp_path, old | {"parity": flat})


def test_what_is_read_can_be_written_and_read_again(tmp_path: Path, old: dict[str, Any]) -> None:
    manifest = read(tmp_path, old)
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    assert read_manifest(tmp_path) == manifest


def test_fields_that_came_later(tmp_path: Path, old: dict[str, Any]) -> None:
    for name in ("embeddings", "tokenizer", "repetition_penalty", "penalised_ids", "parity"):
        del old[name]
    for name in ("precision", "positions", "flops", "tower"):
        del old["vision"][name]
    for stage in ("rfm", "llm"):
        later = ("masked_graph", "precision", "intermediate", "segments", "int8_kv_graph", "floats")
        for name in later:
            del old[stage][name]
    manifest = read(tmp_path, old)
    assert (manifest.embeddings, manifest.tokenizer) == ("embeddings.safetensors", "tokenizer.json")
    assert (manifest.vision.precision, manifest.vision.flops) == ("fp32", 0)
    assert manifest.rfm.graphs == (GraphFile("rfm.onnx", Flavour.GQA),)
    assert (manifest.llm.floats, manifest.llm.intermediate) == ("float32", 0)


def test_int8_of_the_first_versions_was_int8_of_weights_alone(
    tmp_path: Path, old: dict[str, Any]
) -> None:
    old["llm"]["precision"] = "int8"
    assert read(tmp_path, old).llm.precision == "int8-weight"


def test_exact_integers_are_taken_over(tmp_path: Path, old: dict[str, Any]) -> None:
    assert read(tmp_path, old | {"exact_integers": True}).exact_integers


@pytest.mark.parametrize("stage", ["vision", "rfm", "llm"])
@pytest.mark.parametrize("value", [None, [], "graph", 1, {}, {"graph": 3}])
def test_a_stage_that_is_none_is_refused_by_its_name(
    tmp_path: Path, old: dict[str, Any], stage: str, value: object
) -> None:
    with pytest.raises(BundleError, match=rf"not a valid manifest.*{stage}"):
        read(tmp_path, old | {stage: value})


def test_a_graph_outside_the_bundle_is_refused(tmp_path: Path, old: dict[str, Any]) -> None:
    old["llm"]["int8_kv_graph"] = "../llm.onnx"
    with pytest.raises(BundleError, match="not inside the bundle"):
        read(tmp_path, old)


def test_the_given_content_is_not_changed(old: dict[str, Any]) -> None:
    before = copy.deepcopy(old)
    upgraded(old)
    assert old == before


def test_a_prompt_with_a_first_token_and_a_newline(tmp_path: Path, old: dict[str, Any]) -> None:
    old["prompt"] |= {"bos_id": 1, "question_newline": True, "stop_texts": ["###"]}
    prompt = read(tmp_path, old).prompt
    assert prompt.parts[0] == TokenIds((1,))
    assert isinstance(prompt.parts[-1], Question)
    assert prompt.parts[-1].newline
    assert prompt.stop_texts == ("###",)
