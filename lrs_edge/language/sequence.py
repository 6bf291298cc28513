"""Token sequences and a level's local tokens; `layout.py` builds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.rows import Embeds, joined
from lrs_edge.language.kv_cache import TokenKind, Tokens, make_tokens, position_ids
from lrs_edge.pyramid.levels import TokenGrid


@dataclass(frozen=True)
class TokenSequence:
    """Embeddings float32 [n, D] and the labels [n] of the same tokens."""

    embeds: Embeds
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def values(self) -> NDArray[np.float32]:
        """The embeddings on the host, float32 [n, D]; not to be written to."""
        return np.asarray(self.embeds)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions int64 [k, n], as graphs take them."""
        return position_ids(self.tokens)

    @property
    def next_position(self) -> int:
        """The position of text that follows: after the largest on any axis, 0 for no tokens.

        What an image takes up is known to whoever placed it: the last token here is text, or one
        of a model whose tokens have one position.
        """
        return int(np.max(self.tokens["position"][-1])) + 1 if len(self) else 0


def concatenate(*parts: TokenSequence) -> TokenSequence:
    """Sequences one after the other; positions stay as they are."""
    return TokenSequence(
        joined([part.embeds for part in parts]),
        np.concatenate([part.tokens for part in parts]),
    )


def global_places(prefix: TokenSequence) -> NDArray[np.int64]:
    """Places int64 [T] of the global view's tokens in a prefix."""
    return np.flatnonzero(prefix.tokens["kind"] == TokenKind.GLOBAL)


@dataclass(frozen=True)
class LocalTokens:
    """Local tokens of one level as they stand in a sequence.

    Tokens of tiles show a part of the image. The others, newlines and the text that marks a tile,
    give the sequence its structure.

    Attributes:
        embeds: float32 [n, D].
        indices: int64 [n], ascending places in the sequence of the whole level.
        cells: int64 [n], places on the level's token grid, row-major with a column after each row
            for its newline; -1 for marks. In a layout of rows these are the `indices`, counted from
            the text before the rows.
        offsets: int64 [n], positions relative to the first local token. Equal to `indices`, or
            without gaps where the padded sequence is longer than the model was made for. Where
            tokens have k positions, int64 [k, n]: time, row and column of an image.
        span: Positions that the level takes up; the text after the image starts after them.
        tile_rows: int64 [n], -1 for newlines and for text around all rows.
        tile_cols: int64 [n], the same; -1 for text before a row of tiles, too.
        hidden: bool [n], zero tokens that only the reference's dense pass computes.
        level: Index of the search level.
    """

    embeds: Embeds
    indices: NDArray[np.int64]
    cells: NDArray[np.int64]
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

    @property
    def is_mark(self) -> NDArray[np.bool_]:
        """True for the text that marks tiles, or stands around all rows, bool [n]."""
        return self.cells < 0

    @property
    def is_frame(self) -> NDArray[np.bool_]:
        """True for the text around all rows, bool [n]: it is there while any token is."""
        return self.is_mark & self.is_newline

    @property
    def is_break(self) -> NDArray[np.bool_]:
        """True for the text before a row of tiles, bool [n]: it has no column."""
        return self.is_mark & (self.tile_cols < 0) & (self.tile_rows >= 0)

    @property
    def is_structure(self) -> NDArray[np.bool_]:
        """True for newlines and marks, bool [n]: no score chooses them."""
        return self.is_newline | self.is_mark

    def groups(self, grid: TokenGrid) -> NDArray[np.int64]:
        """What each token stands in, int64 [n]: its token row; its tile where tiles have marks.

        Text before a row of tiles stands in none.
        """
        if (self.is_mark & ~self.is_frame).any():
            tiles = self.tile_rows * grid.tile_cols + self.tile_cols
            return np.where(self.is_break, -2 - self.tile_rows, tiles)
        return self.cells // grid.width

    def structure_of(self, top: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of the structure that is kept with the tile tokens at places `top`.

        All newlines, what stands around all rows, the marks of tiles of which a token is kept, and
        the text between rows of such tiles.
        """
        tiles = self.tile_rows << 32 | self.tile_cols
        kept = self.is_newline | (self.is_mark & np.isin(tiles, tiles[top]))
        return np.flatnonzero(kept | self.breaks(top))

    def breaks(self, top: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Text between the rows in which tokens at places `top` lie, bool [n]."""
        if len(top) == 0:
            return np.zeros(len(self), bool)
        rows = self.tile_rows[top]
        within = np.isin(self.tile_rows, rows) & (self.tile_rows > int(rows.min()))
        return np.logical_and(self.is_break, within)

    def take(self, places: NDArray[np.int64]) -> LocalTokens:
        """A part of the tokens, by ascending places."""
        return LocalTokens(
            self.embeds[places],
            self.indices[places],
            self.cells[places],
            self.offsets[..., places],
            self.span,
            self.tile_rows[places],
            self.tile_cols[places],
            self.hidden[places],
            self.level,
        )

    def sequence(self, positions: NDArray[np.int64]) -> TokenSequence:
        """The tokens as a sequence at the given positions int64 [n] or [k, n]."""
        kinds = np.full(len(self), TokenKind.TILE, np.int8)
        kinds[self.is_newline] = TokenKind.NEWLINE
        kinds[self.is_mark] = TokenKind.MARK
        tokens = make_tokens(
            positions, kinds, level=self.level, rows=self.tile_rows, cols=self.tile_cols
        )
        return TokenSequence(self.embeds, tokens)


def pad_dense(local: LocalTokens, grid: TokenGrid) -> LocalTokens:
    """The reference's dense canvas: every place of the level, zeros where no tile was read.

    For layouts of rows that end with newlines, as all models of the reference have.
    """
    count = grid.count
    nothing = np.zeros((1, local.embeds.shape[1]), np.float32)
    sources = np.full(count, len(local), np.int64)
    sources[local.indices] = np.arange(len(local))
    embeds = joined([local.embeds, nothing])[sources]
    hidden = np.ones(count, bool)
    hidden[local.indices] = False
    indices = np.arange(count, dtype=np.int64)
    rows, cols = indices // grid.width, indices % grid.width
    newline = cols == grid.cols
    return LocalTokens(
        embeds=embeds,
        indices=indices,
        cells=indices,
        offsets=indices,
        span=count,
        tile_rows=np.where(newline, -1, rows // grid.per_tile),
        tile_cols=np.where(newline, -1, cols // grid.per_tile),
        hidden=hidden,
        level=local.level,
    )
