"""Builders of sequences without a bundle, for tests of their geometry."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.layout import LocalRows, LocalTiles, Part, PromptSpec, rows_layout
from lrs_edge.engines.rows import Rows, Sources
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.prompt import Prompt
from tests.checkpoints import byte_tokenizer


def content_sources(embeds: NDArray[np.float32]) -> Sources:
    """Sources uint64 [n] for made-up embeddings: equal where their numbers are."""
    rows = np.ascontiguousarray(embeds, np.float32)
    digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, np.uint64)


def recognisable(embeds: NDArray[np.float32]) -> Rows:
    """Made-up embeddings that caches recognise by their numbers."""
    return Rows.of(embeds, content_sources(embeds))


#: Text, global view, a separator of one token, rows, the question.
ROWS = rows_layout("ab", "{question}", separator_id=58)


def builder(parts: tuple[Part, ...], newline: NDArray[np.float32]) -> SequenceBuilder:
    """A builder whose text embeddings hold the token's number in every place."""
    prompt = Prompt(byte_tokenizer().to_str(), PromptSpec(parts, (258,)), 259)
    return SequenceBuilder(
        prompt,
        lambda ids: np.tile(ids[:, None].astype(np.float32), (1, len(newline))),
        newline,
    )


def rows_builder(newline: NDArray[np.float32]) -> SequenceBuilder:
    """A builder of rows that end with newlines."""
    return builder(ROWS, newline)


def tiles_builder(local: LocalTiles, width: int) -> SequenceBuilder:
    """A builder of marked tiles."""
    parts = tuple(local if isinstance(part, LocalRows) else part for part in ROWS)
    return builder(parts, np.zeros(width, np.float32))
