"""The head that some checkpoints of family `nano` have on their neck: it finds objects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")

import onnx
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from benchmarks.embedded_bundle import write_bundle
from benchmarks.embedded_checkpoint import write_checkpoint
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.bundle.layout import LocalRows, Objects, Question
from lrs_edge.bundle.manifest import ObjectSpec
from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.options import ExportOptions, Precisions
from lrs_edge_export.bundle.writer import export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.vision import EfficientNetTower
from lrs_edge_export.distill import checkpoint_writer
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.graphs.flops import graph_flops
from lrs_edge_export.graphs.sessions import open_session
from lrs_edge_export.graphs.vision_graph import write_vision
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.parity import check as parity
from lrs_edge_export.parity.images import load_samples
from lrs_edge_export.quantization import static_vision
from lrs_edge_export.quantization.precision import Plan, Precision
from lrs_edge_export.torch_model import vision
from tests.checkpoints import edit_json, write_nano

NECK = {"width": 48, "low": 40, "words": 5}
#: The mixing convolutions' kernels are large enough to be quantized.
OBJECTS: dict[str, Any] = {
    "width": 24,
    "labels": ["airplane", "ship", "storage tank"],
    "thresholds": [[0.2, 0.5], [0.1, 0.4], [0, 1]],
    "aliases": [["plane"], ["boat", "vessel"], []],
}
LAYERS = ("coarse", "fine", "mix.0", "mix.1", "out")
PREFIX = "model.vision_objects."


def read(folder: Path) -> Model:
    return read_model(find_checkpoint(str(folder)))


def with_objects(folder: Path) -> Path:
    return write_nano(folder, vision_neck=NECK, vision_objects=OBJECTS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_objects(tmp_path_factory.mktemp("objects") / "checkpoint")


@pytest.fixture(scope="module")
def model(source: Path) -> Model:
    return read(source)


@pytest.fixture(scope="module")
def pixels(model: Model) -> np.ndarray:
    return np.concatenate([sample.tiles for sample in load_samples(model.vision, None)[0]])[:4]


@pytest.fixture(scope="module")
def wanted(model: Model, pixels: np.ndarray) -> np.ndarray:
    found = vision.vision_objects(model.vision, torch.from_numpy(pixels))
    assert found is not None
    return found.numpy()


def written(model: Model, folder: Path, precision: Precision = "fp32") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "vision.onnx"
    with WeightFile(folder / "vision.onnx.data", Plan(precision)) as weights:
        write_vision(model.vision, path, weights)
    return path


def run(path: Path, pixels: np.ndarray) -> np.ndarray:
    session = open_session(path)
    assert [output.name for output in session.get_outputs()] == ["tokens", "objects"]
    found: np.ndarray = session.run(["objects"], {"pixel_values": pixels})[0]
    return found


def test_the_graph_is_the_definition(
    model: Model, pixels: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    path = written(model, tmp_path)
    found = run(path, pixels)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape == (4, 5, 4, 4)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert np.abs(run(path, pixels[1:2]) - found[1:2]).max() <= 1e-4
    # Maps that differ from place to place, without which little would be compared.
    assert found.std(axis=(2, 3)).min() > 1e-3
    tokens = vision.vision_tokens(model.vision, torch.from_numpy(pixels)).numpy()
    same = open_session(path).run(["tokens"], {"pixel_values": pixels})[0]
    assert np.abs(same - tokens).max() <= 1e-4 * np.abs(tokens).max()


def test_the_definition_is_a_plain_network(source: Path, model: Model) -> None:
    """What is given out, computed with nothing but torch from the checkpoint's names."""
    weights = {k: torch.from_numpy(v) for k, v in load_file(source / "model.safetensors").items()}

    def conv(name: str, x: torch.Tensor, **how: int) -> torch.Tensor:
        kernel, bias = (weights[f"{PREFIX}{name}.{part}"] for part in ("weight", "bias"))
        return functional.conv2d(x, kernel, bias, **how)

    rng = np.random.default_rng(0)
    both = torch.from_numpy(rng.uniform(0, 6, (2, 96, 2, 2)).astype(np.float32))
    low = torch.from_numpy(rng.standard_normal((2, 112, 4, 4)).astype(np.float32))
    coarse = torch.pixel_shuffle(conv("coarse", both).clamp(0, 6), 2)
    x = torch.cat((coarse, conv("fine", low).clamp(0, 6)), 1)
    x = conv("mix.0", x, padding=1).clamp(0, 6)
    x = conv("mix.1", x, padding=1).clamp(0, 6)
    out = conv("out", x)
    assert model.vision.objects is not None
    with torch.inference_mode():
        found = vision._objects(model.vision.objects, both, low)
    assert torch.allclose(found, torch.cat((out[:, :3].sigmoid(), out[:, 3:]), 1), atol=1e-5)


