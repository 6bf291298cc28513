"""Reading question files: LRS-VQA's JSONL and MME-RealWorld-RS's JSON.

A question file comes from the internet and is untrusted: sizes are limited, types are checked, and
image paths must stay inside the folder that the user names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import msgspec

from lrs_edge.errors import UsageError
from lrs_edge.prompt import MAX_QUESTION_CHARS

QuestionFormat = Literal["lrs-vqa", "mme-realworld"]

#: Evidence box in pixels of the image: x0, y0, x1, y1 from the top left.
Box = tuple[float, float, float, float]

#: A larger file is refused unread; LRS-VQA's has 2 MB, MME-RealWorld's 25 MB.
MAX_FILE_BYTES = 256 << 20
#: A larger JSON array is refused: it is read as a whole, and small values take 20 times the space.
MAX_ARRAY_BYTES = 64 << 20
#: A longer line is refused.
MAX_LINE_BYTES = 1 << 20
#: More questions are refused.
MAX_QUESTIONS = 1_000_000
#: More evidence boxes of one question than that are no evidence.
MAX_BOXES = 256
#: Edges of boxes beyond this many pixels are no evidence.
MAX_COORDINATE = 1e9
MAX_CHOICES = 26

#: What the authors' runner puts after an MME-RealWorld question, on a line of its own.
MME_END_STR = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with "
    "only the letter (A, B, C, D, or E) of the correct option."
)
#: And between the question and its choices.
_MME_CHOICES = " The choices are listed below: \n"
_MME_SUBTASK = "remote sensing"


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        index: Place in the question file, from 0; the key under which its answer is recorded.
        question_id: As in the file; not necessarily unique.
        image: Path of the image inside the folder of images, with `/`.
        category: What kind of question.
        dataset: Where it comes from, such as `FAIR`.
        text: What is asked, choices included.
        ground_truth: The right answer; of a multiple-choice question, its letter.
        choices: Choices such as `(A) 12` of a multiple-choice question, else empty.
        boxes: Evidence boxes; empty where the file has none.
    """

    index: int
    question_id: str
    image: str
    category: str
    dataset: str
    text: str
    ground_truth: str
    choices: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class QuestionFile:
    """A question file that has been read.

    Attributes:
        path: The file.
        sha256: Of its bytes, in hex.
        format: Which of the two formats it has.
        questions: The questions, in the file's order.
        notes: What was left out and how often.
    """

    path: Path
    sha256: str
    format: QuestionFormat
    questions: tuple[Question, ...]
    notes: tuple[str, ...]


def read_questions(path: Path) -> QuestionFile:
    """Read a question file; a JSON array is MME-RealWorld's, lines of JSON objects are LRS-VQA's.

    Rows without an answer or a category are left out, as the authors' scorer does, and rows of
    MME-RealWorld that are not about remote sensing; `notes` says how many.

    Args:
        path: The file.

    Raises:
        UsageError: The file cannot be read, is too large, or a row is not what its format says.
    """
    data = _read(path)
    counts = _LeftOut()
    if data.lstrip()[:1] == b"[":
        kind: QuestionFormat = "mme-realworld"
        found = _numbered(_mme_rows(path, data), path, _mme_question, counts)
    else:
        kind = "lrs-vqa"
        found = _numbered(_jsonl_rows(path, data), path, _lrs_question, counts)
    questions = tuple(found)
    if not questions:
        raise UsageError(f"{path} holds no question with an answer and a category")
    return QuestionFile(path, hashlib.sha256(data).hexdigest(), kind, questions, counts.notes())


