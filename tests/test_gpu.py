"""Bundles for CUDA on an NVIDIA GPU, against the CPU; skipped where onnxruntime has no CUDA.

    python -m pytest -m gpu

Bundles are exported here: everything in float16, of every golden checkpoint, of a tiny checkpoint
of every family, and of the embedded model's weights. Scores and logits agree within 1e-2 of the
largest; greedy tokens are the CPU's, unless two of its logits are as near to each other as that.
Until 2026-11-27 none of it ran on a card as it stands here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lrs_edge
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import BundleError
from lrs_edge.language.kv_cache import KVCache, TokenKind, make_tokens
from lrs_edge.stages import Stages, load_stages
from tests.golden_data import CHECKPOINTS, checkpoint, load_run, run_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers(),
        reason="onnxruntime has no CUDA provider here",
    ),
]

#: Of the largest score or logit.
NEAR = 1e-2

Exported = Callable[[str, str], Path]


#: Tiny checkpoints that tests of families write with transformers: module, and what it is given.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava-1.5": ("llava_1_5", {}),
    "llava-next": ("llava_next", {"text": {"num_key_value_heads": 1}}),
    "llava-onevision": ("llava_onevision", {}),
    "internvl": ("internvl", {"vision": {"attention_bias": True}}),
    "smolvlm": ("idefics3", {"kind": "SmolVLM", "tile": 64, "patch": 8, "factor": 4}),
    "Qwen2VL": ("qwen_vl", {"kind": "Qwen2VL"}),
    "Qwen2_5_VL": ("qwen_vl", {"kind": "Qwen2_5_VL"}),
    "Qwen3VL": ("qwen_vl", {"kind": "Qwen3VL"}),
}
NAMES = [*CHECKPOINTS, "tiny-qwen", "tiny-nano", "embedded", *FAMILIES]


def sources() -> dict[str, Callable[[Path], Path]]:
    """What writes each checkpoint, by its name."""
    from tests.checkpoints import write_nano, write_qwen

    written = {"tiny-qwen": write_qwen, "tiny-nano": write_nano, "embedded": embedded}
    found = {**{name: golden(name) for name in CHECKPOINTS}, **written}
    return {**found, **{name: family(*given) for name, given in FAMILIES.items()}}


def family(module: str, given: dict[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pytest.importorskip("transformers")
        importlib.import_module(f"tests.test_family_{module}").written(folder, **given)
        return folder

    return write


def golden(name: str) -> Callable[[Path], Path]:
    def find(_folder: Path) -> Path:
        source = checkpoint(name)
        if source is None:
            pytest.skip("only a part of the golden data is here")
        return source

    return find


def embedded(folder: Path) -> Path:
    from benchmarks.embedded_checkpoint import write_checkpoint

    return write_checkpoint(None, folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Bundles for CUDA by checkpoint and precision, each exported once."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export.bundle.writer import ExportOptions, Precisions, export_bundle

    folders: dict[str, Path] = {}
    bundles: dict[tuple[str, str], Path] = {}

    def export(name: str, precision: str = "fp16") -> Path:
        if name not in folders:
            folders[name] = sources()[name](tmp_path_factory.mktemp("source") / name)
        if (name, precision) not in bundles:
            target = tmp_path_factory.mktemp("cuda") / f"{name}-{precision}"
            asked = Precisions.all(precision)  # type: ignore[arg-type]
            # Models of transformers have no region focus module of their own.
            layers = 1 if name in FAMILIES else None
            options = ExportOptions(
                precisions=asked, parity=False, target="cuda", rfm_layers=layers
            )
            bundles[name, precision] = export_bundle(str(folders[name]), target, options).path
        return bundles[name, precision]

    return export


def test_float32_bundles_are_refused(golden_bundles: dict[str, Path]) -> None:
    for bundle in golden_bundles.values():
        with pytest.raises(BundleError, match="--target cuda"):
            lrs_edge.load(bundle, device="cuda")


def loaded(bundle: Path, device: str) -> Stages:
    return load_stages(open_bundle(bundle), BackendOptions(device))


def near(found: np.ndarray, wanted: np.ndarray, limit: float = NEAR) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= limit * np.abs(wanted).max()


def numbers(stages: Stages) -> dict[str, Any]:
    """What each stage gives for the same tokens: prompts in parts, after dropped places, alone."""
    manifest = stages.manifest
    draw = np.random.default_rng(0)
    side = manifest.vision.tile
    pixels = draw.standard_normal((3, 3, side, side)).astype(np.float32)
    found: dict[str, Any] = {"vision": stages.vision.encode(list(pixels))}
    embeds = draw.standard_normal((60, manifest.llm.width)).astype(np.float32)
    axes = manifest.prompt.position_axes
    places = np.arange(60, dtype=np.int64)
    labels = make_tokens(places if axes == 1 else np.tile(places, (axes, 1)), TokenKind.TILE)
    for name, part in (("rfm", stages.focus), ("llm", stages.llm)):
        if part is None:
            continue
        decoder = part._decoder
        cache: KVCache = part.new_cache()
        steps = []
        for start, end in ((0, 30), (30, 50)):
            steps.append(decoder.forward(cache, embeds[start:end], labels[start:end]))
        cache.keep(np.arange(0, 50, 2))
        for place in range(50, 60):
            new = slice(place, place + 1)
            steps.append(decoder.forward(cache, embeds[new], labels[new]))
        found[name] = steps
    return found


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_cpu_s(name: str, exported: Exported) -> None:
    bundle = exported(name, "fp16")
    wanted, found = (numbers(loaded(bundle, device)) for device in ("cpu", "cuda"))
    near(found["vision"], wanted["vision"])
    for stage in wanted.keys() - {"vision"}:
        for ours, theirs in zip(found[stage], wanted[stage], strict=True):
            near(ours, theirs)
    for ours, theirs in zip(found["llm"], wanted["llm"], strict=True):
        second, first = np.sort(theirs[0])[-2:]
        if first - second > 2 * NEAR * np.abs(theirs).max():
            assert ours.argmax() == theirs.argmax()


@pytest.mark.parametrize("name", NAMES)
def test_int8_weights_are_near_to_float16(name: str, exported: Exported) -> None:
    """Both on the card: the CPU computes such products with activations in int8."""
    wanted = numbers(loaded(exported(name, "fp16"), "cuda"))
    found = numbers(loaded(exported(name, "int8-weight"), "cuda"))
    for ours, theirs in zip(found["llm"], wanted["llm"], strict=True):
        near(ours, theirs, 0.1)


@pytest.mark.parametrize("budget", [None, 200])
@pytest.mark.parametrize("name", [name for name in run_names() if "700x500" in name])
def test_golden_answers_on_cuda(name: str, budget: int | None, exported: Exported) -> None:
    """The CPU's tokens, with and without a cache that is compacted on the device."""
    variant, run = name.split("_", maxsplit=1)[0], load_run(name)
    bundle = exported(variant, "fp16")
    tokens = []
    for device in ("cpu", "cuda"):
        with lrs_edge.load(bundle, device=device) as engine:
            assert engine.provider == device
            scene = engine.open(run.image)
            answer = scene.ask(run.info["question"], kv_budget=budget, max_tokens=8)
            tokens.append(np.array(answer.token_ids))
    assert np.array_equal(*tokens)


@pytest.mark.parametrize("name", ["tiny-qwen", "embedded"])
def test_nodes_run_on_the_card(name: str, exported: Exported) -> None:
    """As counted after loading: decoders leave shapes, lengths and positions to the CPU alone."""
    with lrs_edge.load(exported(name, "fp16"), device="cuda") as engine:
        assert engine.device == "cuda"
        fused = engine.manifest.vision.has(Flavour.FUSED)
        for place in engine.places:
            assert place.device == "cuda"
            left = place.nodes.get("CPUExecutionProvider", 0)
            assert place.nodes["CUDAExecutionProvider"] > left
            assert not (left and place.stage == "vision" and fused)
