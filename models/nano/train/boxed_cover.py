"""Questions on land cover, from its share in each ninth of the picture."""

from __future__ import annotations

import random
from itertools import permutations
from typing import Any

import boxed_wording as words
from boxed_offers import MUCH, YES_NO, Offer

ENOUGH = 0.02
"""Share of an area from which on a cover is there; below it nothing is asked, down to none."""
MAIN = 0.4
"""Share of an area that its main cover has at least."""
PART_SEEN = 0.2
"""Share of the ninth that holds most of a cover."""
POSITIONS = tuple(words.PARTS)
COVER_NAMES: dict[str, tuple[str, ...]] = {
    "building": ("buildings",), "land": ("bare land", "bare ground"),
    "road": ("roads", "paved roads"),
    "vegetation": ("vegetation", "plants", "greenery"), "water": ("water", "open water"),
}  # fmt: skip
"""Land cover; the first name is the answer's."""
COVER_PRESENCE = (
    "{Is} there [{cover}] in this image?", "{Is} there any [{cover}]?", "{Is} there [{cover}]?",
    "Does the image show any [{cover}]?", "Can you see [{cover}]?", "{Is} any [{cover}] visible?",
    "any [{cover}] here", "[{cover}]?", "Does the scene contain [{cover}]?",
    "Do you see [{cover}] in this satellite image?",
)  # fmt: skip
COVER_HALF = (
    "{Is} there [{cover}] in the {half} half?",
    "{Is} there any [{cover}] in the {half} half of the image?",
    "Does the {half} half of the image show [{cover}]?",
    "Can you see [{cover}] in the {half} half?", "{is} there [{cover}] in the {half} half",
    "{Is} any [{cover}] visible in the {half} half?",
    "In the {half} half, {is} there any [{cover}]?", "Does the {half} half contain any [{cover}]?",
)  # fmt: skip
COVER_WHERE = (
    "Where is most of the [{cover}]?", "where is most of the [{cover}]",
    "Where {is} the most [{cover}]?", "In which part of the image is most of the [{cover}]?",
    "Where does most of the [{cover}] lie?", "Which part of the image has the most [{cover}]?",
    "Which part shows most of the [{cover}]?",
    "In what part of the scene is most of the [{cover}]?",
    "Where in the picture is the most [{cover}]?",
)  # fmt: skip
COVER_SIDE = (
    "Is most of the [{cover}] in the {one} or the {other} half of the image?",
    "Is most of the [{cover}] in the {one} or {other} half?",
    "Which half has more [{cover}], the {one} or the {other}?",
    "{one} or {other} half: where is more [{cover}]?",
    "In which half is more [{cover}], {one} or {other}?",
    "is there more [{cover}] {one} or {other}",
    "Which half of the image shows more [{cover}], {one} or {other}?",
    "Is there more [{cover}] in the {one} or the {other} half?",
)  # fmt: skip
COVER_MOST = (
    "What covers most of the image?", "What is most of the image covered by?",
    "what covers most of the image", "What is the main land cover?",
    "What kind of land cover dominates the image?", "What takes up most of the picture?",
    "Which land cover is the largest?", "What is the background of the image?",
    "What does most of the image show?",
)  # fmt: skip
COVER_PART = (
    "What covers most of the [{part}]?", "What is most of the [{part}] covered by?",
    "what covers most of the [{part}]", "What is the main land cover at the [{part}]?",
    "What kind of land cover dominates the [{part}]?",
    "What takes up most of the [{part}] of the image?", "What is the background at the [{part}]?",
    "Which land cover is the largest in the [{part}]?",
)  # fmt: skip
COVER_MORE = (
    "Is there more [{first} than {second}]?", "Does the image show more [{first} than {second}]?",
    "Can you see more [{first} than {second}]?", "more [{first} than {second}]?",
    "is there more [{first} than {second}]",
    "Is a larger area covered by [{first} than by {second}]?",
    "Is more of the image [{first} than {second}]?",
    "Would you say there is more [{first} than {second}]?",
)  # fmt: skip

Shares = list[list[float]]


def whole(shares: Shares) -> float:
    """Share of the whole picture."""
    return sum(map(sum, shares)) / 9


def band(shares: Shares, half: str) -> tuple[float, float, float]:
    """Mean share of the outer third that lies in a half, of the middle third, of the other one."""
    lines = [
        sum(line) / 3
        for line in (zip(*shares, strict=True) if half in ("left", "right") else shares)
    ]
    first, middle, last = lines
    return (first, middle, last) if half in ("left", "top") else (last, middle, first)


def ninth_box(row: int, column: int) -> tuple[float, float, float, float]:
    """A ninth in shares of width and height."""
    return (column / 3, row / 3, (column + 1) / 3, (row + 1) / 3)


