"""The evaluation in one table: a line for each figure that the embedded model is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from figures import (
    Blind,
    all_found,
    by_class,
    counts,
    known,
    over_classes,
    plain,
    presence_of,
    right,
    seen,
    sides,
    unseen,
)
from scores import percent, share, yes_or_no
from tables import table
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
        false = [
            str(share(yes_or_no(answer(each)) == "yes" for each in absent))
            for answer in (seen, unseen(blind))
        ]
        lines.append(("Dubai, yes to what is not there", false[0], false[1], "0"))
        told, blindly = right(parts["dubai"], seen), right(parts["dubai"], unseen(blind))
        lines.append(("Dubai, all questions", str(told), str(blindly), ""))
    head = ["measured", "this bundle", "without the image, or chance", "goal"]
    return f"**Summary**\n\n{table(head, lines)}"


def _balanced(name: str, results: Sequence[Result], blind: Blind, goal: str) -> Line:
    told, blindly = (
        percent(presence_of(results, answer).balanced) for answer in (seen, unseen(blind))
    )
    return name, told, blindly, goal


def _real(results: Sequence[Result], blind: Blind) -> list[Line]:
    asked = known(results, "presence")
    both_ways = {
        name: some
        for name, some in by_class(plain(asked)).items()
        if len({each.ground_truth for each in some}) == 2
    }
    of_known = [each for some in both_ways.values() for each in some]
    means = [percent(over_classes(of_known, answer)) for answer in (seen, unseen(blind))]
    lines = [
        _balanced("presence, balanced, all classes", asked, blind, ""),
        _balanced("presence, without intersections and roundabouts", plain(asked), blind, "85 %"),
        (f"presence, mean over {len(both_ways)} classes", means[0], means[1], "90 %"),
        _balanced("presence, over their questions", of_known, blind, "90 %"),
    ]
    halves = known(results, "side")
    for name, some, goal in (
        ("side, all classes", halves, ""),
        ("side, without intersections and roundabouts", plain(halves), "92 %"),
    ):
        told, blindly = sides(some, seen), sides(some, unseen(blind))
        lines.append((name, str(told), str(blindly), goal))
    numbers = known(results, "count")
    for name, distance, goal in (("count, exact", 0, "50 %"), ("count, within one", 1, "")):
        told, blindly, ones = (
            counts(numbers, answer, distance) for answer in (seen, unseen(blind), lambda _: "1")
        )
        lines.append((name, str(told), f"{blindly}; always 1: {percent(ones.value)}", goal))
    return lines


def _search(name: str, results: Sequence[Result], tile: int, goal: str) -> list[Line]:
    every = all_found(results, tile)
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
