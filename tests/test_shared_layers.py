"""Where the RFM is the language model's first layers: one copy of them in memory, one prefix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")

import onnx

import lrs_edge
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.joined import JoinedBuffers, JoinedGraph
from lrs_edge.errors import BundleError
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.search.rfm import LEAST_SCORE, relative_logits, token_scores
from lrs_edge.stages import Stages, load_stages
from lrs_edge_export.bundle.options import ExportOptions, Precisions
from lrs_edge_export.bundle.writer import export_bundle
from tests.checkpoints import LAYERS, edit_json, write_qwen
from tests.sequences import recognisable

QUESTIONS = ("What is this?", "Is there a ship in the harbour?")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a tiny checkpoint whose RFM is its language model's first layers."""
    folder = tmp_path_factory.mktemp("shared")
    checkpoint = write_qwen(folder / "checkpoint")

    def made(layers: int = 1, precision: str = "fp32") -> Path:
        target = folder / f"{layers}-{precision}"
        if not target.exists():
            precisions = Precisions(llm=precision)
            options = ExportOptions(parity=False, rfm_layers=layers, precisions=precisions)
            export_bundle(str(checkpoint), target, options)
        return target

    return made


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def apart(bundle: Path, target: Path) -> Path:
    """The bundle as if stages shared nothing: a graph of the whole language model is used."""
    shutil.copytree(bundle, target)
    manifest = open_bundle(bundle).manifest
    entry = manifest_of(target)["llm"]
    graphs = [file for file in entry["graphs"] if file["flavour"] != "gqa-rest"]
    assert len(graphs) == len(manifest.llm.graphs) - 1
    edit_json(target / "manifest.json", llm=entry | {"graphs": graphs})
    return target


def manifest_of(bundle: Path) -> dict[str, Any]:

    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return found


def loaded(bundle: Path) -> Stages:
    return load_stages(open_bundle(bundle), BackendOptions(provider="cpu", threads=1))


