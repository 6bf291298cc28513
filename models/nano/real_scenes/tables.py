"""Results as Markdown tables; "blind" are the answers to the same wordings about a grey image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
from tiles import Found, total, under_tiles

from lrs_edge.evaluation.results import Result

Blind = Mapping[str, str]
"""Answers by wording."""

MIXED = "with intersections and roundabouts"
PLAIN = "without them"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _known(results: Sequence[Result], category: str) -> list[Result]:
    return [result for result in results if result.category == category and not result.error]


def _plain(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if thing(result.prompt) not in WITHOUT_LABELS]


def _presence(results: Sequence[Result], answer: Callable[[Result], str | None]) -> Presence:
    return presence([(result.ground_truth, yes_or_no(answer(result))) for result in results])


def presence_table(results: Sequence[Result], blind: Blind, title: str = "default options") -> str:
    """Presence balanced over yes and no: all, by class, over classes; beside blind answers."""
    asked = _known(results, "presence")
    by_class: dict[str, list[Result]] = {}
    for result in asked:
        by_class.setdefault(thing(result.prompt) or "other", []).append(result)

    def line(name: str, some: Sequence[Result]) -> list[str]:
        seen, unseen = _presence(some, _seen), _presence(some, _unseen(blind))
        return [name, percent(seen.balanced), str(seen.yes), str(seen.no),
                str(seen.yes + seen.no), percent(unseen.balanced)]  # fmt: skip

    rows = [
        line(f"all questions, {MIXED}", asked),
        line(f"all questions, {PLAIN}", _plain(asked)),
    ]
    for name, without in ((MIXED, False), (PLAIN, True)):
        means = []
        for answer in (_seen, _unseen(blind)):
            classes = {
                each: _presence(some, answer)
                for each, some in by_class.items()
                if not (without and each in WITHOUT_LABELS)
            }
            means.append(percent(mean_over_classes(classes)))
        rows.append([f"mean over classes, {name}", means[0], "", "", "", means[1]])
    rows += [line(name, by_class[name]) for name in sorted(by_class)]
    head = ["presence", "balanced", "yes", "no", "right", "blind, balanced"]
    return f"**Presence, {title}**\n\n{table(head, rows)}"


def _seen(result: Result) -> str | None:
    return result.text


def _unseen(blind: Blind) -> Callable[[Result], str | None]:
    return lambda result: blind.get(result.prompt)


def side_table(results: Sequence[Result], blind: Blind) -> str:
    """Left or right, top or bottom."""
    asked = _known(results, "side")

    def right(some: Sequence[Result], answer: Callable[[Result], str | None]) -> str:
        return str(
            share(
                one_of(answer(result), side_choices(result.prompt)) == result.ground_truth.lower()
                for result in some
            )
        )

    rows = [
        [name, right(some, _seen), right(some, lambda result: side_choices(result.prompt)[0]),
         right(some, _unseen(blind))]
        for name, some in ((MIXED, asked), (PLAIN, _plain(asked)))
    ]  # fmt: skip
    return f"**Side**\n\n{table(['side', 'right', 'always left or top', 'blind'], rows)}"


def count_table(results: Sequence[Result], blind: Blind) -> str:
    """Counts from 1 to 9."""
    asked = _known(results, "count")
    ways: tuple[tuple[str, Callable[[Result], str | None]], ...] = (
        ("answers", _seen), ("always 1", lambda _: "1"), ("blind", _unseen(blind)),
    )  # fmt: skip
    rows = []
    for name, answer in ways:
        pairs = [(int(result.ground_truth), number(answer(result))) for result in asked]
        rows.append([name, str(within(pairs, 0)), str(within(pairs, 1))])
    return f"**Count**\n\n{table(['count', 'exact', 'within one'], rows)}"


def found_under(result: Result, tile: int) -> Found | None:
    """The boxes of a result under the tiles that it looked at; None without boxes or tiles."""
    if result.work is None or result.work.finest is None or not result.hbox:
        return None
    return under_tiles(result.hbox, result.work.finest, tile, result.work.image_size)


def tiles_table(title: str, results: Sequence[Result], tile: int) -> str:
    """Boxes whose centres lie under a tile of the finest level."""
    every = [found for found in (found_under(result, tile) for result in results) if found]
    return f"**{title}**\n\n{_tiles(every)}"


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
    every = [found for found in (found_under(result, tile) for result in results) if found]
    answered = _presence(results, _seen)
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

    def right(some: Sequence[Result], answer: Callable[[Result], str | None]) -> str:
        return str(share(is_right(each.prompt, answer(each), each.ground_truth) for each in some))

    rows = [[name, right(some, _seen), right(some, _unseen(blind))] for name, some in kinds.items()]
    rows.append(["all", right(results, _seen), right(results, _unseen(blind))])
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
