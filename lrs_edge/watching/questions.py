"""What every product is asked: a file of JSON lines, or of text with one question a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lrs_edge.errors import UsageError
from lrs_edge.evaluation.question_rows import array_rows, as_utf8, line_rows, read_file
from lrs_edge.language.prompt import MAX_QUESTION_CHARS

#: More questions about every product are refused.
MAX_QUESTIONS = 1000


@dataclass(frozen=True)
class Question:
    """One question that every product is asked.

    Attributes:
        id: `question_id` of the file; without one, made of the text, so that it stays the same
            when lines are added or moved.
        text: What is asked.
    """

    id: str
    text: str

    @cached_property
    def key(self) -> str:
        """Hash of id and text, in hex: a question that was reworded is another one."""
        return hashlib.sha256(f"{self.id}\0{self.text}".encode()).hexdigest()


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read the questions of a file, in its order.

    JSON lines, or one JSON array, have the fields `text` and, optionally, `question_id`, as files
    for `lrs-edge eval` do; other fields are not used, and the same question of several rows is
    asked once. In any other file each line is a question, but for empty ones and those that begin
    with `#`.

    Raises:
        UsageError: The file cannot be read, holds no question or too many, a question is not text
            or too long, or two questions share an id.
    """
    data = as_utf8(path, read_file(path))
    start = data.lstrip()[:1]
    rows = _json(path, data, is_array=start == b"[") if start in (b"{", b"[") else _text(path, data)
    found: dict[str, Question] = {}
    for where, question in rows:
        if len(question.text) > MAX_QUESTION_CHARS:
            raise UsageError(f"{where} is longer than {MAX_QUESTION_CHARS} characters; shorten it")
        if found.setdefault(question.id, question) != question:
            raise UsageError(f"{where} has the id {question.id!r} of another one; give it its own")
        if len(found) > MAX_QUESTIONS:
            raise UsageError(f"{path} holds more than {MAX_QUESTIONS} questions; shorten it")
    if not found:
        raise UsageError(f"{path} holds no question; write one a line, or JSON lines with `text`")
    return tuple(found.values())


def _json(path: Path, data: bytes, *, is_array: bool) -> Iterator[tuple[str, Question]]:
    for row in array_rows(path, data) if is_array else line_rows(path, data):
        text = row.needed("text").strip()
        yield row.where, Question((row.text("question_id") or "").strip() or _id_of(text), text)


def _text(path: Path, data: bytes) -> Iterator[tuple[str, Question]]:
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{path} line {number}", Question(_id_of(text), text)


def _id_of(text: str) -> str:
    return f"q{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:10]}"
