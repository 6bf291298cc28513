"""The evaluation in one table: a line for each figure that the embedded model is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from scores import (
    WITHOUT_LABELS,
    Presence,
    is_right,
    mean_over_classes,
    number,
    one_of,
    percent,
    presence,
    share,
    side_choices,
    thing,
    within,
    yes_or_no,
)
from tables import Blind, found_under, table
from tiles import total

from lrs_edge.evaluation.results import Result

Line = tuple[str, str, str, str]
"""What, of the model, of the same without the image or of chance, and the goal."""


def summary(parts: Mapping[str, Sequence[Result]], blind: Blind, tile: int) -> str:
    """The table, of the parts that were asked.

    Args:
        parts: Results of `real` (the first group alone), `large`, `finer`, `water` and `dubai`.
        blind: Answers by wording about a grey image.
        tile: Side of the bundle's tiles in pixels.
    """
    lines: list[Line] = []
    if "real" in parts:
        lines += _real(parts["real"], blind)
    for name, part, goal in (("a third", "large", "80 %"), ("half", "finer", "95 %")):
        if part in parts:
            lines += _search(f"airplanes found, {name} of the area", parts[part], tile, goal)
    if "water" in parts:
        lines += _search("ships on open water, half of the area", parts["water"], tile, "80 %")
        lines.append(_balanced("ships on open water, presence", parts["water"], blind, ""))
    if "dubai" in parts:
        absent = [each for each in parts["dubai"] if each.ground_truth == "no"]
        false = share(yes_or_no(each.text) == "yes" for each in absent)
        unseen = share(yes_or_no(blind.get(each.prompt)) == "yes" for each in absent)
        lines.append(("Dubai, yes to what is not there", str(false), str(unseen), "0"))
        right, guessed = (
            share(is_right(each.prompt, text, each.ground_truth) for each, text in some)
            for some in _both(parts["dubai"], blind)
        )
        lines.append(("Dubai, all questions", str(right), str(guessed), ""))
    head = ["measured", "this bundle", "without the image, or chance", "goal"]
    return f"**Summary**\n\n{table(head, lines)}"


def _both(
    results: Sequence[Result], blind: Blind
) -> tuple[list[tuple[Result, str | None]], list[tuple[Result, str | None]]]:
    """Results with their answers, and with the blind ones."""
    return (
        [(each, each.text) for each in results],
        [(each, blind.get(each.prompt)) for each in results],
    )


def _balanced(name: str, results: Sequence[Result], blind: Blind, goal: str) -> Line:
    seen, unseen = (percent(_presence(some).balanced) for some in _both(results, blind))
    return name, seen, unseen, goal


def _presence(answered: Sequence[tuple[Result, str | None]]) -> Presence:
    return presence([(each.ground_truth, yes_or_no(text)) for each, text in answered])


def _real(results: Sequence[Result], blind: Blind) -> list[Line]:
    asked = [each for each in results if each.category == "presence"]
    plain = [each for each in asked if thing(each.prompt) not in WITHOUT_LABELS]
    names = sorted({thing(each.prompt) or "other" for each in plain})
    by_class = {name: [each for each in plain if thing(each.prompt) == name] for name in names}
    known = {
        name: some
        for name, some in by_class.items()
        if len({each.ground_truth for each in some}) == 2
    }
    means = [
        percent(
            mean_over_classes(
                {name: _presence(_both(some, blind)[at]) for name, some in known.items()}
            )
        )
        for at in (0, 1)
    ]
    of_known = [each for some in known.values() for each in some]
    lines = [
        _balanced("presence, balanced, all classes", asked, blind, ""),
        _balanced("presence, without intersections and roundabouts", plain, blind, "85 %"),
        (f"presence, mean over {len(known)} classes", means[0], means[1], "90 %"),
        _balanced("presence, over their questions", of_known, blind, "90 %"),
    ]
    for name, some, goal in (
        ("side, all classes", results, ""),
        (
            "side, without intersections and roundabouts",
            [each for each in results if thing(each.prompt) not in WITHOUT_LABELS],
            "92 %",
        ),
    ):
        seen, unseen = (
            share(
                one_of(text, side_choices(each.prompt)) == each.ground_truth.lower()
                for each, text in both
                if each.category == "side"
            )
            for both in _both(some, blind)
        )
        lines.append((name, str(seen), str(unseen), goal))
    counts = [each for each in results if each.category == "count"]
    for name, distance, goal in (("count, exact", 0, "50 %"), ("count, within one", 1, "")):
        seen, unseen = (
            within([(int(each.ground_truth), number(text)) for each, text in both], distance)
            for both in _both(counts, blind)
        )
        ones = within([(int(each.ground_truth), 1) for each in counts], distance)
        lines.append((name, str(seen), f"{unseen}; always 1: {percent(ones.value)}", goal))
    return lines


def _search(name: str, results: Sequence[Result], tile: int, goal: str) -> list[Line]:
    every = [found for found in (found_under(each, tile) for each in results) if found]
    if not every:
        return []
    found = total(every)
    looked = mean(each.looked_at / each.tiles for each in every)
    return [
        (
            f"{name} ({percent(looked)} looked at)",
            percent(found.found / found.boxes),
            f"{percent(found.expected / found.boxes)}; best: {percent(found.best / found.boxes)}",
            goal,
        )
    ]
