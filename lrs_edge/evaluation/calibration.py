"""Fitting a bundle's calibration to its answers to questions whose right answers are known.

docs/confidence.md says what is fitted; `lrs_edge/answer/confidence.py` uses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lrs_edge.answer.confidence import Certainty, confidence
from lrs_edge.bundle.calibration import (
    MAX_VALUE,
    Calibration,
    OpenCalibration,
    YesNoCalibration,
)
from lrs_edge.errors import UsageError
from lrs_edge.evaluation.logistic import Values, fit_logistic
from lrs_edge.evaluation.matching import Matcher, normalise
from lrs_edge.evaluation.reliability import Reliability, reliability
from lrs_edge.evaluation.results import Results
from lrs_edge.language.yes_no import YesNo

Word = Literal["yes", "no"]

#: With fewer answers of yes, of no, or of anything else, nothing is fitted to them.
LEAST_ANSWERS = 10

#: Questions are left out of the fit in so many parts, whole images at a time.
FOLDS = 10
#: Draws of which the threshold is the median: the best threshold of one sample of some hundred
#: answers hangs on a few of them.
_DRAWS = 200


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        image: What it is about; answers about one image are left out of a fit together.
        group: What it asks for; groups count alike in the threshold.
        found: What decoding says.
        truth: The right answer where that is yes or no.
        right: Whether the answer was, as it was given.
    """

    image: str
    group: str
    found: Certainty
    truth: Word | None
    right: bool

    @property
    def is_yes_no(self) -> bool:
        """Whether the threshold decides this answer."""
        return self.found.margin is not None

    def is_right(self, threshold: float | None) -> bool:
        """Whether the answer is right where a threshold decides yes or no.

        Args:
            threshold: None where none does.
        """
        if self.found.margin is None or threshold is None or self.truth is None:
            return self.right
        return (self.found.margin > threshold) == (self.truth == "yes")


@dataclass(frozen=True)
class YesNoFigures:
    """How well yes and no are told apart.

    Attributes:
        questions: Answers that begin with yes or no, of questions with such a right answer.
        by_logits: Balanced accuracy of the larger logit; groups count alike in all three.
        by_threshold: Of the threshold, on the questions that it was fitted to.
        left_out: Of thresholds fitted without these questions.
    """

    questions: int
    by_logits: float
    by_threshold: float
    left_out: float


@dataclass(frozen=True)
class Fit:
    """What was fitted, and how good it is.

    Attributes:
        calibration: Without a domain.
        yes_no: None where no threshold was fitted.
        open_questions: Other answers.
        open_right: How many of them were right.
        left_out: Reliability over questions that were left out of the fit in turn; None where
            nothing was fitted.
        notes: What could not be fitted, one sentence each.
    """

    calibration: Calibration
    yes_no: YesNoFigures | None
    open_questions: int
    open_right: int
    left_out: Reliability | None
    notes: tuple[str, ...]


def samples_of(results: Results, matcher: Matcher) -> list[Sample]:
    """The answers of a run from which something can be learnt; failed questions are left out.

    Raises:
        UsageError: The run was not decoded greedily or followed the reference policy, or its
            file does not say how sure the answers were.
    """
    options = results.header.options
    if options.get("policy", "full") != "full" or options.get("temperature", 0):
        raise UsageError(
            "a calibration is for greedy answers under --policy full; run the evaluation so"
        )
    found = []
    for result in results:
        if result.error or (result.work is not None and result.work.finish_reason == "timeout"):
            continue
        if result.log_probability is None and result.text:
            raise UsageError(
                f"the answer to question {result.question_id!r} says no log_probability: an "
                "lrs-edge that did not note it wrote the file; run the evaluation again"
            )
        said = normalise(result.ground_truth)
        found.append(
            Sample(
                image=result.image,
                group=result.thing or result.category,
                found=Certainty(
                    result.margin, result.log_probability, result.least_log_probability
                ),
                truth="yes" if said == "yes" else "no" if said == "no" else None,
                right=matcher.match(result.text, result.ground_truth, result.choices) is not None,
            )
        )
    return found


def fit(samples: Sequence[Sample], words: YesNo) -> Fit:
    """Fit everything that the answers suffice for, and look at it over answers left out.

    Args:
        samples: Of one bundle, of any number of runs.
        words: Tokens of yes and no, as the runs had them.

    Raises:
        UsageError: They suffice for nothing.
    """
    found, notes = _fitted(samples, words)
    if found.yes_no is None and found.open is None:
        raise UsageError(f"nothing can be fitted to {len(samples)} answers: {'; '.join(notes)}")
    decided, left_out = _left_out(samples, words, found)
    others = [sample for sample in samples if not sample.is_yes_no]
    figures = None
    if found.yes_no is not None:
        threshold = found.yes_no.threshold
        binary = _binary(samples)
        figures = YesNoFigures(
            questions=len(binary),
            by_logits=_balanced([(sample, sample.is_right(0.0)) for sample in binary]),
            by_threshold=_balanced([(sample, sample.is_right(threshold)) for sample in binary]),
            left_out=_balanced(decided),
        )
    error = None if left_out is None else left_out.calibration_error
    calibration = Calibration(found.yes_no, found.open, None, len(samples), error)
    right = sum(sample.right for sample in others)
    return Fit(calibration, figures, len(others), right, left_out, tuple(notes))


