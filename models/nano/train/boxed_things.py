"""What a picture's boxes say: which things are there, which surely are not, and how they lie.

A box's label is fine ("airliner") or broad ("airplane"); a `Concept` is what people ask about and
holds all labels that are one. Absence and counts hold only where the picture's `complete` labels
cover the concept. Boxes are in shares of width and height.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from questions import position

Pair = tuple[str, str]
"""One thing and several."""
CLEAR = 0.03
"""Free share of width or height around a line, and between two places that are told apart."""
FAR = 0.05
"""The same around the middle of the picture."""
PLANES = ("airliner", "chartered", "trainer", "propeller", "fighter")
ROAD = ("car", "van", "truck", "bus", "minibus", "longvehicle", "stairtruck", "pushbacktruck")
COURTS = ("tennis court", "basketball court")
LOOSE = {"car", "van", "vehicle", "truck", "boat", "tree", "building"}
"""Labels that incomplete sources miss in rows: where not complete, the boxed ones say nothing of
where all of them are."""
HARD = 3.0
"""How much more often absence is asked of what belongs to the kind of place that is there."""


@dataclass(frozen=True)
class Concept:
    """Something that people ask about."""

    name: str
    labels: frozenset[str]
    words: tuple[Pair, ...]
    place: str
    """The kind of place that it belongs to: what is absent there is a hard negative."""
    enough: tuple[frozenset[str], ...]
    """Sets of labels, any of which makes the concept complete when the picture's labels hold it."""
    near: frozenset[str] = frozenset()
    """Labels that could be taken for it: where boxed, it is neither absent nor counted."""
    within: str = ""
    """The broader concept, whose absence is this one's."""
    answer: str = ""
    """How an answer names one; the name where empty."""
    weight: float = 1.0
    """How often it is asked about beside the others."""


def _concept(
    name: str, place: str, words: Sequence[str | Pair] = (), labels: Sequence[str] = (),
    enough: Sequence[Sequence[str]] = (), near: Sequence[str] = (), **rest: Any,
) -> Concept:  # fmt: skip
    """A concept; a word w/o a plural of its own gets an s, none at all stands for the name."""
    pairs = tuple((w, f"{w}s") if isinstance(w, str) else w for w in words or [name])
    held = frozenset(labels or [name])
    full = tuple(frozenset(some) for some in enough) or (held,)
    return Concept(name, held, pairs, place, full, frozenset(near), **rest)


