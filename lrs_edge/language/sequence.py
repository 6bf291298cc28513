"""Token sequences: the prefix that all questions on a scene share, and a level's local tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrs_edge.language.kv_cache import TokenKind, Tokens, make_tokens
from lrs_edge.pyramid.levels import TileIndex, TokenGrid
from lrs_edge.pyramid.selection import grid_indices, newline_indices
from lrs_edge.vision.encoder import Features


@dataclass(frozen=True)
class Sequence:
    """Embeddings float32 [n, D] and the labels [n] of the same tokens."""

    embeds: NDArray[np.float32]
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.tokens)


def concatenate(*parts: Sequence) -> Sequence:
    """Sequences one after the other; positions stay as they are."""
    return Sequence(
        np.concatenate([part.embeds for part in parts]),
        np.concatenate([part.tokens for part in parts]),
    )


def build_prefix(
    before: NDArray[np.float32], global_tokens: Features, separator: NDArray[np.float32]
) -> Sequence:
    """Text before the image, global view, separator; positions from 0.

    Args:
        before: float32 [b, D].
        global_tokens: float32 [T, D].
        separator: float32 [1, D].
    """
    embeds = np.concatenate([before, global_tokens, separator])
    kinds = np.full(len(embeds), TokenKind.GLOBAL, np.int8)
    kinds[: len(before)] = TokenKind.SYSTEM
    kinds[-1] = TokenKind.SEPARATOR
    return Sequence(embeds, make_tokens(np.arange(len(embeds), dtype=np.int64), kinds))


def global_places(prefix: Sequence) -> NDArray[np.int64]:
    """Places int64 [T] of the global view's tokens in a prefix."""
    return np.flatnonzero(prefix.tokens["kind"] == TokenKind.GLOBAL)


def build_suffix(after: NDArray[np.float32], first_position: int) -> Sequence:
    """Text after the image, positions from `first_position`."""
    positions = first_position + np.arange(len(after), dtype=np.int64)
    return Sequence(after, make_tokens(positions, TokenKind.QUESTION))


@dataclass(frozen=True)
class LocalTokens:
    """Local tokens of one level as they stand in a sequence.

    Attributes:
        embeds: float32 [n, D].
        indices: int64 [n], ascending places in the level's padded sequence.
        offsets: int64 [n], positions relative to the first local token. Equal to `indices`, or
            without gaps where the padded sequence is longer than the model was made for.
        span: Positions that the level takes up; the text after the image starts behind them.
        tile_rows: int64 [n], -1 for newlines.
        tile_cols: int64 [n], -1 for newlines.
        hidden: bool [n], zero tokens that only the reference's dense pass computes.
        level: Index of the search level.
    """

    embeds: NDArray[np.float32]
    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]
    span: int
    tile_rows: NDArray[np.int64]
    tile_cols: NDArray[np.int64]
    hidden: NDArray[np.bool_]
    level: int

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def is_newline(self) -> NDArray[np.bool_]:
        """True for newline tokens, bool [n]."""
        return self.tile_rows < 0

    def take(self, places: NDArray[np.int64]) -> LocalTokens:
        """A part of the tokens, by ascending places."""
        return LocalTokens(
            self.embeds[places],
            self.indices[places],
            self.offsets[places],
            self.span,
            self.tile_rows[places],
            self.tile_cols[places],
            self.hidden[places],
            self.level,
        )

    def sequence(self, positions: NDArray[np.int64]) -> Sequence:
        """The tokens as a sequence at the given positions int64 [n]."""
        kinds = np.where(self.is_newline, TokenKind.NEWLINE, TokenKind.TILE).astype(np.int8)
        tokens = make_tokens(
            positions, kinds, level=self.level, rows=self.tile_rows, cols=self.tile_cols
        )
        return Sequence(self.embeds, tokens)


def place_local(
    grid: TokenGrid,
    features: Mapping[TileIndex, Features],
    newline: NDArray[np.float32],
    level: int,
    *,
    close_gaps: bool = False,
) -> LocalTokens:
    """Tokens of the given tiles in the order of the level's padded sequence, newlines included.

    Tokens of other tiles are left out and positions keep their gaps, which equals computing the
    padded sequence with those tokens masked.

    Args:
        grid: The level's unpadded token grid.
        features: Tokens float32 [per_tile**2, D] per tile.
        newline: float32 [D], ends every row.
        level: Index of the search level.
        close_gaps: Number positions without gaps, and leave out the newlines of rows in which no
            tile lies: for levels so large that padded positions would leave the model's range.
    """
    lines = newline_indices(grid)
    if close_gaps:
        tops = sorted({tile.row * grid.per_tile for tile in features})
        shown = [row for top in tops for row in range(top, min(top + grid.per_tile, grid.rows))]
        lines = lines[np.array(shown, np.int64)] if shown else lines[:0]
    index_parts, embed_parts = [lines], [np.tile(newline, (len(lines), 1))]
    row_parts = [np.full(len(lines), -1, np.int64)]
    col_parts = [np.full(len(lines), -1, np.int64)]
    for tile, tokens in features.items():
        places, within = grid_indices(grid, tile)
        index_parts.append(places)
        embed_parts.append(tokens[within])
        row_parts.append(np.full(len(places), tile.row, np.int64))
        col_parts.append(np.full(len(places), tile.col, np.int64))
    indices = np.concatenate(index_parts)
    order = np.argsort(indices)
    indices = indices[order]
    return LocalTokens(
        embeds=np.concatenate(embed_parts)[order],
        indices=indices,
        offsets=np.arange(len(indices), dtype=np.int64) if close_gaps else indices,
        span=len(indices) if close_gaps else grid.count,
        tile_rows=np.concatenate(row_parts)[order],
        tile_cols=np.concatenate(col_parts)[order],
        hidden=np.zeros(len(indices), bool),
        level=level,
    )


def pad_dense(local: LocalTokens, grid: TokenGrid) -> LocalTokens:
    """The reference's dense canvas: every place of the level, zeros where no tile was read."""
    count = grid.count
    embeds = np.zeros((count, local.embeds.shape[1]), np.float32)
    embeds[local.indices] = local.embeds
    hidden = np.ones(count, bool)
    hidden[local.indices] = False
    indices = np.arange(count, dtype=np.int64)
    rows, cols = indices // grid.width, indices % grid.width
    newline = cols == grid.cols
    return LocalTokens(
        embeds=embeds,
        indices=indices,
        offsets=indices,
        span=count,
        tile_rows=np.where(newline, -1, rows // grid.per_tile),
        tile_cols=np.where(newline, -1, cols // grid.per_tile),
        hidden=hidden,
        level=local.level,
    )
