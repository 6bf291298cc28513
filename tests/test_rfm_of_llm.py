"""An RFM that is the language model's own first layers, by reference to its weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch", reason="exporting needs the `export` extra")

import lrs_edge
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.commands.main import run
from lrs_edge.errors import BundleError, ExportError
from lrs_edge.search.rfm import token_scores
from lrs_edge_export.bundle.options import ExportOptions, Precisions
from lrs_edge_export.bundle.writer import export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.recipes import Recipe, all_recipes
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.families.scoring import LLAVA, ScoringLayer
from lrs_edge_export.graphs.sessions import DecoderSession
from tests.checkpoints import LAYERS, RFM_LAYERS, edit_json, write_nano, write_qwen
from tests.golden_data import checkpoint

PRUNER = "model.mm_projector.token_pruner."
#: Of a scoring layer.
SCORING = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj")


def weights_without_rfm(source: Path, folder: Path) -> dict[str, np.ndarray]:
    """Copy all of a checkpoint but its weights, and return those that are not an RFM's."""
    shutil.copytree(source, folder)
    weights = {}
    for path in sorted(folder.glob("model*.safetensors*")):
        if path.suffix == ".safetensors":
            weights |= load_file(path)
        path.unlink()
    return {name: value for name, value in weights.items() if PRUNER not in name}


def with_copies(source: Path, folder: Path, layers: int) -> Path:
    """The checkpoint with an RFM whose layers are copies of the language model's first ones."""
    weights = weights_without_rfm(source, folder)
    for name, value in list(weights.items()):
        if not name.startswith("model.layers."):
            continue
        number, rest = name.removeprefix("model.layers.").split(".", 1)
        if int(number) < layers or (int(number) == layers and rest.startswith(SCORING)):
            weights[f"{PRUNER}layers.{number}.{rest}"] = value.copy()
    save_file(weights, folder / "model.safetensors")
    return folder


def without_rfm(source: Path, folder: Path) -> Path:
    """The checkpoint without any RFM."""
    save_file(weights_without_rfm(source, folder), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("of_llm") / "checkpoint")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def logits_of(bundle: Path, embeds: np.ndarray, graph: str = "rfm.onnx") -> np.ndarray:
    bias = None
    if graph == "rfm_masked.onnx":
        bias = np.triu(np.full((len(embeds),) * 2, -3e4, np.float32), 1)
    found: np.ndarray = DecoderSession(bundle / graph, capacity=len(embeds)).run(embeds, bias=bias)
    return found


def check_same(
    source: Path, folder: Path, layers: int, precisions: Precisions, tower: Path | None = None
) -> None:
    """Export with copies and by reference; scores and files are the same but for the copies."""
    copies = with_copies(source, folder / "copies", layers)
    given = str(tower) if tower else None
    options = ExportOptions(vision_tower=given, precisions=precisions, parity=False)
    export_bundle(str(copies), folder / "copied", options)
    export_bundle(str(source), folder / "shared", replace(options, rfm_layers=layers))
    copied, shared = folder / "copied", folder / "shared"
    assert not (shared / "rfm.onnx.data").exists()
    assert (shared / "llm.onnx.data").read_bytes() == (copied / "llm.onnx.data").read_bytes()
    manifests = [open_bundle(path).manifest for path in (copied, shared)]
    assert manifests[0].rfm == manifests[1].rfm
    width = manifests[0].llm.hidden
    for seed, length in ((0, 7), (1, 300)):
        random = np.random.default_rng(seed)
        embeds = random.normal(size=(length, width)).astype(np.float32) * 0.5
        for graph in ("rfm.onnx", "rfm_masked.onnx"):
            wanted, found = (logits_of(path, embeds, graph) for path in (copied, shared))
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * scale)
            np.testing.assert_allclose(
                token_scores(found), token_scores(wanted), rtol=2e-4, atol=1e-9
            )


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic", "int8-weight"])
def test_scores_equal_those_of_copies(source: Path, tmp_path: Path, precision: str) -> None:
    check_same(source, tmp_path, RFM_LAYERS, Precisions(rfm=precision, llm=precision))


