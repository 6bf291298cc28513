"""How sure an answer is, by what was fitted for the bundle (`lrs_edge/bundle/calibration.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lrs_edge.bundle.calibration import Calibration, OpenCalibration, YesNoCalibration

#: Answers below this confidence are marked in the text output: two of five like them are wrong.
#: Yes or no at random is right with .5, so a lower bound would never mark one of these.
UNSURE_BELOW = 0.6
UNSURE = "unsure"


@dataclass(frozen=True)
class Certainty:
    """What decoding says of how sure an answer is.

    Attributes:
        margin: How much rather yes than no, in logits; None where the answer is neither.
        log_probability: Mean over the answer's tokens; None where it has none.
        least_log_probability: The least of them.
    """

    margin: float | None = None
    log_probability: float | None = None
    least_log_probability: float | None = None


def certainty(margin: float | None, log_probabilities: Sequence[float]) -> Certainty:
    """Of an answer.

    Args:
        margin: Of its first token.
        log_probabilities: Of all its tokens, a stop token left out.
    """
    if not log_probabilities:
        return Certainty()
    mean = math.fsum(log_probabilities) / len(log_probabilities)
    return Certainty(margin, mean, min(log_probabilities))


def confidence(calibration: Calibration, found: Certainty) -> float | None:
    """Probability 0..1 that an answer is right; None where nothing was fitted for its kind.

    An answer without any token is not right.
    """
    if found.log_probability is None or found.least_log_probability is None:
        return 0.0
    if found.margin is not None and calibration.yes_no is not None:
        return yes_no_confidence(calibration.yes_no, found.margin)
    if calibration.open is None:
        return None
    return open_confidence(calibration.open, found.log_probability, found.least_log_probability)


def yes_no_confidence(fitted: YesNoCalibration, margin: float) -> float:
    """Probability that what the threshold makes of a margin is right."""
    distance = margin - fitted.threshold
    yes = sigmoid(fitted.slope * distance + fitted.intercept)
    return yes if distance > 0 else 1 - yes


def open_confidence(fitted: OpenCalibration, mean: float, least: float) -> float:
    """Probability that an answer with these log-probabilities is right."""
    return sigmoid(fitted.mean_slope * mean + fitted.least_slope * least + fitted.intercept)


def is_unsure(value: float | None) -> bool:
    """Whether a confidence is so low that the text output says so."""
    return value is not None and value < UNSURE_BELOW


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), of any finite number."""
    if value < 0:
        raised = math.exp(max(value, -700.0))
        return raised / (1 + raised)
    return 1 / (1 + math.exp(-min(value, 700.0)))
