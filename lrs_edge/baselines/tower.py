"""A few tokens of every tile, chosen and merged between the vision tower and the projector.

`visionzip.py` and `prumerge.py` are the rules; here is what they have in common: the tower's graph
that gives its attention out, and the level that is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.manifest import VisionSpec
from lrs_edge.engines.base import Graph
from lrs_edge.errors import BundleError
from lrs_edge.language.sequence import LocalTokens
from lrs_edge.pyramid.levels import Level, TileIndex, TokenGrid, token_grid
from lrs_edge.pyramid.selection import grid_indices
from lrs_edge.requests.clock import Clock
from lrs_edge.requests.options import Resampling
from lrs_edge.search.context import SearchContext
from lrs_edge.search.ranking import Shown
from lrs_edge.vision.colours import Colours, colours_of
from lrs_edge.vision.encoder import VisionEncoder
from lrs_edge.vision.tiles import OnTile

if TYPE_CHECKING:
    from lrs_edge.raster.raster import Raster


class Patches(NamedTuple):
    """What a CLIP tower gives for n patches of one tile; see `TowerSpec`.

    `features` float32 [n, W]; of the last layer that was run `attention` [n] and `keys` [n, d]; of
    the layer after it `next_attention` [n] and `next_keys` [n, W].
    """

    features: NDArray[np.float32]
    attention: NDArray[np.float32]
    keys: NDArray[np.float32]
    next_attention: NDArray[np.float32]
    next_keys: NDArray[np.float32]

    def take(self, places: NDArray[np.int64]) -> Patches:
        """Some of the patches."""
        return Patches(*(values[places] for values in self))


#: Names of the tower's outputs, in the order of `Patches`.
OUTPUTS = ("features", "cls_attention", "keys", "next_cls_attention", "next_keys")
#: Their numbers of dimensions.
_RANKS = (3, 2, 3, 2, 3)


class Compressed(NamedTuple):
    """Kept features or tokens float32 [k, ...] and the patches int64 [k] they stand at, ascending.

    A merged one stands at one of the patches that it was merged from.
    """

    values: NDArray[np.float32]
    places: NDArray[np.int64]


class Rule(Protocol):
    """Chooses and merges features of one tile."""

    def most(self, patches: int) -> int:
        """Most features that are left of so many patches, at least 1."""
        ...

    def compress(self, patches: Patches) -> Compressed:
        """What is left of the patches of one tile, at least one of them."""
        ...


class TowerEncoder:
    """The vision encoder as tower and projector; the graphs are loaded when first needed.

    Args:
        load: Loads both.
        spec: Token grid of the tower.
        hidden: Width D of a token.

    Raises:
        BundleError: On the first use: a graph's outputs are not those of its role.
    """

    def __init__(
        self, load: Callable[[], tuple[Graph, Graph]], spec: VisionSpec, hidden: int
    ) -> None:
        self._load = load
        self._graphs: tuple[Graph, Graph] | None = None
        self._patches = spec.grid**2
        self._hidden = hidden

    def encode(
        self, tile: NDArray[np.float32], inside: NDArray[np.int64], rule: Rule
    ) -> Compressed:
        """Compressed tokens [k, D] of one normalised tile.

        Args:
            tile: float32 [3, S, S].
            inside: int64 [n], the patches that are looked at, at least one.
            rule: What is left of them.
        """
        tower, projector = self._loaded()
        found = tower.run({"pixel_values": tile[None]}, OUTPUTS)
        shaped = all(values.shape[:2] == (1, self._patches) for values in found)
        if not shaped or tuple(values.ndim for values in found) != _RANKS:
            raise BundleError(
                "the vision tower's outputs do not have the shapes that the manifest says; export "
                "the bundle again"
            )
        kept = rule.compress(Patches(*(values[0] for values in found)).take(inside))
        (tokens,) = projector.run({"features": kept.values[None]}, ["tokens"])
        if tokens.shape != (1, len(kept.places), self._hidden):
            raise BundleError(
                "the projector's tokens do not have the shape that the manifest says; export the "
                "bundle again"
            )
        return Compressed(tokens[0], inside[kept.places])

    def _loaded(self) -> tuple[Graph, Graph]:
        if self._graphs is None:
            tower, projector = self._load()
            given = set(OUTPUTS) <= set(tower.outputs)
            if not given or set(projector.inputs) != {"features"}:
                raise BundleError(
                    "the graphs of tower and projector do not have the inputs and outputs of their "
                    "roles; export the "
                    "bundle again with --vision-attention"
                )
            self._graphs = tower, projector
        return self._graphs


class CompressedTiles:
    """Compressed tokens of the tiles of one image, for one question.

    Args:
        encoder: Tower and projector.
        vision: Normalises tiles.
        raster: The image.
        rule: What is left of a tile.
        resampling: How tiles are read.
        clock: Time is counted as `read` and `encode`.
        on_tile: Progress.

    Attributes:
        rule: What is left of a tile.
        looked_at: Tiles encoded, the global view included; none is remembered.
        colours: Of the global view, once its tokens were asked for.
    """

    def __init__(
        self,
        encoder: TowerEncoder,
        vision: VisionEncoder,
        raster: Raster,
        rule: Rule,
        resampling: Resampling,
        clock: Clock,
        on_tile: OnTile,
    ) -> None:
        self._on_tile = on_tile
        self.looked_at = 0
        self._encoder = encoder
        self._vision = vision
        self._raster = raster
        self._filter = vision.filter_of(resampling)
        self.rule = rule
        self._clock = clock
        self.colours: Colours | None = None

    @property
    def side(self) -> int:
        """Patches along a tile's side."""
        return self._vision.spec.grid

    def global_tokens(self, view: Level) -> NDArray[np.float32]:
        """Tokens [k, D] of the global view; padding counts as image there, as it does for `rfm`."""
        pixels = self._read(view, TileIndex(0, 0))
        self.colours = colours_of(pixels)
        return self._encode(pixels, np.arange(self.side**2)).values

    def tokens(self, level: Level, tile: TileIndex, inside: NDArray[np.int64]) -> Compressed:
        """Tokens [k, D] of one tile, of the patches `inside` int64 [n].

        Raises:
            ImageError: The tile cannot be read.
            BackendError: An engine fails.
        """
        return self._encode(self._read(level, tile), inside)

    def _read(self, level: Level, tile: TileIndex) -> NDArray[np.float32]:
        """A tile's pixels float32 [rows, cols, 3] of 0..1."""
        with self._clock.step("read"):
            window = level.tile_window(tile)
            size = (level.height, level.width)
            pixels = self._raster.read(size, window, self._filter, self._clock.expired)
        self._on_tile("read", self.looked_at + 1, self.looked_at)
        return pixels

    def _encode(self, pixels: NDArray[np.float32], inside: NDArray[np.int64]) -> Compressed:
        with self._clock.step("encode"):
            found = self._encoder.encode(self._vision.normalise(pixels), inside, self.rule)
        self.looked_at += 1
        self._on_tile("encode", self.looked_at, self.looked_at)
        return found


