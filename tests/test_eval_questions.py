"""Question files: both formats as the authors write them, and everything that must be refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.errors import UsageError
from lrs_edge.evaluation import question_rows, questions
from lrs_edge.evaluation.question_formats import EvalQuestion
from lrs_edge.evaluation.question_rows import stays_inside
from lrs_edge.evaluation.questions import read_questions
from tests.evaluation import lrs_row, mme_row, write_lines


def read_one(folder: Path, row: dict[str, Any]) -> EvalQuestion:
    (question,) = read_questions(write_lines(folder / "q.jsonl", row)).questions
    return question


def test_lrs_vqa_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", lrs_row(0), lrs_row(1, text="Rural or urban?"))
    found = read_questions(path)
    assert (found.format, found.notes) == ("lrs-vqa", ())
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    first, second = found.questions
    assert (first.index, first.question_id, first.dataset) == (0, "FAIR_0", "FAIR")
    assert (first.text, first.ground_truth) == ("How many ships are there?", "two")
    assert first.boxes == ((10.0, 20.0, 30.0, 40.0),)
    assert (second.index, second.text) == (1, "Rural or urban?")


@pytest.mark.parametrize(
    ("hbox", "boxes"),
    [
        (..., ()),
        (None, ()),
        ([], ()),
        ([[1, 2, 3, 4], [5.5, 6, 7, 8]], ((1, 2, 3, 4), (5.5, 6, 7, 8))),
    ],
)
def test_boxes_are_one_or_several_or_none(
    tmp_path: Path, hbox: object, boxes: tuple[object, ...]
) -> None:
    assert read_one(tmp_path, lrs_row(hbox=hbox)).boxes == boxes


@pytest.mark.parametrize(
    "hbox",
    [
        *([1, 2, 3], [3, 2, 1, 4], [1, 2, 1, 4], ["1", 2, 3, 4], "1,2,3,4", {"x": 1}, 7),
        *([[1, 2, 3, 4], 5], [True, 2, 3, 4], [0, 0, 1e300, 1], [[0, 0, 1, 1]] * 300),
        # No float holds this.
        [0, 0, 10**400, 1],
    ],
)
def test_a_box_that_is_none_is_told_and_not_looked_for(tmp_path: Path, hbox: object) -> None:
    found = read_questions(write_lines(tmp_path / "q.jsonl", lrs_row(hbox=hbox)))
    assert found.questions[0].boxes == ()
    assert found.notes == ("evidence not looked for, hbox is not a box: 1",)


def test_rows_without_an_answer_are_left_out_as_the_authors_do(tmp_path: Path) -> None:
    rows = (lrs_row(0, ground_truth=...), lrs_row(1, category=""), lrs_row(2))
    found = read_questions(write_lines(tmp_path / "q.jsonl", *rows))
    # The index stays the place in the file, so that results keep their meaning.
    assert [question.index for question in found.questions] == [2]
    assert found.notes == ("left out, without an answer or a category: 2",)


def test_numbers_are_text_and_ids_may_be_missing(tmp_path: Path) -> None:
    question = read_one(tmp_path, lrs_row(question_id=..., ground_truth=2, dataset="STAR"))
    assert (question.question_id, question.ground_truth, question.dataset) == ("0", "2", "STAR")
    assert read_one(tmp_path, lrs_row(question_id=17)).dataset == "all"


def test_mme_realworld_as_the_authors_ask_it(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    rows = [mme_row(), mme_row(Category="Person/attribute/Color"), mme_row(Subtask="Monitoring")]
    path.write_text(json.dumps(rows))
    found = read_questions(path)
    assert found.format == "mme-realworld"
    assert found.notes == ("left out, not about remote sensing: 1",)
    first, second = found.questions
    # model_vqa_mme_realworld.py: the text, a sentence, an empty line, the choices.
    assert first.text == (
        "How many airplanes are there? The choices are listed below: \n\n"
        "(A) 12\n(B) 3\n(C) 7\n(D) 9\n(E) None of these"
    )
    assert (first.ground_truth, first.choices[2], first.boxes) == ("C", "(C) 7", ())
    assert (first.category, second.category) == ("count", "person/attribute")


@pytest.mark.parametrize(
    "image",
    [
        *("/etc/passwd", "../1.tif", "a/../../1.tif", "..\\1.tif", "C:\\1.tif", "\\\\host\\1.tif"),
        *("", "  ", "a\0b", "a\nb", "GTIFF_DIR:1:1.tif", "http://host/1.tif", "/vsicurl/http:x"),
    ],
)
@pytest.mark.parametrize("kind", ["lrs", "mme"])
def test_image_paths_stay_in_the_folder(tmp_path: Path, image: str, kind: str) -> None:
    path = tmp_path / "q"
    row = lrs_row(image=image) if kind == "lrs" else mme_row(Image=image)
    path.write_text(json.dumps(row if kind == "lrs" else [row]))
    with pytest.raises(UsageError, match=r"(?i)image (is|is missing)"):
        read_questions(path)


@given(st.text(max_size=30))
def test_no_path_that_is_accepted_leaves_the_folder(path: str) -> None:
    if stays_inside(path):
        joined = Path("/images") / path
        assert joined.is_relative_to("/images")
        assert ".." not in joined.parts
        assert "\0" not in path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"not json\n", "line 1 is not JSON"),
        (b'{"text": "a"}\n{"te', "line 1: image is missing"),
        (json.dumps(lrs_row()).encode() + b'\n{"te', "line 2 is not JSON"),
        (b'"text"\n', "line 1 is not a JSON object"),
        (b"[1, 2]", "question 1 is not a JSON object"),
        (b"[", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b"[]", "holds no question"),
        (b"\xff\xfe{}", "is not JSON"),
        (json.dumps(lrs_row(text=["a"])).encode(), "text is a list, not text"),
        (json.dumps(lrs_row(text=True)).encode(), "text is a bool, not text"),
        (json.dumps(lrs_row(text="a" * 20_000)).encode(), "text is longer than"),
        (json.dumps(lrs_row(ground_truth={})).encode(), "ground_truth is a dict"),
        (json.dumps([mme_row(**{"Ground truth": "12"})]).encode(), "'12', not a letter"),
        (json.dumps([mme_row(**{"Answer choices": "A"})]).encode(), "is not a list of choices"),
        (json.dumps([mme_row(**{"Answer choices": ["x"] * 99})]).encode(), "is not a list of"),
        (json.dumps([mme_row(Text=...)]).encode(), "Text is missing"),
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_questions(path)


def test_giant_lines_and_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * question_rows.MAX_LINE_BYTES + b'"}\n')
    with pytest.raises(UsageError, match="line 1 is longer"):
        read_questions(path)
    monkeypatch.setattr(question_rows, "MAX_ARRAY_BYTES", 100)
    (tmp_path / "q.json").write_text(json.dumps([mme_row()]))
    with pytest.raises(UsageError, match="is a JSON array of more than"):
        read_questions(tmp_path / "q.json")
    monkeypatch.setattr(question_rows, "MAX_FILE_BYTES", 1000)
    with pytest.raises(UsageError, match="larger than"):
        read_questions(path)
    monkeypatch.setattr(questions, "MAX_QUESTIONS", 2)
    with pytest.raises(UsageError, match="more than 2 questions"):
        read_questions(write_lines(path, *(lrs_row(hbox=...) for _ in range(3))))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(tmp_path)


@pytest.mark.parametrize("row", [lrs_row(), mme_row()])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", ["lines", "array", "spread"])
def test_every_form_of_a_file_gives_the_same_questions(
    tmp_path: Path, row: dict[str, Any], encoding: str, form: str
) -> None:
    wanted = read_questions(write_lines(tmp_path / "plain", row, row))
    text = {
        "lines": f"{json.dumps(row)}\r\n\r\n{json.dumps(row)}",
        "array": json.dumps([row, row]),
        "spread": "\n" + json.dumps([row, row], indent=4),
    }[form]
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = tmp_path / "q"
    path.write_bytes((mark + text).encode(encoding))
    found = read_questions(path)
    assert (found.format, found.questions) == (wanted.format, wanted.questions)


def test_joined_files_keep_their_marks_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(lrs_row()).encode() + b"\n")
    path.write_bytes(path.read_bytes() * 2)
    assert len(read_questions(path).questions) == 2


@pytest.mark.parametrize(
    "text",
    ['{"question": "x", "answer": "y"}', '{"a": 1}\n', "[]", "{}", '[{"x": 1}]', "[1]", "7",
     '{\n  "text": "spread over lines"\n}'],
)  # fmt: skip
def test_other_forms_are_told_which_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"LRS-VQA \(question_id, .*MME-RealWorld-RS"):
        read_questions(path)


@pytest.mark.parametrize("truth", [True, ["two"], {"a": 2}, "x" * 20_000, 10**200])
def test_a_row_that_cannot_be_scored_is_named_and_the_others_are_read(
    tmp_path: Path, truth: object
) -> None:
    bad = lrs_row(1, ground_truth=truth)
    found = read_questions(write_lines(tmp_path / "q.jsonl", lrs_row(0), bad, lrs_row(2)))
    assert [question.index for question in found.questions] == [0, 2]
    (note,) = found.notes
    assert "q.jsonl line 2: ground_truth" in note


def test_bad_letters_choices_and_categories_are_named(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"Ground truth": "seven"}, {"Answer choices": "12"}, {"Category": ["count"]},
        {"Ground truth": ...}, {},
    ]  # fmt: skip
    path = write_lines(tmp_path / "q.json", *(mme_row(**change) for change in changes))
    found = read_questions(path)
    assert [question.index for question in found.questions] == [4]
    assert [note.split(": ")[1].split(" ")[0] for note in found.notes[:3]] == [
        "Ground", "Answer", "Category",
    ]  # fmt: skip
    assert found.notes[3] == "left out, without an answer or a category: 1"
    many = write_lines(tmp_path / "many", *[mme_row(**{"Ground truth": "no"})] * 25, mme_row())
    assert read_questions(many).notes[-1] == "left out in the same way: 15 more"


@pytest.mark.parametrize("letter", ["C", "c", "(C)", "C.", " C\n"])
def test_letters_as_people_write_them(tmp_path: Path, letter: str) -> None:
    assert read_one(tmp_path, mme_row(**{"Ground truth": letter})).ground_truth == "C"


def test_numbers_are_answers(tmp_path: Path) -> None:
    assert read_one(tmp_path, lrs_row(ground_truth=2.5)).ground_truth == "2.5"


def test_a_file_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.json", mme_row(Subtask="Monitoring"))
    with pytest.raises(UsageError, match="left out, not about remote sensing: 1"):
        read_questions(path)
