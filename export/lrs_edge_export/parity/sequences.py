"""Prompts for checks and calibration, made by the runtime's builder of sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.sequence import TokenSequence
from lrs_edge.pyramid.levels import Level, TileIndex, TokenGrid
from lrs_edge.pyramid.selection import kept_indices
from lrs_edge.search.rfm import token_scores
from lrs_edge.vision.pooling import pooled
from lrs_edge.vision.positions import ImagePositions
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.tensors import Array

__all__ = ["KEEP_RATIO", "PromptSequence", "positioned", "token_scores", "top_places"]

#: Share of the local tokens that pruning keeps.
KEEP_RATIO = 0.25

#: What is said to have been found, where a prompt says so.
FOUND = "airplane 3 left top: top left, center; perhaps bridge 1 right bottom: bottom"


class PromptSequence:
    """One image's sequence of embeddings, with all tokens of one square level.

    Args:
        model: The checkpoint.
        sequences: Its builder.
        tokens: float32 [1 + side * side, T, D], the global view's first, then the tiles' row-major.
        question: Text of the question.
    """

    def __init__(
        self, model: Model, sequences: SequenceBuilder, tokens: Array, *, question: str
    ) -> None:
        tokens, level = positioned(model, tokens), _level(model, tokens)
        self._sequences = sequences
        self._prefix = sequences.prefix(tokens[0])
        asked = sequences.prompt.tokens(question).after
        self._after = sequences.after(asked, tokens[0])
        self._note = sequences.text(sequences.prompt.note(FOUND))
        stage = model.vision
        short = -(-stage.grid // stage.local_pool)
        side = level.tile_rows
        grid = TokenGrid(side * short, side * short, short, side, side)
        tiles = {
            tile: pooled(shown, stage.local_pool, stage.pooling)
            for tile, shown in zip(level.tiles(), tokens[1:], strict=True)
        }
        self._local = sequences.local(grid, tiles, 0)

    @property
    def whole(self) -> TokenSequence:
        """With all local tokens."""
        return self._sequences.level(self._prefix, self._local, self._after)

    def local(self, logits: Array) -> Array:
        """The local tokens' columns of logits [H, T]."""
        start = len(self._prefix)
        return logits[:, start : start + len(self._local)]

    def pruned(self, scores: Array) -> TokenSequence:
        """With the top-scored local tokens, and the structure that goes with them.

        Args:
            scores: float32 [n] of the local tokens.
        """
        tiles = np.flatnonzero(~self._local.is_structure)
        top = tiles[top_places(scores[tiles])]
        kept = self._local.take(kept_indices(top, self._local.structure_of(top)))
        return self._sequences.final(self._prefix, kept, self._after, self._note)


def _level(model: Model, tokens: Array) -> Level:
    """The square level that tokens [1 + side * side, T, D] show."""
    tile, side = model.vision.tile, int((len(tokens) - 1) ** 0.5)
    return Level(side * tile, side * tile, side, side, tile)


def positioned(model: Model, tokens: Array) -> Array:
    """Tokens [1 + side * side, T, D] with their places in the image added, if the model has any."""
    if model.positions is None:
        return tokens
    positions = ImagePositions(model.positions.rows(), model.positions.cols())
    tile, level = model.vision.tile, _level(model, tokens)
    view = Level(tile, tile, 1, 1, tile)
    shown = [(view, TileIndex(0, 0)), *((level, index) for index in level.tiles())]
    added = [positions.of_tile(*place, model.vision.grid) for place in shown]
    return tokens + np.stack(added)


def top_places(scores: Array) -> NDArray[np.int64]:
    """Places of the top-scored share KEEP_RATIO of scores [n], best first."""
    count = int(KEEP_RATIO * len(scores))
    return np.argsort(-scores, kind="stable")[:count]