class CompressedLevel:
    """The compressed tokens of a level: no grid, so no newlines; in the order of their patches.

    Args:
        context: The question and the image.
        tiles: Gives the tokens.
    """

    def __init__(self, context: SearchContext, tiles: CompressedTiles) -> None:
        self._context = context
        self._tiles = tiles

    def count(self, index: int) -> int:
        """Most tokens that are kept of all tiles together."""
        grid = self._grid(index)
        tiles = self._context.pyramid.levels[index].tiles()
        sizes = (len(grid_indices(grid, tile)[0]) for tile in tiles)
        return sum(self._tiles.rule.most(size) for size in sizes if size)

    @property
    def looked_at(self) -> int:
        """Tiles looked at for this question so far."""
        return self._tiles.looked_at

    def _grid(self, index: int) -> TokenGrid:
        """The level's patches without its padding."""
        level = self._context.pyramid.levels[index]
        return token_grid(level, self._tiles.side, self._context.aspect(index, level))

    def show(self, index: int, tiles: Sequence[TileIndex]) -> Shown:
        """Tokens of the tiles; tiles wholly in the padding have none."""
        context, grid = self._context, self._grid(index)
        level = context.pyramid.levels[index]
        width = context.prefix.embeds.shape[1]
        embeds, indices, owners = [np.zeros((0, width), np.float32)], [np.zeros(0, np.int64)], []
        looked_at = []
        for tile in tiles:
            if context.budget.search_over():
                break
            looked_at.append(tile)
            sequence, within = grid_indices(grid, tile)
            if len(within) == 0:
                continue
            found = self._tiles.tokens(level, tile, within)
            embeds.append(found.values)
            indices.append(sequence[np.searchsorted(within, found.places)])
            owners += [(tile.row, tile.col)] * len(found.places)
        places = np.concatenate(indices)
        order = np.argsort(places)
        rows, cols = np.array(owners, np.int64).reshape(-1, 2)[order].T
        local = LocalTokens(
            embeds=np.concatenate(embeds)[order],
            indices=places[order],
            cells=places[order],
            offsets=places[order],
            span=grid.count,
            tile_rows=rows,
            tile_cols=cols,
            hidden=np.zeros(len(places), bool),
            level=index,
        )
        return Shown(index, level, grid, tuple(sorted(looked_at)), 0, local)
