"""What every search works with: the model's parts, the image's pyramid, budgets, one question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.rows import Embeds
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.sequence import LocalTokens, TokenSequence, global_places
from lrs_edge.pyramid.levels import Level, Pyramid, TileIndex, TokenGrid, token_grid
from lrs_edge.requests.budget import Budget
from lrs_edge.requests.options import AskOptions
from lrs_edge.search.result import SearchResult
from lrs_edge.search.rfm import RegionFocus
from lrs_edge.vision.tiles import TileSession

Item = TypeVar("Item")


@dataclass(frozen=True)
class SearchModel:
    """What the search needs to know of a model.

    Attributes:
        focus: The RFM, where there is one.
        sequences: Builds the prompt's sequences.
        per_tile: Local tokens along a tile's side.
        tile: Tile side in pixels.
        base_side: Long side of the base level in pixels.
        keep_ratio: Share of local tokens kept at every level.
        max_length: Longest sequence given to the language model.
        max_positions: Longest sequence whose positions the RFM was made for.
        gapless: Levels of which some tiles are left out have positions without gaps: the model was
            trained so, because its tokens carry their place in the image (`vision/positions.py`).
        generic: Token ids int64 [g], text after the local tokens with a generic instruction in
            place of the question, where scores are relative to those under it
            (`SearchSpec.relative_to`).
    """

    focus: RegionFocus | None
    sequences: SequenceBuilder
    per_tile: int
    tile: int
    base_side: int
    keep_ratio: float
    max_length: int
    max_positions: int
    gapless: bool = False
    generic: NDArray[np.int64] | None = None

    @property
    def trained_rows(self) -> int:
        """Token rows that the finer of two levels can have: the RFM is trained on as many."""
        return (2 * self.base_side // self.tile + 1) * self.per_tile

    @property
    def trained_span(self) -> int:
        """Positions that the finer of two levels can take up."""
        return self.trained_rows * (self.trained_rows + 1)


#: A level with more token rows than this many times the trained ones has newlines only where a
#: tile is shown, so that upright strips of any length stay cheap.
MAX_ROWS_SHARE = 4

#: Told before a level is searched: its index and the tiles it will look at.
OnLevel = Callable[[int, int], None]


class Strategy(Protocol):
    """One way to search."""

    def run(self) -> SearchResult:
        """Look at tiles, and choose tokens for the language model."""
        ...


@dataclass(frozen=True)
class SearchContext:
    """One question on one image, for any search.

    Attributes:
        model: The model's parts.
        pyramid: Levels of the image under the policy.
        tiles: Gives tokens of tiles.
        prefix: Text before the image, global view, separator.
        after: float32 [a, D], what stands after the local tokens (`SequenceBuilder.after`).
        options: Policy, way to prune, budgets.
        budget: What the question may still cost.
        on_level: Progress.
        traced: Also compute what only traces show.
        local_budget: Local tokens that the language model can be given, by its length and by
            `max_vision_tokens`; set by `Search`.
    """

    model: SearchModel
    pyramid: Pyramid
    tiles: TileSession
    prefix: TokenSequence
    after: Embeds
    options: AskOptions
    budget: Budget
    on_level: OnLevel
    traced: bool = False
    local_budget: int = 0

    def nothing(self) -> SearchResult:
        """The result before any tile was looked at: the global view alone."""
        return no_tiles(self.model, self.pyramid)

    @property
    def views(self) -> int:
        """Tokens T of the global view."""
        return len(global_places(self.model.sequences.without_local(self.prefix, self.after)))

    def remaining_tiles(self, looked_at: int | None = None) -> int | None:
        """Tiles that may still be looked at; None for no limit.

        Args:
            looked_at: Tiles looked at so far, the global view included; None for those that
                `tiles` counts.
        """
        return self.budget.tiles_left(self.tiles.looked_at if looked_at is None else looked_at)

    def grid(self, number: int, level: Level, *, min_cols: int = 1) -> TokenGrid:
        """Token grid of the level that is searched as number 0, 1, ...

        docs/algorithm.md, "Unpad and newlines", says how the padding is cut off.
        """
        size = self.aspect(number, level)
        return token_grid(level, self.model.per_tile, size, min_cols=min_cols)

    def aspect(self, number: int, level: Level) -> tuple[int, int]:
        """Height and width whose ratio cuts the padding off the level searched as `number`."""
        if number == 0:
            return self.pyramid.image_height, self.pyramid.image_width
        return level.height, level.width

    def place(
        self, grid: TokenGrid, features: Mapping[TileIndex, Embeds], index: int
    ) -> LocalTokens:
        """Tokens of some tiles in the order of the level's padded sequence."""
        closed = self.closes_gaps(grid)
        return self.model.sequences.local(grid, features, index, close_gaps=closed)

    def closes_gaps(self, grid: TokenGrid) -> bool:
        """Whether gaps of tiles that are not shown close up.

        Either the model was trained so, or the level's padded sequence, or its newlines alone, are
        far too long to compute.
        """
        if self.model.gapless:
            return True
        sequences = self.model.sequences
        if sequences.axes > 1:
            # A level takes up no more positions than it has rows or columns, and has no newlines.
            taken = self.prefix.next_position + sequences.span(grid) + len(self.after)
            return taken > self.model.max_positions
        length = len(self.prefix) + grid.count + len(self.after)
        trained = self.model.trained_span + len(self.prefix)
        too_long = length > max(self.model.max_positions, trained)
        return too_long or grid.rows > MAX_ROWS_SHARE * self.model.trained_rows


def no_tiles(model: SearchModel, pyramid: Pyramid) -> SearchResult:
    """The result before any tile was looked at: the global view alone."""
    base = pyramid.levels[0]
    grid = TokenGrid(0, 0, model.per_tile, base.tile_rows, base.tile_cols)
    local = model.sequences.local(grid, {}, 0)
    return SearchResult([], local, np.zeros(0, np.float32))


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, spread evenly, in their order; all where there are no more."""
    if count >= len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
