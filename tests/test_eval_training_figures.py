"""The scripts beside the embedded model's training that print its figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lrs_edge.evaluation.questions import read_questions
from tests.scripts import TRAIN, Importer, scripts


@pytest.fixture
def script() -> Iterator[Importer]:
    """Imports a script of the training folder."""
    with scripts(TRAIN) as importer:
        yield importer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Labels of four images in the layout of aid150_rsicd."""
    folder = tmp_path / "aid150_rsicd"
    folder.mkdir()
    rows = [
        {"file": f"images/{scene.lower()}_1.jpg", "scene": scene, "split": split, "captions": texts}
        for scene, split, texts in (
            ("Airport", "test", ["many planes"]),
            ("BareLand", "test", []),
            ("Port", "train", ["a port"]),
            ("River", "test", ["a river", "a green river"]),
        )
    ]
    (folder / "labels.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def test_scenes_become_a_question_file(
    script: Importer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "scenes.jsonl"
    line = ["scene_questions.py", "--data", str(data), "-o", str(target)]
    monkeypatch.setattr(sys, "argv", line)
    script("scene_questions").main()
    found = read_questions(target).questions
    assert [question.ground_truth for question in found] == ["airport", "bare land", "river"]
    assert {question.category for question in found} == {"scene"}
    assert {question.dataset for question in found} == {"RSICD"}
    assert found[1].image == "images/bareland_1.jpg"
    assert found[1].text == "What kind of place is this?"


def test_captions_are_scored_as_words(script: Importer, data: Path) -> None:
    captions = script("captions")
    assert captions.words("It's a  Port,with 3 ships.") == "it's a port with 3 ships"
    rows = captions.test_rows(data, None)
    assert [row["scene"] for row in rows] == ["Airport", "River"]
    assert len(captions.test_rows(data, 1)) == 1


def test_the_scorer_tells_good_from_bad_captions(script: Importer) -> None:
    pytest.importorskip("pycocoevalcap", reason="captions are scored with the `captions` extra")
    captions = script("captions")
    references = [
        ["Many planes are parked next to a terminal.", "some planes stand there"],
        ["a bridge is over a river with green water"],
        ["a piece of yellow desert without any plants"],
    ]
    perfect = captions.scores([texts[0] for texts in references], references)
    assert perfect["BLEU-4"] == pytest.approx(1.0)
    assert perfect["CIDEr"] > 5
    wrong = captions.scores([texts[0] for texts in reversed(references)], references)
    assert wrong["BLEU-4"] < 0.5
    assert wrong["CIDEr"] < perfect["CIDEr"]
