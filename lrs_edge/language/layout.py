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
from lrs_edge.engines.rows import Embeds, joined
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.language.local_plan import Plan, TilePieces, as_image, block, framed, plan_rows
from lrs_edge.language.prompt import Prompt
from lrs_edge.language.sequence import LocalTokens, TokenSequence, concatenate
from lrs_edge.pyramid.levels import TileIndex, TokenGrid
from lrs_edge.pyramid.selection import grid_indices

#: Embeddings float32 [n, D] of token ids int64 [n].
Lookup = Callable[[NDArray[np.int64]], Embeds]


class SequenceBuilder:
    """Builds sequences of one model.

    Args:
        prompt: Layout and tokenizer.
        lookup: Embeddings of tokens. Any width and type will do: training gives the tokens' numbers
            instead, and embeds them later.
        newline: float32 [D], or rows [1, D]; ends rows of local tokens.
        views: Tokens of the global view; only asked for where it comes after the local tokens.
    """

    def __init__(self, prompt: Prompt, lookup: Lookup, newline: Embeds, views: int = 0) -> None:
        self.prompt = prompt
        self._views = views
        self._lookup = lookup
        self._newline = newline[None] if isinstance(newline, np.ndarray) else newline
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
            global_tokens: float32 [T, D]; not among them where the view comes last (`after`).
        """
        embeds: list[Embeds] = []
        kinds, positions = [], []
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
        if not embeds:
            embeds, kinds = [global_tokens[:0]], [np.zeros(0, np.int8)]
            positions = [self._text_positions(0, 0)]
        labels = make_tokens(np.concatenate(positions, axis=-1), np.concatenate(kinds))
        return TokenSequence(joined(embeds), labels)

    @property
    def axes(self) -> int:
        """Positions k of a token."""
        return self.spec.position_axes

    def _text_positions(self, first: int, count: int) -> NDArray[np.int64]:
        """Positions of text: int64 [n], or [k, n] of k axes."""
        places = first + np.arange(count, dtype=np.int64)
        return places if self.axes == 1 else np.tile(places, (self.axes, 1))

    def after(self, ids: NDArray[np.int64], global_tokens: Embeds) -> Embeds:
        """Everything after the local tokens, float32 [a, D].

        Args:
            ids: Text after the local tokens (`PromptTokens.after`), int64 [n].
            global_tokens: float32 [T, D]; among it where the view comes last.
        """
        text = self._lookup(ids)
        if not self._view_is_last:
            return text
        place = len(self.prompt.between)
        return joined([text[:place], global_tokens, text[place:]])

    @property
    def views_after(self) -> int:
        """Tokens of the global view that stand after the local tokens."""
        return self._views if self._view_is_last else 0

    @property
    def _view_is_last(self) -> bool:
        return self.spec.view_place > self.spec.local_place

    def suffix(self, after: Embeds, first_position: int) -> TokenSequence:
        """What stands after the local tokens, float32 [a, D], at positions from `first_position`.

        Args:
            after: See `after`; or text alone that is shorter than what always stands there.
            first_position: Of its first token.
        """
        positions = self._text_positions(first_position, len(after))
        kinds = np.full(len(after), TokenKind.QUESTION, np.int8)
        if self._view_is_last:
            place = len(self.prompt.between)
            kinds[place : place + self._views] = TokenKind.GLOBAL
        return TokenSequence(after, make_tokens(positions, kinds))

    def without_local(self, prefix: TokenSequence, after: Embeds) -> TokenSequence:
        """The prompt of the global view alone."""
        return concatenate(prefix, self.suffix(after, prefix.next_position))

    def level(self, prefix: TokenSequence, local: LocalTokens, after: Embeds) -> TokenSequence:
        """A level as it is scored: its tokens at their places, gaps where tiles were not looked at.

        Args:
            prefix: See `prefix`.
            local: See `local`.
            after: float32 [a, D], see `after`.
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
        text = after if note is None else joined([note, after])
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
        most = sum(map(len, self._marks_of(part, grid, last)))
        rows = max(grid.tile_rows - 1, 0) * len(self._text_ids(part.row))
        marks = grid.tile_rows * grid.tile_cols * most + rows + len(self._text_ids(part.end))
        return grid.rows * grid.cols + marks

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
        tables = [*features.values(), self._lookup(plan.marks)[::-1], self._newline]
        # From the end: the marks' tokens, the newline, then the tiles' from the start.
        source = np.where(plan.source < 0, plan.source + sum(map(len, tables)), plan.source)
        return replace(plan.tokens, embeds=joined(tables)[source])

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
            plan = self._marked_tiles(part, grid, tuple(tiles), level)
            if len(plan.source) == 0 or not part.end:
                return plan
            return framed(plan, self._text_ids(""), self._text_ids(part.end))
        plan = plan_rows(part, grid, tuple(tiles), level, close_gaps=close_gaps)
        if self.axes > 1:
            plan = replace(plan, tokens=as_image(plan.tokens, grid, close_gaps=close_gaps))
        if len(plan.source) == 0 or not (part.before or part.after):
            return plan
        return framed(plan, self._text_ids(part.before), self._text_ids(part.after), grid.count)

    def _marked_tiles(
        self, part: LocalTiles, grid: TokenGrid, tiles: tuple[TileIndex, ...], level: int
    ) -> Plan:
        pieces, row = TilePieces(grid, self.axes), 0
        for place, tile in sorted(enumerate(tiles), key=lambda item: item[1]):
            if len(grid_indices(grid, tile)[0]) == 0:
                continue
            if tile.row > row:
                pieces.add_row(tile.row, self._text_ids(part.row))
                row = tile.row
            before, after = self._marks_of(part, grid, tile)
            pieces.add_tile(tile, place, before, after)
        return pieces.plan(level)

    def _marks_of(
        self, part: LocalTiles, grid: TokenGrid, tile: TileIndex
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids int64 [m] of the texts before and after a tile."""

        def counted(place: int, tiles: int) -> int:
            known = min(part.most or tiles, tiles)
            return place * known // max(tiles, 1) + 1

        values = {
            ROW: counted(tile.row, grid.tile_rows),
            COL: counted(tile.col, grid.tile_cols),
            NUMBER: tile.row * grid.tile_cols + tile.col + 1,
        }

        def filled(text: str) -> str:
            for name, value in values.items():
                text = text.replace(name, str(value))
            return text

        return self._text_ids(filled(part.before)), self._text_ids(filled(part.after))

    def _text_ids(self, text: str) -> NDArray[np.int64]:
        """Token ids int64 [m] of a text among the local tokens."""
        if text not in self._marks:
            self._marks[text] = self.prompt.encode(text, after_image=True)
        return self._marks[text]
