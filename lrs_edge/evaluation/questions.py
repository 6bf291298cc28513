"""Reading question files: the rows of LRS-VQA and of MME-RealWorld-RS, as JSON lines or one array.

A question file comes from the internet and is untrusted: sizes are limited, types are checked, and
image paths must stay inside the folder that the user names.
"""

from __future__ import annotations

import codecs
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import msgspec

from lrs_edge.errors import UsageError
from lrs_edge.language.prompt import MAX_QUESTION_CHARS

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

#: Fields by which the rows of the two formats are told apart.
_LRS_FIELDS = frozenset({"question_id", "image", "category", "text", "ground_truth", "hbox"})
_MME_FIELDS = frozenset(
    {"Question_id", "Image", "Category", "Text", "Ground truth", "Answer choices", "Subtask"}
)
_FORMS = (
    "a question file holds one JSON object a line, or one JSON array of them, with the fields of "
    "LRS-VQA (question_id, image, category, text, ground_truth) or of MME-RealWorld-RS "
    "(Question_id, Image, Category, Text, Answer choices, Ground truth)"
)
#: Rows that cannot be scored are told one by one up to so many, the others are counted.
_MOST_ROWS_TOLD = 10


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
    """Read a question file: JSON lines or one JSON array, in UTF-8 or with a byte order mark.

    The first row's fields decide which format all rows have. Rows without an answer or a category
    are left out, as the authors' scorer does, and rows of MME-RealWorld that are not about remote
    sensing; `notes` says how many. Rows whose answer, category or choices are not what the format
    says cannot be scored: they are left out too, and `notes` names their lines.

    Args:
        path: The file.

    Raises:
        UsageError: The file cannot be read, is too large, or a row is not what its format says.
    """
    data = _read(path)
    text = _utf8(path, data)
    is_array = text.lstrip()[:1] == b"["
    rows = _array_rows(path, text) if is_array else _line_rows(path, text)
    first = next(rows, None)
    if first is None:
        raise UsageError(f"{path} holds no question; {_FORMS}")
    kind = _format(first)
    read = _mme_question if kind == "mme-realworld" else _lrs_question
    left_out = _LeftOut()
    questions = tuple(_numbered(chain([first], rows), path, read, left_out))
    notes = left_out.notes()
    if not questions:
        reason = "; ".join(notes)
        raise UsageError(f"{path} holds no question that can be asked and scored ({reason})")
    return QuestionFile(path, hashlib.sha256(data).hexdigest(), kind, questions, notes)


@dataclass
class _LeftOut:
    """Rows, or parts of rows, that were left out."""

    counts: dict[str, int] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)

    def add(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def add_bad(self, error: _BadRowError) -> None:
        self.bad_rows.append(str(error))

    def notes(self) -> tuple[str, ...]:
        told = [f"left out, {reason}" for reason in self.bad_rows[:_MOST_ROWS_TOLD]]
        more = len(self.bad_rows) - len(told)
        if more:
            told.append(f"left out in the same way: {more} more")
        return (*told, *(f"{what}: {count}" for what, count in self.counts.items()))


class _BadRowError(Exception):
    """One row cannot be scored; the others can."""


@dataclass(frozen=True)
class _Row:
    """One row with its place, for messages."""

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str | None:
        """A field as text, finite numbers included; None where it is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _is_short(value):
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

    def scored(self, name: str) -> str:
        """A field that the scoring needs; empty where it is missing, null or blank.

        Raises:
            _BadRowError: It is no text.
        """
        try:
            return (self.text(name) or "").strip()
        except UsageError as error:
            raise _BadRowError(str(error)) from error

    def wrong(self, name: str, what: str) -> UsageError:
        return UsageError(f"{self.where}: {name} {what}")


def _is_short(value: float) -> bool:
    """Whether a number is finite and of a length that is worth printing."""
    # A whole number may be too large for `math.isfinite`.
    return -1e100 < value < 1e100 if isinstance(value, int) else math.isfinite(value)


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


def _utf8(path: Path, data: bytes) -> bytes:
    """The text of a file as UTF-8 without a byte order mark, which editors on Windows write."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding).encode()
            except UnicodeError as error:
                raise UsageError(
                    f"{path} begins with a byte order mark of {encoding} and is not such text "
                    f"({error}); save it as UTF-8"
                ) from error
    return data


#: UTF-32's little mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _format(row: _Row) -> QuestionFormat:
    """Which format a row has, by its fields."""
    lrs, mme = (len(known & row.fields.keys()) for known in (_LRS_FIELDS, _MME_FIELDS))
    if lrs == mme:
        raise UsageError(f"{row.where} has the fields of neither format; {_FORMS}")
    return "mme-realworld" if mme > lrs else "lrs-vqa"


def _line_rows(path: Path, data: bytes) -> Iterator[_Row]:
    for number, joined in enumerate(data.splitlines(), 1):
        # Files that were joined by `cat` have a mark in the middle.
        line = joined.removeprefix(codecs.BOM_UTF8)
        where = f"{path} line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(f"{where} is longer than {MAX_LINE_BYTES} bytes")
        if line.strip():
            yield _Row(where, _object(where, _decoded(where, line)))


def _array_rows(path: Path, data: bytes) -> Iterator[_Row]:
    if len(data) > MAX_ARRAY_BYTES:
        raise UsageError(
            f"{path} is a JSON array of more than {MAX_ARRAY_BYTES >> 20} MiB; split it into files"
        )
    rows = _decoded(str(path), data)
    if not isinstance(rows, list):
        raise UsageError(f"{path} is no JSON array; {_FORMS}")
    for number, row in enumerate(rows, 1):
        yield _Row(f"{path} question {number}", _object(f"{path} question {number}", row))


def _decoded(where: str, data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}); {_FORMS}") from error


