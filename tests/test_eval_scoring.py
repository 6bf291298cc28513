"""Figures: accuracies, evidence, costs, comparison, and their three forms."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.errors import UsageError
from lrs_edge.evaluation.comparison import compare, mcnemar
from lrs_edge.evaluation.matching import Matcher
from lrs_edge.evaluation.results import FinestLevel, QuestionSource, Results
from lrs_edge.evaluation.scoring import SIZE_BINS, score
from lrs_edge.evaluation.tables import comparison_text, score_text
from tests.evaluation import make_result, make_results, make_work

EXACT = Matcher(None)
WRONG = "a dozen"


class Pairs:
    """Knows one pair of synonyms."""

    def similarity(self, first: str, second: str) -> float:
        return 1.0 if {first, second} == {"2", "two"} else 0.5


def example() -> Results:
    """Five results: three counts (two right, one of them by a synonym), a colour, an error."""
    return make_results(
        make_result(0),
        make_result(1, "2", dataset="STAR"),
        make_result(2, WRONG, work=make_work(image_size=(9000, 100), flops=None)),
        make_result(3, "red", ground_truth="Red", category="color", dataset="STAR"),
        make_result(5, "", error="1.tif does not exist", work=None, category="color"),
        questions=QuestionSource("questions.jsonl", "cd" * 32, "lrs-vqa", 7),
    )


def test_accuracies_are_the_authors() -> None:
    found = score(example(), Matcher(Pairs()))
    assert (found.overall.questions, found.overall.correct) == (5, 3)
    assert found.overall.accuracy == pytest.approx(3 / 5)
    # Average over categories, not over questions: counts 2 of 3, colours 1 of 2.
    assert found.overall.average == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert (found.exact, found.synonyms, found.errors, found.missing) == (2, 1, 1, 2)
    assert [(g.name, g.correct, g.questions) for g in found.categories] == [
        ("color", 1, 2),
        ("count", 2, 3),
    ]
    fair, star = found.datasets
    assert (fair.name, fair.correct, fair.questions) == ("FAIR", 1, 3)
    # Within FAIR: counts 1 of 2, colours 0 of 1.
    assert fair.average == pytest.approx((1 / 2 + 0) / 2)
    assert (star.name, star.accuracy, star.average) == ("STAR", 1.0, 1.0)


def test_without_synonyms_only_exact_matches_count() -> None:
    found = score(example(), EXACT)
    assert (found.overall.correct, found.exact, found.synonyms) == (2, 2, 0)


def test_an_error_is_wrong_even_where_nothing_is_the_answer() -> None:
    results = make_results(
        make_result(0, "", ground_truth="A", choices=("(A) 1",), error="no image", work=None)
    )
    assert score(results, EXACT).overall.correct == 0


def test_images_fall_into_bins_by_their_long_side() -> None:
    sizes = [(SIZE_BINS[0], 1), (1, SIZE_BINS[0] + 1), (16_001, 2), (5_000, 4_000)]
    results = make_results(
        *(make_result(i, work=make_work(image_size=size)) for i, size in enumerate(sizes)),
        make_result(9, "", error="x", work=None),
    )
    assert [(group.name, group.questions) for group in score(results, EXACT).sizes] == [
        ("0-1,000 px", 1),
        ("1,000-2,000 px", 1),
        ("4,000-8,000 px", 1),
        ("over 16,000 px", 1),
        ("unknown", 1),
    ]


def test_region_recall_and_chance() -> None:
    # Tiles (0, 0) and (0, 1) of 50 were looked at: pixels 0..200 across, 0..100 down.
    results = make_results(
        make_result(0, hbox=((10.0, 10.0, 90.0, 90.0),)),
        make_result(1, hbox=((150.0, 0.0, 250.0, 100.0),)),
        make_result(2, hbox=((500.0, 300.0, 600.0, 400.0),)),
        make_result(3),
        make_result(4, "", error="x", work=None, hbox=((0.0, 0.0, 1.0, 1.0),)),
    )
    regions = score(results, EXACT).regions
    assert regions is not None
    assert regions.questions == 3
    assert regions.recall == pytest.approx(2 / 3)
    assert regions.coverage == pytest.approx((1 + 0.5 + 0) / 3)
    assert regions.random_coverage == pytest.approx(2 / 50)
    one_of_two = 1 - math.comb(48, 2) / math.comb(50, 2)
    assert regions.random_recall == pytest.approx((2 / 50 + one_of_two + 2 / 50) / 3)


def test_a_search_that_stayed_with_the_global_view_covers_nothing() -> None:
    work = make_work(finest=None)
    found = score(make_results(make_result(0, hbox=((0.0, 0.0, 9.0, 9.0),), work=work)), EXACT)
    assert found.regions is not None
    assert (found.regions.recall, found.regions.random_recall) == (0.0, 0.0)


@pytest.mark.parametrize(
    "finest",
    [
        FinestLevel(500, 1000, 5, 10, ((5, 0),)),
        FinestLevel(500, 1000, 5, 10, ((0, -1),)),
        FinestLevel(0, 1000, 5, 10, ()),
        FinestLevel(500, 1000, 1 << 30, 1 << 30, ()),
        FinestLevel(500, 1000, -1, -1, ()),
    ],
)
def test_tiles_that_cannot_be_are_refused(finest: FinestLevel) -> None:
    work = make_work(finest=finest)
    with pytest.raises(UsageError, match="damaged"):
        score(make_results(make_result(0, hbox=((0.0, 0.0, 9.0, 9.0),), work=work)), EXACT)


def test_costs_are_means_over_answered_questions() -> None:
    results = make_results(
        make_result(0),
        make_result(1, work=make_work(tiles_encoded=0, tiles_from_cache=8)),
        make_result(2, "", error="x", work=None),
    )
    cost = score(results, EXACT).cost
    assert cost is not None
    assert (cost.questions, cost.tiles, cost.tiles_encoded) == (2, 6.0, 1.5)
    assert (cost.tokens["sent"], cost.seconds["total"]) == (30.0, 2.0)
    assert cost.tflops == {"vision": 1.0, "rfm": 2.0, "llm": 3.0, "total": 6.0}
    assert score(example(), EXACT).cost.tflops == {}  # type: ignore[union-attr]


def test_without_results_there_is_no_score() -> None:
    with pytest.raises(UsageError, match="no answer yet"):
        score(make_results(), EXACT)


# -- comparison --------------------------------------------------------------------------------


def test_comparison_counts_changes_question_by_question() -> None:
    first = make_results(
        make_result(0), make_result(1), make_result(2, WRONG), make_result(3, WRONG), make_result(4)
    )
    second = make_results(
        make_result(0),
        make_result(1, WRONG),
        make_result(2),
        make_result(3, work=make_work(tiles_encoded=9), category="color"),
        make_result(9),
    )
    found = compare(first, second, EXACT)
    # Question 4 has no result in the second run, 9 none in the first.
    assert found.overall.questions == 4
    assert (found.overall.first, found.overall.second) == (0.5, 0.75)
    assert found.overall.difference == pytest.approx(0.25)
    assert (found.won, found.lost) == (("FAIR_2", "FAIR_3"), ("FAIR_1",))
    assert found.p_value == 1.0
    assert [change.name for change in found.categories] == ["count"]
    one, other = found.costs
    assert one is not None
    assert other is not None
    assert (one.tiles, other.tiles) == (4.0, 5.5)


def test_means_are_compared_over_the_same_questions() -> None:
    box = ((10.0, 10.0, 90.0, 90.0),)
    missed = ((500.0, 300.0, 600.0, 400.0),)
    first = make_results(
        make_result(0, hbox=box),
        make_result(1, hbox=missed, work=make_work(tiles_encoded=999)),
    )
    second = make_results(
        make_result(0, hbox=box), make_result(1, "", error="x", work=None, hbox=missed)
    )
    for found in (compare(first, second, EXACT), compare(second, first, EXACT)):
        assert found.overall.questions == 2
        assert found.regions[0] == found.regions[1]
        assert found.costs[0] == found.costs[1]
        assert found.regions[0] is not None
        assert found.regions[0].recall == 1.0


def test_runs_over_other_questions_cannot_be_compared() -> None:
    other = QuestionSource("other.jsonl", "ee" * 32, "lrs-vqa", 4)
    with pytest.raises(UsageError, match="different question files"):
        compare(make_results(make_result(0)), make_results(make_result(0), questions=other), EXACT)
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(make_results(make_result(0)), make_results(make_result(1)), EXACT)


@pytest.mark.parametrize(
    ("won", "lost", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 6, 2 / 64), (8, 2, 2 * 56 / 1024), (3, 3, 1.0)],
)
def test_mcnemar_s_exact_test(won: int, lost: int, p_value: float) -> None:
    assert mcnemar(won, lost) == pytest.approx(p_value)


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_counts_coin_tosses(won: int, lost: int) -> None:
    tosses = list(product((0, 1), repeat=won + lost)) if won + lost <= 10 else None
    if tosses is None:
        return
    apart = abs(won - lost)
    as_far = sum(abs(2 * sum(toss) - len(toss)) >= apart for toss in tosses)
    assert mcnemar(won, lost) == pytest.approx(as_far / len(tosses))
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_mcnemar_of_thousands_is_a_number() -> None:
    assert 0 <= mcnemar(4000, 3000) < 1e-30
    assert mcnemar(3500, 3500) == 1.0


# -- forms -------------------------------------------------------------------------------------


def test_the_table_says_everything() -> None:
    text = score_text(score(example(), Matcher(Pairs())), "table")
    for part in (
        *("tiny", "60.0 %   3 of 5 (exact or synonym)", "58.3 %", "2 exact, 1 by synonyms"),
        *("1 failed", "2 not asked yet", "count", "STAR", "8,000-16,000 px", "unknown"),
        *("4.0 looked at, 3.0 of them encoded", "2.00 (read 0.10", "TFLOPs", "unknown:"),
    ):
        assert part in text
    assert "(exact matches only)" in score_text(score(example(), EXACT), "table")


def test_names_from_a_question_file_stay_on_their_line() -> None:
    results = make_results(make_result(0, category="a\nb " + "c" * 100))
    lines = score_text(score(results, EXACT), "table").splitlines()
    assert any(line.startswith("a b ccc") and "…" in line for line in lines)


def test_changed_options_are_shown() -> None:
    options = {"policy": "full", "max_tiles": 9, "end_str": "Answer with one word."}
    text = score_text(score(make_results(make_result(0), options=options), EXACT), "table")
    assert text.splitlines()[0].endswith("; max-tiles 9")


def test_json_holds_the_same_figures() -> None:
    facts = json.loads(score_text(score(example(), Matcher(Pairs())), "json"))
    assert facts["overall"]["accuracy"] == 0.6
    assert facts["overall"]["synonyms"] == 1
    assert facts["categories"]["count"] == {
        "questions": 3,
        "correct": 2,
        "accuracy": 0.666667,
        "average_accuracy": 0.666667,
    }
    assert facts["run"]["model"] == "tiny"
    assert facts["regions"] is None
    assert facts["cost"]["seconds"]["total"] == 2.0
    assert json.loads(score_text(score(example(), EXACT), "json"))["overall"]["synonyms"] is None


def test_csv_has_one_figure_per_row() -> None:
    results = make_results(make_result(0, category="=1+1", hbox=((0.0, 0.0, 9.0, 9.0),)))
    text = score_text(score(results, EXACT), "csv")
    rows = {tuple(row[:3]): row[3] for row in csv.reader(io.StringIO(text))}
    assert rows["section", "name", "metric"] == "value"
    assert rows["overall", "", "accuracy"] == "1.0"
    # A spreadsheet must not take a category for a formula.
    assert rows["categories", "'=1+1", "correct"] == "1"
    assert rows["regions", "", "recall"] == "1.0"
    assert rows["cost", "tflops", "total"] == "6.0"


def test_comparisons_have_the_same_forms() -> None:
    found = compare(
        make_results(make_result(0, WRONG, hbox=((0.0, 0.0, 9.0, 9.0),))),
        make_results(make_result(0, hbox=((0.0, 0.0, 9.0, 9.0),)), options={"policy": "reference"}),
        EXACT,
    )
    table = comparison_text(found, "table")
    for part in ("A: tiny", "; policy reference", "+100.0", "won 1 and lost 0 of 1", "p = 1"):
        assert part in table
    assert "region recall" in table
    facts = json.loads(comparison_text(found, "json"))
    assert (facts["overall"]["won"], facts["won"]) == (1, ["FAIR_0"])
    assert facts["costs"]["second"]["tflops"]["total"] == 6.0
    rows = {
        tuple(row[:3]): row[3] for row in csv.reader(io.StringIO(comparison_text(found, "csv")))
    }
    assert rows["overall", "", "difference"] == "1.0"
    assert rows["costs", "second/tflops", "total"] == "6.0"
