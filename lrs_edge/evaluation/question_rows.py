"""The bytes of a question file as rows: JSON lines or one JSON array, read with limits.

A question file comes from the internet and is untrusted: sizes are limited, types are checked, and
image paths must stay inside the folder that the user names.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import msgspec

from lrs_edge.errors import UsageError
from lrs_edge.language.prompt import MAX_QUESTION_CHARS

#: A larger file is refused unread; LRS-VQA's has 2 MB, MME-RealWorld's 25 MB.
MAX_FILE_BYTES = 256 << 20
#: A larger JSON array is refused: it is read as a whole, and small values take 20 times the space.
MAX_ARRAY_BYTES = 64 << 20
#: A longer line is refused.
MAX_LINE_BYTES = 1 << 20

FORMS = (
    "a question file holds one JSON object a line, or one JSON array of them, with the fields of "
    "LRS-VQA (question_id, image, category, text, ground_truth) or of MME-RealWorld-RS "
    "(Question_id, Image, Category, Text, Answer choices, Ground truth)"
)

#: Rows that cannot be scored are told one by one up to so many, the others are counted.
_MOST_ROWS_TOLD = 10


class BadRowError(Exception):
    """One row cannot be scored; the others can."""


@dataclass(frozen=True)
class Row:
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
            BadRowError: It is not text.
        """
        try:
            return (self.text(name) or "").strip()
        except UsageError as error:
            raise BadRowError(str(error)) from error

    def wrong(self, name: str, what: str) -> UsageError:
        """The error that says where a field is not what it should be."""
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


@dataclass
class LeftOut:
    """Rows, or parts of rows, that were left out."""

    counts: dict[str, int] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)

    def add(self, what: str) -> None:
        """Count one."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def add_bad(self, error: BadRowError) -> None:
        """Remember a row that cannot be scored."""
        self.bad_rows.append(str(error))

    def notes(self) -> tuple[str, ...]:
        """What was left out and how often, one phrase each."""
        told = [f"left out, {reason}" for reason in self.bad_rows[:_MOST_ROWS_TOLD]]
        more = len(self.bad_rows) - len(told)
        if more:
            told.append(f"left out in the same way: {more} more")
        return (*told, *(f"{what}: {count}" for what, count in self.counts.items()))


def read_file(path: Path) -> bytes:
    """The bytes of a question file.

    Raises:
        UsageError: It cannot be read, is too large, or is empty.
    """
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


def as_utf8(path: Path, data: bytes) -> bytes:
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


def line_rows(path: Path, data: bytes) -> Iterator[Row]:
    """Rows of JSON lines; empty lines are left out.

    Raises:
        UsageError: A line is too long, or not a JSON object.
    """
    for number, joined in enumerate(data.splitlines(), 1):
        # Files that were joined by `cat` have a mark in the middle.
        line = joined.removeprefix(codecs.BOM_UTF8)
        where = f"{path} line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(f"{where} is longer than {MAX_LINE_BYTES} bytes; correct it")
        if line.strip():
            yield Row(where, _object(where, _decoded(where, line)))


def array_rows(path: Path, data: bytes) -> Iterator[Row]:
    """Rows of a JSON array.

    Raises:
        UsageError: It is too large, or not an array of objects.
    """
    if len(data) > MAX_ARRAY_BYTES:
        raise UsageError(
            f"{path} is a JSON array of more than {MAX_ARRAY_BYTES >> 20} MiB; split it into files"
        )
    rows = _decoded(str(path), data)
    if not isinstance(rows, list):
        raise UsageError(f"{path} is not a JSON array; {FORMS}")
    for number, row in enumerate(rows, 1):
        yield Row(f"{path} question {number}", _object(f"{path} question {number}", row))


def _decoded(where: str, data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}); {FORMS}") from error


def _object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a JSON object; {FORMS}")
    return value
