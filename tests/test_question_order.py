"""Questions on one scene share tiles and prefixes; no way to ask may change another's answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lrs_edge
from lrs_edge import Answer, Engine
from tests.golden_data import checkpoint
from tests.test_engine import IMAGE

QUESTIONS = ("How many ships are there?", "Is there a river?")

#: The second resampling has another prefix, and so caches of its own.
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"resampling": "reference"},
    {"policy": "reference"},
    {"kv_budget": 200},
    {"max_tiles": 0},
    {"search": "exhaustive"},
    {"prune": "none"},
    {"prune": "random"},
    {"prune": "norm"},
    {"prune": "fastv"},
    {"prune": "pdrop"},
    {"prune": "visionzip"},
    {"prune": "prumerge"},
)

asked = st.tuples(st.sampled_from(QUESTIONS), st.sampled_from(WAYS))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A golden checkpoint's bundle with everything that a way to prune needs."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export.bundle.writer import ExportOptions, export_bundle

    source = checkpoint("llama")
    if source is None:
        pytest.skip("the golden checkpoint is not here")
    target = tmp_path_factory.mktemp("order") / "bundle"
    options = ExportOptions(parity=False, attention_layers=(1,), vision_attention=True)
    export_bundle(str(source), target, options)
    with lrs_edge.load(target, provider="cpu", threads=1) as loaded:
        yield loaded


def ask(scene: lrs_edge.Scene, question: str, way: dict[str, Any]) -> Answer:
    return scene.ask(question, max_tokens=3, **way)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[tuple[str, int], Answer]:
    """Every question asked in every way, each on a fresh scene."""
    found = {}
    for question in QUESTIONS:
        for number, way in enumerate(WAYS):
            with engine.open(IMAGE) as scene:
                found[question, number] = ask(scene, question, way)
    return found


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.lists(asked, min_size=1, max_size=4), st.sampled_from(QUESTIONS))
def test_earlier_questions_change_no_answer(
    engine: Engine,
    alone: dict[tuple[str, int], Answer],
    earlier: list[tuple[str, dict[str, Any]]],
    last: str,
) -> None:
    with engine.open(IMAGE) as scene:
        for question, way in [*earlier, (last, {})]:
            found, fresh = ask(scene, question, way), alone[question, WAYS.index(way)]
            assert found.token_ids == fresh.token_ids, way
            assert found.search_end == fresh.search_end
            assert found.segments == fresh.segments
            assert (found.tokens.sent, found.tokens.scored) == (
                fresh.tokens.sent,
                fresh.tokens.scored,
            )
            places = {(r.level, r.row, r.col): r for r in fresh.regions}
            assert {(r.level, r.row, r.col) for r in found.regions} == set(places)
            for region in found.regions:
                other = places[region.level, region.row, region.col]
                assert region.tokens_kept == other.tokens_kept
                assert region.score == pytest.approx(other.score, abs=1e-5)


def test_ways_differ(alone: dict[tuple[str, int], Answer]) -> None:
    """Answers that were all alike would hide what one question does to another."""
    seen = {(answer.token_ids, answer.tokens.sent) for answer in alone.values()}
    assert len(seen) > len(WAYS)
