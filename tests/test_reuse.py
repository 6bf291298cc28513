"""What a scene remembers changes what is computed, never what comes out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lrs_edge
from lrs_edge import BackendError, Engine
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.engines.metered import GraphWork, MeteredGraph
from lrs_edge.language.decoder import PREFILL_CHUNK, _boundaries
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.search.rfm import dense_bias
from tests.golden_data import ROOT
from tests.sequences import recognisable

IMAGE = ROOT / "images" / "img_1500x900.png"
QUESTIONS = ("How many ships are there?", "Is there a river?", "What color is the roof?")


@pytest.fixture(scope="module")
def engine(golden_bundles: dict[str, Path]) -> Engine:
    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as loaded:
        yield loaded


def traced(scene: lrs_edge.Scene, path: Path, question: str, **options: object) -> dict:
    scene.ask(question, max_tokens=3, trace=path, **options)
    with np.load(path) as data:
        return {key: data[key] for key in data}


def assert_same(found: dict, wanted: dict) -> None:
    assert found["new_ids"].tolist() == wanted["new_ids"].tolist()
    keys = [key for key in wanted if key.endswith(("_attn", "logits", "logits_heads"))]
    assert len(keys) > 2
    for key in keys:
        assert np.abs(found[key] - wanted[key]).max() <= 1e-4


def work(engine: Engine, ask: object) -> dict[str, GraphWork]:
    before = engine.meter.read()
    ask()  # type: ignore[operator]
    return engine.meter.since(before)


def test_a_second_question_runs_only_what_changed(engine: Engine) -> None:
    rfm, llm = engine.manifest.rfm.path(Flavour.GQA), engine.manifest.llm.path(Flavour.GQA)
    with engine.open(IMAGE) as scene:
        first = work(engine, lambda: scene.ask(QUESTIONS[0], max_tokens=1))
        caches = scene._caches
        assert caches is not None
        base = int(np.isin(caches.rfm.tokens["kind"], (3, 4)).sum())
        prefix = int((caches.rfm.tokens["kind"] < 3).sum())
        second = work(engine, lambda: scene.ask(QUESTIONS[1], max_tokens=1))
        again = work(engine, lambda: scene.ask(QUESTIONS[1], max_tokens=1))
    assert engine.manifest.vision.path(Flavour.PLAIN) not in second
    texts = abs(len(QUESTIONS[0]) - len(QUESTIONS[1])) + 10
    saved = first[rfm].tokens - second[rfm].tokens
    assert abs(saved - (base + prefix)) < texts
    # The prefix at least; tokens kept for both questions may begin alike. Prompts differ by a few.
    assert first[llm].tokens - second[llm].tokens > prefix - 200
    # The same question: the base level's result and the whole prompt are there.
    assert again[rfm].tokens < second[rfm].tokens
    assert llm not in again


@pytest.mark.parametrize("policy", ["full", "reference"])
def test_a_used_scene_answers_as_a_fresh_one(engine: Engine, tmp_path: Path, policy: str) -> None:
    fresh = {}
    for question in QUESTIONS:
        with engine.open(IMAGE) as scene:
            fresh[question] = traced(scene, tmp_path / "t.npz", question, policy=policy)
    with engine.open(IMAGE) as scene:
        for question in (*QUESTIONS, *reversed(QUESTIONS), QUESTIONS[0]):
            found = traced(scene, tmp_path / "t.npz", question, policy=policy)
            assert_same(found, fresh[question])


def test_nothing_that_disturbs_a_question_harms_the_next(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.open(IMAGE) as scene:
        wanted = traced(scene, tmp_path / "t.npz", QUESTIONS[0])
    with engine.open(IMAGE) as scene:
        disturbances = (
            lambda: scene.ask(QUESTIONS[0], max_tokens=2, kv_budget=250),
            lambda: scene.ask(QUESTIONS[0], max_tokens=2, kv_budget=60),
            lambda: scene.ask(QUESTIONS[0], max_tokens=2, policy="reference"),
            lambda: scene.ask(QUESTIONS[0], max_tokens=2, max_tiles=4),
            lambda: scene.ask(QUESTIONS[0], max_tokens=2, search="exhaustive"),
            lambda: scene.ask(QUESTIONS[1], max_tokens=2, timeout=0.001),
            lambda: next(scene.stream(QUESTIONS[2], max_tokens=9)),
        )
        for disturb in disturbances:
            disturb()
            assert_same(traced(scene, tmp_path / "t.npz", QUESTIONS[0]), wanted)
        # Every run of a question fails in turn, until one goes through.
        run, ended, fails = MeteredGraph.run, False, 0
        while not ended:
            fails += 1
            monkeypatch.setattr(MeteredGraph, "run", failing(run, fails))
            with suppress(BackendError):
                scene.ask(QUESTIONS[fails % 2 + 1], max_tokens=2)
                ended = True
            monkeypatch.setattr(MeteredGraph, "run", run)
            assert_same(traced(scene, tmp_path / "t.npz", QUESTIONS[0]), wanted)
        assert fails > 4


@given(
    head=st.lists(st.integers(1, 900), min_size=1, max_size=3),
    tails=st.tuples(st.integers(0, 900), st.integers(0, 900)),
)
def test_sequences_that_begin_alike_are_cut_alike(head: list[int], tails: tuple[int, int]) -> None:
    ends = np.cumsum(head).tolist()
    one, other = (_boundaries(PREFILL_CHUNK, *ends, ends[-1] + tail) for tail in tails)
    for bounds in (one, other):
        assert all(0 < b - a <= PREFILL_CHUNK for a, b in itertools.pairwise(bounds))
    # Only the last part of the shorter one may end where the longer one goes on.
    common = set(range(ends[-1] + min(tails) // PREFILL_CHUNK * PREFILL_CHUNK + 1))
    assert common.intersection(one) == common.intersection(other)


@pytest.mark.parametrize("held", [0, 3, 4, 9, 10, 13])
def test_a_dense_pass_goes_on_anywhere_in_its_prefix(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr("lrs_edge.language.decoder.PREFILL_CHUNK", 4)
    focus = engine._loaded().focus
    rng = np.random.default_rng(held)
    width = engine.manifest.rfm.hidden
    embeds = recognisable(rng.standard_normal((16, width)).astype(np.float32))
    tokens = make_tokens(np.arange(16, dtype=np.int64), TokenKind.TILE)
    prefix = 10
    bias = dense_bias(prefix, np.zeros(16 - prefix, np.bool_))
    wanted = focus.logits(focus.new_cache(), embeds, tokens, (prefix, 16), bias)
    cache = focus.new_cache()
    focus.fill_prefix(cache, embeds[:prefix], tokens[:prefix])
    focus.logits(cache, embeds[:prefix], tokens[:prefix], (prefix,))
    cache.truncate(min(held, len(cache)))
    found = focus.logits(cache, embeds, tokens, (prefix, 16), bias)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def failing(run: Callable[..., object], fails: int) -> Callable[..., object]:
    """`run` that raises in place of its result when it is called for the nth time."""
    calls = itertools.count(1)

    def broken(*args: object) -> object:
        found = run(*args)
        if next(calls) == fails:
            raise BackendError("lost")
        return found

    return broken


def test_a_cache_that_is_too_large_keeps_its_prefix_only(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.open(IMAGE) as scene:
        wanted = traced(scene, tmp_path / "t.npz", QUESTIONS[1])
    monkeypatch.setattr("lrs_edge.requests.scene_caches.MAX_KEPT_BYTES", 1000)
    monkeypatch.setattr("lrs_edge.search.scorers.MAX_KEPT_BYTES", 1000)
    with engine.open(IMAGE) as scene:
        scene.ask(QUESTIONS[0], max_tokens=1)
        caches = scene._caches
        assert caches is not None
        assert (caches.rfm.tokens["kind"] < 3).all()
        assert len(caches.rfm) == len(caches.llm) > 576
        assert_same(traced(scene, tmp_path / "t.npz", QUESTIONS[1]), wanted)