@pytest.mark.parametrize("variant", ["qwen", "llama"])
def test_scores_of_a_golden_checkpoint(variant: str, tmp_path: Path) -> None:
    golden = checkpoint(variant)
    if golden is None:
        pytest.skip(f"the golden checkpoint of {variant} is not here")
    tower = golden.parent / "clip_tiny_336"
    check_same(golden, tmp_path, 2, Precisions(), tower)


def test_a_checkpoint_without_rfm_answers_with_layers_of_its_llm(
    source: Path, image: Path, tmp_path: Path
) -> None:
    bare = without_rfm(source, tmp_path / "bare")
    target = tmp_path / "bundle"
    assert run(["export", str(bare), "-o", str(target), "--rfm", "from-llm:1", "-q"]) == 0
    manifest = open_bundle(target).manifest
    assert manifest.rfm.layers == 1
    with lrs_edge.load(target) as engine, engine.open(image) as scene:
        full = scene.ask("Where?", max_tokens=2)
        reference = scene.ask("Where?", max_tokens=2, policy="reference")
    assert full.token_ids
    assert reference.token_ids
    assert full.prune == "rfm"
    assert any(region.kept for region in full.regions)


def test_an_rfm_of_its_own_gives_way(source: Path, tmp_path: Path) -> None:
    export_bundle(str(source), tmp_path / "own", ExportOptions(parity=False))
    options = ExportOptions(parity=False, rfm_layers=1)
    export_bundle(str(source), tmp_path / "shared", options)
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).iterdir()) for n in ("own", "shared")]
    assert sizes[1] < sizes[0]


def test_the_config_of_a_nano_checkpoint_may_say_so(tmp_path: Path) -> None:
    trained = write_nano(tmp_path / "trained", rfm_from_llm=1)
    rfm = read_model(find_checkpoint(str(trained))).region_focus
    assert (rfm.of_llm, rfm.config.layers) == (False, RFM_LAYERS)
    bare = without_rfm(trained, tmp_path / "bare")
    precisions = Precisions(rfm="int8-dynamic", llm="int8-dynamic")
    options = ExportOptions(precisions=precisions)
    shared = export_bundle(str(bare), tmp_path / "shared", options).manifest
    assert shared.rfm.layers == 1
    assert "rfm.onnx.data" not in shared.files
    assert shared.parity.stage("rfm").value("cosine") > 0.99
    # What is asked for comes first, and without the entry gives the same graphs.
    asked = export_bundle(str(bare), tmp_path / "asked", replace(options, rfm_layers=2)).manifest
    assert asked.rfm.layers == 2
    edit_json(bare / "config.json", rfm_from_llm=None, llm_layer_list=None)
    assert read_model(find_checkpoint(str(bare))).rfm is None
    export_bundle(str(bare), tmp_path / "option", replace(options, rfm_layers=1))
    for name in ("rfm.onnx", "rfm_masked.onnx", "llm.onnx", "llm.onnx.data"):
        same = [(tmp_path / bundle / name).read_bytes() for bundle in ("shared", "option")]
        assert same[0] == same[1], name
    edit_json(bare / "config.json", rfm_from_llm=LAYERS)
    with pytest.raises(ExportError, match=r"rfm_from_llm is 3, it must be an integer of 0\.\.2"):
        read_model(find_checkpoint(str(bare)))


@pytest.mark.parametrize("layers", [0, 3, 400])
def test_layers_that_there_are_not(source: Path, tmp_path: Path, layers: int) -> None:
    options = ExportOptions(rfm_layers=layers)
    with pytest.raises(ExportError, match=r"from-llm:\d+: .* name 1 to 2"):
        export_bundle(str(source), tmp_path / "bundle", options)


