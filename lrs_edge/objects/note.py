"""What was found, in words: the text that the language model reads."""

from __future__ import annotations

import re

import numpy as np

from lrs_edge.bundle.manifest import ObjectSpec
from lrs_edge.objects.detections import Detections

#: Names of the ninths of an image, row by row; questions about composed scenes have the same.
NINTHS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)

_NAMES = tuple(name for row in NINTHS for name in row)

#: Parts that are named for one label.
MOST_NINTHS = 3

#: Counts above this are "many".
MOST_COUNTED = 99

#: Stands before labels that are doubtful.
DOUBTFUL = "perhaps "

#: What an image without any object is said to show.
NOTHING = "nothing"


def named(question: str, spec: ObjectSpec) -> tuple[int, ...]:
    """Labels that a question names, by themselves or an alias, singular or plural, as they come.

    Args:
        question: In English, as the labels are.
        spec: Labels and aliases.
    """
    places = {}
    for label, name in enumerate(spec.labels):
        words = (name, *(spec.aliases[label] if spec.aliases else ()))
        either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        hit = re.search(rf"\b(?:{either})(?:s|es)?\b", question, re.IGNORECASE)
        if hit:
            places[label] = hit.start()
    return tuple(sorted(places, key=lambda label: (places[label], label)))


def describe(found: Detections, spec: ObjectSpec, question: str = "", most: int = 10) -> str:
    """What the model is told for one question: of the labels that it names, else of all found.

    A small model then finds the answer in one place, and need not match words first.

    Args:
        found: Merged objects (`lrs_edge.objects.merge`).
        spec: Labels, thresholds, aliases.
        question: What is asked.
        most: Labels that are named at most.

    Returns:
        As `everything`; "no ship" for a label that is asked for and was not found.
    """
    asked = named(question, spec)[:most]
    if not asked:
        return everything(found, spec, most)
    parts = []
    for label in asked:
        one = everything(found.take(np.flatnonzero(found.labels == label)), spec)
        parts.append(f"no {spec.labels[label]}" if one == NOTHING else one)
    return "; ".join(parts)


def everything(found: Detections, spec: ObjectSpec, most: int = 10) -> str:
    """Labels with how many there are and where, the surest first.

    A label with an object that reaches its high threshold counts the objects that do; one that
    reaches only the low threshold counts those, and is doubtful. The halves are those of the
    objects' mean centre, the ninths the most frequent ones of their centres:

        airplane 3 left top: top left, center; perhaps bridge 1 right bottom: bottom

    Args:
        found: Merged objects (`lrs_edge.objects.merge`).
        spec: Labels and thresholds.
        most: Labels that are named at most.

    Returns:
        "nothing" where nothing reaches its low threshold.
    """
    items = []
    centres = found.centres.astype(np.float64)
    for label in np.unique(found.labels):
        low, high = (np.float32(threshold) for threshold in spec.thresholds[label])
        own = found.labels == label
        best = found.scores[own].max()
        if best < low:
            continue
        doubtful = bool(best < high)
        counted = centres[own & (found.scores >= (low if doubtful else high))]
        text = f"{spec.labels[label]} {_count(len(counted))} {_places(counted)}"
        items.append((doubtful, -float(best), int(label), (DOUBTFUL if doubtful else "") + text))
    return "; ".join(text for *_, text in sorted(items)[:most]) or NOTHING


def longest(spec: ObjectSpec, most: int = 10) -> str:
    """A text at least about as long as any of `describe`: what to leave room for."""
    places = f"right bottom: {', '.join(sorted(_NAMES, key=len)[-MOST_NINTHS:])}"
    labels = sorted(spec.labels, key=len)[-most:]
    return "; ".join(f"{DOUBTFUL}{label} {_count(MOST_COUNTED)} {places}" for label in labels)


def _count(number: int) -> str:
    return str(number) if number <= MOST_COUNTED else "many"


def _places(centres: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    """Halves of the mean and most frequent ninths of points [n, 2] in shares of the image."""
    x, y = centres.mean(axis=0)
    halves = f"{'right' if x >= 0.5 else 'left'} {'bottom' if y >= 0.5 else 'top'}"
    cols, rows = np.minimum(centres * 3, 2).astype(np.int64).T
    counts = np.bincount(rows * 3 + cols, minlength=9)
    frequent = np.argsort(-counts, kind="stable")[:MOST_NINTHS]
    return f"{halves}: {', '.join(_NAMES[i] for i in frequent if counts[i])}"