_ALL_ROAD = [["vehicle"], ["car", "truck", "bus"]]
CONCEPTS: dict[str, Concept] = {
    c.name: c
    for c in (
        _concept("airplane", "air",
                 ["airplane", "airplane", "plane", "plane", ("aircraft", "aircraft"), "aeroplane"],
                 ["airplane", *PLANES], [["airplane"], PLANES[:4]]),
        _concept("airliner", "air", ["airliner", "passenger plane"], near=["airplane", "chartered"],
                 within="airplane", weight=0.5),
        _concept("chartered", "air", ["chartered plane", "business jet"],
                 near=["airplane", "airliner"], within="airplane", weight=0.5,
                 answer="chartered plane"),
        _concept("trainer", "air", ["trainer plane"], near=["airplane", "propeller"],
                 within="airplane", weight=0.5, answer="trainer plane"),
        _concept("propeller", "air", ["propeller plane"], near=["airplane", "trainer"],
                 within="airplane", weight=0.5, answer="propeller plane"),
        _concept("fighter", "air", ["fighter plane", "fighter jet"], near=["airplane", "trainer"],
                 within="airplane", weight=0.5, answer="fighter plane"),
        _concept("helicopter", "air"),
        _concept("ship", "water", ["ship", "ship", "ship", "boat", "vessel"], ["ship", "boat"],
                 [["ship"], ["boat"]]),
        _concept("harbor", "water", ["harbor", "harbor", "harbor", "dock", "pier", "port"]),
        _concept("bridge", "water"),
        _concept("storage tank", "industry", ["storage tank", "storage tank", "oil tank", "tank"]),
        _concept("baseball diamond", "sport", ["baseball diamond", "baseball field"]),
        _concept("tennis court", "sport"),
        _concept("basketball court", "sport"),
        _concept("ground track field", "sport",
                 ["ground track field", "running track", "athletics track", "track field"]),
        _concept("football field", "sport", ["football field", "soccer field"],
                 ["ground track field"], near=["baseball diamond", *COURTS], weight=0.7),
        _concept("sports field", "sport", ["sports field"],
                 ["ground track field", "baseball diamond"], near=COURTS, weight=0.3),
        _concept("vehicle", "road", ["vehicle", "vehicle", "road vehicle"], ["vehicle", *ROAD],
                 _ALL_ROAD),
        _concept("car", "road", ["car", "car", "car", "automobile"], ["car", "vehicle"],
                 [["car"], ["vehicle"]], ["van", "minibus"], within="vehicle"),
        _concept("van", "road", near=["vehicle", "minibus"], within="vehicle", weight=0.7),
        _concept("truck", "road", ["truck", "truck", ("lorry", "lorries")],
                 near=["vehicle", "longvehicle", "stairtruck", "pushbacktruck", "van"],
                 within="vehicle", weight=0.7),
        _concept("bus", "road", [("bus", "buses")], near=["vehicle", "minibus"], within="vehicle",
                 weight=0.7),
        _concept("minibus", "road", [("minibus", "minibuses")], near=["vehicle", "van", "bus"],
                 within="vehicle", weight=0.4),
        _concept("longvehicle", "road", ["long vehicle"], near=["vehicle", "truck", "bus"],
                 within="vehicle", weight=0.4, answer="long vehicle"),
        _concept("stairtruck", "air", ["stair truck"], near=["vehicle", "truck"], within="vehicle",
                 weight=0.4, answer="stair truck"),
        _concept("pushbacktruck", "air", ["pushback truck"], near=["vehicle", "truck"],
                 within="vehicle", weight=0.4, answer="pushback truck"),
        _concept("building", "land", ["building", "building", "house"]),
        _concept("tree", "land"),
        _concept("swimming pool", "land", ["swimming pool", "pool"]),
        _concept("roundabout", "road", ["roundabout", "traffic circle"]),
        _concept("intersection", "road", ["intersection", "road intersection",
                                          ("crossroads", "crossroads")]),
    )
}  # fmt: skip
BROAD = dict.fromkeys(PLANES, "airplane") | {"boat": "ship"}
"""The concept that answers name a label by, where it is not the label itself."""
FINE = {"airplane": PLANES, "vehicle": ROAD}
"""Labels that tell what kind of such a thing it is."""


def every_name() -> list[Pair]:
    """All words for all things."""
    pairs = [pair for concept in CONCEPTS.values() for pair in concept.words]
    pairs += [(c.answer, f"{c.answer}s") for c in CONCEPTS.values() if c.answer]
    return list(dict.fromkeys(pairs))


@dataclass
class Balance:
    """Which answers were given, so that none pays without a look at the picture."""

    given: dict[tuple[str, ...], Counter[str]] = field(default_factory=dict)

    def weight(self, key: tuple[str, ...], answer: str, answers: Sequence[str] = ()) -> float:
        """How welcome an answer is: 1 at the mean of all, more below it, less above it.

        Args:
            key: What was asked about.
            answer: One of the answers.
            answers: All that there could be; those given so far where empty.
        """
        seen = self.given.get(key)
        if not seen:
            return 1.0
        number = len({*answers, answer, *(() if answers else seen)})
        return (sum(seen.values()) / number + 1) / (seen[answer] + 1)

    def add(self, key: tuple[str, ...], answer: str) -> None:
        """Note an answer."""
        self.given.setdefault(key, Counter())[answer] += 1


@dataclass(frozen=True)
class Thing:
    """One boxed thing and the words that single it out, such as 'top-most bridge'."""

    phrase: str
    index: int
    concept: str
    extreme: str = ""
    """What it is of all such things, such as 'top'; empty where there is only one."""


