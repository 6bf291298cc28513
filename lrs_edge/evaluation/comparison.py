"""Two runs over the same questions: what the second won and lost against the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb

from lrs_edge.errors import UsageError
from lrs_edge.evaluation.matching import Matcher
from lrs_edge.evaluation.results import Results, RunHeader
from lrs_edge.evaluation.scoring import (
    CostFigures,
    RegionFigures,
    Scored,
    cost_figures,
    judge,
    region_figures,
)

Pair = tuple[Scored, Scored]


@dataclass(frozen=True)
class GroupChange:
    """Accuracy of the same questions in two runs, A and B, 0..1."""

    name: str
    questions: int
    first: float
    second: float

    @property
    def difference(self) -> float:
        """B minus A."""
        return self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """Two runs, A and B, on the questions that both answered.

    Attributes:
        first: Header of A.
        second: Header of B.
        overall: All questions.
        categories: By category.
        datasets: By source dataset.
        won: Ids of the questions that B answered right and A wrong.
        lost: Ids of the questions that A answered right and B wrong.
        p_value: McNemar's exact test, two-sided: how likely a difference in won and lost at least
            as large is where both runs are equally good.
        regions: Region recall of A and of B on the questions with boxes that neither failed; None
            where there are none.
        costs: Mean costs of A and of B on the questions that neither failed; None without any.
    """

    first: RunHeader
    second: RunHeader
    overall: GroupChange
    categories: tuple[GroupChange, ...]
    datasets: tuple[GroupChange, ...]
    won: tuple[str, ...]
    lost: tuple[str, ...]
    p_value: float
    regions: tuple[RegionFigures | None, RegionFigures | None]
    costs: tuple[CostFigures | None, CostFigures | None]


def compare(first: Results, second: Results, matcher: Matcher) -> Comparison:
    """Compare two runs over the same question file.

    Raises:
        UsageError: The question files differ, or no question has a result in both.
    """
    if first.header.questions.sha256 != second.header.questions.sha256:
        raise UsageError(
            f"the two runs answered different question files ({first.header.questions.file} and "
            f"{second.header.questions.file}); compare runs over the same one"
        )
    others = {item.result.index: item for item in judge(second, matcher)}
    pairs = [
        (item, others[item.result.index])
        for item in judge(first, matcher)
        if item.result.index in others
    ]
    if not pairs:
        raise UsageError("no question has a result in both runs; there is nothing to compare")
    # Means over other questions each would not be a comparison.
    answered = [(a, b) for a, b in pairs if a.result.work and b.result.work]
    located = [(a, b) for a, b in answered if a.coverage and b.coverage]
    won = tuple(a.result.question_id for a, b in pairs if b.correct and not a.correct)
    lost = tuple(a.result.question_id for a, b in pairs if a.correct and not b.correct)
    return Comparison(
        first=first.header,
        second=second.header,
        overall=_change("overall", pairs),
        categories=_changes(pairs, lambda item: item.result.category),
        datasets=_changes(pairs, lambda item: item.result.dataset),
        won=won,
        lost=lost,
        p_value=mcnemar(len(won), len(lost)),
        regions=(region_figures(a for a, _ in located), region_figures(b for _, b in located)),
        costs=(cost_figures(a for a, _ in answered), cost_figures(b for _, b in answered)),
    )


def _change(name: str, pairs: Sequence[Pair]) -> GroupChange:
    first, second = (sum(pair[place].correct for pair in pairs) for place in (0, 1))
    return GroupChange(name, len(pairs), first / len(pairs), second / len(pairs))


def _changes(pairs: Iterable[Pair], name: Callable[[Scored], str]) -> tuple[GroupChange, ...]:
    members: dict[str, list[Pair]] = {}
    for pair in pairs:
        members.setdefault(name(pair[0]), []).append(pair)
    return tuple(_change(key, members[key]) for key in sorted(members))


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p-value of McNemar's exact test: a fair coin for every question that changed.

    Args:
        won: Questions that only the second run answered right.
        lost: Questions that only the first run answered right.
    """
    changed = won + lost
    if changed == 0:
        return 1.0
    tail = sum(comb(changed, i) for i in range(min(won, lost) + 1))
    # As whole numbers: 2^-changed is not a float for thousands of changes.
    return min(2 * tail / (1 << changed), 1.0)
