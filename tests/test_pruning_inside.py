"""Dropping tokens between the language model's layers, against a plain PyTorch model with masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import torch
from torch.nn import functional as F

import lrs_edge
from lrs_edge import Answer, BundleError, Engine, UsageError
from lrs_edge.answer import report
from lrs_edge.baselines.inside import VISION, PruningPlan, kept_count, kept_places, plan_pruning
from lrs_edge.baselines.segments import SegmentedDecoder
from lrs_edge.bundle.bundle import open_bundle, read_manifest
from lrs_edge.bundle.manifest import Flavour, SegmentSpec
from lrs_edge.commands.main import run
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.errors import ExportError
from lrs_edge.language.decoder import PREFILL_CHUNK, Decoder
from lrs_edge.language.kv_cache import TokenKind, Tokens, make_tokens
from lrs_edge.requests.options import AskOptions
from lrs_edge.search.rfm import token_scores
from lrs_edge_export.bundle.writer import ExportOptions, Precisions, export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.torch_model import decoder, stages
from tests.checkpoints import HIDDEN, LAYERS, write_qwen

SYSTEM, VIEW, TEXT = 5, 30, 6
LENGTH = SYSTEM + VIEW + TEXT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("inside") / "qwen")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return read_model(find_checkpoint(str(checkpoint)))


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    """Cut after both inner edges of its three layers."""
    target = checkpoint.parent / "bundle"
    export_bundle(str(checkpoint), target, ExportOptions(parity=False, attention_layers=(1, 2)))
    return target


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Path:
    """Not cut at all."""
    target = checkpoint.parent / "whole"
    export_bundle(str(checkpoint), target, ExportOptions(parity=False))
    return target


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Engine]:
    with lrs_edge.load(bundle, provider="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 255, size=(100, 150, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def segmented(bundle: Path) -> SegmentedDecoder:
    opened = open_bundle(bundle)
    spec = opened.manifest.llm
    graphs = [
        OnnxGraph.load(opened.file(segment.graph), BackendOptions("cpu", threads=1))
        for segment in spec.segments
    ]
    return SegmentedDecoder(graphs, spec)


def whole_decoder(bundle: Path) -> Decoder:
    opened = open_bundle(bundle)
    spec = opened.manifest.llm
    graph = OnnxGraph.load(opened.file(spec.path(Flavour.GQA)), BackendOptions("cpu", threads=1))
    return Decoder(graph, spec, scoring=False)


def prompt(length: int = LENGTH, seed: int = 3) -> tuple[np.ndarray, Tokens]:
    """A prompt of text, vision tokens and text."""
    embeds = np.random.default_rng(seed).standard_normal((length, HIDDEN)).astype(np.float32)
    kinds = np.full(length, TokenKind.GLOBAL, np.int8)
    kinds[:SYSTEM], kinds[-TEXT:] = TokenKind.SYSTEM, TokenKind.QUESTION
    kinds[SYSTEM + 3 : SYSTEM + 13 : 2] = TokenKind.NEWLINE
    kinds[SYSTEM + 14] = TokenKind.SEPARATOR
    return embeds, make_tokens(np.arange(length, dtype=np.int64), kinds)


class Masked:
    """The language model in plain PyTorch; dropped tokens are masked as keys, layer by layer."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._stage = model.llm

    def logits(
        self, embeds: np.ndarray, tokens: Tokens, plan: PruningPlan, later: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Which prompt tokens each cut leaves, and logits [V] after prompt and later tokens."""
        x = torch.from_numpy(np.concatenate([embeds, later]))
        prompt_length, total = len(embeds), len(embeds) + len(later)
        visible = torch.ones(total, total).tril().bool()
        vision = np.flatnonzero(np.isin(tokens["kind"], VISION))
        alive, initial, left = vision, len(vision), []
        before: torch.Tensor | None = None
        for layer in range(LAYERS):
            if layer in plan.keeps:
                entering = before if plan.ranking == "attention" else x
                assert entering is not None
                ranked = layer - 1 if plan.ranking == "attention" else layer
                mask = self._earlier if plan.ranking == "attention" else visible
                attention = self._last_row(entering, ranked, prompt_length, mask)
                order = alive[np.argsort(-attention[alive], kind="stable")]
                kept = order[: int(initial * plan.keeps[layer])]
                dropped = np.setdiff1d(alive, kept)
                visible = visible.clone()
                visible[:, dropped] = False
                visible[dropped, dropped] = True
                alive = kept
                left.append(np.setdiff1d(np.arange(prompt_length), np.setdiff1d(vision, alive)))
            before, self._earlier = x, visible
            x = self._layer(x, layer, visible)
        normed = stages.final_norm(self._stage, x[-1:])
        return left, F.linear(normed, torch.from_numpy(self._model.lm_head()))[0].numpy()

    def _last_row(
        self, x: torch.Tensor, layer: int, length: int, visible: torch.Tensor
    ) -> np.ndarray:
        """Attention of the prompt's last token to the prompt, mean over heads."""
        weights, turns = stages.StoredLayer(self._stage, layer), stages.rope(self._stage, len(x))
        last = slice(length - 1, length)
        products = decoder.attention_logits(self._stage.config, weights, x, turns, last)[:, 0]
        products = products.masked_fill(~visible[length - 1], -torch.inf)
        return products.softmax(-1).mean(0).numpy()

    def _layer(self, x: torch.Tensor, layer: int, visible: torch.Tensor) -> torch.Tensor:
        weights, turns = stages.StoredLayer(self._stage, layer), stages.rope(self._stage, len(x))
        attend = decoder.masked(visible)
        return decoder.decoder_layer(self._stage.config, weights, x, turns, attend)


def close(found: np.ndarray, wanted: np.ndarray, limit: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= limit * np.abs(wanted).max()


# -- segments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8-weight"])
@pytest.mark.parametrize("length", [LENGTH, PREFILL_CHUNK + 40])
def test_without_a_cut_segments_are_the_whole_model(
    checkpoint: Path, bundle: Path, tmp_path: Path, precision: str, length: int
) -> None:
    if precision == "int8-weight":
        bundle = tmp_path / "int8"
        options = ExportOptions(
            parity=False, attention_layers=(1, 2), precisions=Precisions.all("int8-weight")
        )
        export_bundle(str(checkpoint), bundle, options)
    embeds, tokens = prompt(length)
    parts, decoder = segmented(bundle), whole_decoder(bundle)
    caches, logits = parts.prefill(embeds, tokens, PruningPlan({}, "attention"))
    cache = decoder.new_cache()
    close(logits, decoder.forward(cache, embeds, tokens))
    for step in range(3):
        later = embeds[step : step + 1]
        label = make_tokens(caches.text_positions(1), TokenKind.ANSWER)
        close(parts.forward(caches, later, label), decoder.forward(cache, later, label))
    assert [len(held) for held in caches.tokens] == [length + 3] * 3


@pytest.mark.parametrize(
    "plan",
    [
        PruningPlan({1: 0.5}, "attention"),
        PruningPlan({2: 0.5}, "attention"),
        PruningPlan({1: 0.75, 2: 0.25}, "attention"),
        PruningPlan({1: 0.5}, "next_attention"),
        PruningPlan({1: 0.5, 2: 0.25}, "next_attention"),
        PruningPlan({2: 0.0}, "next_attention"),
    ],
    ids=str,
)
def test_dropping_equals_masking(model: Model, bundle: Path, plan: PruningPlan) -> None:
    embeds, tokens = prompt()
    later = np.random.default_rng(8).standard_normal((3, HIDDEN)).astype(np.float32)
    parts, masked = segmented(bundle), Masked(model)
    caches, logits = parts.prefill(embeds, tokens, plan)
    left, wanted = masked.logits(embeds, tokens, plan, later[:0])
    close(logits[0], wanted)
    held = [tokens_of["position"] for tokens_of in caches.tokens]
    for kept, layer in zip(left, plan.keeps, strict=True):
        assert np.array_equal(held[layer], kept)
    for step in range(3):
        label = make_tokens(caches.text_positions(1), TokenKind.ANSWER)
        logits = parts.forward(caches, later[step : step + 1], label)
        close(logits[0], masked.logits(embeds, tokens, plan, later[: step + 1])[1])


def test_cutting_changes_something(bundle: Path) -> None:
    embeds, tokens = prompt()
    found = [
        segmented(bundle).prefill(embeds, tokens, PruningPlan(keeps, "attention"))[1]
        for keeps in ({}, {1: 0.5}, {2: 0.5})
    ]
    assert np.abs(found[0] - found[1]).max() > 1e-2
    assert np.abs(found[1] - found[2]).max() > 1e-2


def test_the_last_chunk_ranks_all_tokens(model: Model, bundle: Path) -> None:
    embeds, tokens = prompt(PREFILL_CHUNK + 9)
    for ranking in ("attention", "next_attention"):
        plan = PruningPlan({1: 0.25}, ranking)
        _, logits = segmented(bundle).prefill(embeds, tokens, plan)
        close(logits[0], Masked(model).logits(embeds, tokens, plan, embeds[:0])[1], 1e-4)


# -- plans and places ----------------------------------------------------------------------------

CUT = tuple(SegmentSpec(f"llm_segment{i}.onnx", 8 * i, 8) for i in range(4))


def test_defaults_are_the_papers() -> None:
    fastv = plan_pruning(AskOptions(prune="fastv"), CUT)
    assert (dict(fastv.keeps), fastv.ranking) == ({8: 0.5}, "attention")
    pdrop = plan_pruning(AskOptions(prune="pdrop"), CUT)
    assert (dict(pdrop.keeps), pdrop.ranking) == ({8: 0.5, 16: 0.25, 24: 0.125}, "next_attention")


def test_plans_follow_the_options() -> None:
    options = AskOptions(prune="pdrop", prune_layers=(8, 24), prune_ratio=0.75)
    assert plan_pruning(options, CUT).keeps == {8: 0.25, 24: 0.0625}
    with pytest.raises(UsageError, match=r"not cut after layer 9.*8, 16, 24"):
        plan_pruning(AskOptions(prune="fastv", prune_layers=(9,)), CUT)
    with pytest.raises(BundleError, match="--attention-layers"):
        plan_pruning(AskOptions(prune="fastv"), ())


def test_counts_are_rounded_down_but_not_by_float_error() -> None:
    assert kept_count(10, 1 - 0.9) == 1
    assert kept_count(7, 0.5) == 3
    assert kept_count(3, 0.125) == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from(list(TokenKind)), min_size=1, max_size=40), st.data())
