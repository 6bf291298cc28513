"""The budget of one question: its clock, measured rates, and the sharing of tiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.errors import CancelledError
from lrs_edge.requests.budget import (
    ANSWER_TOKENS,
    FIRST_TOKENS,
    GRACE,
    LEAST_ANSWER_TOKENS,
    MARGIN,
    SEARCH_SHARE,
    Budget,
    ModelCosts,
)
from lrs_edge.requests.clock import Clock
from lrs_edge.requests.options import AskOptions
from lrs_edge.requests.rates import Rates
from lrs_edge.requests.sharing import share_tiles

COSTS = ModelCosts("vision", "rfm", "llm", rfm_share=0.5, per_tile=100, keep_ratio=0.25)

WANTED = st.lists(st.integers(1, 20), min_size=1, max_size=8)


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def measured(tile: float = 0.1, token: float = 0.001, step: float = 0.01) -> Rates:
    rates = Rates()
    rates.measured("vision", tile, tiles=1)
    rates.measured("llm", token * 200, tokens=200)
    rates.measured("llm", step, tokens=1)
    return rates


def budget_of(timeout: float | None, time: Time, rates: Rates | None = None) -> Budget:
    options = AskOptions(timeout=timeout)
    return Budget(options, Clock(timeout, time), rates or measured(), COSTS)


@given(WANTED, st.integers(0, 200))
def test_shares_keep_the_budget_and_reach_the_finest_level(wanted: list[int], budget: int) -> None:
    shares = share_tiles(budget, wanted)
    assert sum(shares) == min(budget, sum(wanted))
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))
    # Levels without a tile are the coarsest, and there are none where there are tiles enough.
    assert [share > 0 for share in shares] == sorted(share > 0 for share in shares)
    if budget >= len(wanted):
        assert all(shares)


@given(WANTED, st.integers(0, 200))
def test_a_larger_budget_takes_from_no_level(wanted: list[int], budget: int) -> None:
    smaller, larger = share_tiles(budget, wanted), share_tiles(budget + 1, wanted)
    assert all(a <= b for a, b in zip(smaller, larger, strict=True))


@given(WANTED, st.integers(0, 200))
def test_shares_are_even(wanted: list[int], budget: int) -> None:
    shares = share_tiles(budget, wanted)
    for share, want in zip(shares, wanted, strict=True):
        assert share == want or share >= max(shares) - 1


@given(WANTED, st.integers(0, 200))
def test_shares_taken_one_level_after_the_other_are_the_same(
    wanted: list[int], budget: int
) -> None:
    left, taken = budget, []
    for level in range(len(wanted)):
        share = share_tiles(left, wanted[level:])[0]
        taken.append(share)
        left -= share
    assert taken == share_tiles(budget, wanted)


def test_the_global_view_counts_as_a_tile() -> None:
    budget = Budget(AskOptions(max_tiles=5), Clock(None))
    assert budget.share(1, [9, 16, 16]) == ([1, 1, 2], "max_tiles")
    assert Budget(AskOptions(max_tiles=0), Clock(None)).share(1, [9]) == ([0], "max_tiles")
    assert Budget(AskOptions(max_tiles=42), Clock(None)).share(1, [9, 16, 16])[1] is None
    assert Budget(AskOptions(), Clock(None)).share(1, [9, 16]) == ([9, 16], None)


def test_the_search_leaves_what_prefill_and_an_answer_need() -> None:
    time = Time()
    budget = budget_of(2.0, time)
    budget.asked(100)
    budget.found(300)
    needed = MARGIN * (0.001 * 400 + 0.01 * (1 + ANSWER_TOKENS))
    time.now += 2.0 - needed - 0.01
    assert not budget.search_over()
    time.now += 0.02
    assert budget.search_over()
    assert not budget.expired()


def test_a_note_is_prefilled_and_not_scored() -> None:
    time = Time()
    budget = budget_of(2.0, time)
    budget.asked(100)
    fixed = budget.affordable_tokens()
    assert fixed is not None
    budget.noted(500)
    # What is prefilled beside the local tokens leaves room for as many fewer.
    assert budget.affordable_tokens() == pytest.approx(fixed - 500, abs=1)
    left = 2.0 / MARGIN - 0.001 * 600 - 0.01 * (1 + ANSWER_TOKENS)
    score, tile = 0.001 * COSTS.rfm_share, 0.1 + 0.001 * (COSTS.rfm_share + COSTS.keep_ratio) * 100
    wanted = int((left - score * (100 + 100)) / tile)
    assert wanted > int((left - score * (600 + 100)) / tile)
    assert budget.affordable_tiles(0, 0) == wanted
    budget.noted(0)
    assert budget.affordable_tokens() == fixed


def test_the_search_leaves_time_for_answers_as_long_as_they_have_been() -> None:
    time, rates = Time(), measured(step=1.0, token=1e-6)
    for tokens, left_for in ((None, ANSWER_TOKENS), (2, LEAST_ANSWER_TOKENS), (500, 64)):
        if tokens is not None:
            rates.answered(tokens)
        budget = budget_of(1000, time, rates)
        time.now += 1000 - MARGIN * (1 + left_for) - 0.1
        assert not budget.search_over()
        time.now += 0.2
        assert budget.search_over()


def test_before_anything_is_measured_the_search_has_a_share() -> None:
    time = Time()
    budget = budget_of(10, time, Rates())
    time.now += 10 * SEARCH_SHARE - 0.1
    assert not budget.search_over()
    time.now += 0.2
    assert budget.search_over()


def test_waiting_counts() -> None:
    time = Time()
    clock = Clock(10, time)
    time.now += 8
    budget = Budget(AskOptions(timeout=10), clock, Rates(), COSTS)
    assert clock.left == pytest.approx(2)
    time.now += 2 * SEARCH_SHARE + 0.01
    assert budget.search_over()
    time.now += 1
    assert budget.expired()


def test_no_limit_never_expires() -> None:
    time = Time()
    budget = budget_of(None, time)
    time.now += 1e9
    assert not budget.expired()
    assert not budget.search_over()
    assert budget.can_run(1_000_000)
    assert budget.can_score(1_000_000)
    assert budget.affordable_tiles(0, 0) is None
    assert budget.affordable_tokens() is None


@given(st.floats(0.01, 60), st.floats(1e-4, 1), st.floats(1e-6, 1e-2), st.floats(1e-4, 0.5))
def test_what_is_affordable_ends_in_time(
    timeout: float, tile: float, token: float, step: float
) -> None:
    time = Time()
    budget = budget_of(timeout, time, measured(tile, token, step))
    budget.asked(20)
    tiles = budget.affordable_tiles(0, 0)
    assert tiles is not None
    if tiles > 0:
        time.now += tiles * (tile + 0.5 * token * 100) + 0.5 * token * 120
    kept = tiles * 25
    budget.found(kept)
    sendable = budget.affordable_tokens()
    assert sendable is not None
    if tiles > 0:
        assert sendable >= kept
    sent = min(kept, sendable)
    time.now += token * (sent + 20) + step * FIRST_TOKENS
    if tiles > 0:
        assert not budget.expired()


def test_remembered_tiles_cost_no_encoding() -> None:
    time = Time()
    fresh, remembered = budget_of(1.0, time), budget_of(1.0, time)
    few, more = fresh.affordable_tiles(0, 0), remembered.affordable_tiles(4, 0)
    assert few is not None
    assert more is not None
    assert few < more <= few + 4


def test_the_first_tokens_may_pass_the_limit_a_little() -> None:
    time = Time()
    budget = budget_of(1.0, time)
    budget.asked(20)
    time.now += 1.0
    assert budget.expired()
    assert budget.answers_late()
    time.now += GRACE
    assert not budget.answers_late()


def test_a_question_that_is_given_up_stops_everywhere() -> None:
    given_up = False
    budget = Budget(AskOptions(), Clock(None), is_given_up=lambda: given_up)
    budget.check()
    assert not budget.search_over()
    given_up = True
    assert budget.search_over()
    assert budget.expired()
    with pytest.raises(CancelledError):
        budget.check()


def test_rates_follow_the_newest_measurements() -> None:
    rates = Rates()
    assert rates.tile("vision") is rates.token("llm") is rates.step("llm") is None
    for _ in range(5):
        rates.measured("vision", 4.0, tiles=2)
    assert rates.tile("vision") == pytest.approx(2.0)
    for _ in range(5):
        rates.measured("vision", 1.0, tiles=1)
    assert 1.0 < (rates.tile("vision") or 0) < 1.05
    # A run of a few tokens says nothing of long ones.
    rates.measured("llm", 1.0, tokens=5)
    assert rates.token("llm") is None


def test_stages_add_up_even_when_they_fail() -> None:
    time = Time()
    clock = Clock(None, time)
    for _ in range(2):
        try:
            with clock.step("read"):
                time.now += 2
                raise OSError
        except OSError:
            pass
    assert clock.seconds("read") == 4
    assert clock.seconds("encode") == 0
    assert clock.elapsed == 4