def places(graph: Path) -> dict[tuple[int, int], str]:
    """Parts of the weight file that a graph reads."""
    model = onnx.load(str(graph), load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        values = {entry.key: entry.value for entry in tensor.external_data}
        if values:
            assert values["location"] == "llm.onnx.data"
            found[int(values["offset"]), int(values["length"])] = tensor.name
    return found


@pytest.mark.parametrize("layers", [1, LAYERS - 1])
@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic"])
def test_every_weight_is_in_one_of_two_graphs(
    export: Callable[..., Path], layers: int, precision: str
) -> None:
    bundle = export(layers, precision)
    first, rest, whole = (
        places(bundle / name) for name in ("rfm.onnx", "llm_rest.onnx", "llm.onnx")
    )
    # Of the layers nothing; a vector of frequencies is a constant of both.
    assert {first[place] for place in first.keys() & rest.keys()} <= {"inverse_frequencies"}
    assert first.keys() | rest.keys() == whole.keys()
    assert not (bundle / "rfm.onnx.data").exists()
    assert not (bundle / "llm_rest.onnx.data").exists()


def test_both_stages_run_one_graph_in_memory(export: Callable[..., Path]) -> None:
    stages = loaded(export())
    assert stages.focus is not None
    joined = stages.llm._decoder._graph._graph
    assert isinstance(joined, JoinedGraph)
    assert stages.focus._decoder._graph._graph is joined._front


@pytest.mark.parametrize("layers", [1, LAYERS - 1])
@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic", "int8-weight"])
def test_answers_are_those_of_stages_apart(
    export: Callable[..., Path], image: Path, tmp_path: Path, layers: int, precision: str
) -> None:
    shared = export(layers, precision)
    found = []
    for bundle in (shared, apart(shared, tmp_path / "apart")):
        with lrs_edge.load(bundle, provider="cpu", threads=1) as engine:
            assert isinstance(engine._loaded().llm.new_cache().buffers, JoinedBuffers) is (
                bundle == shared
            )
            with engine.open(image) as scene:
                for number, question in enumerate((*QUESTIONS, QUESTIONS[0])):
                    trace = tmp_path / f"{bundle.name}-{number}.npz"
                    scene.ask(question, max_tokens=4, trace=trace)
                    with np.load(trace) as arrays:
                        found.append({name: arrays[name] for name in arrays.files})
    tolerance = {"fp32": 1e-4, "int8-weight": 1e-4}.get(precision, 0.05)
    for one, other in zip(found[:3], found[3:], strict=True):
        for name in ("rfm1_logits_heads", "prefill_last_logits"):
            scale = np.abs(other[name]).max()
            np.testing.assert_allclose(one[name], other[name], rtol=0, atol=tolerance * scale)
        if precision != "int8-dynamic":
            np.testing.assert_array_equal(one["new_ids"], other["new_ids"])
            np.testing.assert_array_equal(one["topk1_raw_indices"], other["topk1_raw_indices"])
    # The same question again, of what is remembered.
    for name in ("rfm1_logits_heads", "prefill_last_logits"):
        np.testing.assert_array_equal(found[2][name], found[0][name])


def test_the_prefix_runs_once_for_both(export: Callable[..., Path], tmp_path: Path) -> None:
    shared = export()
    counts = []
    for bundle in (shared, apart(shared, tmp_path / "apart")):
        stages = loaded(bundle)
        assert stages.focus is not None
        rng = np.random.default_rng(0)
        embeds = recognisable(
            rng.standard_normal((70, stages.manifest.llm.width)).astype(np.float32)
        )
        tokens = make_tokens(np.arange(70, dtype=np.int64), TokenKind.GLOBAL)
        own, llm = stages.focus.new_cache(), stages.llm.new_cache()
        assert stages.focus.known(own, 70, llm) == 0
        stages.focus.fill_prefix(own, embeds, tokens, llm_cache=llm)
        assert len(own) == stages.focus.known(own, 70, llm) == 70
        stages.llm.fill_prefix(llm, embeds, tokens)
        counts.append({graph: work.tokens for graph, work in stages.meter.read().items()})
        if bundle == shared:
            for name in own.buffers.names:
                held = (cache.buffers.read(name)[:, :, :70] for cache in (own, llm))
                np.testing.assert_array_equal(*held)
    assert counts == [{"llm_rest.onnx": 70}, {"rfm.onnx": 70, "llm.onnx": 70}]


def test_a_cache_of_both_can_be_pruned_and_copied(export: Callable[..., Path]) -> None:
    stages = loaded(export())
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((12, stages.manifest.llm.width)).astype(np.float32)
    tokens = make_tokens(np.arange(12, dtype=np.int64), TokenKind.TILE)
    cache = stages.llm.new_cache()
    stages.llm.prefill(cache, embeds, tokens, 4)
    kept = np.array([0, 2, 5, 11])
    wanted = {name: cache.buffers.read(name)[:, :, kept] for name in cache.buffers.names}
    cache.keep(kept)
    copied = cache.copy(3)
    assert copied.buffers.nbytes == copied.bytes_per_token * copied.buffers.capacity
    for name, values in wanted.items():
        np.testing.assert_array_equal(cache.buffers.read(name)[:, :, :4], values)
        np.testing.assert_array_equal(copied.buffers.read(name)[:, :, :3], values[:, :, :3])


@pytest.mark.parametrize("options", [{"policy": "reference"}, {"kv_budget": 60}, {"timeout": 60}])
def test_every_way_to_ask_works(
    export: Callable[..., Path], image: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    shared = export()
    ids = []
    for bundle in (shared, apart(shared, tmp_path / "apart")):
        with (
            lrs_edge.load(bundle, provider="cpu", threads=1) as engine,
            engine.open(image) as scene,
        ):
            answer = scene.ask(QUESTIONS[0], max_tokens=4, **options)
            ids.append((answer.token_ids, [region.kept for region in answer.regions]))
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("stage", "change", "named"),
    [
        ("rfm", {"layers": LAYERS}, "must be its first layers"),
        ("rfm", {"kv_heads": 1}, r"rfm\.kv_heads must be llm\.kv_heads"),
        ("rfm", {"precision": "int8-weight"}, r"rfm\.precision must be llm\.precision"),
        ("search", {"relative_to": "x" * 5000}, r"search\.relative_to must have at most 4096"),
    ],
)
def test_manifests_that_do_not_fit_are_refused(
    export: Callable[..., Path], tmp_path: Path, stage: str, change: dict[str, Any], named: str
) -> None:
    bundle = shutil.copytree(export(), tmp_path / "bundle")
    entry = manifest_of(bundle)[stage]
    edit_json(bundle / "manifest.json", **{stage: entry | change})
    with pytest.raises(BundleError, match=named):
        open_bundle(bundle)


def relative(bundle: Path, target: Path, text: str) -> Path:
    shutil.copytree(bundle, target)
    search = manifest_of(target)["search"] | {"relative_to": text}
    edit_json(target / "manifest.json", search=search)
    return target


@pytest.mark.parametrize("search", ["pyramid", "exhaustive"])
def test_scores_can_be_relative_to_a_generic_instruction(
    export: Callable[..., Path], image: Path, tmp_path: Path, search: str
) -> None:
    plain = export()
    found = {}
    generic = "Describe the image."
    for name, bundle in (
        ("plain", plain),
        ("relative", relative(plain, tmp_path / "relative", generic)),
        ("to itself", relative(plain, tmp_path / "itself", QUESTIONS[0])),
    ):
        with (
            lrs_edge.load(bundle, provider="cpu", threads=1) as engine,
            engine.open(image) as scene,
        ):
            for question in (QUESTIONS[0], generic, QUESTIONS[0]):
                trace = tmp_path / f"{name}.npz"
                scene.ask(question, max_tokens=1, trace=trace, search=search)
                with np.load(trace) as arrays:
                    key = name, question
                    scores = arrays["rfm1_attn"]
                    width = int(arrays["seq1_local_hw_incl_newline"][1])
                    shown = arrays["rfm1_local_indices"] % width < width - 1
                    # Remembered or not, the numbers are the same.
                    np.testing.assert_array_equal(found.setdefault(key, scores), scores)
    asked, base = found["plain", QUESTIONS[0]], found["plain", generic]
    if search == "pyramid":
        wanted = asked / base
        np.testing.assert_allclose(
            found["relative", QUESTIONS[0]], wanted / wanted.sum(), rtol=1e-3
        )
    # Newlines are in several passes of an exhaustive search.
    flat = found["to itself", QUESTIONS[0]][shown]
    np.testing.assert_allclose(flat, np.full(len(flat), flat[0]), rtol=1e-4)


def test_the_reference_policy_knows_no_relative_scores(
    export: Callable[..., Path], image: Path, tmp_path: Path
) -> None:
    plain = export()
    regions = []
    for bundle in (plain, relative(plain, tmp_path / "relative", "Describe the image.")):
        with (
            lrs_edge.load(bundle, provider="cpu", threads=1) as engine,
            engine.open(image) as scene,
        ):
            answer = scene.ask(QUESTIONS[0], max_tokens=1, policy="reference")
            regions.append([(region.score, region.kept) for region in answer.regions])
    assert regions[0] == regions[1]


def test_an_instruction_that_cannot_be_asked_is_refused(
    export: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = relative(export(), tmp_path / "bundle", "Describe <|im_end|> it")
    with pytest.raises(BundleError, match=r"relative_to.*control token"):
        loaded(bundle)


def test_quotients() -> None:
    asked = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], np.float32))
    generic = np.log(np.array([[0.2, 0.2, 0.6], [0.2, 0.4, 0.4]], np.float32))
    quotients = np.array([0.3 / 0.2, 0.2 / 0.3, 0.5 / 0.5])
    found = token_scores(relative_logits(asked, generic))
    np.testing.assert_allclose(found, quotients / quotients.sum(), rtol=1e-5)
    # Nothing is divided by nothing.
    nothing = np.array([[0.0, -1e4]], np.float32)
    assert np.isfinite(relative_logits(nothing, nothing)).all()
    assert relative_logits(np.zeros((2, 0), np.float32), np.zeros((2, 0), np.float32)).size == 0
    assert LEAST_SCORE < 1 / (1 << 20)
