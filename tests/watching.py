"""What the tests of `watch` share: a folder of small files, an asker without a model, no sleep."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lrs_edge.errors import ImageError
from lrs_edge.watching import journal
from lrs_edge.watching.asking import Asking, Reply
from lrs_edge.watching.journal import Journal
from lrs_edge.watching.questions import Question
from lrs_edge.watching.results import Results
from lrs_edge.watching.waking import Waking
from lrs_edge.watching.worker import Settings, Worker

QUESTIONS = (Question("ships", "How many ships?"), Question("bridge", "Is there a bridge?"))


def without_syncing(patch: pytest.MonkeyPatch) -> None:
    """Kills need no syncing with the disk, losses of power do; tests are faster without."""
    patch.setattr(journal, "SYNCHRONOUS", "OFF")
    patch.setattr(os, "fsync", lambda _: None)


class Killed(BaseException):
    """Stands for `kill -9`: nothing of the program handles it."""


class FakeTime(Waking):
    """Time that passes when it is waited for; `events` happen during the waits."""

    def __init__(self, events: list[Callable[[], None]] | None = None) -> None:
        super().__init__()
        self.seconds = 1000.0
        self.events = events or []

    def now(self) -> float:
        return 1_700_000_000 + self.seconds

    def monotonic(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> None:
        self.seconds += max(seconds, 0.001)
        if self.events:
            self.events.pop(0)()


@dataclass
class FakeAsker:
    """Answers with the image's text; images that begin with `bad` cannot be read."""

    time: FakeTime | None = None
    cost: float = 0.0
    open_cost: float = 0.0
    error: Exception | None = None
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)

    @contextmanager
    def open(self, image: Path, seconds: float) -> Iterator[Asking]:  # noqa: ARG002
        text = image.read_text()
        if self.time is not None:
            self.time.seconds += self.open_cost
        if text.startswith("bad"):
            raise ImageError(f"{image.name} is damaged")
        yield _FakeAsking(self, image, text)


@dataclass
class _FakeAsking:
    asker: FakeAsker
    image: Path
    text: str

    def ask(self, question: str, seconds: float) -> Reply:  # noqa: ARG002
        if self.asker.error is not None:
            raise self.asker.error
        self.asker.asked[self.image.name, question] += 1
        if self.asker.time is not None:
            self.asker.time.seconds += self.asker.cost
        record = {"answer": f"{self.text}: {question}"}
        return Reply(record, {"type": "FeatureCollection", "features": []}, record)


class Station:
    """A watched folder and an output folder, and what came out of all runs."""

    def __init__(self, place: Path, **settings: object) -> None:
        self.root, self.out = place / "in", place / "out"
        self.root.mkdir(exist_ok=True)
        self.out.mkdir(exist_ok=True)
        self.time = FakeTime()
        self.asker = FakeAsker(self.time)
        self.lines: list[str] = []
        self.told: list[str] = []
        self.settings = replace(
            Settings(self.root, QUESTIONS, once=True, leave_out=(self.out,)),
            **settings,  # type: ignore[arg-type]
        )

    def land(self, name: str, text: str = "image") -> Path:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def run(self, step: Callable[[str], None] | None = None) -> Worker:
        kept = Journal(self.out)
        try:
            results = Results(self.out)
            arguments = (self.settings, kept, results, self.asker, self.time)
            tellers = (self.lines.append, self.told.append)
            worker = Worker(*arguments, *tellers, *([] if step is None else [step]))
            worker.run()
        finally:
            kept.close()
        return worker

    def results(self) -> list[str]:
        return sorted(os.listdir(self.out / "results"))

    def records(self) -> list[Path]:
        return sorted((self.out / "quarantine").iterdir())
