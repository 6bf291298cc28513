"""The runtime's builder of sequences over a checkpoint's embeddings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.prompt import Prompt
from lrs_edge.language.sequence import TokenSequence, concatenate
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.rows import Rows
from lrs_edge_export.checkpoints.tensors import Array


class TextEmbeddings:
    """Embeddings of the tokens that prompts use: each is read once, when it is first asked for.

    Args:
        table: float32 [V, D].
        width: Of a token as graphs take it, D or more: zeros follow the embedding.
    """

    def __init__(self, table: Rows | Array, width: int | None = None) -> None:
        self._table = table
        self._width = table.shape[1] if width is None else width
        self._rows: dict[int, Array] = {}

    def lookup(self, ids: NDArray[np.int64]) -> Array:
        """Embeddings float32 [n, width] of token ids int64 [n]."""
        hidden = self._table.shape[1]
        found = np.zeros((len(ids), self._width), np.float32)
        for row, token in zip(found, ids.tolist(), strict=True):
            if token not in self._rows:
                self._rows[token] = self._table[[token]][0]
            row[:hidden] = self._rows[token]
        return found


def table_of(model: Model) -> TextEmbeddings:
    """Embeddings of a checkpoint's tokens, as wide as its graphs take them."""
    return TextEmbeddings(model.embed_tokens, model.llm.config.width)


def followed_by(sequence: TokenSequence, embeds: Array) -> TokenSequence:
    """A sequence and text after it, float32 [n, width]."""
    places = sequence.next_position + np.arange(len(embeds), dtype=np.int64)
    positions = np.tile(places, (len(sequence.positions), 1))
    after = make_tokens(positions if len(positions) > 1 else places, TokenKind.ANSWER)
    return concatenate(sequence, TokenSequence(embeds, after))


def model_sequences(model: Model) -> SequenceBuilder:
    """The builder for a checkpoint.

    Raises:
        BundleError: Its tokenizer does not work, or has tokens without an embedding.
    """
    prompt = Prompt(model.tokenizer_json, model.prompt, model.vocabulary)
    config, newline = model.llm.config, model.image_newline()
    newline = np.concatenate([newline, np.zeros(config.width - config.hidden, np.float32)])
    return SequenceBuilder(prompt, table_of(model).lookup, newline, model.vision.grid**2)
