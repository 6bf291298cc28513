"""Figures of results, of the model's answers or of others: what tables and the summary show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from scores import (
    WITHOUT_LABELS,
    Presence,
    Share,
    is_right,
    mean_over_classes,
    number,
    one_of,
    presence,
    share,
    side_choices,
    thing,
    within,
    yes_or_no,
)
from tiles import Found, under_tiles

from lrs_edge.evaluation.results import Result

Blind = Mapping[str, str]
"""Answers by wording."""
Answer = Callable[[Result], str | None]
"""What is taken for the answer to a result's question."""


def seen(result: Result) -> str | None:
    """The model's answer."""
    return result.text


def unseen(blind: Blind) -> Answer:
    """The answer to the same wording about a grey image."""
    return lambda result: blind.get(result.prompt)


def known(results: Sequence[Result], category: str) -> list[Result]:
    """Those of a category that did not fail."""
    return [result for result in results if result.category == category and not result.error]


def plain(results: Sequence[Result]) -> list[Result]:
    """Those about things that some source labels."""
    return [result for result in results if thing(result.prompt) not in WITHOUT_LABELS]


def by_class(results: Sequence[Result]) -> dict[str, list[Result]]:
    """By what they ask about."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(thing(result.prompt) or "other", []).append(result)
    return found


def presence_of(results: Sequence[Result], answer: Answer) -> Presence:
    """Yes and no told apart."""
    return presence([(result.ground_truth, yes_or_no(answer(result))) for result in results])


def over_classes(results: Sequence[Result], answer: Answer) -> float | None:
    """Mean of the classes' balanced accuracies."""
    classes = by_class(results).items()
    return mean_over_classes({name: presence_of(some, answer) for name, some in classes})


def sides(results: Sequence[Result], answer: Answer) -> Share:
    """Left or right, top or bottom."""
    return share(
        one_of(answer(result), side_choices(result.prompt)) == result.ground_truth.lower()
        for result in results
    )


def counts(results: Sequence[Result], answer: Answer, distance: int) -> Share:
    """Numbers that are at most so far from the true ones."""
    pairs = [(int(result.ground_truth), number(answer(result))) for result in results]
    return within(pairs, distance)


def right(results: Sequence[Result], answer: Answer) -> Share:
    """Short answers of any kind."""
    return share(is_right(each.prompt, answer(each), each.ground_truth) for each in results)


def found_under(result: Result, tile: int) -> Found | None:
    """The boxes of a result under the tiles that it looked at; None without boxes or tiles."""
    if result.work is None or result.work.finest is None or not result.hbox:
        return None
    return under_tiles(result.hbox, result.work.finest, tile, result.work.image_size)


def all_found(results: Sequence[Result], tile: int) -> list[Found]:
    """The same of every result that has both."""
    return [found for found in (found_under(result, tile) for result in results) if found]
