r"""The prompt's layout as data: what a sequence is made of, part after part.

A model family is described by its layout; `lrs_edge.language.layout` is the one builder that makes
sequences of it, at run time, in calibration, in checks, and in training. In `manifest.json` every
part is an object whose `part` names its kind:

    {"part": "ids", "ids": [1]}                      tokens by their numbers, such as BOS
    {"part": "text", "text": "USER: "}               text, tokenised by itself
    {"part": "global_view"}                          the tokens of the whole image in one tile
    {"part": "separator", "ids": [25]}               tokens between the image's views
    {"part": "local_rows", "newline": true}          tokens of the tiles, in rows across all tiles;
                                                     `before` and `after` are text around them
    {"part": "local_tiles", "before": "\n<tile {number}>", "after": ""}
                                                     tokens of the tiles, tile after tile; `row` and
                                                     `end` are text between their rows and behind
    {"part": "objects", "text": "\nSeen: {objects}"} what the vision stage's detector found
    {"part": "question", "text": "\n{question} ASSISTANT:", "newline": true}

There is one global view, one of `local_rows` and `local_tiles`, then one question. Right after the
local tokens there may be `objects`, for the language model alone: the region focus module never
sees it, and a layout has it if and only if the bundle's vision stage has a detector. All parts
before the local tokens are the prefix, which is the same for every level of the search and for
every question, and whose keys and values are reused. The global view may come after the local
tokens, where a model was trained so: it is then run with every level and every question.
"""

from __future__ import annotations

import msgspec

#: Stands for the question in a `Question`.
QUESTION = "{question}"

#: Stands for what was found in an `Objects`.
OBJECTS = "{objects}"

#: Stand for a tile in the marks of `LocalTiles`, all counted from 1: its row and its column in the
#: level's grid of tiles, and its number in that grid, row after row.
ROW, COL, NUMBER = "{row}", "{col}", "{number}"


class _Part(msgspec.Struct, frozen=True, tag_field="part", forbid_unknown_fields=True):
    """One part of a prompt."""


class Text(_Part, frozen=True, tag="text"):
    """Text; control tokens of the tokenizer may stand in it."""

    text: str


class TokenIds(_Part, frozen=True, tag="ids"):
    """Tokens by their numbers."""

    ids: tuple[int, ...]


class GlobalView(_Part, frozen=True, tag="global_view"):
    """Tokens of the whole image in one tile, row-major."""


class Separator(_Part, frozen=True, tag="separator"):
    """Tokens between global view and local tokens; they count as vision tokens."""

    ids: tuple[int, ...]


class LocalRows(_Part, frozen=True, tag="local_rows"):
    """Tokens of the tiles in rows that run across all tiles of the level.

    Attributes:
        newline: The image's newline embedding ends every row.
        before: Text before the first row, where there are tokens at all.
        after: Text after the last row, likewise.
    """

    newline: bool = True
    before: str = ""
    after: str = ""


class LocalTiles(_Part, frozen=True, tag="local_tiles"):
    """Tokens of the tiles, tile after tile in row-major order, each between two marks in text.

    Attributes:
        before: Text before a tile's tokens, in which `{row}`, `{col}` and `{number}` are replaced.
        after: The same after them.
        row: Text between rows of tiles.
        end: Text after the last tile, where there are tokens of tiles at all.
        most: Rows and columns of tiles that the model has marks for, 0 for any number. Of a level
            with more, `{row}` and `{col}` say in which of so many parts of it a tile begins.
    """

    before: str = ""
    after: str = ""
    row: str = ""
    end: str = ""
    most: int = 0


class Objects(_Part, frozen=True, tag="objects"):
    """What the detector found on the tiles looked at, in words, tokenised with the text around it.

    Attributes:
        text: `{objects}` is replaced (`lrs_edge.objects.describe`).
    """

    text: str


class Question(_Part, frozen=True, tag="question"):
    """The question in its text, tokenised as one.

    Attributes:
        text: `{question}` is replaced.
        newline: A newline, and the `end_str` of an evaluation if there is one, follow the question
            before `text` goes on (LLaVA's evaluation scripts).
    """

    text: str
    newline: bool = False


