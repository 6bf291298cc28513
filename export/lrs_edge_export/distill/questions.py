"""Question files in the LRS-VQA form: image, question, and where the evidence is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrs_edge.errors import UsageError
from lrs_edge.evaluation.question_formats import MAX_BOXES, MAX_COORDINATE
from lrs_edge.evaluation.question_rows import stays_inside
from lrs_edge.pyramid.box import Box

#: A line longer than this is refused; a question is a few hundred bytes.
MAX_LINE_BYTES = 1 << 20

#: More questions than this are refused; LRS-VQA has some 7,000.
MAX_QUESTIONS = 1_000_000


@dataclass(frozen=True)
class TrainingQuestion:
    """One question.

    Attributes:
        image: The image file, relative to the folder of images, as the question file has it.
        text: What is asked.
        boxes: Evidence in pixels of the image; empty where none is known.
    """

    image: str
    text: str
    boxes: tuple[Box, ...]


def question_files(data: Path) -> list[Path]:
    """The JSONL files of a folder, sorted, or the one file that is named.

    Raises:
        UsageError: There are none.
    """
    if data.is_file():
        return [data]
    files = sorted(path for path in data.glob("*.jsonl") if path.is_file())
    if not files:
        raise UsageError(
            f"{data} holds no question file (*.jsonl, in the form of LRS-VQA); name the folder "
            "that `lrs-edge scenes` wrote, or one like it"
        )
    return files


def read_questions(files: list[Path]) -> list[TrainingQuestion]:
    """All questions of some files, in their order.

    Fields of a line: `image`, `text`, and `hbox` where known: x0, y0, x1, y1 in pixels, or a list
    of such boxes. Other fields (`question_id`, `category`, `ground_truth`) are not used.

    Raises:
        UsageError: A file cannot be read or a line is not a question.
    """
    found: list[TrainingQuestion] = []
    for path in files:
        for where, line in _lines(path):
            found.append(_question(where, line))
            if len(found) > MAX_QUESTIONS:
                raise UsageError(f"{path}: more than {MAX_QUESTIONS} questions; split the data")
    if not found:
        raise UsageError(f"{', '.join(str(path) for path in files)}: no questions in there")
    return found


def image_folder(data: Path, given: Path | None, questions: list[TrainingQuestion]) -> Path:
    """Where the images lie: the folder given, else that of the data, or `images` in it.

    Raises:
        UsageError: The first question's image is in none of them.
    """
    home = data.parent if data.is_file() else data
    folders = [given] if given is not None else [home, home / "images"]
    first = questions[0].image
    for folder in folders:
        # Not `Path.is_file`: it raises where the name is too long for a file.
        if os.path.isfile(folder / first):
            return folder
    tried = " or ".join(str(folder) for folder in folders)
    raise UsageError(f"the image {first} is not in {tried}; name its folder with --images")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise UsageError(
                        f"{path}, line {number} is longer than {MAX_LINE_BYTES} bytes; this is no "
                        "question file"
                    )
                if line.strip():
                    yield f"{path}, line {number}", line
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from error


def _question(where: str, line: bytes) -> TrainingQuestion:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}); correct the file") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where} is not a JSON object; correct the file")
    image, text = values.get("image"), values.get("text")
    for name, value in (("image", image), ("text", text)):
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"{where}: {name} must be text that is not empty; correct the file")
    if not stays_inside(str(image)):
        raise UsageError(
            f"{where}: the image {str(image)[:80]!r} is not a path inside the folder of images; "
            "correct the file"
        )
    return TrainingQuestion(str(image), str(text), _boxes(where, values.get("hbox")))


def _boxes(where: str, value: Any) -> tuple[Box, ...]:
    if value is None or value == []:
        return ()
    listed = value if isinstance(value, list) else [value]
    if listed and not isinstance(listed[0], list):
        listed = [listed]
    if len(listed) > MAX_BOXES:
        raise UsageError(f"{where}: hbox has more than {MAX_BOXES} boxes; correct the file")
    return tuple(_box(where, box) for box in listed)


def _box(where: str, value: Any) -> Box:
    numbers: list[Any] = value if isinstance(value, list) and len(value) == 4 else []
    sound = numbers and all(
        isinstance(part, int | float) and not isinstance(part, bool) and abs(part) < MAX_COORDINATE
        for part in numbers
    )
    if not sound or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        raise UsageError(
            f"{where}: hbox is {repr(value)[:60]}; it must be x0, y0, x1, y1 in pixels with "
            "x0 < x1 and y0 < y1, or a list of such boxes"
        )
    x0, y0, x1, y1 = (float(part) for part in numbers)
    return x0, y0, x1, y1
