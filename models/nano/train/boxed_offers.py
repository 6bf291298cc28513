"""A question that could be asked, not yet drawn, and how the things in it are named."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import boxed_wording as words
from boxed_things import CONCEPTS, Thing, Things

POSITIONS = tuple(words.PARTS)
PAIRS = 24
"""Pairs of things of one picture that are compared at most."""
YES_NO = ("yes", "no")
STRICT = 20.0
"""Power of the balance of yes and no; rare things are far more often absent than there."""
SOME = tuple(str(number) for number in range(1, 10))
"""Answers of counts."""
MUCH = 1.4
"""How many times as large something is that is clearly larger."""


@dataclass(frozen=True)
class Offer:
    """What a question asks; how its words are chosen comes later."""

    kind: str
    templates: tuple[str, ...]
    answer: str
    words: dict[str, str]
    """Fields of the templates."""
    evidence: tuple[int, ...]
    """Regions that show the answer."""
    keys: tuple[tuple[str, ...], ...]
    """Under which the balance of answers is kept."""
    answers: tuple[str, ...] = ()
    """All that there could be; empty where the list is open."""
    power: float = 1.0
    """How strictly the answers are balanced."""
    weight: float = 1.0
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Evidence that is no region, in shares of width and height."""


class Speaker:
    """Names the things of one picture.

    Args:
        picture: As `boxed_questions` says.
        draw: Source of every choice.
    """

    def __init__(self, picture: dict[str, Any], draw: random.Random) -> None:
        self.picture, self.draw = picture, draw
        self.things = Things(picture)

    def words_for(self, name: str) -> dict[str, str]:
        """Fields of templates that name a concept."""
        singular, several = self.things.name(name, self.draw)
        return {"name": singular, "names": several, "a": words.article(singular)}

    def those(self, name: str, number: int) -> dict[str, str]:
        """Fields of templates that name all there are of a concept."""
        singular, several = self.things.name(name, self.draw)
        one = number == 1 and self.draw.random() < 0.85
        return agreeing(singular if one else several, not one)

    def named(self, name: str) -> list[Thing]:
        """The things of one concept that can be singled out in words."""
        held = self.things.held[name]
        if not self.things.located(name) or (len(held) > 1 and not self.things.complete(name)):
            return []
        if len(held) == 1:
            return [Thing(self.things.name(name, self.draw)[0], held[0], name)]
        found = self.things.extremes(held)
        things = []
        for kind, index in found.items():
            adjective = self.draw.choice(words.EXTREMES[kind])
            sizes = [s for s in ("largest", "smallest") if found.get(s) == index]
            if kind not in ("largest", "smallest") and sizes and self.draw.random() < 0.6:
                adjective = f"{adjective} and {sizes[0]}"
            phrase = f"{adjective} {self.things.name(name, self.draw)[0]}"
            things.append(Thing(phrase, index, name, kind))
        return things

    def pairs(self) -> list[tuple[Thing, Thing]]:
        """Pairs of different things that can be named, in both orders."""
        things = [thing for name in self.things.held for thing in self.named(name)]
        found = [
            (a, b) for a, b in permutations(things, 2)
            if a.index != b.index
            and (a.concept == b.concept or not overlap(a.concept, b.concept))
        ]  # fmt: skip
        return self.draw.sample(found, min(len(found), PAIRS))


def agreeing(that: str, several: bool) -> dict[str, str]:
    """Fields of templates with a verb."""
    return {"that": that, "is": "are" if several else "is", "Is": "Are" if several else "Is"}


def overlap(first: str, second: str) -> bool:
    """Whether one thing could be both."""
    a, b = CONCEPTS[first], CONCEPTS[second]
    return (
        bool(a.labels & (b.labels | b.near) or b.labels & a.near)
        or second == a.within
        or first == b.within
    )


def yes_no(
    kind: str, templates: tuple[str, ...], answer: str, fields: dict[str, str],
    evidence: tuple[int, ...], about: str = "", weight: float = 1.0,
) -> Offer:  # fmt: skip
    """An offer that yes or no answers, balanced over all pictures for what it is about."""
    keys = ((kind, about),) if about else ((kind,),)
    return Offer(kind, templates, answer, fields, evidence, keys, YES_NO, STRICT, weight)


def naming(
    kind: str, templates: tuple[str, ...], fields: dict[str, str],
    answer: str, evidence: tuple[int, ...], weight: float = 1.0,
) -> Offer:  # fmt: skip
    """A question that a thing's name answers."""
    return Offer(kind, templates, answer, fields, evidence, ((kind,),), (), 1.0, weight)
