"""What answers are worth: reading them, and the figures made of them. Pure functions.

A class is a thing that real_eval asks about, such as "airplane". Answers that say nothing readable
are None, and wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

THINGS: dict[str, str] = {
    "airplane": "airplane", "plane": "airplane", "ship": "ship", "boat": "ship",
    "bridge": "bridge", "basketball": "basketball court", "baseball": "baseball field",
    "tennis": "tennis court", "football": "football field", "vehicle": "vehicle",
    "intersection": "intersection", "roundabout": "roundabout",
}  # fmt: skip
"""Words of questions, and the class that each names."""

WITHOUT_LABELS = frozenset({"intersection", "roundabout"})
"""Classes that no training data is labelled with."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def thing(text: str) -> str | None:
    """The class that a question is about."""
    lowered = text.lower()
    return next((name for word, name in THINGS.items() if word in lowered), None)


def yes_or_no(answer: str | None) -> str | None:
    """An answer's first word, where that is yes or no."""
    first = re.match(r"\W*(yes|no)\b", (answer or "").lower())
    return first[1] if first else None


def one_of(answer: str | None, choices: Collection[str]) -> str | None:
    """The one choice that an answer names; None where it names none or several."""
    words = set(re.findall(r"[a-z]+", (answer or "").lower()))
    named = [choice for choice in choices if choice in words]
    return named[0] if len(named) == 1 else None


def number(answer: str | None) -> int | None:
    """The first number of an answer, as digits or as a word up to ten."""
    for word in re.findall(r"[a-z]+|\d+", (answer or "").lower()):
        if word.isdigit():
            return int(word)
        if word in _NUMBERS:
            return _NUMBERS.index(word)
    return None


def side_choices(text: str) -> tuple[str, str]:
    """The two answers that a question about halves offers."""
    return ("left", "right") if "left" in text.lower() else ("top", "bottom")


def is_right(question: str, answer: str | None, truth: str) -> bool:
    """Whether a short answer says what is true, whatever the kind of the question."""
    if truth in ("yes", "no"):
        return yes_or_no(answer) == truth
    if truth in ("left", "right", "top", "bottom") and "half" in question:
        return one_of(answer, side_choices(question)) == truth
    return re.sub(r"[^a-z0-9 ]", "", (answer or "").lower()).strip() == truth


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    right: float
    of: float

    def __add__(self, other: Share) -> Share:
        return Share(self.right + other.right, self.of + other.of)

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.right / self.of if self.of else None

    def __str__(self) -> str:
        return "-" if not self.of else f"{percent(self.value)} ({self.right:g}/{self.of:g})"


def percent(value: float | None) -> str:
    """A share as text."""
    return "-" if value is None else f"{100 * value:.1f} %"


def share(rights: Iterable[bool]) -> Share:
    """How many are right."""
    every = list(rights)
    return Share(sum(every), len(every))


@dataclass(frozen=True)
class Presence:
    """Answers to questions that are answered by yes or no, by what is true."""

    yes: Share
    no: Share

    @property
    def balanced(self) -> float | None:
        """Mean of the shares right among yes and among no; None without either."""
        if self.yes.value is None or self.no.value is None:
            return None
        return (self.yes.value + self.no.value) / 2


def presence(pairs: Iterable[tuple[str, str | None]]) -> Presence:
    """Of pairs of what is true and what was answered."""
    every = list(pairs)
    yes, no = (share(given == truth for true, given in every if true == truth)
               for truth in ("yes", "no"))  # fmt: skip
    return Presence(yes, no)


def mean_over_classes(classes: Mapping[str, Presence]) -> float | None:
    """Mean of the balanced accuracies of the classes that have one."""
    values = [each.balanced for each in classes.values() if each.balanced is not None]
    return sum(values) / len(values) if values else None


def within(pairs: Sequence[tuple[int, int | None]], distance: int) -> Share:
    """Counts that are at most so far from the true ones."""
    return share(given is not None and abs(given - true) <= distance for true, given in pairs)