def _object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a JSON object; {_FORMS}")
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
        try:
            question = read(index, row, left_out)
        except _BadRowError as error:
            left_out.add_bad(error)
            continue
        if question is not None:
            yield question


_WITHOUT_ANSWER = "left out, without an answer or a category"


def _lrs_question(index: int, row: _Row, left_out: _LeftOut) -> Question | None:
    text, image = row.needed("text"), row.image("image")
    ground_truth, category = row.scored("ground_truth"), row.scored("category")
    if not (ground_truth and category):
        left_out.add(_WITHOUT_ANSWER)
        return None
    question_id = row.text("question_id") or str(index)
    boxes = _boxes(row.fields.get("hbox"))
    if boxes is None:
        left_out.add("evidence not looked for, hbox is no box")
    return Question(
        index,
        question_id,
        image,
        row.text("category") or "",
        _dataset(row, question_id),
        text,
        row.text("ground_truth") or "",
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


#: The right choice as `C`, `c`, `(C)` or `C.`.
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")


def _mme_question(index: int, row: _Row, left_out: _LeftOut) -> Question | None:
    subtask = row.text("Subtask")
    if subtask is not None and subtask.strip().lower().replace("_", " ") != _MME_SUBTASK:
        left_out.add("left out, not about remote sensing")
        return None
    ground_truth, category = row.scored("Ground truth"), row.scored("Category")
    if not (ground_truth and category):
        left_out.add(_WITHOUT_ANSWER)
        return None
    letter = _LETTER.fullmatch(ground_truth)
    if letter is None:
        raise _BadRowError(str(row.wrong("Ground truth", f"is {ground_truth!r}, not a letter")))
    choices = row.fields.get("Answer choices")
    if not (
        isinstance(choices, list)
        and 0 < len(choices) <= MAX_CHOICES
        and all(isinstance(choice, str) and len(choice) <= MAX_QUESTION_CHARS for choice in choices)
    ):
        what = "is not a list of choices such as '(A) 12'"
        raise _BadRowError(str(row.wrong("Answer choices", what)))
    listed = "\n".join(choices)
    return Question(
        index,
        row.text("Question_id") or str(index),
        row.image("Image"),
        _mme_category(category),
        row.text("Dataset") or "MME-RealWorld-RS",
        f"{row.needed('Text')}{_MME_CHOICES}\n{listed}".strip(),
        letter[1].upper(),
        tuple(choices),
    )


def _mme_category(category: str) -> str:
    """Category as the authors' scorer counts it: kinds of attributes are one category."""
    lowered = category.lower()
    return f"{lowered.split('/')[0]}/attribute" if "attribute" in lowered else lowered
