"""Reading question files: the rows of LRS-VQA and of MME-RealWorld-RS, as JSON lines or one array.

`question_rows.py` makes rows of a file's bytes, `question_formats.py` makes questions of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lrs_edge.errors import UsageError
from lrs_edge.evaluation.question_formats import (
    EvalQuestion,
    QuestionFormat,
    format_of,
    lrs_question,
    mme_question,
)
from lrs_edge.evaluation.question_rows import (
    FORMS,
    BadRowError,
    LeftOut,
    Row,
    array_rows,
    as_utf8,
    line_rows,
    read_file,
)

#: More questions are refused.
MAX_QUESTIONS = 1_000_000


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
    questions: tuple[EvalQuestion, ...]
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
    data = read_file(path)
    text = as_utf8(path, data)
    is_array = text.lstrip()[:1] == b"["
    rows = array_rows(path, text) if is_array else line_rows(path, text)
    first = next(rows, None)
    if first is None:
        raise UsageError(f"{path} holds no question; {FORMS}")
    kind = format_of(first)
    read = mme_question if kind == "mme-realworld" else lrs_question
    left_out = LeftOut()
    questions = tuple(_numbered(chain([first], rows), path, read, left_out))
    notes = left_out.notes()
    if not questions:
        reason = "; ".join(notes)
        raise UsageError(
            f"{path} holds no question that can be asked and scored ({reason}); {FORMS}"
        )
    return QuestionFile(path, hashlib.sha256(data).hexdigest(), kind, questions, notes)


def _numbered(
    rows: Iterable[Row],
    path: Path,
    read: Callable[[int, Row, LeftOut], EvalQuestion | None],
    left_out: LeftOut,
) -> Iterator[EvalQuestion]:
    for index, row in enumerate(rows):
        if index >= MAX_QUESTIONS:
            raise UsageError(f"{path} holds more than {MAX_QUESTIONS} questions; split it")
        try:
            question = read(index, row, left_out)
        except BadRowError as error:
            left_out.add_bad(error)
            continue
        if question is not None:
            yield question
