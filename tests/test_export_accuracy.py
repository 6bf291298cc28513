"""Accuracy of a bundle in process: what is counted, compared and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import lrs_edge
from lrs_edge.bundle.parity import Accuracy
from lrs_edge.errors import ExportError
from lrs_edge.requests.options import AskOptions
from lrs_edge_export.bundle.options import AccuracyCheck
from lrs_edge_export.parity.accuracy import AccuracyReport, measure_accuracy
from tests.evaluation import lrs_row, write_lines
from tests.test_engine import picture

#: The tiny model's answers are nonsense; two tokens of them are enough.
QUICK = AskOptions(max_tokens=2)
ASKED = ("How many ships?", "How many cars?", "How many trees?")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    picture(tmp_path / "a.png", 100, 80)
    return tmp_path


@pytest.fixture
def bundle(golden_bundles: dict[str, Path]) -> Path:
    return golden_bundles["llama"]


def test_right_answers_are_counted_and_compared(bundle: Path, images: Path) -> None:
    with lrs_edge.load(bundle, provider="cpu") as engine, engine.open(images / "a.png") as scene:
        said = [scene.ask(text, QUICK).text for text in ASKED]
    # What it says to the first and third question becomes the truth.
    truths = [said[0], "certainly not", said[2]]
    rows = [
        lrs_row(i, image="a.png", text=text, ground_truth=truth, hbox=...)
        for i, (text, truth) in enumerate(zip(ASKED, truths, strict=True))
    ]
    questions = write_lines(images / "tiny.jsonl", *rows)
    told: list[str] = []
    check = AccuracyCheck(questions, images, baseline=bundle)
    found = measure_accuracy(bundle, check, options=QUICK, progress=told.append)
    assert (found.correct, found.total, found.failed, found.baseline_correct) == (2, 3, 0, 2)
    assert found.dataset == "tiny.jsonl"
    assert found.loss == 0
    found.raise_if_failed()
    assert told[-1] == "asked 3 of 3 questions"
    first = measure_accuracy(bundle, AccuracyCheck(questions, images, limit=1), options=QUICK)
    assert (first.correct, first.total, first.baseline_correct) == (1, 1, None)


def test_loss_beyond_what_is_allowed() -> None:
    found = AccuracyReport(
        "tiny", correct=90, total=100, failed=1, matching="exact", baseline_correct=93, most_lost=3
    )
    assert found.loss == pytest.approx(3)
    found.raise_if_failed()
    assert "90 of 100 right (exact), 1 failed; baseline 93, +3.0 points lost" in found.shown
    with pytest.raises(ExportError, match=r"90 of 100, 3\.0 points below the baseline's 93"):
        replace(found, most_lost=2.5).raise_if_failed()
    entry = found.entry
    assert entry == Accuracy("tiny", 90, 100, failed=1, matching="exact", baseline_correct=93)
    assert entry.share == 0.9


def test_questions_that_cannot_be_asked(bundle: Path, images: Path) -> None:
    missing = write_lines(images / "missing.jsonl", lrs_row(image="nowhere.png"))
    with pytest.raises(ExportError, match=r"accuracy cannot be measured.*nowhere\.png"):
        measure_accuracy(bundle, AccuracyCheck(missing, images), options=QUICK)
    (images / "broken.png").write_bytes(b"no image")
    broken = write_lines(images / "broken.jsonl", lrs_row(image="broken.png"))
    with pytest.raises(ExportError, match=r"every question failed.*broken\.png"):
        measure_accuracy(bundle, AccuracyCheck(broken, images), options=QUICK)
    with pytest.raises(ExportError, match="accuracy cannot be measured"):
        measure_accuracy(bundle, AccuracyCheck(images / "none.jsonl", images))
