"""Whether confidences are what they say: of answers of confidence .7, seven in ten are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Bins of equal width over 0..1.
BINS = 10


@dataclass(frozen=True)
class ReliabilityBin:
    """Answers of about the same confidence.

    Attributes:
        low: Least confidence of the bin.
        high: Confidence that the next begins with.
        questions: How many there are.
        confidence: Their mean confidence.
        accuracy: Share of them that was right.
    """

    low: float
    high: float
    questions: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """Confidences of answers beside how many were right.

    Attributes:
        questions: How many answers have a confidence.
        confidence: Its mean.
        accuracy: Share of them that was right.
        calibration_error: Expected calibration error, 0..1: the mean over answers of how far apart
            confidence and accuracy of their bin are.
        bins: Those that have answers.
    """

    questions: int
    confidence: float
    accuracy: float
    calibration_error: float
    bins: tuple[ReliabilityBin, ...]


def reliability(answers: Sequence[tuple[float, bool]]) -> Reliability | None:
    """The table of answers, each its confidence 0..1 and whether it was right; None without any."""
    if not answers:
        return None
    members: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in answers:
        members.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, right))
    bins = tuple(_bin(place, members[place]) for place in sorted(members))
    count = len(answers)
    apart = math.fsum(abs(part.confidence - part.accuracy) * part.questions for part in bins)
    return Reliability(
        questions=count,
        confidence=_mean(answers),
        accuracy=sum(right for _, right in answers) / count,
        calibration_error=apart / count,
        bins=bins,
    )


def _bin(place: int, answers: Sequence[tuple[float, bool]]) -> ReliabilityBin:
    return ReliabilityBin(
        low=place / BINS,
        high=(place + 1) / BINS,
        questions=len(answers),
        confidence=_mean(answers),
        accuracy=sum(right for _, right in answers) / len(answers),
    )


def _mean(answers: Sequence[tuple[float, bool]]) -> float:
    return math.fsum(confidence for confidence, _ in answers) / len(answers)
