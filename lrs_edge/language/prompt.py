"""Prompts: the text around image and question, tokens in and text out.

Each part of the layout is tokenised by itself (docs/algorithm.md, "Prompt").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lrs_edge.bundle.layout import (
    OBJECTS,
    QUESTION,
    LocalTiles,
    Part,
    PromptSpec,
    Question,
    Separator,
    Text,
    TokenIds,
)
from lrs_edge.bundle.tokenizer import check_tokenizer
from lrs_edge.errors import BundleError, QuestionError

#: A question longer than this is refused before it is tokenised.
MAX_QUESTION_CHARS = 10_000

#: Stands for the image in traces, as in the authors' `input_ids`.
IMAGE_TOKEN = -200


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of the text around the image.

    Attributes:
        before: int64, before the first of global view and local tokens.
        after: int64, after the local tokens.
        view: Where in `after` the global view stands that comes after the local tokens; 0 where it
            comes before them.
    """

    before: NDArray[np.int64]
    after: NDArray[np.int64]
    view: int = 0


class Prompt:
    """One model's prompt and tokenizer.

    Args:
        source: `tokenizer.json`: its path, checked as a bundle's is, or what it holds.
        spec: Layout and special tokens.
        vocabulary: Rows of the embedding table.

    Raises:
        BundleError: The tokenizer cannot be read or has tokens without an embedding.
    """

    def __init__(self, source: Path | str, spec: PromptSpec, vocabulary: int) -> None:
        path = self._path = source if isinstance(source, Path) else "the tokenizer"
        if isinstance(source, Path):
            check_tokenizer(source)
        try:
            if isinstance(source, Path):
                self._tokenizer = Tokenizer.from_file(str(source))
            else:
                self._tokenizer = Tokenizer.from_str(source)
        # tokenizers raises bare Exception for every kind of bad file, and panics beyond Exception.
        except BaseException as error:
            raise self._refused(error) from error
        # A bundle's tokenizer could be set to cut or fill every text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = list(spec.stop_ids)
        for part in spec.parts:
            ids += part.ids if isinstance(part, TokenIds | Separator) else ()
        largest = max(*self._tokenizer.get_vocab(with_added_tokens=True).values(), *ids)
        if largest >= vocabulary or min(ids, default=0) < 0:
            raise BundleError(
                f"{path} has token {largest}, the embeddings have {vocabulary} rows; "
                "export the bundle again"
            )
        self._spec = spec
        self._control = tuple(
            token.content
            for token in self._tokenizer.get_added_tokens_decoder().values()
            if token.special
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, content in added.items() if content.special)
        # Vocabularies of the LLaMA family spell unknown characters in bytes.
        tokens = self._tokenizer.get_vocab(with_added_tokens=True)
        spelled = {f"<0x{byte:02X}>": byte for byte in range(256)}
        self._bytes = {tokens[name]: byte for name, byte in spelled.items() if name in tokens}
        if spec.image_token and spec.image_token not in {token.content for token in added.values()}:
            raise BundleError(
                f"{path} has no control token {spec.image_token!r}, which prompt.image_token "
                "names; export the bundle again"
            )
        first, second = sorted((spec.view_place, spec.local_place))
        self._before = self.ids(spec.parts[:first])
        self._between = np.zeros(0, np.int64)
        if second == spec.view_place:
            self._between = self.ids(spec.parts[first + 1 : second], after_image=True)

    @property
    def spec(self) -> PromptSpec:
        """Layout and special tokens."""
        return self._spec

    @property
    def before(self) -> NDArray[np.int64]:
        """Token ids before the image; the same for every question."""
        return self._before

    @property
    def between(self) -> NDArray[np.int64]:
        """Token ids after the local tokens and before the global view, where that comes last."""
        return self._between

    def tokens(self, question: str, end_str: str = "") -> PromptTokens:
        """Tokenise the prompt for a question.

        Args:
            question: What the user asks.
            end_str: Instruction on the line after the question.

        Raises:
            QuestionError: The question is empty, too long, not text, or holds a control token.
        """
        text = self._checked(question, "question")
        if not text.strip():
            raise QuestionError("the question is empty; ask something about the image")
        self._checked(end_str, "end_str")
        return PromptTokens(
            self._before,
            self.ids(
                self._spec.parts[self._spec.local_place + 1 :], text, end_str, after_image=True
            ),
            len(self._between),
        )

    def seen(self, tokens: PromptTokens) -> tuple[int, ...]:
        """Tokens of a whole prompt, the image's own token included, each once and in no order.

        Marks that name a tile's place are left out: no answer holds one.
        """
        spec = self._spec
        between = self.ids(spec.parts[spec.view_place + 1 : spec.local_place], after_image=True)
        texts = [spec.local.before, spec.local.after]
        if isinstance(spec.local, LocalTiles):
            texts += [spec.local.row, spec.local.end]
        marks = [text for text in texts if "{" not in text]
        beside = [self.encode(text, after_image=True) for text in marks]
        image = [] if not spec.image_token else [self._tokenizer.token_to_id(spec.image_token)]
        every = np.concatenate([tokens.before, between, *beside, tokens.after, image])
        return tuple(np.unique(every.astype(np.int64)).tolist())

    def note(self, found: str) -> NDArray[np.int64]:
        """Token ids int64 [n] of what was found, in words; none where the layout has no place."""
        part = self._spec.objects
        if part is None:
            return np.zeros(0, np.int64)
        return self.encode(part.text.replace(OBJECTS, found), after_image=True)

    def ids(
        self,
        parts: Sequence[Part],
        question: str = "",
        end_str: str = "",
        *,
        after_image: bool = False,
    ) -> NDArray[np.int64]:
        """Token ids int64 [n] of consecutive parts; others have none, and `objects` neither.

        Args:
            parts: Of the layout.
            question: Stands in for the question, as it is.
            end_str: As in `tokens`.
            after_image: Whether they stand behind the global view.
        """
        found = [np.zeros(0, np.int64)]
        for part in parts:
            if isinstance(part, TokenIds | Separator):
                found.append(np.array(part.ids, np.int64))
            elif isinstance(part, Text):
                found.append(self.encode(part.text, after_image=after_image))
            elif isinstance(part, Question):
                asked = f"{question}\n{end_str}" if end_str or part.newline else question
                text = part.text.replace(QUESTION, asked)
                found.append(self.encode(text, after_image=after_image))
        return np.concatenate(found)

    def _checked(self, text: str, what: str) -> str:
        if not isinstance(text, str):
            raise QuestionError(f"the {what} is a {type(text).__name__}; give text")
        if len(text) > MAX_QUESTION_CHARS:
            raise QuestionError(
                f"the {what} has {len(text)} characters; at most {MAX_QUESTION_CHARS} are allowed"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise QuestionError(f"the {what} is not valid Unicode text") from error
        if (control := self._control_token(text)) is not None:
            raise QuestionError(
                f"the {what} contains the model's control token {control!r}; leave it out"
            )
        return text

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuse a detector's labels that would be more than words in a note.

        Raises:
            BundleError: A label holds a control token.
        """
        for label in labels:
            if (control := self._control_token(label)) is not None:
                raise BundleError(
                    f"the label {label!r} of vision.objects contains the model's control token "
                    f"{control!r}; rename it and export the bundle again"
                )

    def _control_token(self, text: str) -> str | None:
        """A control token that a text holds, or None."""
        return next((control for control in self._control if control in text), None)

    def encode(self, text: str, *, after_image: bool = False) -> NDArray[np.int64]:
        """Token ids int64 [n] of a text, with nothing added.

        Args:
            text: The text.
            after_image: Whether it stands behind the image or before it; it is tokenised with the
                image's token at that end where the layout names one.

        Raises:
            BundleError: The tokenizer fails.
        """
        token = self._spec.image_token
        try:
            whole = token + text if after_image else text + token
            ids = self._tokenizer.encode(whole, add_special_tokens=False).ids
        # As when it is made.
        except BaseException as error:
            raise self._refused(error) from error
        if token:
            ids = ids[1:] if after_image else ids[:-1]
        return np.array(ids, np.int64)

    def _refused(self, error: BaseException) -> BaseException:
        """What to raise for an error of the tokenizers library; an interrupt stays what it is."""
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            return error
        reason = " ".join(str(error).split())[:200]
        return BundleError(
            f"{self._path} is not a tokenizer that works ({reason}); export it again"
        )

    def decode(self, ids: list[int]) -> str:
        """Text of generated tokens, control tokens left out.

        Bytes that are not UTF-8 become U+FFFD one by one, as SentencePiece has it; `tokenizers`
        would give up the whole run of bytes, the valid ones included.
        """
        if self._bytes.keys().isdisjoint(ids):
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        pieces: list[str] = []
        run = bytearray()
        for token in (*ids, None):
            if token is not None and token in self._bytes:
                run.append(self._bytes[token])
                continue
            if run:
                pieces.append(run.decode("utf-8", errors="replace"))
                run.clear()
            if token is not None and token not in self._special:
                # Rows of the vocabulary may have no token.
                pieces.append(self._tokenizer.id_to_token(token) or "")
        return str(self._tokenizer.decoder.decode(pieces))

    def text_stream(self) -> TextStream:
        """A new incremental decoder."""
        return TextStream(self.decode)


class TextStream:
    """Turns generated tokens into text as they come, never splitting a character.

    All tokens are decoded at every step: `tokenizers.decoders.DecodeStream` raises on bytes that
    turn out to be no UTF-8, which byte-fallback vocabularies (LLaMA's) can always produce.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        whole = self._decode(self._ids)
        return "" if whole.endswith("\ufffd") else self._advance(whole)

    def finish(self) -> str:
        """What is left when no token follows: an unfinished character as U+FFFD."""
        return self._advance(self._decode(self._ids))

    def _advance(self, whole: str) -> str:
        piece = whole[len(self.text) :]
        self.text += piece
        return piece