def seen(shares: Shares) -> tuple[tuple[float, float, float, float], ...]:
    """The ninths that show enough of a cover."""
    cells = [(r, c) for r in range(3) for c in range(3) if shares[r][c] >= ENOUGH]
    return tuple(ninth_box(r, c) for r, c in cells)


def fields(cover: str, draw: random.Random) -> dict[str, str]:
    """Fields of templates that name a cover."""
    name = draw.choice(COVER_NAMES[cover])
    several = name.endswith("s")
    return {"cover": name, "is": "are" if several else "is", "Is": "Are" if several else "Is"}


def main_cover(shares: dict[str, float]) -> str | None:
    """The cover of clearly most of an area."""
    order = sorted(shares, key=lambda cover: -shares[cover])
    if shares[order[0]] < MAIN or (len(order) > 1 and shares[order[0]] < MUCH * shares[order[1]]):
        return None
    return COVER_NAMES[order[0]][0]


def cover_offers(picture: dict[str, Any], draw: random.Random) -> list[Offer]:
    """Everything to ask about the picture's land cover."""
    covers: dict[str, Shares] = picture.get("cover") or {}
    found: list[Offer] = []
    for cover, shares in covers.items():
        found += _one(cover, shares, draw)
    if not covers:
        return []
    main = main_cover({cover: whole(shares) for cover, shares in covers.items()})
    if main:
        found.append(Offer("background", COVER_MOST, main, {}, (), (("background",),)))
    for place, (row, column) in zip(
        POSITIONS, ((r, c) for r in range(3) for c in range(3)), strict=True
    ):
        main = main_cover({cover: shares[row][column] for cover, shares in covers.items()})
        if main:
            part = {"part": draw.choice(words.PARTS[place])}
            found.append(Offer("background", COVER_PART, main, part, (), (("background",),),
                               weight=0.3, boxes=(ninth_box(row, column),)))  # fmt: skip
    for a, b in permutations(covers, 2):
        first, second = whole(covers[a]), whole(covers[b])
        if max(first, second) > MUCH * min(first, second) + ENOUGH:
            names = {"first": fields(a, draw)["cover"], "second": fields(b, draw)["cover"]}
            answer = "yes" if first > second else "no"
            found.append(Offer("compare", COVER_MORE, answer, names, (),
                               (("compare", "cover"), ("compare", a, b)), YES_NO, 2.0, 0.2,
                               seen(covers[a]) + seen(covers[b])))  # fmt: skip
    return found


def _one(cover: str, shares: Shares, draw: random.Random) -> list[Offer]:
    """Questions on one kind of land cover."""
    total = whole(shares)
    found: list[Offer] = []
    if total >= ENOUGH or total == 0:
        answer = "yes" if total else "no"
        found.append(Offer("presence", COVER_PRESENCE, answer, fields(cover, draw), (),
                           (("presence", cover),), YES_NO, 6.0, 1.0, seen(shares)))  # fmt: skip
    for half, spoken in words.HALVES.items():
        outer, middle, _ = band(shares, half)
        if outer >= ENOUGH or outer == middle == 0:
            part = {**fields(cover, draw), "half": draw.choice(spoken)}
            inside = [box for box in seen(shares) if _in(box, half)]
            found.append(Offer("half", COVER_HALF, "yes" if outer else "no", part, (),
                               (("half", cover),), YES_NO, 6.0, 0.5, tuple(inside)))  # fmt: skip
        # The middle third may lie in either half: all of it is counted for the other one.
        pair = ("left", "right") if half in ("left", "right") else ("top", "bottom")
        if outer > middle + band(shares, half)[2] and total >= ENOUGH:
            one, other = pair if draw.random() < 0.6 else pair[::-1]
            part = {**fields(cover, draw), "one": one, "other": other}
            found.append(Offer("side", COVER_SIDE, half, part, (), (("side", *pair),), pair,
                               4.0, 1.0, seen(shares)))  # fmt: skip
    cells = sorted(((shares[r][c], r * 3 + c) for r in range(3) for c in range(3)), reverse=True)
    if cells[0][0] >= PART_SEEN and cells[0][0] >= MUCH * cells[1][0]:
        place = cells[0][1]
        found.append(Offer("where", COVER_WHERE, POSITIONS[place], fields(cover, draw), (),
                           (("where",),), POSITIONS, 1.5, 1.0,
                           (ninth_box(*divmod(place, 3)),)))  # fmt: skip
    return found


def _in(box: tuple[float, float, float, float], half: str) -> bool:
    """Whether a ninth lies in a half, or half of it does."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    at = x if half in ("left", "right") else y
    return at < 0.51 if half in ("left", "top") else at > 0.49
