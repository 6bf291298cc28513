"""What was fitted to a model's answers to questions whose right answers are known.

docs/confidence.md says how it is fitted and used. A manifest without it leaves answers as the model
gives them.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

#: Colour statistics of a picture: mean of red, green and blue, then their standard deviations.
COLOUR_FEATURES = 6

#: Most ids that stand for one word, ranges of ground resolution, and questions; and the largest
#: number that a fit may give: logits of language models are below 10^3.
MAX_WORD_IDS = 64
MAX_RANGES = 64
MAX_QUESTIONS = 1 << 40
MAX_VALUE = 1e4
#: Metres a pixel.
MIN_RESOLUTION, MAX_RESOLUTION = 1e-4, 1e6
#: A covariance of pixels of 0..1 has eigenvalues far below 1; below the least, its inverse is
#: noise.
MIN_VARIANCE, MAX_VARIANCE = 1e-9, 1e2


class YesNoCalibration(msgspec.Struct, frozen=True):
    """How yes and no are told apart, and how sure that is.

    The margin is the largest logit of `yes_ids` less the largest of `no_ids`, of an answer's first
    token. The answer is yes above the threshold, and right with the probability
    sigmoid(slope (margin - threshold) + intercept), or 1 less that for no.

    Attributes:
        yes_ids: Tokens that say yes.
        no_ids: Tokens that say no.
        threshold: A logit.
        slope: Per logit.
        intercept: At the threshold.
    """

    yes_ids: tuple[int, ...]
    no_ids: tuple[int, ...]
    threshold: float
    slope: float
    intercept: float = 0.0


class OpenCalibration(msgspec.Struct, frozen=True):
    """How sure all other answers are: sigmoid(mean_slope m + least_slope l + intercept).

    Attributes:
        intercept: Where every token was certain.
        mean_slope: Per mean m of the log-probabilities of the answer's tokens (natural logarithm).
        least_slope: Per least l of them.
    """

    intercept: float
    mean_slope: float
    least_slope: float = 0.0


class ColourDomain(msgspec.Struct, frozen=True):
    """Colours of the scenes that a model was trained on, by their global views.

    Attributes:
        mean: Of the statistics `COLOUR_FEATURES` of pixels of 0..1.
        covariance: Of the same, [6, 6].
        limit: Mahalanobis distance above which a scene is unlike them.
    """

    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    limit: float


class Domain(msgspec.Struct, frozen=True):
    """Which scenes are like those that a model was trained on.

    Attributes:
        resolutions: Ranges (lowest, highest) of the ground resolution in metres a pixel; empty
            where any will do.
        colours: None where any will do.
    """

    resolutions: tuple[tuple[float, float], ...] = ()
    colours: ColourDomain | None = None


class Calibration(msgspec.Struct, frozen=True):
    """Everything that was fitted; parts that were not are None.

    Attributes:
        yes_no: Answers that are yes or no.
        open: All other answers.
        domain: Scenes that the model was trained on.
        questions: How many the first two were fitted to.
        calibration_error: Expected calibration error over ten bins, 0..1, of questions left out of
            the fit.
    """

    yes_no: YesNoCalibration | None = None
    open: OpenCalibration | None = None
    domain: Domain | None = None
    questions: int = 0
    calibration_error: float | None = None


def calibration_problems(calibration: Calibration, vocabulary: int) -> Iterator[str]:
    """What no fit gives, one sentence each.

    Args:
        calibration: As it was read.
        vocabulary: Tokens of the language model.
    """
    yes_no, open_, domain = calibration.yes_no, calibration.open, calibration.domain
    if yes_no is not None:
        yield from _words(yes_no, vocabulary)
        yield from _fitted("yes_no.threshold", yes_no.threshold)
        yield from _fitted("yes_no.slope", yes_no.slope, least=0.0)
        yield from _fitted("yes_no.intercept", yes_no.intercept)
    if open_ is not None:
        yield from _fitted("open.intercept", open_.intercept)
        yield from _fitted("open.mean_slope", open_.mean_slope, least=0.0)
        yield from _fitted("open.least_slope", open_.least_slope, least=0.0)
    if domain is not None:
        yield from _domain(domain)
    if not 0 <= calibration.questions <= MAX_QUESTIONS:
        yield f"calibration.questions must be 0..{MAX_QUESTIONS}"
    error = calibration.calibration_error
    if error is not None and not 0 <= error <= 1:
        yield "calibration.calibration_error must be 0..1"


def _fitted(name: str, value: float, least: float = -MAX_VALUE) -> Iterator[str]:
    # Not a number compares as false.
    if not least <= value <= MAX_VALUE:
        yield f"calibration.{name} must be {least:g}..{MAX_VALUE:g}"


def _words(yes_no: YesNoCalibration, vocabulary: int) -> Iterator[str]:
    for name, ids in (("yes_ids", yes_no.yes_ids), ("no_ids", yes_no.no_ids)):
        if not 1 <= len(ids) <= MAX_WORD_IDS:
            yield f"calibration.yes_no.{name} must be 1..{MAX_WORD_IDS}"
        if not all(0 <= token < vocabulary for token in ids):
            yield f"calibration.yes_no.{name} must be tokens 0..{vocabulary - 1}"
    if set(yes_no.yes_ids) & set(yes_no.no_ids):
        yield "calibration.yes_no.yes_ids and no_ids must have no token in common"


def _domain(domain: Domain) -> Iterator[str]:
    if len(domain.resolutions) > MAX_RANGES:
        yield f"calibration.domain.resolutions must be at most {MAX_RANGES}"
    if not all(MIN_RESOLUTION <= low <= high <= MAX_RESOLUTION for low, high in domain.resolutions):
        yield (
            "calibration.domain.resolutions must be ranges of metres a pixel within "
            f"{MIN_RESOLUTION:g}..{MAX_RESOLUTION:g}"
        )
    if domain.colours is not None:
        yield from _colours(domain.colours)


def _colours(colours: ColourDomain) -> Iterator[str]:
    if not 0 < colours.limit <= MAX_VALUE:
        yield f"calibration.domain.colours.limit must be above 0 and at most {MAX_VALUE:g}"
    if len(colours.mean) != COLOUR_FEATURES or not all(-1 <= x <= 2 for x in colours.mean):
        yield f"calibration.domain.colours.mean must be {COLOUR_FEATURES} numbers of -1..2"
    rows = colours.covariance
    if len(rows) != COLOUR_FEATURES or any(len(row) != COLOUR_FEATURES for row in rows):
        yield "calibration.domain.colours.covariance must be 6 rows of 6 numbers"
        return
    matrix = np.array(rows, np.float64)
    if not (np.abs(matrix) <= MAX_VARIANCE).all() or not np.allclose(matrix, matrix.T):
        yield "calibration.domain.colours.covariance must be symmetric, of small numbers"
        return
    spread = np.linalg.eigvalsh(matrix)
    if not (spread[0] >= MIN_VARIANCE and spread[-1] <= MAX_VARIANCE):
        yield (
            "calibration.domain.colours.covariance must have eigenvalues of "
            f"{MIN_VARIANCE:g}..{MAX_VARIANCE:g}"
        )
