"""The student on questions that it did not learn from, beside the teacher and chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lrs_edge_export.distill.chance import seeded
from lrs_edge_export.distill.collect import Targets
from lrs_edge_export.distill.evidence import Localisation, localisation, top_quarter
from lrs_edge_export.distill.localise import Row
from lrs_edge_export.distill.loss import divergence
from lrs_edge_export.distill.sequences import Assembler, GroupInput, QuestionGroup
from lrs_edge_export.distill.student import Student

#: Scores float32 [Q, n] of a group.
Scorer = Callable[[GroupInput], NDArray[np.float32]]


@dataclass(frozen=True)
class Measured:
    """One row of the table: who, on which levels, and how well.

    Attributes:
        who: Whose scores.
        levels: `base` or `finer`.
        questions: Questions asked; those with evidence in view are `evidence.questions`.
        kl: Mean divergence from the teacher at the scoring layer, in nats.
        overlap: Share of the teacher's top quarter that is in these scores' top quarter.
        evidence: Localisation.
    """

    who: str
    levels: str
    questions: int
    kl: float
    overlap: float
    evidence: Row


def student_scorer(student: Student) -> Scorer:
    """The scores of a student's last layer."""

    def score(made: GroupInput) -> NDArray[np.float32]:
        with torch.inference_mode():
            return student.scores(made.packed)[-1].float().cpu().numpy()

    return score


def random_scorer(seed: int) -> Scorer:
    """Scores drawn at random, for each question its own; they sum to 1."""

    def score(made: GroupInput) -> NDArray[np.float32]:
        drawn = seeded(seed, made.group.name).random(made.evidence.shape, np.float32)
        scores: NDArray[np.float32] = drawn / drawn.sum(axis=1, keepdims=True)
        return scores

    return score


def measure(
    groups: Sequence[QuestionGroup],
    assembler: Assembler,
    targets: Targets,
    scorers: dict[str, Scorer],
) -> list[Measured]:
    """Measure scorers on groups; `teacher` comes first.

    Raises:
        ImageError: An image cannot be read.
    """
    tallies = {(who, base): _Tally() for base in (True, False) for who in ("teacher", *scorers)}
    for group in groups:
        made, target = assembler.build(group), targets.get(group)[-1]
        found = {"teacher": target} | {who: score(made) for who, score in scorers.items()}
        for who, scores in found.items():
            tallies[who, group.level == 0].add(made, target, scores)
    return [
        tally.result(who, "base" if base else "finer")
        for (who, base), tally in tallies.items()
        if tally.kl
    ]


class _Tally:
    """Sums over questions."""

    def __init__(self) -> None:
        self.kl: list[float] = []
        self._overlap: list[float] = []
        self._found: list[Localisation] = []

    def add(
        self, made: GroupInput, target: NDArray[np.float32], scores: NDArray[np.float32]
    ) -> None:
        self.kl += divergence(torch.from_numpy(target), torch.from_numpy(scores)).tolist()
        for wanted, row, evidence in zip(target, scores, made.evidence, strict=True):
            best, top = top_quarter(wanted[made.shown]), top_quarter(row[made.shown])
            self._overlap.append(len(np.intersect1d(best, top)) / len(best))
            judged = localisation(row, evidence, made.shown)
            if judged is not None:
                self._found.append(judged)

    def result(self, who: str, levels: str) -> Measured:
        # A divergence of nothing is rounded to a little less than 0.
        kl, overlap = max(float(np.mean(self.kl)), 0.0), float(np.mean(self._overlap))
        return Measured(who, levels, len(self.kl), kl, overlap, Row.of(self._found))


def measure_table(rows: Sequence[Measured]) -> str:
    """The measurements as text."""
    lines = [
        "levels  scores            questions  KL      overlap  with evidence  share  mass   "
        "recall  best token"
    ]
    for row in rows:
        found = row.evidence
        lines.append(
            f"{row.levels:<6}  {row.who:<16}  {row.questions:<9}  {row.kl:<6.3f}  "
            f"{row.overlap:<7.3f}  {found.questions:<13}  {found.share:<5.3f}  {found.mass:<5.3f}  "
            f"{found.recall:<6.3f}  {found.best:.3f}"
        )
    return "\n".join(lines)