def test_kept_places_are_all_text_and_the_best_vision_tokens(
    kinds: list[TokenKind], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(kinds)))
    seed = data.draw(st.integers(0, 2**31))
    logits = np.random.default_rng(seed).normal(size=(3, len(kinds))).astype(np.float32)
    tokens = make_tokens(np.arange(len(kinds), dtype=np.int64), np.array(kinds, np.int8))
    kept = kept_places(tokens, logits, count)
    assert np.array_equal(kept, np.unique(kept))
    vision = {place for place, kind in enumerate(kinds) if kind in VISION}
    assert set(range(len(kinds))) - vision <= set(kept.tolist())
    chosen = vision & set(kept.tolist())
    assert len(chosen) == min(count, len(vision))
    scores = token_scores(logits)
    if chosen and chosen != vision:
        assert min(scores[list(chosen)]) >= max(scores[list(vision - chosen)])


# -- questions -----------------------------------------------------------------------------------


def ask(engine: Engine, image: Path, **options: object) -> Answer:
    with engine.open(image) as scene:
        return scene.ask("How many ships?", max_tokens=4, **options)


def test_fastv_and_pdrop_answer(engine: Engine, image: Path) -> None:
    none = ask(engine, image, prune="none")
    assert none.segments == ()
    for prune, shares in (("fastv", (1, 0.5, 0.5)), ("pdrop", (1, 0.5, 0.25))):
        answer = ask(engine, image, prune=prune)
        assert (answer.prune, answer.token_ids != ()) == (prune, True)
        assert answer.tokens.sent == none.tokens.sent
        assert [(s.first_layer, s.layers) for s in answer.segments] == [(0, 1), (1, 1), (2, 1)]
        # All but the separator may be dropped.
        vision = none.tokens.sent - 1
        assert [s.vision_tokens for s in answer.segments] == [int(vision * x) for x in shares]
        text = {s.tokens - s.vision_tokens for s in answer.segments}
        assert text == {answer.tokens.text + 1}
        told = json.loads(report.to_json(answer, report.ImageFacts(str(image), 150, 100)))
        assert [s["tokens"] for s in told["segments"]] == [s.tokens for s in answer.segments]
        assert "in layers 0..0" in report.evidence(answer)