def test_without_a_number_the_family_says_how_many(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = without_rfm(source, tmp_path / "bare")
    generic = "Describe the image."
    command = ["export", str(bare), "--rfm", "from-llm", "--relative-to", generic, "--no-parity"]
    assert run([*command, "-o", str(tmp_path / "bundle")]) == 0
    said = capsys.readouterr().err
    # 14 of 32 are one of three.
    assert "from-llm:1: layer 1 of the language model scores" in said
    assert "2502.17422" in said
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.rfm.layers == 1
    assert manifest.search.relative_to == generic


@pytest.mark.parametrize(("layers", "before"), [(2, 1), (3, 1), (24, 10), (28, 12), (32, 14)])
def test_depth_of_a_scoring_layer(layers: int, before: int) -> None:
    assert LLAVA.before(layers) == before
    assert ScoringLayer(4, 4, "").before(layers) == layers - 1


def test_a_recipe_says_how_many(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        name="mine",
        checkpoint=str(source),
        licence="",
        source="",
        config=json.loads((source / "config.json").read_text(encoding="utf-8")),
        vision_tower=str(source / "tower"),
        rfm_layers=2,
        rfm_source="a measurement",
    )
    monkeypatch.setattr("lrs_edge_export.bundle.writer.resolve", lambda _: (str(source), recipe))
    said: list[str] = []
    options = ExportOptions(parity=False, rfm_layers="default")
    export_bundle("mine", tmp_path / "bundle", options, said.append)
    assert open_bundle(tmp_path / "bundle").manifest.rfm.layers == 2
    assert any("from-llm:2" in line and "a measurement" in line for line in said)


def test_recipes_that_name_a_layer_name_its_source() -> None:
    assert all(bool(recipe.rfm_layers) is bool(recipe.rfm_source) for recipe in all_recipes())


@pytest.mark.parametrize("value", ["from-llm:", "from-llm:x", "from-llm:-1", "from-llm:2.5", "llm"])
def test_values_of_rfm_that_are_none(value: str, source: Path, tmp_path: Path) -> None:
    command = ["export", str(source), "-o", str(tmp_path / "b"), "--rfm", value]
    assert run(command) == 2


@pytest.fixture(scope="module")
def bare(source: Path) -> Path:
    """A bundle of a checkpoint without RFM, its language model cut after layer 1."""
    checkpoint = without_rfm(source, source.parent / "bare")
    target = source.parent / "bare_bundle"
    command = ["export", str(checkpoint), "-o", str(target), "--attention-layers", "1", "-q"]
    assert run(command) == 0
    return target


@pytest.mark.parametrize(
    ("options", "prune"),
    [
        ({}, "fastv"),
        ({"kv_budget": 30}, "none"),
        ({"search": "exhaustive"}, "norm"),
        ({"timeout": 60}, "fastv"),
    ],
)
def test_a_bundle_without_rfm_takes_another_way_and_says_so(
    bare: Path, image: Path, options: dict[str, Any], prune: str
) -> None:
    manifest = open_bundle(bare).manifest
    assert manifest.rfm is None
    assert not any("rfm" in name for name in manifest.files)
    with lrs_edge.load(bare) as engine, engine.open(image) as scene:
        answer = scene.ask("Where?", max_tokens=2, **options)
        again = scene.ask("Where?", max_tokens=2, **options)
    assert answer.token_ids == again.token_ids != ()
    assert answer.prune == prune
    assert any("no region focus module" in w and "from-llm" in w for w in answer.warnings)


def test_ways_that_need_no_rfm_work_without_a_word(bare: Path, image: Path) -> None:
    with lrs_edge.load(bare) as engine, engine.open(image) as scene:
        for prune in ("none", "norm", "random", "fastv"):
            answer = scene.ask("Where?", max_tokens=2, prune=prune)
            assert answer.prune == prune
            assert not any("region focus module" in warning for warning in answer.warnings)
        with pytest.raises(BundleError, match=r"reference policy needs.*from-llm"):
            scene.ask("Where?", policy="reference")


def test_a_bundle_without_rfm_is_described(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(bare)]) == 0
    assert run(["info", str(bare), "--format", "json"]) == 0
    assert run(["models", "verify", str(bare)]) == 0
    few = ["--stages", "encode,rfm,prefill", "-p", "8", "-r", "1", "--tiles", "2", "-q"]
    assert run(["bench", "-m", str(bare), *few]) == 0
    assert "rfm" in capsys.readouterr().out
