"""From pictures and questions to padded batches of token sequences.

One sequence holds one picture and several questions: the shared prefix (text before, global view,
separator, kept local tokens with newlines) and then one block for each question with its answer.
The mask lets a block see the prefix and itself; positions continue from the prefix, so each block
looks exactly as it would alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from common import END, GRID, PROMPT_NOTE, PROMPT_PREFIX, PROMPT_SUFFIX, SEPARATOR, TOKENS
from questions import PictureQuestion
from tokenizers import Tokenizer
from torch import Tensor
from views import View

from lrs_edge.bundle.layout import PromptSpec, rows_layout
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.prompt import Prompt
from lrs_edge.language.sequence import LocalTokens, concatenate
from lrs_edge.pyramid.levels import TileIndex, TokenGrid

TEXT, NEWLINE = -1, -2
"""Marks in `PackedSequence.source` of places that are not vision tokens."""
WEIGHTS = {
    "caption": 0.3, "position": 4.0, "where": 4.0, "category": 2.0, "beside": 2.0, "count": 3.0,
    "side": 4.0, "half": 2.0, "part count": 2.0, "presence": 1.5, "side of": 2.0,
}  # fmt: skip
"""Of an answer in the loss, by kind of question; others 1."""


NINTH_KINDS = ("position", "where")
"""Kinds whose answer is a ninth of the picture; other places are halves."""


@dataclass
class PackedSequence:
    """One sequence, not yet padded; all arrays have one entry per place."""

    features: np.ndarray
    centres: np.ndarray
    ids: np.ndarray
    source: np.ndarray
    block: np.ndarray
    position: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    queries: list[tuple[int, list[np.ndarray]]]
    """Last prompt places, each with the local tokens, the global tokens, the words of the question
    and those of what was detected that matter for it."""
    local: tuple[int, int]
    """First local place, and the one after the last."""
    full: bool


@dataclass
class Batch:
    """Padded sequences as tensors."""

    features: Tensor
    centres: Tensor
    """[vision tokens, 2], (y, x) in shares of the picture."""
    vision_places: Tensor
    vision_rows: Tensor
    newline_places: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    label_places: Tensor
    labels: Tensor
    weights: Tensor
    query_batch: Tensor
    query_places: Tensor
    query_seen: Tensor
    """[4, queries, T]: which places are local tokens, the global view, and twice all that may be
    seen."""
    query_evidence: Tensor
    """The same shape: which of those show the evidence, name what is looked for, or say it."""


def _as_text(ids: np.ndarray) -> np.ndarray:
    """Pairs (TEXT, token id) [n, 2]."""
    return np.stack([np.full(len(ids), TEXT), ids], 1)


class Writer:
    """Builds sequences with one tokenizer, by the runtime's builder.

    What is embedded is still to be trained: in place of embeddings the builder is given pairs
    (source, token id), such as (TEXT, 17) for text and (5, 0) for the vision token 5.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        separator = tokenizer.encode(SEPARATOR).ids
        self.end = tokenizer.encode(END).ids
        if len(separator) != 1 or len(self.end) != 1:
            raise ValueError("separator and end must be single tokens")
        layout = rows_layout(PROMPT_PREFIX, PROMPT_SUFFIX, separator_id=separator[0])
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        prompt = Prompt(tokenizer.to_str(), PromptSpec(layout, tuple(self.end)), largest + 1)
        self.before = prompt.before
        self.builder = SequenceBuilder(prompt, _as_text, np.array([NEWLINE, 0]))

    def focus(self, question: PictureQuestion) -> np.ndarray:
        """Which tokens of the text after the image spell what the question looks for."""
        text = PROMPT_SUFFIX.format(question=question.text)
        start = text.lower().rfind(question.focus.lower()) if question.focus else -1
        if start < 0:
            return np.zeros(0, np.int64)
        stop = start + len(question.focus)
        spans = self.tokenizer.encode(text).offsets
        return np.array([i for i, (a, b) in enumerate(spans) if a < stop and b > start], np.int64)

    def after(self, question: str) -> list[int]:
        """Tokens of the text after the image."""
        spec = self.builder.spec
        return self.builder.prompt.ids(spec.parts[spec.local_place + 1 :], question).tolist()

    def said(self, note: str) -> list[int]:
        """Tokens of what was detected."""
        return self.tokenizer.encode(PROMPT_NOTE.format(objects=note)).ids

    def telling(self, note: str, question: PictureQuestion) -> np.ndarray:
        """Which tokens of what was detected spell the answer, or say that there is something."""
        text = PROMPT_NOTE.format(objects=note)
        colon = text.find(":", len("\nSeen:"))
        first, last = (colon, len(text)) if question.kind in NINTH_KINDS else (0, colon)
        answer = r"\d+" if question.answer == "yes" else re.escape(question.answer.lower())
        hit = re.compile(rf"\b{answer}\b").search(text, max(first, 6), max(last, 0) or len(text))
        if hit is None:
            return np.zeros(0, np.int64)
        spans = self.tokenizer.encode(text).offsets
        return np.array([i for i, (a, b) in enumerate(spans) if a < hit.end() and b > hit.start()])

    def local(self, view: View, kept: np.ndarray) -> tuple[LocalTokens, TokenGrid]:
        """The kept local tokens of a view with the newlines of all its rows, and their grid."""
        rows, cols = view.local.shape
        down, across = -(-rows // GRID), -(-cols // GRID)
        whole = np.full((down * GRID, across * GRID), -1)
        whole[:rows, :cols] = view.local
        tiles = {}
        for row in range(down):
            for col in range(across):
                part = whole[row * GRID : (row + 1) * GRID, col * GRID : (col + 1) * GRID]
                if part[0, 0] >= 0:
                    tiles[TileIndex(row, col)] = np.stack([part.ravel(), np.zeros(TOKENS, int)], 1)
        grid = TokenGrid(rows, cols, GRID, down, across)
        local = self.builder.local(grid, tiles, 0, close_gaps=True)
        row, col = np.divmod(local.cells, grid.width)
        stays = local.is_structure.copy()
        stays[~stays] = kept[row[~stays], col[~stays]]
        return local.take(np.flatnonzero(stays)), grid

    def write(
        self,
        view: View,
        kept: np.ndarray | None,
        questions: list[PictureQuestion],
        note: Callable[[str], str] | None = None,
    ) -> PackedSequence:
        """One sequence; kept marks the local tokens to keep, None leaves out rows and newlines too.

        The note says what was detected; the RFM's passes have none. Every shown row ends with a
        newline, whether tokens of it are kept or not: as at run time.
        """
        views = np.stack([np.arange(TOKENS), np.zeros(TOKENS, int)], 1)
        shared = self.builder.prefix(views)
        first = len(shared)
        token_place = np.full(view.local.shape, -1)
        if kept is not None:
            local, grid = self.local(view, kept)
            shown = np.flatnonzero(~local.is_structure)
            row, col = np.divmod(local.cells[shown], grid.width)
            token_place[row, col] = first + shown
            positions = first + np.arange(len(local), dtype=np.int64)
            shared = concatenate(shared, local.sequence(positions))
        source, ids = (column.tolist() for column in shared.embeds.T)
        prefix = len(ids)
        block, position = [0] * prefix, shared.tokens["position"].tolist()
        label, weight = [-100] * prefix, [0.0] * prefix
        queries = []
        for number, question in enumerate(questions, 1):
            seen = None if note is None else note(question.text)
            said = [] if seen is None else self.said(seen)
            prompt = said + self.after(question.text)
            answer = self.tokenizer.encode(question.answer).ids + self.end
            both = prompt + answer[:-1]
            start = len(ids)
            ids += both
            source += [TEXT] * len(both)
            block += [number] * len(both)
            position += range(prefix, prefix + len(both))
            label += [-100] * (len(prompt) - 1) + answer
            each = WEIGHTS.get(question.kind, 1.0)
            weight += [0.0] * (len(prompt) - 1) + [each] * len(answer)
            if question.evidence or question.boxes or question.focus:
                boxes = [view.boxes[i] for i in question.evidence] or list(question.boxes)
                near = token_place[view.evidence(boxes)]
                whole = np.flatnonzero(view.global_evidence(boxes))
                words = self.focus(question) + start + len(said)
                told = np.zeros(0, np.int64) if seen is None else self.telling(seen, question)
                shown = [near[near >= 0], whole + len(self.before), words, told + start]
                queries.append((start + len(prompt) - 1, shown))
        arrays = [np.array(x) for x in (ids, source, block, position, label)]
        vision = arrays[1] >= 0
        used, arrays[1][vision] = np.unique(arrays[1][vision], return_inverse=True)
        full = kept is not None and bool(kept[view.shown].all())
        return PackedSequence(
            view.features[used],
            view.centres[used],
            *arrays,
            np.array(weight, np.float32),
            queries,
            (first, prefix),
            full,
        )


def collate(sequences: list[PackedSequence]) -> Batch:
    """Pad to the longest sequence."""
    longest = max(len(s.ids) for s in sequences)
    size = (len(sequences), longest)
    ids, positions = np.zeros(size, np.int64), np.zeros(size, np.int64)
    block = np.full(size, -1)
    places, rows, newlines, label_places = [], [], [], []
    labels_, weights = [], []
    queries: list[tuple[int, int, PackedSequence, list[np.ndarray]]] = []
    offset = 0
    for b, s in enumerate(sequences):
        n = len(s.ids)
        ids[b, :n], positions[b, :n], block[b, :n] = s.ids, s.position, s.block
        vision = np.flatnonzero(s.source >= 0)
        places.append(b * longest + vision)
        rows.append(offset + s.source[vision])
        newlines.append(b * longest + np.flatnonzero(s.source == NEWLINE))
        marked = np.flatnonzero(s.label >= 0)
        label_places.append(b * longest + marked)
        labels_.append(s.label[marked])
        weights.append(s.weight[marked])
        queries += [(b, t, s, shown) for t, shown in s.queries]
        offset += len(s.features)
    block_t = torch.from_numpy(block)
    order = torch.arange(longest)
    earlier = order[None, :, None] >= order[None, None, :]
    same = block_t[:, :, None] == block_t[:, None, :]
    allowed = earlier & (same | (block_t == 0)[:, None, :]) | torch.eye(longest, dtype=torch.bool)
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill_(~allowed, float("-inf"))
    seen = torch.zeros(4, len(queries), longest, dtype=torch.bool)
    evidence = torch.zeros_like(seen)
    for i, (b, t, s, shown) in enumerate(queries):
        first, last = s.local
        seen[0, i, first:last] = True
        seen[1, i, first - 1 - TOKENS : first - 1] = True
        seen[2:, i] = allowed[b, t]
        for part in range(4):
            evidence[part, i, torch.from_numpy(shown[part])] = True

    def joined(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts))

    return Batch(
        torch.from_numpy(np.concatenate([s.features for s in sequences])),
        torch.from_numpy(np.concatenate([s.centres for s in sequences])),
        joined(places), joined(rows), joined(newlines),
        torch.from_numpy(ids), torch.from_numpy(positions), mask[:, None],
        joined(label_places), joined(labels_), joined(weights),
        torch.tensor([q[0] for q in queries], dtype=torch.long),
        torch.tensor([q[1] for q in queries], dtype=torch.long),
        seen, evidence,
    )  # fmt: skip
