"""Held-out questions on real images: what is asked follows from boxes that can be trusted."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from lrs_edge.evaluation.questions import read_questions
from tests.scripts import Importer


@pytest.fixture
def held_out(real_scenes: Importer) -> ModuleType:
    """The script."""
    return real_scenes("held_out")


def write_labels(data: Path) -> None:
    """Six images of vhr10_rgb, two of airport_338 and one of simd552_640, 900 pixels wide."""
    ship, bridge, plane, court = "ship", "bridge", "airplane", "tennis court"
    rows = {
        "vhr10_rgb": [
            ("images/900.webp", "test", [(ship, (10, 10, 60, 40)), (ship, (80, 500, 99, 599))]),
            ("images/901.webp", "test", [(bridge, (400, 280, 480, 310))]),
            ("images/902.webp", "test", [(court, (700, 20, 760, 60))] * 3),
            ("images/903.webp", "test", [("vehicle", (700, 20, 760, 60))]),
            ("images/501.webp", "test", [(ship, (500, 10, 520, 40))]),
            ("images/904.webp", "train", [(ship, (10, 10, 60, 40))]),
        ],
        "airport_338": [
            ("images/a.webp", "val", [(plane, (500, 10, 520, 30)), (plane, (10, 10, 30, 30))]),
            ("images/b.webp", "test", [(plane, (500, 10, 520, 30))]),
        ],
        "simd552_640": [("images/s.jpg", "val", [("car", (1, 1, 9, 9)), ("bus", (9, 9, 99, 99))])],
    }  # fmt: skip
    for folder, images in rows.items():
        lines = [
            json.dumps({
                "file": file, "split": split, "width": 900, "height": 600,
                "objects": [{"class": name, "bbox": box} for name, box in objects],
            })
            for file, split, objects in images
        ]  # fmt: skip
        (data / folder).mkdir()
        (data / folder / "labels.jsonl").write_text("\n".join(lines))


def test_the_file_asks_what_the_labels_say(
    held_out: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_labels(tmp_path)
    command = ["held_out.py", str(tmp_path), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    held_out.main()
    written = (tmp_path / "out" / "held_out.jsonl").read_bytes()
    held_out.main()
    assert (tmp_path / "out" / "held_out.jsonl").read_bytes() == written
    questions = read_questions(tmp_path / "out" / "held_out.jsonl").questions
    presence = [question for question in questions if question.category == "presence"]
    answers = Counter(question.ground_truth for question in presence)
    assert answers["yes"] == answers["no"] > 0
    assert all(bool(question.boxes) == (question.ground_truth == "yes") for question in presence)
    assert not any("904" in question.image for question in questions)
    # What simd552_640 does not box may be there all the same.
    from_simd = [question for question in questions if question.dataset == "simd552_640"]
    assert {(question.category, question.ground_truth) for question in from_simd} == {
        ("presence", "yes")
    }
    # Only images that were looked at are without vehicles.
    vehicles = [
        question
        for question in presence
        if question.ground_truth == "no" and question.thing == "vehicle"
    ]
    assert {question.image for question in vehicles} == {"vhr10_rgb/images/501.webp"}
    counts = {question.image: question.ground_truth for question in questions
              if question.category == "count"}  # fmt: skip
    assert counts["vhr10_rgb/images/902.webp"] == "3"
    assert "vhr10_rgb/images/903.webp" not in counts
    position = {question.image: question.ground_truth for question in questions
                if question.category == "position"}  # fmt: skip
    assert position == {
        "vhr10_rgb/images/901.webp": "center",
        "vhr10_rgb/images/501.webp": "top",
    }


def test_boxes_on_both_sides_of_the_middle_have_no_side(held_out: ModuleType) -> None:
    assert held_out.sides([(0, 0, 50, 20), (10, 60, 40, 90)], 100, 100) == {"left"}
    assert held_out.sides([(40, 60, 60, 90)], 100, 100) == {"bottom"}
    assert held_out.sides([(50, 0, 60, 50)], 100, 100) == {"right", "top"}
    assert held_out.sides([], 100, 100) == set()


@pytest.mark.parametrize(
    ("box", "name"),
    [
        ((0, 0, 10, 10), "top left"),
        ((45, 45, 55, 55), "center"),
        ((80, 45, 99, 55), "right"),
        ((28, 45, 38, 55), None),
        ((0, 0, 40, 10), None),
        ((90, 90, 100, 100), "bottom right"),
    ],
)
def test_a_position_is_clear_or_not_asked_for(
    held_out: ModuleType, box: tuple[int, int, int, int], name: str | None
) -> None:
    assert held_out.ninth(box, 100, 100) == name


def test_known_faults_of_the_labels_are_not_asked_about(
    real_scenes: Importer,
) -> None:
    labels = real_scenes("labels")
    river = labels.Labelled("vhr10_rgb", "images/177.webp", 900, 600, {"bridge": ((1, 1, 9, 9),)})
    assert not river.lacks("storage tank")
    assert river.lacks("ship")
    assert not river.lacks("bridge")
    assert not river.lacks("vehicle")
    assert not labels.Labelled("airport_338", "images/x.webp", 9, 9, {}).lacks("ship")
