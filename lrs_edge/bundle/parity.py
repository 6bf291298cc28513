"""What an exporter measured of a bundle: the manifest's `parity`."""

from __future__ import annotations

from typing import Literal

import msgspec

#: `whole`: the stage's graph, as the runtime runs it; the LLM's text is its own greedy choice.
#: `layer by layer`: its layers one at a time, on a given text.
Mode = Literal["whole", "layer by layer"]


class Figure(msgspec.Struct, frozen=True):
    """One figure of a stage.

    Attributes:
        measure: What was measured, such as `relative error`.
        value: What came out.
        sign: On which side of the limit it must be.
        limit: The limit; None in the oldest bundles of version 1.
    """

    measure: str
    value: float
    sign: Literal["<=", ">="]
    limit: float | None = None

    @property
    def shown(self) -> str:
        """The value as text; of a cosine or a share, the digits that tell it from 1."""
        return f"{self.value:.6g}" if self.sign == ">=" else f"{self.value:.3g}"

    @property
    def passed(self) -> bool:
        """False beyond the limit, and for a value that is not a number."""
        if self.limit is None:
            return True
        return self.value <= self.limit if self.sign == "<=" else self.value >= self.limit


class StageParity(msgspec.Struct, frozen=True):
    """A stage that was compared with the checkpoint.

    Attributes:
        stage: `vision`, `rfm`, `llm`, `llm-kv` (the LLM with int8 key and value buffers), or
            `pipeline`: all three one after the other, each given the bundle's own outputs, with the
            loosest of their precisions and all their bytes.
        figures: How far it is from the checkpoint.
        precision: Of its weights; None, like what follows, in the oldest bundles of version 1.
        bytes: Of its graph and weights.
        mode: How it was run.
    """

    stage: str
    figures: tuple[Figure, ...]
    precision: str | None = None
    bytes: int | None = None
    mode: Mode | None = None

    def value(self, measure: str) -> float:
        """One figure's value. Raises KeyError when it was not measured."""
        return {figure.measure: figure.value for figure in self.figures}[measure]


class Choice(msgspec.Struct, frozen=True):
    """A precision that a stage could have had: least cosine to float over the calibration data."""

    stage: str
    precision: str
    cosine: float


class Accuracy(msgspec.Struct, frozen=True):
    """Answers to the first questions of a file.

    Attributes:
        dataset: Name of the question file.
        correct: Questions answered right.
        total: Questions asked.
        failed: Questions of the total that ended in an error.
        matching: How answers were compared: `synonyms` (WordNet), `exact` where there is none, or
            `choice` for multiple-choice questions.
        baseline_correct: Questions that another bundle answered right; None without one.
    """

    dataset: str
    correct: int
    total: int
    failed: int = 0
    matching: str = ""
    baseline_correct: int | None = None

    @property
    def share(self) -> float:
        """Share answered right, 0..1; 0 of no questions."""
        return self.correct / self.total if self.total else 0.0


class ParityReport(msgspec.Struct, frozen=True):
    """Everything that was measured when a bundle was exported.

    Attributes:
        images: What stages were compared on; None where they were not (`--no-parity`).
        stages: Those compared.
        kept_higher: Linears that are in a higher precision than their stage, by stage.
        choices: Ways to be int8 that were measured, by stage, the chosen one first.
        accuracy: Answers to questions, where any were asked.
    """

    images: str | None = None
    stages: tuple[StageParity, ...] = ()
    kept_higher: dict[str, tuple[str, ...]] = {}
    choices: tuple[Choice, ...] = ()
    accuracy: Accuracy | None = None

    @property
    def passed(self) -> bool:
        """True if every figure is within its limit."""
        return all(figure.passed for stage in self.stages for figure in stage.figures)

    def stage(self, name: str) -> StageParity:
        """A stage's figures. Raises KeyError when it was not compared."""
        return {stage.stage: stage for stage in self.stages}[name]