@dataclass
class _LeftOut:
    """Rows, or parts of rows, that were left out."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{what}: {count}" for what, count in self.counts.items())


@dataclass(frozen=True)
class _Row:
    """One row with its place, for messages."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str | None:
        """A field as text, whole numbers included; None where it is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.wrong(name, f"is a {type(value).__name__}, not text")
        if len(value) > MAX_QUESTION_CHARS:
            raise self.wrong(name, f"is longer than {MAX_QUESTION_CHARS} characters")
        return value

    def needed(self, name: str) -> str:
        """A field that must be there."""
        value = self.text(name)
        if value is None or not value.strip():
            raise self.wrong(name, "is missing or empty")
        return value

    def image(self, name: str) -> str:
        """A path that stays inside the folder of images."""
        value = self.needed(name)
        if not stays_inside(value):
            raise self.wrong(
                name, f"is {value!r}, which is not a plain path inside the folder of images"
            )
        return value

    def wrong(self, name: str, what: str) -> UsageError:
        return UsageError(f"{self.where}: {name} {what}")


def stays_inside(path: str) -> bool:
    """True for a plain relative path, in both path syntaxes, without `..`.

    Links inside the folder are followed: they are the user's own, not the question file's.
    """
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    return (
        bool(path.strip())
        and path.isprintable()
        and ":" not in path
        and not posix.is_absolute()
        and not windows.is_absolute()
        and ".." not in posix.parts
        and ".." not in windows.parts
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name a question file"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; split it into files")
    if not data.strip():
        raise UsageError(f"{path} is empty; name a question file")
    return data


def _jsonl_rows(path: Path, data: bytes) -> Iterator[_Row]:
    for number, line in enumerate(data.splitlines(), 1):
        where = f"{path} line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(f"{where} is longer than {MAX_LINE_BYTES} bytes")
        if line.strip():
            yield _Row(where, _object(where, _decoded(where, line)))


def _mme_rows(path: Path, data: bytes) -> Iterator[_Row]:
    if len(data) > MAX_ARRAY_BYTES:
        raise UsageError(
            f"{path} is a JSON array of more than {MAX_ARRAY_BYTES >> 20} MiB; split it into files"
        )
    rows = _decoded(str(path), data)
    assert isinstance(rows, list)
    for number, row in enumerate(rows, 1):
        yield _Row(f"{path} question {number}", _object(f"{path} question {number}", row))


def _decoded(where: str, data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(
            f"{where} is not JSON ({error}); a question file is LRS-VQA's JSONL or "
            "MME-RealWorld-RS's JSON"
        ) from error


def _object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a JSON object, which one question is")
    return value


def _numbered(
    rows: Iterable[_Row],
    path: Path,
    read: Callable[[int, _Row, _LeftOut], Question | None],
    left_out: _LeftOut,
) -> Iterator[Question]:
    for index, row in enumerate(rows):
        if index >= MAX_QUESTIONS:
            raise UsageError(f"{path} holds more than {MAX_QUESTIONS} questions; split it")
        question = read(index, row, left_out)
        if question is not None:
            yield question


def _lrs_question(index: int, row: _Row, left_out: _LeftOut) -> Question | None:
    text, image = row.needed("text"), row.image("image")
    ground_truth, category = row.text("ground_truth"), row.text("category")
    if not (ground_truth and ground_truth.strip() and category and category.strip()):
        left_out.add("left out, without an answer or a category")
        return None
    question_id = row.text("question_id") or str(index)
    boxes = _boxes(row.fields.get("hbox"))
    if boxes is None:
        left_out.add("evidence not looked for, hbox is no box")
    return Question(
        index,
        question_id,
        image,
        category,
        _dataset(row, question_id),
        text,
        ground_truth,
        boxes=boxes or (),
    )


def _dataset(row: _Row, question_id: str) -> str:
    """Source dataset: a field of its own, else what the authors' scorer reads off the id."""
    named = row.text("dataset")
    if named and named.strip():
        return named.strip()
    before, underscore, _ = question_id.partition("_")
    return before if underscore and before else "all"


def _boxes(value: object) -> tuple[Box, ...] | None:
    """Boxes of an `hbox`: one list of four numbers, or a list of such; None for anything else."""
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        return None
    rows = value if isinstance(value[0], list) else [value]
    if len(rows) > MAX_BOXES:
        return None
    found = [_box(row) for row in rows]
    return None if None in found else tuple(box for box in found if box is not None)


def _box(row: object) -> Box | None:
    if not (isinstance(row, list) and len(row) == 4):
        return None
    for number in row:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return None
        # False for NaN too; a whole number may be too large for `math.isfinite`.
        if not abs(number) < MAX_COORDINATE:
            return None
    x0, y0, x1, y1 = (float(number) for number in row)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _mme_question(index: int, row: _Row, left_out: _LeftOut) -> Question | None:
    subtask = row.text("Subtask")
    if subtask is not None and subtask.strip().lower().replace("_", " ") != _MME_SUBTASK:
        left_out.add("left out, not about remote sensing")
        return None
    ground_truth = row.needed("Ground truth").strip()
    if not re.fullmatch("[A-Z]", ground_truth):
        raise row.wrong("Ground truth", f"is {ground_truth!r}, not a letter")
    choices = row.fields.get("Answer choices")
    if not (
        isinstance(choices, list)
        and 0 < len(choices) <= MAX_CHOICES
        and all(isinstance(choice, str) and len(choice) <= MAX_QUESTION_CHARS for choice in choices)
    ):
        raise row.wrong("Answer choices", "is not a list of choices such as '(A) 12'")
    listed = "\n".join(choices)
    return Question(
        index,
        row.text("Question_id") or str(index),
        row.image("Image"),
        _mme_category(row.needed("Category")),
        row.text("Dataset") or "MME-RealWorld-RS",
        f"{row.needed('Text')}{_MME_CHOICES}\n{listed}".strip(),
        ground_truth,
        tuple(choices),
    )


def _mme_category(category: str) -> str:
    """Category as the authors' scorer counts it: kinds of attributes are one category."""
    lowered = category.lower()
    return f"{lowered.split('/')[0]}/attribute" if "attribute" in lowered else lowered
