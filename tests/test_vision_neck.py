"""The neck that some checkpoints of family `nano` have behind their vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")

import onnx
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from lrs_edge.bundle.manifest import Flavour
from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.options import ExportOptions, Precisions
from lrs_edge_export.bundle.writer import export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
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

#: The context's kernels are large enough to be quantized, the words' is not.
NECK = {"width": 48, "low": 40, "words": 5}
LAYERS = ("neck.high", "neck.low", "neck.context.0", "neck.context.1", "neck.words")


def read(folder: Path) -> Model:
    return read_model(find_checkpoint(str(folder)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nano(tmp_path_factory.mktemp("neck") / "checkpoint", vision_neck=NECK)


@pytest.fixture(scope="module")
def model(source: Path) -> Model:
    return read(source)


@pytest.fixture(scope="module")
def pixels(model: Model) -> np.ndarray:
    shape = (3, 3, model.vision.tile, model.vision.tile)
    return np.random.default_rng(8).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def wanted(model: Model, pixels: np.ndarray) -> np.ndarray:
    return vision.vision_tokens(model.vision, torch.from_numpy(pixels)).numpy()


def written(model: Model, folder: Path, precision: Precision = "fp32") -> Path:
    path = folder / "vision.onnx"
    with WeightFile(folder / "vision.onnx.data", Plan(precision)) as weights:
        write_vision(model.vision, path, weights)
    return path


def run(path: Path, pixels: np.ndarray) -> np.ndarray:
    found: np.ndarray = open_session(path).run(["tokens"], {"pixel_values": pixels})[0]
    return found


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    norms = np.linalg.norm(found) * np.linalg.norm(wanted)
    return float(np.vdot(found, wanted) / norms)


def test_the_graph_is_the_definition(
    model: Model, pixels: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    path = written(model, tmp_path)
    found = run(path, pixels)
    assert found.shape == wanted.shape == (3, 4, 64)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    alone = run(path, pixels[1:2])
    assert np.abs(alone - found[1:2]).max() <= 1e-5 * np.abs(wanted).max()


def test_the_definition_is_a_plain_network(source: Path, model: Model) -> None:
    """What tokens are, computed with nothing but torch from the checkpoint's names."""
    weights = {k: torch.from_numpy(v) for k, v in load_file(source / "model.safetensors").items()}

    def conv(name: str, x: torch.Tensor, **how: int) -> torch.Tensor:
        kernel, bias = (weights[f"model.vision_neck.{name}.{part}"] for part in ("weight", "bias"))
        return functional.conv2d(x, kernel, bias, **how)

    rng = np.random.default_rng(0)
    high = torch.from_numpy(rng.uniform(0, 6, (2, 1280, 2, 2)).astype(np.float32))
    low = torch.from_numpy(rng.standard_normal((2, 112, 4, 4)).astype(np.float32))
    a = conv("high", high).clamp(0, 6)
    b = conv("low", low, stride=2).clamp(0, 6)
    c = conv("context.0", torch.cat((a, b), 1), padding=1).clamp(0, 6)
    d = conv("context.1", c, padding=2, dilation=2).clamp(0, 6)
    p = conv("words", torch.cat((c, d), 1)).sigmoid()
    context = torch.cat((d, 6 * p), 1)
    assert model.vision.neck is not None
    with torch.inference_mode():
        assert torch.allclose(vision._neck(model.vision.neck, high, low), context, atol=1e-5)
        features = torch.cat((high, context), 1).flatten(2).transpose(1, 2)
        found = vision.project(model.vision, features)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        parts = (weights.get(f"model.mm_projector.{name}.{part}") for part in ("weight", "bias"))
        return functional.linear(x, *parts)

    inner = functional.gelu(linear("mlp_projector.0", features[..., :1280]))
    added = linear("neck", features[..., 1280:])
    assert float(added.abs().max()) > 0.1
    assert torch.allclose(found, linear("mlp_projector.2", inner) + added, atol=1e-4)


