"""Results as Markdown tables; "blind" are the answers to the same wordings about a grey image."""

from __future__ import annotations

from collections.abc import Sequence

from figures import (
    Answer,
    Blind,
    all_found,
    by_class,
    counts,
    found_under,
    known,
    over_classes,
    plain,
    presence_of,
    right,
    seen,
    sides,
    unseen,
)
from scores import is_right, percent, side_choices
from tiles import Found, total

from lrs_edge.evaluation.results import Result

MIXED = "with intersections and roundabouts"
PLAIN = "without them"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def presence_table(results: Sequence[Result], blind: Blind, title: str = "default options") -> str:
    """Presence balanced over yes and no: all, by class, over classes; beside blind answers."""
    asked, classes = known(results, "presence"), by_class(known(results, "presence"))

    def line(name: str, some: Sequence[Result]) -> list[str]:
        told, blindly = presence_of(some, seen), presence_of(some, unseen(blind))
        return [name, percent(told.balanced), str(told.yes), str(told.no),
                str(told.yes + told.no), percent(blindly.balanced)]  # fmt: skip

    parts = ((MIXED, asked), (PLAIN, plain(asked)))
    rows = [line(f"all questions, {name}", some) for name, some in parts]
    for name, some in parts:
        means = [percent(over_classes(some, answer)) for answer in (seen, unseen(blind))]
        rows.append([f"mean over classes, {name}", means[0], "", "", "", means[1]])
    rows += [line(name, classes[name]) for name in sorted(classes)]
    head = ["presence", "balanced", "yes", "no", "right", "blind, balanced"]
    return f"**Presence, {title}**\n\n{table(head, rows)}"


def side_table(results: Sequence[Result], blind: Blind) -> str:
    """Left or right, top or bottom."""
    asked = known(results, "side")
    ways: tuple[Answer, ...] = (seen, lambda each: side_choices(each.prompt)[0], unseen(blind))
    rows = [
        [name, *(str(sides(some, answer)) for answer in ways)]
        for name, some in ((MIXED, asked), (PLAIN, plain(asked)))
    ]
    return f"**Side**\n\n{table(['side', 'right', 'always left or top', 'blind'], rows)}"


def count_table(results: Sequence[Result], blind: Blind) -> str:
    """Counts from 1 to 9."""
    asked = known(results, "count")
    ways: tuple[tuple[str, Answer], ...] = (
        ("answers", seen), ("always 1", lambda _: "1"), ("blind", unseen(blind)),
    )  # fmt: skip
    rows = [
        [name, str(counts(asked, answer, 0)), str(counts(asked, answer, 1))]
        for name, answer in ways
    ]
    return f"**Count**\n\n{table(['count', 'exact', 'within one'], rows)}"


def tiles_table(title: str, results: Sequence[Result], tile: int) -> str:
    """Boxes whose centres lie under a tile of the finest level."""
    return f"**{title}**\n\n{_tiles(all_found(results, tile))}"


def _tiles(every: Sequence[Found]) -> str:
    found = total(every)
    head = ["scenes", "boxes", "found", "best choice of tiles", "random tiles", "tiles looked at"]
    if not found.boxes:
        return table(head, [["0", "0", "-", "-", "-", "-"]])
    row = [
        str(len(every)), str(found.boxes), percent(found.found / found.boxes),
        percent(found.best / found.boxes), percent(found.expected / found.boxes),
        percent(found.looked_at / found.tiles),
    ]  # fmt: skip
    return table(head, [row])


def water_table(results: Sequence[Result], blind: Blind, tile: int) -> str:
    """Ships on open water: found by the search, and answered."""
    every = all_found(results, tile)
    answered = presence_of(results, seen)
    rows = [
        [result.question_id, result.ground_truth, result.text.replace("|", "/"),
         f"{found.found} of {found.boxes}" if (found := found_under(result, tile)) else "-"]
        for result in results
    ]  # fmt: skip
    said = (
        f'"{results[0].prompt}" answered rightly where there are some: {answered.yes}; where there '
        f'are none: {answered.no}; blind: "{blind.get(results[0].prompt, "-")}"'
    )
    listed = table(["scene", "ships", "answer", "under tiles"], rows)
    return f"**Ships on open water, half of the area**\n\n{_tiles(every)}\n\n{said}\n\n{listed}"


def dubai_table(results: Sequence[Result], blind: Blind) -> str:
    """Answers about scenes of Dubai, right ones counted and all listed."""
    kinds: dict[str, list[Result]] = {}
    for result in results:
        kinds.setdefault(_kind(result), []).append(result)

    rows = [
        [name, *(str(right(some, answer)) for answer in (seen, unseen(blind)))]
        for name, some in (*kinds.items(), ("all", results))
    ]
    listed = [
        [
            each.image.rsplit("/", maxsplit=1)[-1].split(".")[0],
            each.prompt,
            each.ground_truth,
            each.text.replace("|", "/"),
            "" if is_right(each.prompt, each.text, each.ground_truth) else "wrong",
        ]
        for each in results
    ]
    counted = table(["Dubai", "right", "blind"], rows)
    questions = table(["scene", "question", "true", "answer", ""], listed)
    return f"**Dubai, scenes 1, 4 and 5**\n\n{counted}\n\n{questions}"


def _kind(result: Result) -> str:
    if result.category != "presence":
        return result.category
    there = "there" if result.ground_truth == "yes" else "not there"
    return f"presence of what is {there}"


def blind_table(blind: Blind) -> str:
    """What is answered about a grey image."""
    rows = [[text, answer.replace("|", "/")] for text, answer in blind.items()]
    return f"**Answers about a grey image**\n\n{table(['question', 'answer'], rows)}"
