"""Parts that the tests of the evaluation share: question files, results, and a small WordNet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lrs_edge.answer.answer import Timings, TokenCounts
from lrs_edge.evaluation.results import (
    SCHEMA_NAME,
    SCHEMA_VERSION,
    FinestLevel,
    FlopCounts,
    QuestionSource,
    Result,
    Results,
    RunHeader,
    Work,
)

WORDNET = Path(__file__).parent / "wordnet"


def lrs_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of LRS-VQA's question file."""
    row = {
        "question_id": f"FAIR_{number}",
        "image": "LRS_VQA/image/1.tif",
        "category": "count",
        "text": "How many ships are there?",
        "ground_truth": "two",
        "hbox": [10, 20, 30, 40],
    }
    return {name: value for name, value in (row | changes).items() if value is not ...}


def mme_row(**changes: Any) -> dict[str, Any]:
    """A row of MME-RealWorld's question file."""
    row = {
        "Question_id": "perception/remote_sensing/count/0001",
        "Image": "remote_sensing/03553_Toronto.png",
        "Text": "How many airplanes are there?",
        "Question Type": "Multiple Choice",
        "Answer choices": ["(A) 12", "(B) 3", "(C) 7", "(D) 9", "(E) None of these"],
        "Ground truth": "C",
        "Task": "Perception",
        "Subtask": "Remote Sensing",
        "Category": "count",
    }
    return {name: value for name, value in (row | changes).items() if value is not ...}


def write_lines(path: Path, *rows: Any) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def make_header(**changes: Any) -> RunHeader:
    values: dict[str, Any] = {
        "schema": SCHEMA_NAME,
        "schema_version": SCHEMA_VERSION,
        "lrs_edge": "0.1.0",
        "model": "tiny",
        "manifest_sha256": "ab" * 32,
        "tile": 100,
        "provider": "cpu",
        "questions": QuestionSource("questions.jsonl", "cd" * 32, "lrs-vqa", 4),
        "options": {"policy": "full", "max_tiles": None},
    }
    return RunHeader(**(values | changes))


def make_work(**changes: Any) -> Work:
    values: dict[str, Any] = {
        "image_size": (1000, 500),
        "search_end": "finest_level",
        "finish_reason": "stop",
        "tiles_encoded": 3,
        "tiles_from_cache": 1,
        "tokens": TokenCounts(100, 50, 40, 30, 10, 0, 2),
        "seconds": Timings(0.1, 0.2, 0.3, 0.4, 0.5, 2.0),
        "flops": FlopCounts(10**12, 2 * 10**12, 3 * 10**12),
        # Tiles of 100 x 100 pixels; the image is the level.
        "finest": FinestLevel(500, 1000, 5, 10, ((0, 0), (0, 1))),
    }
    return Work(**(values | changes))


def make_result(index: int, text: str = "two", **changes: Any) -> Result:
    values: dict[str, Any] = {
        "index": index,
        "question_id": f"FAIR_{index}",
        "image": "1.tif",
        "category": "count",
        "dataset": "FAIR",
        "prompt": "How many?",
        "ground_truth": "two",
        "text": text,
        "work": make_work(),
    }
    return Result(**(values | changes))


def make_results(*results: Result, **header: Any) -> Results:
    return Results(make_header(**header), {result.index: result for result in results})


def private_wordnet(folder: Path) -> Path:
    """The small WordNet as NLTK wants it: writable by its owner alone, whatever git left."""
    target = folder / "wordnet"
    shutil.copytree(WORDNET, target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    target.chmod(0o700)
    for path in target.iterdir():
        path.chmod(0o600)
    return target
