"""A prompt as the decoders are given it: text, global view and local tokens, as embeddings.

The runtime builds the same sequence in `lrs_edge.language.sequence`; this one is for checks and
calibration.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lrs_edge.pyramid.levels import Level, TileIndex
from lrs_edge.vision.positions import ImagePositions
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.rows import Rows
from lrs_edge_export.checkpoints.tensors import Array

#: Share of the local tokens that pruning keeps.
KEEP_RATIO = 0.25


class PromptSequence:
    """One image's sequence of embeddings: text, global view, separator, local tokens, text.

    Args:
        model: The checkpoint.
        table: Its embeddings, float32 [V, D].
        tokens: float32 [1 + side * side, T, D], the global view's first, then the tiles' row-major.
        question: Text of the question.
    """

    def __init__(self, model: Model, table: Array | Rows, tokens: Array, *, question: str) -> None:
        before, after = prompt_ids(model, question)
        tokens = positioned(model, tokens)
        separator = [model.prompt.separator_id]
        self._head = np.concatenate([table[before], tokens[0], table[separator]])
        self._tail = table[after]
        self._local, self.newline = local_grid(model, tokens[1:])

    @property
    def embeds(self) -> Array:
        """float32 [T, D] with all local tokens."""
        return np.concatenate([self._head, self._local, self._tail])

    def local(self, logits: Array) -> Array:
        """The local tokens' columns of logits [H, T]."""
        start = len(self._head)
        return logits[:, start : start + len(self._local)]

    def pruned(self, scores: Array) -> Array:
        """float32 [T', D] with the top-scored local tokens and all newlines."""
        kept = self.newline.copy()
        kept[top_places(scores)] = True
        return np.concatenate([self._head, self._local[kept], self._tail])


def positioned(model: Model, tokens: Array) -> Array:
    """Tokens [1 + side * side, T, D] with their places in the image added, if the model has any."""
    if model.positions is None:
        return tokens
    positions = ImagePositions(model.positions.rows(), model.positions.cols())
    tile, side = model.vision.tile, int((len(tokens) - 1) ** 0.5)
    view = Level(tile, tile, 1, 1, tile)
    level = Level(side * tile, side * tile, side, side, tile)
    shown = [(view, TileIndex(0, 0)), *((level, index) for index in level.tiles())]
    added = [positions.of_tile(*place, model.vision.tower.grid) for place in shown]
    return tokens + np.stack(added)


def prompt_ids(model: Model, question: str) -> tuple[list[int], list[int]]:
    """Token ids before the image, with BOS where the model has one, and behind it."""
    tokenizer = Tokenizer.from_str(model.tokenizer_json)
    spec = model.prompt
    question += "\n" * spec.question_newline
    before = tokenizer.encode(spec.prefix, add_special_tokens=False).ids
    suffix = spec.suffix.replace("{question}", question)
    after = tokenizer.encode(suffix, add_special_tokens=False).ids
    return ([] if spec.bos_id is None else [spec.bos_id]) + before, after


def local_grid(model: Model, tokens: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Local tokens of tiles [side * side, T, D], a newline behind each row of the whole grid.

    Returns:
        float32 [n, D] row-major over all tiles, and bool [n], True for the newlines.
    """
    pool, grid = model.vision.local_pool, model.vision.tower.grid
    side, short = int(len(tokens) ** 0.5), grid // pool
    split = tokens.reshape(side, side, short, pool, short, pool, -1).mean((3, 5))
    rows = split.transpose(0, 2, 1, 3, 4).reshape(side * short, side * short, -1)
    newline = np.broadcast_to(model.image_newline(), (len(rows), 1, rows.shape[2]))
    places = np.zeros((len(rows), side * short + 1), np.bool_)
    places[:, -1] = True
    return np.concatenate([rows, newline], axis=1).reshape(places.size, -1), places.ravel()


def token_scores(logits: Array) -> Array:
    """Softmax per head, mean over heads, [n] of [H, n]."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: Array = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    return scores


def top_places(scores: Array) -> NDArray[np.int64]:
    """Places of the top-scored share KEEP_RATIO of scores [n], best first."""
    count = int(KEEP_RATIO * len(scores))
    return np.argsort(-scores, kind="stable")[:count]