def test_it_reads_the_map_before_the_last_stride(model: Model) -> None:
    tower = model.vision.tower
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the `train` extra")
    net = package.EfficientNet.from_name("efficientnet-lite0").eval()
    state = {n: torch.from_numpy(tower.tensors.read(n)) for n in tower.tensors.names()}
    net.load_state_dict(state, strict=False)
    seen: dict[str, torch.Tensor] = {}
    net._blocks[10].register_forward_hook(lambda _m, _i, out: seen.update(low=out))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert model.vision.neck is not None
    with torch.inference_mode():
        high = net.extract_features(pixels)
        assert seen["low"].shape == (1, 112, 4, 4)
        context = vision._neck(model.vision.neck, high, seen["low"])
        found = vision.vision_features(model.vision, pixels)
    wanted = torch.cat((high, context), 1).flatten(2).transpose(1, 2)
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_its_kernels_are_quantized_as_the_towers_are(
    model: Model, pixels: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    path = written(model, tmp_path, "int8-weight")
    names = {t.name for t in onnx.load(path, load_external_data=False).graph.initializer}
    for layer in LAYERS[:-1]:
        assert {f"{layer}.weight.int8", f"{layer}.weight.scale", f"{layer}.bias"} <= names
    # Too small to gain anything by.
    assert {"neck.words.weight", "projector.neck.weight"} <= names
    assert 0.995 < cosine(run(path, pixels), wanted) < 1 - 1e-9


def test_half_precision(
    model: Model, pixels: np.ndarray, wanted: np.ndarray, tmp_path: Path
) -> None:
    path = written(model, tmp_path, "fp16")
    assert cosine(run(path, pixels), wanted) > 0.9999


@pytest.mark.parametrize("symmetric", [False, True])
def test_activations_are_quantized_too(
    model: Model, pixels: np.ndarray, tmp_path: Path, symmetric: bool
) -> None:
    path, target = written(model, tmp_path), tmp_path / "static.onnx"
    static_vision(path, pixels[:2], target, symmetric=symmetric)
    graph = onnx.load(target, load_external_data=False).graph
    floats = {value for node in graph.node if node.op_type == "Conv" for value in node.input}
    assert not floats & {f"{layer}.weight" for layer in LAYERS}
    assert 0.9 < cosine(run(target, pixels), run(path, pixels)) < 1 - 1e-9
    # A word that no tile showed may still be sure.
    steps = {t.name: float(numpy_helper.to_array(t)) for t in graph.initializer if not t.dims}
    for op, most in (("Sigmoid", 1.0), ("Mul", 6.0)):
        node = next(node for node in graph.node if node.op_type == op)
        step = steps[f"{node.output[0]}_scale"]
        assert step * (127 if symmetric else 255) == pytest.approx(most, rel=0.01)
    # One layer can be left out by its name.
    static_vision(path, pixels[:2], target, exclude={"neck.words"}, symmetric=symmetric)
    graph = onnx.load(target, load_external_data=False).graph
    floats = {value for node in graph.node if node.op_type == "Conv" for value in node.input}
    assert "neck.words.weight" in floats


def test_its_operations_are_counted(model: Model, tmp_path: Path) -> None:
    plain = read(write_nano(tmp_path / "plain"))
    counts = []
    for name, one in (("with", model), ("without", plain)):
        (tmp_path / name).mkdir()
        counts.append(graph_flops(written(one, tmp_path / name)))
    places, width, low, words = 4, NECK["width"], NECK["low"], NECK["words"]
    each = 1280 * width + 4 * 112 * low + 9 * (width + low) * width + 9 * width**2
    each += 2 * width * words + (width + words) * 64
    assert counts[0] - counts[1] == 2 * places * each


@pytest.mark.parametrize("precision", ["fp32", "int8-weight"])
def test_a_bundle_is_within_the_limits_of_parity(
    source: Path, model: Model, tmp_path: Path, precision: Precision
) -> None:
    """Of the vision stage: a language model of random weights makes much of its rounding."""
    options = ExportOptions(precisions=Precisions(vision=precision), parity=precision == "fp32")
    bundle = export_bundle(str(source), tmp_path / "bundle", options)
    graph = bundle.path / bundle.manifest.vision.path(Flavour.PLAIN)
    samples = load_samples(model.vision, None)[0][:2]
    tiles = [torch.from_numpy(sample.tiles) for sample in samples]
    wanted = [vision.vision_tokens(model.vision, part).numpy() for part in tiles]
    _, figures = parity._compare_vision(graph, model.vision, samples, wanted, precision)
    assert all(figure.passed for figure in figures)
    assert {figure.measure: figure.value for figure in figures}["cosine"] > 0.995


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"width": 47},
            ("vision neck", "neck.high.weight", "[48, 1280, 1, 1]", "[47, 1280, 1, 1]"),
        ),
        ({"low": None}, ("model.vision_neck.low.weight", "[160, 112, 2, 2]")),
        ({"words": 6}, ("model.vision_neck.words.weight", "[6, 96, 1, 1]")),
        ({"words": 0}, ("vision_neck.words is 0", "integer")),
        ({"width": "wide"}, ("vision_neck.width", "integer")),
        ({"words": None}, ("vision_neck.words is 'absent'",)),
    ],
)
def test_what_config_says_must_be_what_weights_are(
    tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    folder = write_nano(tmp_path / "checkpoint", vision_neck=NECK)
    neck = {key: value for key, value in (NECK | change).items() if value is not None}
    edit_json(folder / "config.json", vision_neck=neck)
    refused(folder, *words)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ExportError) as caught:
        read(folder)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_weights_and_config_come_together(tmp_path: Path) -> None:
    folder = write_nano(tmp_path / "checkpoint", vision_neck=NECK)
    edit_json(folder / "config.json", vision_neck=None)
    refused(folder, "vision_neck is 'absent'", "model.vision_neck.*")
    edit_json(folder / "config.json", vision_neck=[192])
    refused(folder, "vision_neck", "object")
    edit_json(folder / "config.json", vision_neck=NECK)
    weights = load_file(folder / "model.safetensors")
    for name in ("model.mm_projector.neck.weight", "model.vision_neck.context.1.bias"):
        save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors")
        refused(folder, name, "missing")
    more = np.zeros(64, np.float32)
    for name in ("model.mm_projector.neck.bias", "model.vision_neck.context.2.weight"):
        save_file(weights | {name: more}, folder / "model.safetensors")
        refused(folder, name)
