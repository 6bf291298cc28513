"""Asking the questions of a file through the runtime, with results files to go on from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lrs_edge
from lrs_edge.evaluation import runner
from lrs_edge.evaluation.questions import read_questions
from lrs_edge.evaluation.results import Result, open_results, read_results
from lrs_edge.requests.options import AskOptions

QuestionRow = Mapping[str, Any]
"""A row of a question file, with the field names of LRS-VQA."""


@dataclass(frozen=True)
class Run:
    """Questions, and how they are asked.

    Attributes:
        name: Of the results file, without its ending.
        questions: Question file.
        images: Folder of its images.
        options: Of every question.
        whole: Asked whole, whatever the limit: others are compared with it.
    """

    name: str
    questions: Path
    images: Path
    options: AskOptions = field(default_factory=AskOptions)
    whole: bool = False


class Asker:
    """A loaded bundle that answers runs and keeps their results in one folder.

    Args:
        engine: The bundle.
        bundle: Its directory; None for the embedded one.
        results: Folder of the results files.
        limit: Only the first so many questions of each run.
    """

    def __init__(
        self, engine: lrs_edge.Engine, bundle: Path | None, results: Path, limit: int | None
    ) -> None:
        self.engine = engine
        self._bundle = bundle
        self._results = results
        self._limit = limit

    @property
    def tile(self) -> int:
        """Side of the bundle's tiles in pixels."""
        return self.engine.manifest.vision.tile

    def ask(self, run: Run) -> list[Result]:
        """Answers to a run, those of an interrupted one included, in the file's order.

        Raises:
            UsageError: The results file is of another bundle, or of other questions or options.
            LrsEdgeError: An engine fails, or results cannot be written.
        """
        settings = runner.RunSettings(
            read_questions(run.questions),
            run.images,
            run.options,
            limit=None if run.whole else self._limit,
        )
        self._results.mkdir(parents=True, exist_ok=True)
        path = self._results / f"{run.name}.jsonl"
        known, writer = open_results(path, runner.make_header(settings, self.engine, self._bundle))
        waiting = len(runner.unanswered(settings, known))
        with writer:
            done = 0

            def tell(_: Result) -> None:
                nonlocal done
                done += 1
                if done % 20 == 0 or done == waiting:
                    print(f"{run.name}: {done} of {waiting}", file=sys.stderr, flush=True)

            runner.run(self.engine, settings, known, writer, tell)
        found = read_results([path]).by_index
        return [
            found[question.index]
            for question in sorted(runner.chosen_questions(settings), key=lambda each: each.index)
        ]


def write_rows(path: Path, rows: Iterable[QuestionRow]) -> Path:
    """Write a question file, where it says something new; returns its path."""
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a question file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
