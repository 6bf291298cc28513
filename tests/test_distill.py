"""`distill` from end to end on tiny checkpoints: what is written and learned, with a break too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="distilling needs the `export` extra")
pytest.importorskip("onnx", reason="distilling needs the `export` extra")

import torch
from safetensors.torch import load_file, save_file

import lrs_edge
from lrs_edge.commands.main import run
from lrs_edge.errors import ExportError, UsageError
from lrs_edge.pyramid.levels import TileIndex
from lrs_edge_export import ExportOptions, export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.tensors import open_tensors
from lrs_edge_export.distill import DistillOptions, LossWeights, Sampling, TrainOptions, distill
from lrs_edge_export.distill.features import open_encoder
from lrs_edge_export.distill.questions import TrainingQuestion
from lrs_edge_export.distill.sequences import Assembler, QuestionGroup
from lrs_edge_export.distill.student import Student
from lrs_edge_export.distill.train import Trainer
from lrs_edge_export.families.parts import PRUNER
from lrs_edge_export.families.registry import read_model
from tests.checkpoints import HIDDEN, edit_json, write_nano, write_qwen
from tests.golden_data import checkpoint as golden_checkpoint


def write_placed_nano(folder: Path) -> Path:
    """A nano checkpoint whose vision tokens carry their place in the image."""
    write_nano(folder, position_entries=5)
    weights = load_file(folder / "model.safetensors")
    for number, axis in enumerate(("rows", "cols")):
        torch.manual_seed(number)
        weights[f"model.vision_position.{axis}"] = 0.5 * torch.randn(5, HIDDEN)
    save_file(weights, folder / "model.safetensors")
    return folder


WRITERS = {"qwen": write_qwen, "nano": write_nano, "placed nano": write_placed_nano}
QUESTIONS = ("What is this?", "Is there a ship in the harbour?", "how many cars", "Where?")

#: Learned layers that are not the language model's first, so that there is something to learn.
OPTIONS = DistillOptions(
    layer_list=(2,),
    precision="fp32",
    held_out=0.3,
    sampling=Sampling(tiles=6),
    train=TrainOptions(steps=12, rate=3e-3),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with questions; two have boxes."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for place, (width, height) in enumerate([(150, 90), (64, 130), (210, 200)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{place}.png")
        for number, text in enumerate(QUESTIONS):
            box = [10 + number, 10, 60, 50 + number] if number < 2 else []
            values = {"question_id": len(lines), "image": f"{place}.png", "text": text}
            lines.append(json.dumps(values | {"ground_truth": "x", "hbox": box}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def done(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path, dict[str, Any]]]:
    """Checkpoint, result and report of each family."""
    found = {}
    for family, write in WRITERS.items():
        folder = tmp_path_factory.mktemp(family)
        source = write(folder / "source")
        result = distill(str(source), data, folder / "new", OPTIONS)
        found[family] = source, result.path, dict(result.report)
    return found


@pytest.mark.parametrize("family", WRITERS)
def test_only_the_rfm_changes(done: dict[str, Any], family: str) -> None:
    source, target, _ = done[family]
    old, new = (load_file(path / "model.safetensors") for path in (source, target))
    rest = {name for name in old if not name.startswith(PRUNER)}
    assert rest == {name for name in new if not name.startswith(PRUNER)}
    assert all(torch.equal(old[name], new[name]) for name in rest)
    changed = {name.removeprefix(PRUNER) for name in new if name.startswith(PRUNER)}
    # One full layer, and one to score with: whole in the authors' layout.
    assert {name.split(".")[1] for name in changed if name != "norm.weight"} == {"0", "1"}
    assert ("layers.1.mlp.up_proj.weight" in changed) == (family == "qwen")
    for place, layer in enumerate((1, 2)):
        key = f"layers.{place}.self_attn.k_proj.weight"
        start = old[f"model.{key.replace(f'.{place}.', f'.{layer}.')}"]
        assert new[PRUNER + key].shape == start.shape
        assert not torch.equal(new[PRUNER + key], start)
    described = json.loads((target / "config.json").read_text())
    assert described["llm_layer_list"] == [2]
    before = json.loads((source / "config.json").read_text())
    assert described | {"llm_layer_list": before["llm_layer_list"]} == before
    same = {p.relative_to(source) for p in source.rglob("*.json") if p.name != "config.json"}
    assert all((source / name).read_bytes() == (target / name).read_bytes() for name in same)


@pytest.mark.parametrize("family", WRITERS)
def test_the_student_comes_nearer_to_the_teacher(done: dict[str, Any], family: str) -> None:
    _, target, report = done[family]
    rows = {(row["levels"], row["who"]): row for row in report["measured"]}
    assert {"base", "finer"} >= {levels for levels, _ in rows} >= {"base"}
    for levels in {levels for levels, _ in rows}:
        assert rows[levels, "teacher"]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert rows[levels, "teacher"]["overlap"] == 1.0
        assert rows[levels, "random"]["overlap"] < 1.0
    # Held-out questions, measured before and after.
    assert rows["base", "after"]["kl"] < rows["base", "before"]["kl"]
    assert json.loads((target / "distill.json").read_text()) == json.loads(json.dumps(report))


@pytest.mark.parametrize("family", WRITERS)
def test_the_bundle_scores_as_the_student_does(
    done: dict[str, Any], family: str, tmp_path: Path
) -> None:
    """The whole way: export, the runtime's own search, the student on the same tiles."""
    _, target, _ = done[family]
    export_bundle(str(target), tmp_path / "bundle", ExportOptions())
    pixels = np.random.default_rng(5).integers(0, 256, (170, 230, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "new.png")
    with lrs_edge.load(tmp_path / "bundle") as engine, engine.open(tmp_path / "new.png") as scene:
        scene.ask(QUESTIONS[1], trace=tmp_path / "t.npz", tiles_per_level=5, max_tokens=1)
    model = read_model(find_checkpoint(str(target)))
    encoder, _ = open_encoder(model, tmp_path, None)
    asked = [TrainingQuestion("new.png", text, ()) for text in QUESTIONS]
    assembler = Assembler(model, encoder, asked, tmp_path, tmp_path)
    student = Student.read(model.region_focus, torch.device("cpu"))
    with np.load(tmp_path / "t.npz") as trace:
        levels = [
            int(name[3:-5]) for name in trace if name.endswith("_attn") and name[3:-5].isdigit()
        ]
        assert levels
        for level in levels:
            tiles = tuple(TileIndex(int(row), int(col)) for row, col in trace[f"rfm{level}_tiles"])
            group = QuestionGroup(f"g{level}", "new.png", level - 1, tiles, (0, 1, 2))
            made = assembler.build(group)
            scores = student.scores(made.packed)[-1][1].numpy()
            np.testing.assert_array_equal(made.cells, trace[f"rfm{level}_local_indices"])
            # Tokens are kept as float16 on disk.
            np.testing.assert_allclose(scores, trace[f"rfm{level}_attn"], rtol=0.02, atol=1e-5)


def test_a_broken_off_run_ends_as_an_uninterrupted_one(
    done: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    source, whole, _ = done["qwen"]
    train = replace(OPTIONS.train, save_every=0.0)
    options = replace(OPTIONS, train=train)

    def break_off(trainer: Any) -> None:
        if trainer.step == 5:
            raise KeyboardInterrupt
        step(trainer)

    step = Trainer._one_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_one_step", break_off)
        with pytest.raises(KeyboardInterrupt):
            distill(str(source), data, tmp_path / "new", options)
    assert not (tmp_path / "new").exists()
    said: list[str] = []
    distill(str(source), data, tmp_path / "new", options, said.append)
    assert not any(line.startswith("teacher") for line in said)  # targets were there already
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "new", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = replace(options, sampling=Sampling(tiles=6, seed=1), force=True)
    with pytest.raises(UsageError, match="another seed"):
        distill(str(source), data, tmp_path / "new", other)


def test_layers_are_measured_and_a_perfect_start_is_left_alone(data: Path, tmp_path: Path) -> None:
    source = write_qwen(tmp_path / "source")
    said: list[str] = []
    options = replace(OPTIONS, layer_list=None)
    result = distill(str(source), data, tmp_path / "new", options, said.append)
    # Two layers lead only to the third of three.
    assert result.layer_list == (1, 2)
    assert result.localisation is not None
    assert [row.questions > 0 for row in result.localisation] == [True] * 3
    assert "* 2" in result.layer_table
    assert any("nothing to train" in line for line in said)
    rows = {(row.levels, row.who): row for row in result.measured}
    assert rows["base", "after"].kl == pytest.approx(0.0, abs=1e-6)
    old, new = (load_file(path / "model.safetensors") for path in (source, tmp_path / "new"))
    for layer in range(3):
        key = f"layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(new[PRUNER + key], old[f"model.{key}"])


def test_evidence_can_be_learned_too(data: Path, tmp_path: Path) -> None:
    source = write_qwen(tmp_path / "source")
    train = TrainOptions(steps=25, rate=3e-3, weights=LossWeights(0.1, 0.1, 1.0))
    options = replace(OPTIONS, layer_list=(1, 2), train=train, limit=1)
    said: list[str] = []
    result = distill(str(source), data, tmp_path / "new", options, said.append)
    assert any("one image only" in line for line in said)
    rows = {(row.levels, row.who): row for row in result.measured}
    assert rows["base", "after"].evidence.mass > rows["base", "before"].evidence.mass


def test_it_can_go_on_from_its_own_rfm(done: dict[str, Any], data: Path, tmp_path: Path) -> None:
    _, first, report = done["qwen"]
    train = replace(OPTIONS.train, steps=0)
    options = replace(OPTIONS, from_existing=True, train=train)
    result = distill(str(first), data, tmp_path / "new", options)
    rows = {(row.levels, row.who): row for row in result.measured}
    after = [row for row in report["measured"] if (row["levels"], row["who"]) == ("base", "after")]
    assert rows["base", "before"].kl == pytest.approx(after[0]["kl"], rel=1e-4)
    with pytest.raises(UsageError, match="--from-existing"):
        distill(str(first), data, tmp_path / "x", replace(options, layer_list=(1, 2)))


def test_a_checkpoint_without_rfm(data: Path, tmp_path: Path) -> None:
    source = write_qwen(tmp_path / "source", llm_layer_list=None)
    old = load_file(source / "model.safetensors")
    bare = {name: value for name, value in old.items() if not name.startswith(PRUNER)}
    # Two shards, one of them pickled weights' successor: an index names the file of each tensor.
    (source / "model.safetensors").unlink()
    names = sorted(bare)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: bare[name].half() for name in part}, source / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    distill(str(source), data, tmp_path / "new", OPTIONS)
    new = open_tensors(tmp_path / "new")
    assert set(new.names()) > set(bare)
    model = read_model(find_checkpoint(str(tmp_path / "new")))
    assert model.region_focus.config.layers == 1
    stored = load_file(tmp_path / "new" / "model-00003-of-00003.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    for number, file in enumerate(shards, 1):
        copied = tmp_path / "new" / f"model-{number:05d}-of-00003.safetensors"
        assert copied.read_bytes() == (source / file).read_bytes()
    export_bundle(str(tmp_path / "new"), tmp_path / "bundle", ExportOptions(parity=False))


def test_pickled_weights(data: Path, tmp_path: Path) -> None:
    source = write_qwen(tmp_path / "source")
    old = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(old, source / "pytorch_model.bin")
    options = replace(OPTIONS, train=replace(OPTIONS.train, steps=1))
    distill(str(source), data, tmp_path / "new", options)
    assert sorted(path.name for path in (tmp_path / "new").glob("*.*")) == [
        "config.json", "distill.json", "generation_config.json", "model.safetensors",
        "tokenizer.json",
    ]  # fmt: skip
    new = load_file(tmp_path / "new" / "model.safetensors")
    rest = [name for name in old if not name.startswith(PRUNER)]
    assert all(torch.equal(old[name], new[name]) for name in rest)


@pytest.mark.parametrize("name", ["tower", "hub/tower", "../source/tower", "."])
def test_a_tower_inside_the_checkpoint_goes_along(data: Path, tmp_path: Path, name: str) -> None:
    source = write_qwen(tmp_path / "source", mm_vision_tower=name)
    train = replace(OPTIONS.train, steps=0)
    options = replace(OPTIONS, train=train, limit=1, vision_tower=str(source / "tower"))
    distill(str(source), data, tmp_path / "new", options)
    copied = {path.name for path in (tmp_path / "new").glob("tower/*")}
    assert copied == (set() if name == "." else {"config.json", "model.safetensors"})
    assert {path.name for path in tmp_path.iterdir()} == {"source", "new", "new.work"}
    report = json.loads((tmp_path / "new" / "distill.json").read_text())
    assert report["last_loss"] is None


def test_the_authors_layout(data: Path, tmp_path: Path) -> None:
    """The golden checkpoint of the authors' code: shards, SentencePiece or BPE, 336-pixel tiles."""
    source = golden_checkpoint("llama")
    if source is None:
        pytest.skip("the golden checkpoint is not here")
    train = TrainOptions(steps=3, batch=1)
    options = replace(OPTIONS, layer_list=(2, 4), train=train, limit=1, sampling=Sampling(tiles=2))
    options = replace(options, vision_tower=str(source.parent / "clip_tiny_336"))
    result = distill(str(source), data, tmp_path / "new", options)
    assert result.report["steps"] == 3
    model = read_model(find_checkpoint(str(tmp_path / "new")), options.vision_tower)
    assert (model.region_focus.config.layers, result.layer_list) == (2, (2, 4))


# -- refusals ------------------------------------------------------------------------------------


def test_without_boxes_the_layers_must_be_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_qwen(tmp_path / "source")
    lines = [json.loads(text) for text in (data / "questions.jsonl").read_text().splitlines()]
    file = tmp_path / "unboxed.jsonl"
    file.write_text("\n".join(json.dumps(values | {"hbox": None}) for values in lines))
    images = ["--images", str(data / "images")]
    asked = ["distill", str(source), "--data", str(file), "-o", str(tmp_path / "new"), *images]
    assert run(asked) == 2
    assert "--layer-list" in capsys.readouterr().err
    assert run([*asked, "--layer-list", "2", "--steps", "1", "-q", "--tiles-per-level", "4"]) == 0
    shown = capsys.readouterr()
    assert "learned from layers 2" in shown.out
    assert shown.err == ""
    assert run([*asked, "--layer-list", "2", "--steps", "1"]) == 1
    assert "--force" in capsys.readouterr().err
    assert run([*asked, "--layer-list", "two"]) == 2
    assert "'two' is not a list of layers such as" in capsys.readouterr().err


def test_the_empty_folder_one_is_in(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_qwen(tmp_path / "source")
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    options = replace(OPTIONS, train=replace(OPTIONS.train, steps=0))
    found = distill(str(source), data, Path(), options)
    assert found.path == tmp_path / "new"
    assert (tmp_path / "new" / "distill.json").is_file()
    assert (tmp_path / "new.work").is_dir()


def test_targets_in_the_way(data: Path, tmp_path: Path) -> None:
    source = write_qwen(tmp_path / "source")
    with pytest.raises(ExportError, match="the checkpoint itself"):
        distill(str(source), data, source, OPTIONS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").touch()
    with pytest.raises(ExportError, match="remove it yourself"):
        distill(str(source), data, tmp_path / "mine", replace(OPTIONS, force=True))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"layers": 3, "layer_list": None}, "--layers is 3"),
        ({"layers": 2, "layer_list": (2,)}, "differ"),
        ({"layer_list": (0, 1)}, "--layer-list 0,1"),
        ({"layer_list": (3,)}, "--layer-list 3"),
    ],
)
def test_layers_that_are_not_there(
    data: Path, tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    source = write_qwen(tmp_path / "source")
    with pytest.raises(UsageError, match=word):
        distill(str(source), data, tmp_path / "new", replace(OPTIONS, **options))
    assert not (tmp_path / "new.work").exists()


def test_a_damaged_training_state_is_refused(
    done: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    source, _, _ = done["qwen"]
    options = replace(OPTIONS, train=replace(OPTIONS.train, steps=1))
    distill(str(source), data, tmp_path / "new", options)
    edit_json(tmp_path / "new" / "config.json", llm_layer_list=[1])
    for state in (tmp_path / "new.work").glob("state-*.pt"):
        state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UsageError, match="remove it to start"):
        distill(str(source), data, tmp_path / "new", replace(options, force=True))