def test_its_kernels_are_quantized_as_the_towers_are(
    model: Model, pixels: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    path = written(model, tmp_path, "int8-weight")
    names = {t.name for t in onnx.load(path, load_external_data=False).graph.initializer}
    for layer in ("mix.0", "mix.1"):
        name = f"objects.{layer}"
        assert {f"{name}.weight.int8", f"{name}.weight.scale", f"{name}.bias"} <= names
    assert {"objects.fine.weight", "objects.out.weight"} <= names
    apart = np.abs(run(path, pixels) - wanted)
    assert 1e-6 < apart[:, :3].mean() < parity.OBJECT_LIMITS["int8-weight"][0]


def test_half_precision(
    model: Model, pixels: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    found = run(written(model, tmp_path, "fp16"), pixels)
    assert found.dtype == np.float32
    assert np.abs(found - wanted)[:, :3].mean() < parity.OBJECT_LIMITS["fp16"][0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_activations_are_quantized_too(
    model: Model, pixels: np.ndarray, wanted: np.ndarray, tmp_path: Path, symmetric: bool
) -> None:
    path, target = written(model, tmp_path), tmp_path / "static.onnx"
    static_vision(path, pixels[:2], target, symmetric=symmetric)
    graph = onnx.load(target, load_external_data=False).graph
    floats = {value for node in graph.node if node.op_type == "Conv" for value in node.input}
    assert not floats & {f"objects.{layer}.weight" for layer in LAYERS}
    # Probabilities and sizes are not put into one scale.
    makers = {value: node for node in graph.node for value in node.output}
    output = makers["objects"]
    assert output.op_type == "Identity"
    assert makers[output.input[0]].op_type == "Concat"
    found = run(target, pixels)
    assert np.corrcoef(found[:, :3].ravel(), wanted[:, :3].ravel())[0, 1] > 0.8
    static_vision(path, pixels[:2], target, exclude={"objects.coarse"}, symmetric=symmetric)
    graph = onnx.load(target, load_external_data=False).graph
    floats = {value for node in graph.node if node.op_type == "Conv" for value in node.input}
    assert "objects.coarse.weight" in floats
    run(target, pixels)


def test_its_operations_are_counted(model: Model, tmp_path: Path) -> None:
    plain = read(write_nano(tmp_path / "plain", vision_neck=NECK))
    with_head, without = (
        graph_flops(written(one, tmp_path / name)) for name, one in (("a", model), ("b", plain))
    )
    width, both = OBJECTS["width"], 2 * OBJECTS["width"]
    each = 4 * 4 * width * 2 * NECK["width"]
    each += 16 * (112 * width + 2 * 9 * both**2 + both * 5)
    assert with_head - without == 2 * each


def test_a_bundle_says_what_it_finds(source: Path, tmp_path: Path) -> None:
    options = ExportOptions(precisions=Precisions(vision="int8-weight"))
    manifest = export_bundle(str(source), tmp_path / "bundle", options).manifest
    assert manifest.vision.objects == ObjectSpec(
        ("airplane", "ship", "storage tank"),
        4,
        ((0.2, 0.5), (0.1, 0.4), (0.0, 1.0)),
        (("plane",), ("boat", "vessel"), ()),
    )
    assert manifest.prompt.parts[-3:-1] == (LocalRows(), Objects("\nSeen: {objects}"))
    assert isinstance(manifest.prompt.parts[-1], Question)
    assert open_bundle(tmp_path / "bundle").manifest == manifest
    found = manifest.parity.stage("vision")
    assert 0 < found.value("objects' probability error") < 0.02
    assert found.value("objects' size error") > 0


def test_without_a_head_nothing_changes(source: Path, tmp_path: Path) -> None:
    plain = read(write_nano(tmp_path / "checkpoint", vision_neck=NECK))
    assert plain.vision.objects is None
    assert not [part for part in plain.prompt.parts if isinstance(part, Objects)]
    path = written(plain, tmp_path / "graph")
    assert [output.name for output in onnx.load(path).graph.output] == ["tokens"]
    # The head's nodes stand behind all others, so that those of a graph without it are the same.
    whole = onnx.load(written(read(source), tmp_path / "whole")).graph
    alone = onnx.load(path).graph
    assert list(whole.node)[: len(alone.node)] == list(alone.node)


class Changed:
    """Tensors of a head of which one is changed on the way."""

    def __init__(self, tensors: Scoped, name: str, factor: float) -> None:
        self._tensors, self._name, self._factor = tensors, name, np.float32(factor)

    def read(self, name: str) -> np.ndarray:
        value = self._tensors.read(name)
        return value * self._factor if name == self._name else value


def test_a_broken_head_fails_the_check(model: Model, tmp_path: Path) -> None:
    tower = model.vision.tower
    assert isinstance(tower, EfficientNetTower)
    assert tower.neck is not None
    assert tower.neck.objects is not None
    samples = load_samples(model.vision, None)[0][:1]
    tiles = torch.from_numpy(samples[0].tiles)
    tokens = [vision.vision_tokens(model.vision, tiles).numpy()]
    for broken in ("", "coarse.weight", "mix.1.weight", "out.bias"):
        tensors: Any = Changed(tower.neck.objects.tensors, broken, -1.0)
        neck = replace(tower.neck, objects=replace(tower.neck.objects, tensors=tensors))
        changed = replace(model.vision, tower=replace(tower, neck=neck))
        path = written(replace(model, vision=changed), tmp_path / f"a{broken}", "int8-weight")
        _, figures = parity._compare_vision(path, model.vision, samples, tokens, "int8-weight")
        failed = {figure.measure for figure in figures if not figure.passed}
        assert bool(failed) == bool(broken), (broken, figures)
        assert failed <= {"objects' probability error", "objects' size error"}


def test_a_bundle_gives_its_head_back(source: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    export_bundle(str(source), old, ExportOptions(parity=False))
    checkpoint = write_checkpoint(old, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["vision_objects"] == OBJECTS
    found, wanted = (load_file(x / "model.safetensors") for x in (checkpoint, source))
    names = {name for name in wanted if name.startswith(PREFIX)}
    assert len(names) == 2 * len(LAYERS)
    assert names == {name for name in found if name.startswith(PREFIX)}
    for name in names:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-7, err_msg=name)
    before, after = (open_bundle(x).manifest for x in (old, write_bundle(old, tmp_path / "new")))
    assert before.vision.objects == after.vision.objects
    assert before.prompt == after.prompt


def test_distilling_keeps_it(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "distilled"
    checkpoint = find_checkpoint(str(source))
    weights = Scoped(checkpoint.tensors(), "model.")
    checkpoint_writer.write_checkpoint(
        checkpoint, target, weights, {}, (0,), {}, whole_last_layer=False
    )
    assert json.loads((target / "config.json").read_text())["vision_objects"] == OBJECTS
    found, wanted = (load_file(x / "model.safetensors") for x in (target, source))
    for name in (name for name in wanted if name.startswith(PREFIX)):
        np.testing.assert_array_equal(found[name], wanted[name])


PAIRS = OBJECTS["thresholds"]
LABELS = OBJECTS["labels"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": []}, "vision_objects.labels is [], it must be a list of 1..256 labels"),
        ({"labels": "ship"}, "vision_objects.labels is 'ship', it must be a list"),
        ({"labels": None}, "vision_objects.labels is 'absent', it must be a list"),
        ({"labels": [f"a{i}" for i in range(257)]}, "must be a list of 1..256 labels"),
        ({"labels": ["a", "", "b"]}, "labels of 1..64 printable characters"),
        ({"labels": ["a", 1, "b"]}, "labels of 1..64 printable characters"),
        ({"labels": ["a", "b ", "c"]}, "labels of 1..64 printable characters"),
        ({"labels": ["a", "b\nAnswer: c", "c"]}, "labels of 1..64 printable characters"),
        ({"labels": ["a", "b" * 65, "c"]}, "labels of 1..64 printable characters"),
        ({"labels": ["a", "b<|im_end|>", "c"]}, "the tokenizer's control token '<|im_end|>'"),
        ({"labels": ["a", "b", "a"]}, "vision_objects.labels is ['a', 'b', 'a'], it must name no"),
        ({"labels": [*LABELS, "d"]}, "vision_objects.thresholds"),
        (
            {"labels": [*LABELS, "d"], "thresholds": [*PAIRS, [0, 1]], "aliases": []},
            "model.vision_objects.out.weight has shape [5, 48, 1, 1]",
        ),
        ({"aliases": [["plane"]]}, "vision_objects.aliases"),
        ({"aliases": [["plane"], "boat", []]}, "vision_objects.aliases"),
        ({"aliases": [["a"] * 17, [], []]}, "at most 16 words"),
        ({"aliases": [[""], [], []]}, "must have words of 1..64 characters"),
        ({"thresholds": PAIRS[:2]}, "vision_objects.thresholds"),
        ({"thresholds": None}, "vision_objects.thresholds is 'absent'"),
        ({"thresholds": {"low": 0}}, "vision_objects.thresholds"),
        ({"thresholds": [[0.5, 0.4], *PAIRS[1:]]}, "0 <= low <= high <= 1"),
        ({"thresholds": [[-0.1, 0.4], *PAIRS[1:]]}, "0 <= low <= high <= 1"),
        ({"thresholds": [[0.1, 1.01], *PAIRS[1:]]}, "0 <= low <= high <= 1"),
        ({"thresholds": [[0.1, float("nan")], *PAIRS[1:]]}, "0 <= low <= high <= 1"),
        ({"thresholds": [[0.1], *PAIRS[1:]]}, "vision_objects.thresholds"),
        ({"thresholds": [0.1, *PAIRS[1:]]}, "vision_objects.thresholds"),
        ({"thresholds": [[False, True], *PAIRS[1:]]}, "vision_objects.thresholds"),
        ({"thresholds": [["0", "1"], *PAIRS[1:]]}, "vision_objects.thresholds"),
        ({"width": 0}, "vision_objects.width is 0, it must be an integer of 1..512"),
        ({"width": 1 << 40}, "must be an integer of 1..512"),
        ({"width": 23}, "model.vision_objects.coarse.weight has shape [96, 96, 1, 1]"),
    ],
)
def test_what_config_says_must_be_right(tmp_path: Path, change: Any, words: str) -> None:
    folder = with_objects(tmp_path / "checkpoint")
    found = {key: value for key, value in (OBJECTS | change).items() if value is not None}
    edit_json(folder / "config.json", vision_objects=found)
    refused(folder, words)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(ExportError) as caught:
        read(folder)
    assert words in str(caught.value)


def test_weights_and_config_come_together(tmp_path: Path) -> None:
    folder = with_objects(tmp_path / "checkpoint")
    edit_json(folder / "config.json", vision_objects=None)
    refused(folder, "vision_objects is 'absent', it must describe the weights")
    edit_json(folder / "config.json", vision_objects=["ship"])
    refused(folder, "must be an object")
    edit_json(folder / "config.json", vision_objects=OBJECTS)
    weights = load_file(folder / "model.safetensors")
    name = f"{PREFIX}mix.1.bias"
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors")
    refused(folder, f"object head: {name} missing")
    name = f"{PREFIX}mix.2.bias"
    save_file(weights | {name: np.zeros(48, np.float32)}, folder / "model.safetensors")
    refused(folder, f"object head: the checkpoint has {name}")
    kept = {k: v for k, v in weights.items() if "neck" not in k}
    save_file(kept, folder / "model.safetensors")
    edit_json(folder / "config.json", vision_neck=None)
    refused(folder, "vision_neck is 'absent', it must be there")