Part = Text | TokenIds | GlobalView | Separator | LocalRows | LocalTiles | Objects | Question


class PromptSpec(msgspec.Struct, frozen=True):
    """The prompt: its layout, and what ends an answer.

    Attributes:
        parts: The layout.
        stop_ids: Tokens that end an answer.
        stop_texts: Texts that end an answer.
        position_axes: Positions k that a token has: graphs take position_ids [k, L]. Of three, the
            global view, the local rows as a whole, and every marked tile are each an image of rows
            and columns (`lrs_edge.language.layout`).
        image_token: Token of the tokenizer that the model's own prompts have in the image's place.
            Text beside the image is tokenised beside it, because tokenizers treat the start of a
            text and what follows a control token differently. Empty where each part of the prompt
            is tokenised by itself.
    """

    parts: tuple[Part, ...]
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    position_axes: int = 1
    image_token: str = ""

    @property
    def view_place(self) -> int:
        """Which of the parts the global view is."""
        return next(i for i, part in enumerate(self.parts) if isinstance(part, GlobalView))

    @property
    def local_place(self) -> int:
        """Which of the parts the local tokens are; what stands before it is the prefix."""
        return next(i for i, part in enumerate(self.parts) if isinstance(part, LOCAL))

    @property
    def local(self) -> LocalRows | LocalTiles:
        """How local tokens stand in the sequence."""
        part = self.parts[self.local_place]
        assert isinstance(part, LOCAL)
        return part

    @property
    def objects(self) -> Objects | None:
        """How the sequence says what was found, or None."""
        return next((part for part in self.parts if isinstance(part, Objects)), None)


#: The kinds of part that local tokens can be.
LOCAL = (LocalRows, LocalTiles)


def rows_layout(
    prefix: str,
    suffix: str,
    *,
    separator_id: int,
    bos_id: int | None = None,
    question_newline: bool = False,
    objects: str | None = None,
) -> tuple[Part, ...]:
    """The layout of the authors' models: text, global view, separator, rows with newlines, text.

    Args:
        prefix: Text before the image.
        suffix: Text after the image; `{question}` is replaced.
        separator_id: Token between global view and local tokens.
        bos_id: Token before the prefix, or None.
        question_newline: See `Question`.
        objects: Text that says what was found, in which `{objects}` is replaced, or None.
    """
    first = () if bos_id is None else (TokenIds((bos_id,)),)
    found = () if objects is None else (Objects(objects),)
    return (
        *first,
        Text(prefix),
        GlobalView(),
        Separator((separator_id,)),
        LocalRows(),
        *found,
        Question(suffix, question_newline),
    )


def problems(parts: tuple[Part, ...]) -> str:
    """What is wrong with the order of a layout's parts; empty where nothing is."""
    kinds = (GlobalView, LOCAL, Question)
    places = [[i for i, part in enumerate(parts) if isinstance(part, kind)] for kind in kinds]
    if any(len(found) != 1 for found in places):
        return "must have one global_view, one of local_rows and local_tiles, and one question"
    (view,), (local,), (question,) = places
    if not max(view, local) < question:
        return "must have its question after its global_view and its local tokens"
    if view > local and any(isinstance(part, Objects) for part in parts):
        return "must have its global_view before its local tokens where it has objects"
    if any(isinstance(part, Separator) for part in parts[local:]):
        return "must have a separator before its local tokens only"
    if any(isinstance(p, Objects) for p in (*parts[: local + 1], *parts[local + 2 :])):
        return "must have its objects once, right after its local tokens"
    return next(filter(None, map(_problem, parts)), "")


def _problem(part: Part) -> str:
    """What is wrong with the text of a part; empty where nothing is."""
    if isinstance(part, Objects) and part.text.count(OBJECTS) != 1:
        return f"must have {OBJECTS} once in the text of its objects"
    if isinstance(part, Question) and part.text.count(QUESTION) != 1:
        return f"must have {QUESTION} once in the text of its question"
    if isinstance(part, Text | Objects) and QUESTION in part.text:
        return f"must have {QUESTION} in its question only"
    return ""
