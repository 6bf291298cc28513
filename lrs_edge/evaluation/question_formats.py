"""What a row of a question file asks, in the form of LRS-VQA or of MME-RealWorld-RS."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lrs_edge.errors import UsageError
from lrs_edge.evaluation.question_rows import FORMS, BadRowError, LeftOut, Row
from lrs_edge.language.prompt import MAX_QUESTION_CHARS
from lrs_edge.pyramid.box import Box

QuestionFormat = Literal["lrs-vqa", "mme-realworld"]

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


@dataclass(frozen=True)
class EvalQuestion:
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
        thing: What is asked for, such as `ship`; empty where the file does not say it.
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
    thing: str = ""


def format_of(row: Row) -> QuestionFormat:
    """Which format a row has, by its fields."""
    lrs, mme = (len(known & row.fields.keys()) for known in (_LRS_FIELDS, _MME_FIELDS))
    if lrs == mme:
        raise UsageError(f"{row.where} has the fields of neither format; {FORMS}")
    return "mme-realworld" if mme > lrs else "lrs-vqa"


_WITHOUT_ANSWER = "left out, without an answer or a category"


def lrs_question(index: int, row: Row, left_out: LeftOut) -> EvalQuestion | None:
    """A row of LRS-VQA as a question; None, counted in `left_out`, where it cannot be scored.

    Raises:
        UsageError: A field is not what the format says.
        BadRowError: The same of a field that only the scoring needs.
    """
    text, image = row.needed("text"), row.image("image")
    ground_truth, category = row.scored("ground_truth"), row.scored("category")
    if not (ground_truth and category):
        left_out.add(_WITHOUT_ANSWER)
        return None
    question_id = row.text("question_id") or str(index)
    boxes = _boxes(row.fields.get("hbox"))
    if boxes is None:
        left_out.add("evidence not looked for, hbox is not a box")
    return EvalQuestion(
        index,
        question_id,
        image,
        row.text("category") or "",
        _dataset(row, question_id),
        text,
        row.text("ground_truth") or "",
        boxes=boxes or (),
        thing=(row.text("thing") or "").strip(),
    )


def _dataset(row: Row, question_id: str) -> str:
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


def mme_question(index: int, row: Row, left_out: LeftOut) -> EvalQuestion | None:
    """As `lrs_question`, of MME-RealWorld; rows that are not about remote sensing are left out."""
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
        raise BadRowError(str(row.wrong("Ground truth", f"is {ground_truth!r}, not a letter")))
    choices = row.fields.get("Answer choices")
    if not (
        isinstance(choices, list)
        and 0 < len(choices) <= MAX_CHOICES
        and all(isinstance(choice, str) and len(choice) <= MAX_QUESTION_CHARS for choice in choices)
    ):
        what = "is not a list of choices such as '(A) 12'"
        raise BadRowError(str(row.wrong("Answer choices", what)))
    listed = "\n".join(choices)
    return EvalQuestion(
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
