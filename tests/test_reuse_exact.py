"""A cache gives exactly the numbers of an empty one, though int8 scales are those of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lrs_edge
from lrs_edge import Engine
from lrs_edge.engines.rows import Rows
from lrs_edge.language.kv_cache import TokenKind, Tokens, make_tokens
from tests.sequences import recognisable
from tests.test_engine import picture

CHUNK = 8
PREFIX = 11


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The embedded model: its RFM quantizes activations while it runs."""
    with lrs_edge.load(provider="cpu", threads=1) as loaded:
        yield loaded


@st.composite
def passes(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Passes over one scene: rows of tiles that are shown, where they part, words of the text."""
    one = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 9))
    return draw(st.lists(one, min_size=2, max_size=4))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(passes())
def test_any_order_of_passes_gives_the_numbers_of_an_empty_cache(
    engine: Engine, asked: list[tuple[int, int, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrs_edge.language.decoder.PREFILL_CHUNK", CHUNK)
        focus = engine._loaded().focus
        cache = focus.new_cache()
        for shown, parts_at, words in asked:
            embeds, tokens, ends = sequence(engine, shown, parts_at, words)
            focus.fill_prefix(cache, embeds[:PREFIX], tokens[:PREFIX])
            found = focus.logits(cache, embeds, tokens, ends)
            fresh = focus.logits(focus.new_cache(), embeds, tokens, ends)
            assert np.array_equal(found, fresh)


def sequence(
    engine: Engine, shown: int, parts_at: int, words: int
) -> tuple[Rows, Tokens, list[int]]:
    """A pass: prefix, `shown` local tokens of which those from `parts_at` on are others, text."""
    rng = np.random.default_rng(1)
    embeds = rng.standard_normal((PREFIX + 60, engine.manifest.rfm.hidden)).astype(np.float32)
    embeds *= rng.exponential(1, (len(embeds), 1)).astype(np.float32)
    local = embeds[PREFIX : PREFIX + shown].copy()
    local[parts_at:] *= -1.5
    whole = np.concatenate([embeds[:PREFIX], local, embeds[-words:]])
    kinds = np.full(len(whole), TokenKind.TILE, np.int8)
    kinds[:PREFIX], kinds[PREFIX + shown :] = TokenKind.GLOBAL, TokenKind.QUESTION
    tokens = make_tokens(np.arange(len(whole), dtype=np.int64), kinds)
    return recognisable(whole), tokens, [PREFIX, PREFIX + shown, len(whole)]


#: A strip of one column of tiles: a few of them are where the whole level begins.
STRIP = (300, 2400)
BUDGETS = (None, 6, 4, 3)
QUESTIONS = ("What is this?", "Is there a river?")


@pytest.fixture(scope="module")
def strip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture(tmp_path_factory.mktemp("strip") / "strip.png", *STRIP)


@pytest.fixture(scope="module")
def alone(engine: Engine, strip: Path) -> dict[tuple[str, int | None], dict]:
    found = {}
    for question in QUESTIONS:
        for budget in BUDGETS:
            with engine.open(strip) as scene:
                found[question, budget] = scores(scene, question, budget)
    assert len({len(regions) for regions in found.values()}) > 2
    return found


ORDERS = st.lists(
    st.tuples(st.sampled_from(QUESTIONS), st.sampled_from(BUDGETS)), min_size=2, max_size=4
)


@settings(deadline=None, max_examples=3, derandomize=True)
@given(ORDERS)
@example([(QUESTIONS[0], budget) for budget in BUDGETS])
@example([(QUESTIONS[1], budget) for budget in reversed(BUDGETS)])
def test_any_order_of_questions_and_budgets_gives_the_numbers_of_a_fresh_scene(
    engine: Engine,
    strip: Path,
    alone: dict[tuple[str, int | None], dict],
    order: list[tuple[str, int | None]],
) -> None:
    with engine.open(strip) as scene:
        for question, budget in order:
            assert scores(scene, question, budget) == alone[question, budget]


def scores(scene: lrs_edge.Scene, question: str, budget: int | None) -> dict[object, object]:
    """All that an answer says of its regions, and the text, exactly."""
    answer = scene.ask(question, max_tiles=budget, max_tokens=3)
    regions = {(r.level, r.row, r.col): (r.score, r.tokens_kept) for r in answer.regions}
    return {**regions, "text": answer.token_ids}
