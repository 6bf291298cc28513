"""The builder of sequences: a prompt's layout, filled with the tokens of an image and a question.

Runtime, calibration, parity checks, distillation and training all build their sequences here. What
differs between model families is the layout, which is data (`lrs_edge.bundle.layout`).

Where tokens have three positions (`PromptSpec.position_axes`), text has the same one on all axes,
and every image is a block: its tokens share a time, and add their row and column to it. What
follows starts after the largest. The global view is one image, the local rows of a level another,
whatever tiles they come from; marked tiles are an image each. Tokens that pruning keeps keep their
places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.layout import (
    COL,
    NUMBER,
    ROW,
    GlobalView,
    LocalRows,
    LocalTiles,
    PromptSpec,
    Separator,
)
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.language.local_plan import Plan, as_image, block, framed, plan_rows
from lrs_edge.language.prompt import Prompt
from lrs_edge.language.sequence import LocalTokens, TokenSequence, concatenate
from lrs_edge.pyramid.levels import TileIndex, TokenGrid
from lrs_edge.pyramid.selection import grid_indices

Embeds = NDArray[np.float32]

#: Embeddings float32 [n, D] of token ids int64 [n].
Lookup = Callable[[NDArray[np.int64]], Embeds]

#: Places in the sequence of a whole level count so many for each marked tile, more than it has.
_TILE_STRIDE = 1 << 32


class SequenceBuilder:
    """Builds sequences of one model.

    Args:
        prompt: Layout and tokenizer.
        lookup: Embeddings of tokens. Any width and type will do: training gives the tokens' numbers
            instead, and embeds them later.
        newline: float32 [D], ends rows of local tokens.
    """

    def __init__(self, prompt: Prompt, lookup: Lookup, newline: Embeds) -> None:
        self.prompt = prompt
        self._lookup = lookup
        self._newline = newline
        self._marks: dict[str, NDArray[np.int64]] = {}

    @property
    def spec(self) -> PromptSpec:
        """The layout."""
        return self.prompt.spec

    def text(self, ids: NDArray[np.int64]) -> Embeds:
        """Embeddings float32 [n, D] of token ids int64 [n]."""
        return self._lookup(ids)

    def prefix(self, global_tokens: Embeds) -> TokenSequence:
        """All parts before the local tokens, at positions from 0.

        Args:
            global_tokens: float32 [T, D].
        """
        embeds, kinds, positions = [], [], []
        start = 0
        for place, part in enumerate(self.spec.parts[: self.spec.local_place]):
            kind = TokenKind.SYSTEM
            if isinstance(part, GlobalView):
                kind = TokenKind.GLOBAL
                embeds.append(global_tokens)
            else:
                kind = TokenKind.SEPARATOR if isinstance(part, Separator) else kind
                ids = self.prompt.ids((part,), after_image=place > self.spec.view_place)
                embeds.append(self._lookup(ids))
            kinds.append(np.full(len(embeds[-1]), kind, np.int8))
            if kind is TokenKind.GLOBAL and self.axes > 1:
                side = math.isqrt(len(global_tokens))
                cells = np.arange(side * side, dtype=np.int64)
                positions.append(start + block(cells // side, cells % side))
                start += side
            else:
                positions.append(self._text_positions(start, len(embeds[-1])))
                start += len(embeds[-1])
        labels = make_tokens(np.concatenate(positions, axis=-1), np.concatenate(kinds))
        return TokenSequence(np.concatenate(embeds), labels)

    @property
    def axes(self) -> int:
        """Positions k of a token."""
        return self.spec.position_axes

    def _text_positions(self, first: int, count: int) -> NDArray[np.int64]:
        """Positions of text: int64 [n], or [k, n] of k axes."""
        places = first + np.arange(count, dtype=np.int64)
        return places if self.axes == 1 else np.tile(places, (self.axes, 1))

    def suffix(self, after: Embeds, first_position: int) -> TokenSequence:
        """Text after the local tokens, float32 [a, D], at positions from `first_position`."""
        positions = self._text_positions(first_position, len(after))
        return TokenSequence(after, make_tokens(positions, TokenKind.QUESTION))

    def level(self, prefix: TokenSequence, local: LocalTokens, after: Embeds) -> TokenSequence:
        """A level as it is scored: its tokens at their places, gaps where tiles were not looked at.

        Args:
            prefix: See `prefix`.
            local: See `local`.
            after: float32 [a, D], embeddings of the text after the local tokens.
        """
        return concatenate(prefix, *self.behind(prefix, local, after))

    def behind(
        self, prefix: TokenSequence, local: LocalTokens, *texts: Embeds
    ) -> tuple[TokenSequence, ...]:
        """A level's local tokens as they are scored, and texts that may each follow them.

        Args:
            prefix: See `prefix`.
            local: See `local`.
            *texts: float32 [a, D] each.
        """
        start = prefix.next_position
        shown = local.sequence(start + local.offsets)
        return shown, *(self.suffix(text, start + local.span) for text in texts)

    def final(
        self, prefix: TokenSequence, kept: LocalTokens, after: Embeds, note: Embeds | None = None
    ) -> TokenSequence:
        """What the language model is given: kept local tokens, positions without gaps.

        Of several axes, tokens keep their row and column, and the text starts where it would after
        the whole level: what is left is an image with tokens masked out.

        Args:
            prefix: See `prefix`.
            kept: The local tokens.
            after: float32 [a, D], embeddings of the text after the local tokens.
            note: float32 [m, D], of what was found, which stands between both
                (`Prompt.note`); None for nothing.
        """
        text = after if note is None else np.concatenate([note, after])
        if self.axes > 1:
            return self.level(prefix, kept, text)
        start = prefix.next_position
        local = kept.sequence(start + np.arange(len(kept), dtype=np.int64))
        return concatenate(prefix, local, self.suffix(text, start + len(kept)))

    def count(self, grid: TokenGrid) -> int:
        """Local tokens of a whole level; where marks differ in length, at most so many."""
        part = self.spec.local
        if isinstance(part, LocalRows):
            around = len(self._text_ids(part.before)) + len(self._text_ids(part.after))
            return around + (grid.count if part.newline else grid.rows * grid.cols)
        last = TileIndex(max(grid.tile_rows - 1, 0), max(grid.tile_cols - 1, 0))
        most = sum(len(self._mark(text, grid, last)) for text in (part.before, part.after))
        return grid.rows * grid.cols + grid.tile_rows * grid.tile_cols * most

    def span(self, grid: TokenGrid) -> int:
        """Positions that a whole level takes up, as `count` counts its tokens."""
        if self.axes == 1:
            return self.count(grid)
        if isinstance(self.spec.local, LocalRows):
            return self.count(grid) - grid.rows * grid.cols + max(grid.rows, grid.cols)
        tiles = grid.tile_rows * grid.tile_cols
        return self.count(grid) - grid.rows * grid.cols + tiles * grid.per_tile

    def local(
        self,
        grid: TokenGrid,
        features: Mapping[TileIndex, Embeds],
        level: int,
        *,
        close_gaps: bool = False,
    ) -> LocalTokens:
        """Tokens of the given tiles in the order of the level's sequence, with its structure.

        In a layout of rows, tokens of other tiles are left out and positions keep their gaps, which
        equals computing the padded sequence with those tokens masked. In one of marked tiles, a
        tile that is left out leaves no gap: the marks say which tiles are there.

        Args:
            grid: The level's unpadded token grid.
            features: Tokens float32 [per_tile**2, D] per tile.
            level: Index of the search level.
            close_gaps: Number positions of rows without gaps, and leave out the newlines of rows in
                which no tile lies: for levels so large that padded positions would leave the
                model's range.
        """
        plan = self._plan(grid, features, level, close_gaps=close_gaps)
        width = self._newline.shape[0]
        rows = [self._lookup(plan.marks)[::-1], self._newline[None]]
        # From the end: the marks' tokens, the newline, then the tiles' from the start.
        table = np.concatenate([*features.values(), *rows]) if len(plan.source) else None
        embeds = np.zeros((0, width), np.float32) if table is None else table[plan.source]
        return replace(plan.tokens, embeds=embeds)

    def places(
        self, grid: TokenGrid, tiles: Iterable[TileIndex], level: int, *, close_gaps: bool = False
    ) -> LocalTokens:
        """As `local`, without embeddings (they are float32 [n, 0])."""
        return self._plan(grid, tiles, level, close_gaps=close_gaps).tokens

    def _plan(
        self, grid: TokenGrid, tiles: Iterable[TileIndex], level: int, *, close_gaps: bool
    ) -> Plan:
        part = self.spec.local
        if isinstance(part, LocalTiles):
            return self._marked_tiles(part, grid, tuple(tiles), level)
        plan = plan_rows(part, grid, tuple(tiles), level, close_gaps=close_gaps)
        if self.axes > 1:
            plan = replace(plan, tokens=as_image(plan.tokens, grid, close_gaps=close_gaps))
        if len(plan.source) == 0 or not (part.before or part.after):
            return plan
        return framed(plan, grid, self._text_ids(part.before), self._text_ids(part.after))

    def _marked_tiles(
        self, part: LocalTiles, grid: TokenGrid, tiles: tuple[TileIndex, ...], level: int
    ) -> Plan:
        marks: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        cells, sources, indices, owners = [], [], [], []
        blocks: list[NDArray[np.int64]] = []
        taken = span = 0
        for place, tile in sorted(enumerate(tiles), key=lambda item: item[1]):
            inside, within = grid_indices(grid, tile)
            if len(inside) == 0:
                continue
            before, after = (self._mark(text, grid, tile) for text in (part.before, part.after))
            count = len(before) + len(inside) + len(after)
            numbers = -2 - taken - np.arange(len(before) + len(after), dtype=np.int64)
            marks += [before, after]
            taken += len(numbers)
            own = place * grid.per_tile**2 + within
            sources.append(np.concatenate([numbers[: len(before)], own, numbers[len(before) :]]))
            cell = np.full(count, -1, np.int64)
            cell[len(before) : len(before) + len(inside)] = inside
            cells.append(cell)
            number = tile.row * grid.tile_cols + tile.col
            indices.append(number * _TILE_STRIDE + np.arange(count, dtype=np.int64))
            owners.append(np.tile(np.array([[tile.row], [tile.col]], np.int64), count))
            if self.axes > 1:
                rows, cols = within // grid.per_tile, within % grid.per_tile
                shown = span + len(before)
                end = shown + int(max(rows.max(), cols.max())) + 1
                blocks += [
                    self._text_positions(span, len(before)),
                    shown + block(rows, cols),
                    self._text_positions(end, len(after)),
                ]
                span = end + len(after)
        empty = np.zeros(0, np.int64)
        joined = np.concatenate([empty, *indices])
        rows, cols = np.concatenate([np.zeros((2, 0), np.int64), *owners], axis=1)
        offsets = np.arange(len(joined), dtype=np.int64)
        if self.axes > 1:
            offsets = np.concatenate([np.zeros((self.axes, 0), np.int64), *blocks], axis=1)
        tokens = LocalTokens(
            embeds=np.zeros((len(joined), 0), np.float32),
            indices=joined,
            cells=np.concatenate([empty, *cells]),
            offsets=offsets,
            span=span if self.axes > 1 else len(joined),
            tile_rows=rows,
            tile_cols=cols,
            hidden=np.zeros(len(joined), bool),
            level=level,
        )
        return Plan(tokens, np.concatenate([empty, *sources]), np.concatenate(marks))

    def _mark(self, text: str, grid: TokenGrid, tile: TileIndex) -> NDArray[np.int64]:
        """Token ids int64 [m] of the text that marks a tile."""
        values = {
            ROW: tile.row + 1,
            COL: tile.col + 1,
            NUMBER: tile.row * grid.tile_cols + tile.col + 1,
        }
        for name, value in values.items():
            text = text.replace(name, str(value))
        return self._text_ids(text)

    def _text_ids(self, text: str) -> NDArray[np.int64]:
        """Token ids int64 [m] of a text among the local tokens."""
        if text not in self._marks:
            self._marks[text] = self.prompt.encode(text, after_image=True)
        return self._marks[text]