def _binary(samples: Iterable[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.is_yes_no and sample.truth is not None]


def _fitted(samples: Sequence[Sample], words: YesNo) -> tuple[Calibration, list[str]]:
    """The calibration, and why parts of it are missing."""
    notes = []
    binary = _binary(samples)
    others = [
        sample
        for sample in samples
        if not sample.is_yes_no and sample.found.log_probability is not None
    ]
    truths = Counter(sample.truth for sample in binary)
    yes_no, open_ = None, None
    if not (words.yes_ids and words.no_ids):
        notes.append(
            "no threshold of yes and no: the tokenizer has no single token for one of them"
        )
    elif min(truths["yes"], truths["no"]) >= LEAST_ANSWERS:
        yes_no = _fit_yes_no(binary, words)
    else:
        notes.append(
            f"no threshold of yes and no: it takes {LEAST_ANSWERS} questions with each of the two "
            f"as right answer, there are {truths['yes']} and {truths['no']}"
        )
    if len(others) >= LEAST_ANSWERS:
        open_ = _fit_open(others)
    else:
        notes.append(
            f"no confidence of other answers: it takes {LEAST_ANSWERS}, there are {len(others)}"
        )
    return Calibration(yes_no=yes_no, open=open_), notes


def _left_out(
    samples: Sequence[Sample], words: YesNo, whole: Calibration
) -> tuple[list[tuple[Sample, bool]], Reliability | None]:
    """What fits without them make of questions: yes and no decided, and all confidences.

    A part that the rest of the questions do not suffice for has that of the whole fit.
    """
    images = sorted({sample.image for sample in samples})
    np.random.default_rng(0).shuffle(images)
    folds = {image: place % FOLDS for place, image in enumerate(images)}
    decided: list[tuple[Sample, bool]] = []
    sure: list[tuple[float, bool]] = []
    for fold in range(min(FOLDS, len(images))):
        inside = [sample for sample in samples if folds[sample.image] == fold]
        rest, _ = _fitted([sample for sample in samples if folds[sample.image] != fold], words)
        used = Calibration(rest.yes_no or whole.yes_no, rest.open or whole.open)
        threshold = None if used.yes_no is None else used.yes_no.threshold
        for sample in inside:
            right = sample.is_right(threshold)
            value = confidence(used, sample.found)
            if value is not None:
                sure.append((value, right))
            if sample.is_yes_no and sample.truth is not None:
                decided.append((sample, right))
    return decided, reliability(sure)


def balanced_weights(samples: Sequence[Sample]) -> Values:
    """Weights [n] with which yes and no count alike, and in each of them all groups."""
    sizes = Counter((sample.truth, sample.group) for sample in samples)
    groups = Counter(truth for truth, _ in sizes)
    weights = [1 / (groups[sample.truth] * sizes[sample.truth, sample.group]) for sample in samples]
    return np.array(weights, np.float64) / max(len(groups), 1)


def _balanced(answers: Sequence[tuple[Sample, bool]]) -> float:
    weights = balanced_weights([sample for sample, _ in answers])
    return float(weights @ np.array([right for _, right in answers], np.float64))


def _fit_yes_no(samples: Sequence[Sample], words: YesNo) -> YesNoCalibration:
    margins = np.array([sample.found.margin for sample in samples], np.float64)
    margins = margins.clip(-MAX_VALUE, MAX_VALUE)
    yes = np.array([sample.truth == "yes" for sample in samples], np.float64)
    weights = balanced_weights(samples)
    threshold = _threshold(margins, yes, weights)
    slope, intercept = fit_logistic((margins - threshold)[:, None], yes, weights)
    return YesNoCalibration(
        words.yes_ids, words.no_ids, threshold, _bounded(slope), _bounded(intercept)
    )


def _threshold(margins: Values, yes: Values, weights: Values) -> float:
    """Median of the best thresholds of samples drawn from the answers, yes and no apart."""
    random = np.random.default_rng(0)
    places = [np.flatnonzero(yes == value) for value in (0.0, 1.0)]
    found = [_best_threshold(margins, yes, weights)]
    for _ in range(_DRAWS):
        drawn = np.concatenate([random.choice(part, len(part)) for part in places])
        found.append(_best_threshold(margins[drawn], yes[drawn], weights[drawn]))
    return float(np.median(found))


def _best_threshold(margins: Values, yes: Values, weights: Values) -> float:
    """The middle of the thresholds that are right most often."""
    order = np.argsort(margins, kind="stable")
    ascending = margins[order]
    # Right below the first margin: all yes. Each margin passed loses a yes, or wins a no.
    steps = np.where(yes[order] > 0, -weights[order], weights[order])
    right = np.append(0.0, np.cumsum(steps))
    # No threshold lies between equal margins.
    inside = np.append(True, np.append(ascending[1:] > ascending[:-1], True))
    edges = np.concatenate([ascending[:1] - 1, ascending, ascending[-1:] + 1])
    middles = (edges[:-1] + edges[1:]) / 2
    best = np.flatnonzero(inside & (right >= right[inside].max() - 1e-12))
    return float(middles[best[len(best) // 2]])


def _fit_open(samples: Sequence[Sample]) -> OpenCalibration:
    features = np.array(
        [(sample.found.log_probability, sample.found.least_log_probability) for sample in samples],
        np.float64,
    ).clip(-MAX_VALUE, 0)
    right = np.array([sample.right for sample in samples], np.float64)
    mean_slope, least_slope, intercept = fit_logistic(features, right, np.ones(len(samples)))
    return OpenCalibration(_bounded(intercept), _bounded(mean_slope), _bounded(least_slope))


def _bounded(value: float) -> float:
    return float(np.clip(value, -MAX_VALUE, MAX_VALUE))