def test_traces_say_what_each_segment_saw(engine: Engine, image: Path, tmp_path: Path) -> None:
    with engine.open(image) as scene:
        trace = tmp_path / "trace.npz"
        answer = scene.ask("How many ships?", max_tokens=2, prune="pdrop", trace=trace)
    with np.load(trace) as arrays:
        assert (arrays["search"].tolist(), arrays["prune"].tolist()) == (["pyramid"], ["pdrop"])
        seen = [arrays[f"segment{number}_positions"] for number in range(3)]
        assert np.array_equal(seen[0], arrays["prefill_position_ids"])
        assert "rfm1_attn" not in arrays
    assert [len(places) for places in seen] == [segment.tokens for segment in answer.segments]
    assert set(seen[2]) < set(seen[1]) < set(seen[0])


def test_dropping_nothing_is_no_pruning(engine: Engine, image: Path) -> None:
    none = ask(engine, image, prune="none")
    for prune in ("fastv", "pdrop"):
        assert ask(engine, image, prune=prune, prune_ratio=0.0).token_ids == none.token_ids


def test_questions_after_another_are_unharmed(engine: Engine, image: Path) -> None:
    with engine.open(image) as scene:
        before = scene.ask("How many ships?", max_tokens=4)
        first = scene.ask("How many ships?", max_tokens=4, prune="fastv", prune_layers=(2,))
        again = scene.ask("How many ships?", max_tokens=4, prune="fastv", prune_layers=(2,))
        after = scene.ask("How many ships?", max_tokens=4)
    assert first.token_ids == again.token_ids
    vision = [segment.vision_tokens for segment in first.segments]
    assert vision[0] == vision[1] > vision[2]
    assert before.token_ids == after.token_ids