class Things:
    """The boxes of one picture, by what people call what is in them."""

    def __init__(self, picture: dict[str, Any]) -> None:
        self.labels = [region["label"] for region in picture["regions"]]
        self.boxes = [tuple(region["box"]) for region in picture["regions"]]
        self.centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in self.boxes]
        self.areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in self.boxes]
        self.boxed = set(self.labels)
        self.trusted = set(picture["complete"])
        self.held = {
            name: tuple(i for i, label in enumerate(self.labels) if label in concept.labels)
            for name, concept in CONCEPTS.items()
            if concept.labels & self.boxed
        }
        self.places = {CONCEPTS[name].place for name in self.held}

    def complete(self, name: str) -> bool:
        """Whether all there are of it are boxed, and nothing else could be taken for it."""
        concept = CONCEPTS[name]
        covered = any(labels <= self.trusted for labels in concept.enough)
        return covered and not concept.near & self.boxed

    def absent(self, name: str) -> bool:
        """Whether there is surely none."""
        if name in self.held:
            return False
        broader = CONCEPTS[name].within
        return self.complete(name) or (
            bool(broader) and broader not in self.held and self.complete(broader)
        )

    def located(self, name: str) -> bool:
        """Whether the boxed ones are all there are, as far as it matters for where they are."""
        could = CONCEPTS[name].labels
        return self.complete(name) or (not could & LOOSE and not CONCEPTS[name].near & self.boxed)

    @property
    def closed(self) -> bool:
        """Whether all kinds of things that are boxed are boxed wherever they are."""
        known = self.boxed <= BROAD.keys() | CONCEPTS.keys()
        return known and all(self.complete(BROAD.get(label, label)) for label in self.boxed)

    def name(self, name: str, draw: random.Random) -> Pair:
        """Words for it; a helicopter is an aircraft, so that word is left out beside one."""
        words = CONCEPTS[name].words
        if name == "airplane" and "helicopter" in self.boxed:
            words = tuple(pair for pair in words if pair[0] != "aircraft")
        return draw.choice(words)

    def answer(self, index: int) -> str:
        """What an answer calls one boxed thing."""
        name = BROAD.get(self.labels[index], self.labels[index])
        return CONCEPTS[name].answer or name

    def ninth(self, index: int) -> str | None:
        """The ninth of the picture that holds its centre; None near a line between two."""
        near = [abs(at - line) for at in self.centres[index] for line in (1 / 3, 2 / 3)]
        return None if min(near) < CLEAR else position(list(self.boxes[index]))

    def half(self, index: int, half: str, margin: float = FAR) -> bool:
        """Whether its centre lies in a half, by a margin."""
        at = self.centres[index][half in ("top", "bottom")]
        return at < 0.5 - margin if half in ("left", "top") else at > 0.5 + margin

    def outside(self, index: int, half: str) -> bool:
        """Whether no part of its box is in a half."""
        at = half in ("top", "bottom")
        box = self.boxes[index]
        return box[at] > 0.5 if half in ("left", "top") else box[at + 2] < 0.5

    def extremes(self, indices: Sequence[int]) -> dict[str, int]:
        """Which of some things is clearly the left-most, ..., the largest, the smallest."""
        found: dict[str, int] = {}
        for kind, axis, sign in (
            ("left", 0, 1),
            ("right", 0, -1),
            ("top", 1, 1),
            ("bottom", 1, -1),
        ):
            order = sorted(indices, key=lambda i: sign * self.centres[i][axis])
            first, second = order[:2]
            edge = axis if sign > 0 else axis + 2
            reach = min(sign * self.boxes[i][edge] for i in order[1:])
            apart = abs(self.centres[first][axis] - self.centres[second][axis])
            if apart >= CLEAR and sign * self.boxes[first][edge] < reach:
                found[kind] = first
        order = sorted(indices, key=lambda i: self.areas[i])
        if self.areas[order[0]] * 1.25 < self.areas[order[1]]:
            found["smallest"] = order[0]
        if self.areas[order[-2]] * 1.25 < self.areas[order[-1]]:
            found["largest"] = order[-1]
        return found


def way(first: tuple[float, float], second: tuple[float, float]) -> str | None:
    """Which way the first point lies from the second, where it is clearly one of four."""
    x, y = first[0] - second[0], first[1] - second[1]
    if max(abs(x), abs(y)) < FAR or min(abs(x), abs(y)) * 1.5 > max(abs(x), abs(y)):
        return None
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"
