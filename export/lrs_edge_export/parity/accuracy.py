"""Accuracy of an exported bundle on questions, and what quantization costs of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lrs_edge
from lrs_edge.bundle.parity import Accuracy
from lrs_edge.errors import ExportError, LrsEdgeError
from lrs_edge.evaluation import runner
from lrs_edge.evaluation.matching import Matcher
from lrs_edge.evaluation.questions import QuestionFile, read_questions
from lrs_edge.evaluation.results import Result, Results, open_results
from lrs_edge.evaluation.scoring import score
from lrs_edge.evaluation.wordnet import WordNet
from lrs_edge.requests.options import AskOptions
from lrs_edge_export.bundle.options import AccuracyCheck


@dataclass(frozen=True)
class AccuracyReport:
    """Answers to the first questions of a file.

    Attributes:
        dataset: Name of the question file.
        correct: Questions answered right.
        total: Questions asked.
        failed: Questions of the total that ended in an error.
        matching: How answers were compared: `synonyms` (WordNet), `exact` where there is none, or
            `choice` for multiple-choice questions.
        baseline_correct: Questions that the other bundle answered right; None without one.
        most_lost: Percentage points that may be lost against it.
    """

    dataset: str
    correct: int
    total: int
    failed: int
    matching: str
    baseline_correct: int | None = None
    most_lost: float = 0.0

    @property
    def loss(self) -> float:
        """Percentage points below the baseline; 0 without one, negative above it."""
        if self.baseline_correct is None:
            return 0.0
        return 100 * (self.baseline_correct - self.correct) / self.total

    @property
    def entry(self) -> Accuracy:
        """For the manifest."""
        return Accuracy(
            dataset=self.dataset,
            correct=self.correct,
            total=self.total,
            failed=self.failed,
            matching=self.matching,
            baseline_correct=self.baseline_correct,
        )

    @property
    def shown(self) -> str:
        """One line for people."""
        text = f"accuracy on {self.dataset}: {self.correct} of {self.total} right ({self.matching})"
        if self.failed:
            text += f", {self.failed} failed"
        if self.baseline_correct is not None:
            text += (
                f"; baseline {self.baseline_correct}, {self.loss:+.1f} points lost "
                f"(limit: <= {self.most_lost:g})"
            )
        return text

    def raise_if_failed(self) -> None:
        """Raise ExportError where more percentage points are lost than may be."""
        if self.loss > self.most_lost:
            raise ExportError(
                f"accuracy on {self.dataset} is {self.correct} of {self.total}, "
                f"{self.loss:.1f} points below the baseline's {self.baseline_correct}; use a "
                f"higher --precision, or allow more than {self.most_lost:g} by --most-lost"
            )


def measure_accuracy(
    bundle: Path,
    check: AccuracyCheck,
    *,
    options: AskOptions | None = None,
    wordnet: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> AccuracyReport:
    """Ask a bundle what `lrs-edge eval --limit` asks, on the CPU, and count what is right.

    Args:
        bundle: A bundle, its manifest included.
        check: The questions, and a baseline if there is one.
        options: Of every question; None for the defaults.
        wordnet: Folder of WordNet's files; None looks where `lrs-edge eval` does.
        progress: Called with one line now and then.

    Raises:
        ExportError: The questions or images cannot be used, every question fails, or the engine
            does.
    """
    try:
        asked = read_questions(check.questions)
        matcher = _matcher(asked, wordnet)
        settings = runner.RunSettings(
            questions=asked,
            images=check.images,
            options=runner.question_options(asked, options or AskOptions()),
            limit=check.limit,
        )
        runner.check_images(settings)
        results = _run(bundle, settings, progress)
        others = None if check.baseline is None else _run(check.baseline, settings, progress)
        found = score(results, matcher)
        before = None if others is None else score(others, matcher).overall.correct
    except LrsEdgeError as error:
        raise ExportError(f"accuracy cannot be measured: {error}") from error
    if found.errors == found.overall.questions:
        reason = next(iter(results)).error
        raise ExportError(f"accuracy cannot be measured: every question failed ({reason})")
    return AccuracyReport(
        # Data sets' question files are often all called the same.
        dataset=asked.path.name if asked.path.stem != "questions" else asked.path.parent.name,
        correct=found.overall.correct,
        total=found.overall.questions,
        failed=found.errors,
        matching=_matching(asked, matcher),
        baseline_correct=before,
        most_lost=check.most_lost,
    )


def _run(bundle: Path, settings: runner.RunSettings, progress: Callable[[str], None]) -> Results:
    """All results of one bundle; the results file is a temporary one."""
    count = len(runner.chosen_questions(settings))
    step = max(math.ceil(count / 4), 1)
    done: dict[int, Result] = {}

    def on_result(result: Result) -> None:
        done[result.index] = result
        if len(done) % step == 0 or len(done) == count:
            progress(f"asked {len(done)} of {count} questions")

    with (
        tempfile.TemporaryDirectory() as folder,
        lrs_edge.load(bundle, provider="cpu", verify=False) as engine,
    ):
        runner.check_bundle(settings, engine)
        header = runner.make_header(settings, engine, bundle)
        known, writer = open_results(Path(folder) / "results.jsonl", header)
        with writer:
            runner.run(engine, settings, known, writer, on_result)
    return Results(header, done)


def _matcher(questions: QuestionFile, wordnet: Path | None) -> Matcher:
    """Synonyms count where WordNet is there; a folder that was named must hold it."""
    if questions.format == "mme-realworld":
        return Matcher(None)
    try:
        return Matcher(WordNet(wordnet))
    except LrsEdgeError:
        if wordnet is not None:
            raise
        return Matcher(None)


def _matching(questions: QuestionFile, matcher: Matcher) -> str:
    if questions.format == "mme-realworld":
        return "choice"
    return "synonyms" if matcher.knows_synonyms else "exact"
