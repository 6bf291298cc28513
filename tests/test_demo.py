"""The examples, and what README.md says of them: sizes, questions, answers, origin."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from lrs_edge.evaluation.questions import read_questions
from scripts import demo_answers, dev, make_examples

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUESTIONS = demo_answers.questions()

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

#: Rows of README's table: image, question, truth and what is there, answer, wrong.
ROWS = re.findall(
    r"^\| `(\w+\.tif)` \| (.+?) \| (.+?): (.+?) \| (.+?)( \(\*\*wrong\*\*\))? "
    r"\| \w* \|(?: [\d %]* \|)?$",
    README,
    re.MULTILINE,
)


def test_examples_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in EXAMPLES.iterdir()}
    assert sum(sizes.values()) <= 12_000_000
    assert max(sizes.values()) <= 8_000_000


@pytest.mark.parametrize("name", ["islands.tif", "coast.tif"])
def test_the_scenes_are_large_and_have_overviews(name: str) -> None:
    with rasterio.open(EXAMPLES / name) as image:
        assert max(image.shape) > 3000
        assert image.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert image.overviews(1) != []
        assert (image.crs is not None) == (name == "coast.tif")


def test_questions_are_what_eval_reads_and_their_places_are_in_the_images() -> None:
    found = read_questions(EXAMPLES / "questions.jsonl")
    assert len(found.questions) == len(QUESTIONS) >= 6
    assert {row["image"] for row in QUESTIONS} == {"islands.tif", "coast.tif"}
    for question, row in zip(found.questions, QUESTIONS, strict=True):
        with rasterio.open(EXAMPLES / question.image) as image:
            height, width = image.shape
        assert question.boxes == tuple(demo_answers.boxes(row))
        assert all(x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
                   for x0, y0, x1, y1 in question.boxes)  # fmt: skip
        # Only what is not there has no place.
        assert (question.boxes == ()) == (question.ground_truth == "no")


def test_yes_and_no_are_asked_about_as_often() -> None:
    truths = [row["ground_truth"] for row in QUESTIONS]
    assert truths.count("yes") == truths.count("no")


def test_readme_shows_all_questions_and_truths_and_counts_the_right_answers() -> None:
    assert [row[:4] for row in ROWS] == [
        (row["image"], row["text"], row["ground_truth"], row["seen"]) for row in QUESTIONS
    ]
    right = 0
    for _, _, truth, _, answer, wrong in ROWS:
        assert (answer.lower() == truth) == (not wrong)
        right += not wrong
    assert f"{right} of these {len(ROWS)} answers are right:" in README


def test_the_demo_is_answered_as_readme_says_and_rightly() -> None:
    image, question, truth, _, answer, _ = ROWS[0]
    command = dev.demo()
    assert command == ["ask", f"examples/{image}", question]
    assert f'lrs-edge ask {command[1]} "{question}"' in README
    done = subprocess.run(
        [sys.executable, "-m", "lrs_edge", *command],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A calibrated bundle marks answers that it is not sure of.
    assert done.stdout.strip().removesuffix(" (unsure)") == answer
    assert answer.lower() == truth


@pytest.mark.slow
def test_all_answers_of_readme_are_the_model_s() -> None:
    assert demo_answers.main(["--check"]) == 0, "run `python scripts/demo_answers.py`"


def test_a_reply_says_whether_the_place_was_looked_at() -> None:
    answer = {
        "answer": "Yes",
        "levels": [{"level": 0}, {"level": 1}],
        "regions": [
            {"level": 1, "window": [0, 0, 10, 10]},
            {"level": 0, "window": [0, 0, 100, 100]},
        ],
    }
    found = [
        demo_answers.Reply({"ground_truth": "yes", "hbox": boxes}, answer)
        for boxes in ([2, 2, 4, 4], [[50, 50, 60, 60], [8, 8, 10, 10]], [50, 50, 60, 60], [])
    ]
    assert [reply.looked_at for reply in found] == [True, True, False, None]
    assert all(reply.right for reply in found)


def test_confidence_is_shown_where_the_bundle_is_calibrated() -> None:
    question = {"image": "a.tif", "text": "Is it?", "ground_truth": "yes", "seen": "it", "hbox": []}
    answer = {"answer": "No", "levels": [{"level": 0}], "regions": []}
    plain = demo_answers.Reply(question, answer)
    sure = demo_answers.Reply(question, answer | {"confidence": 0.834})
    row = "| `a.tif` | Is it? | yes: it | No (**wrong**) |  |"
    assert demo_answers.table([plain]).endswith(f"|---|---|---|---|---|\n{row}")
    assert demo_answers.table([sure, plain]).endswith(
        f"confidence |\n{'|---' * 6}|\n{row} 83 % |\n{row}  |"
    )


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    text = "a\n<!-- demo-answers: by x -->\n\nold\n\n<!-- /demo-answers -->\nb\n"
    new = demo_answers.replaced(text, "demo-answers", "new")
    assert new == text.replace("old", "new")
    assert demo_answers.replaced(new, "demo-answers", "new") == new
    with pytest.raises(SystemExit, match="no part named x"):
        demo_answers.replaced(text, "x", "")


def test_examples_are_made_from_the_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, coast = (
        tmp_path / "data" / next(iter(sources.values()))
        for sources in (make_examples.SCENES, make_examples.COPIES)
    )
    scene.parent.mkdir(parents=True)
    coast.parent.mkdir(parents=True)
    ramp = np.linspace(0, 255, 600 * 700 * 3).reshape(600, 700, 3).astype("uint8")
    Image.fromarray(ramp).save(scene)
    coast.write_bytes((EXAMPLES / "coast.tif").read_bytes())
    written = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        make_examples.main(str(tmp_path / "data"), str(folder))
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert written[0]["coast.tif"] == coast.read_bytes()
    with rasterio.open(tmp_path / "once" / "islands.tif") as image:
        assert image.shape == (600, 700)
        assert image.overviews(1) == [2, 4]
        assert image.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert np.abs(image.read().transpose(1, 2, 0).astype(int) - ramp).mean() < 4
    assert "islands.tif: 700x600" in capsys.readouterr().out