def test_a_bundle_without_segments_says_what_to_do(whole: Path, image: Path) -> None:
    with (
        lrs_edge.load(whole, provider="cpu", threads=1) as engine,
        pytest.raises(BundleError, match="--attention-layers"),
    ):
        ask(engine, image, prune="fastv")


# -- bundles -------------------------------------------------------------------------------------


def test_segments_add_no_weights(bundle: Path, whole: Path) -> None:
    data = "llm.onnx.data"
    # Keys of the layer after a cut are projected twice, by the same weights.
    assert (bundle / data).read_bytes() == (whole / data).read_bytes()
    assert (bundle / "llm.onnx").read_bytes() == (whole / "llm.onnx").read_bytes()
    segments = read_manifest(bundle).llm.segments
    assert [(s.first_layer, s.layers) for s in segments] == [(0, 1), (1, 1), (2, 1)]
    assert read_manifest(whole).llm.segments == ()
    assert sum((bundle / s.graph).stat().st_size for s in segments) < 200_000


def test_the_command_cuts(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    line = ["export", str(checkpoint), "-o", str(target), "--no-parity", "-q"]
    assert run([*line, "--attention-layers", "2"]) == 0
    segments = read_manifest(target).llm.segments
    assert [(s.first_layer, s.layers) for s in segments] == [(0, 2), (2, 1)]
    assert run([*line, "--force", "--attention-layers", "9"]) == 1
    assert run([*line, "--force", "--attention-layers", "two"]) == 2


@pytest.mark.parametrize("cuts", [(0,), (LAYERS,), (2, 1), (1, 1), (-1,)])
def test_cuts_outside_the_model_are_refused(
    checkpoint: Path, tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    options = ExportOptions(parity=False, attention_layers=cuts)
    with pytest.raises(ExportError, match="--attention-layers"):
        export_bundle(str(checkpoint), tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "layers", [[(0, 1), (1, 1)], [(0, 2), (1, 2)], [(1, 2)], [(0, 3), (3, 0)], [(0, 4)]]
)
def test_segments_that_are_not_all_layers_are_refused(
    bundle: Path, tmp_path: Path, layers: list[tuple[int, int]]
) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["llm"]["segments"] = [
        {"graph": "llm_segment0.onnx", "first_layer": first, "layers": count}
        for first, count in layers
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="do not fit together"):
        read_manifest(tmp_path)


def test_a_graph_of_another_segment_is_refused(bundle: Path) -> None:
    opened = open_bundle(bundle)
    spec = opened.manifest.llm
    graph = OnnxGraph.load(opened.file(spec.segments[0].graph), BackendOptions("cpu"))
    with pytest.raises(BundleError, match="llm_segment1"):
        SegmentedDecoder([graph, graph, graph], spec)
