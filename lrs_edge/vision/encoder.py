"""Tiles to tokens: normalising, padding, encoding, pooling, and the tile-feature cache."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.manifest import VisionSpec
from lrs_edge.engines.base import Graph
from lrs_edge.errors import BundleError, OutOfMemoryError
from lrs_edge.objects.detections import Detections
from lrs_edge.requests.cache_pool import CachePool
from lrs_edge.requests.options import Resampling
from lrs_edge.vision.positions import ImagePositions

if TYPE_CHECKING:
    from lrs_edge.raster.window import Resampling as ReadResampling

#: Tiles encoded in one run at most.
MOST_BATCH = 16

Features = NDArray[np.float32]


class Encoded(NamedTuple):
    """What the graph gives of N tiles: tokens [N, T, D], and its detector's maps, if any.

    The maps are float32 [N, C + 2, G, G] (`VisionSpec.objects`).
    """

    tokens: Features
    maps: NDArray[np.float32] | None


class VisionEncoder:
    """The vision encoder with its projector.

    Args:
        graph: The graph; its inputs are checked against `spec`.
        spec: Tile size, token grid, normalisation.
        hidden: Width D of a token.
        positions: Added to tokens where the model was trained so.

    Raises:
        BundleError: The graph's input or output is not that of its role.
    """

    def __init__(
        self,
        graph: Graph,
        spec: VisionSpec,
        hidden: int,
        positions: ImagePositions | None = None,
    ) -> None:
        self.spec = spec
        self.positions = positions
        self._graph = graph
        self._hidden = hidden
        self._batch = 1 if graph.device == "cpu" else MOST_BATCH
        self._mean = np.array(spec.mean, np.float32)
        self._std = np.array(spec.std, np.float32)
        wanted = (None, 3, spec.tile, spec.tile)
        pixels = graph.inputs.get("pixel_values")
        if pixels is None or len(graph.inputs) != 1 or pixels.dtype != "float32":
            found = ", ".join(sorted(graph.inputs))
            raise BundleError(
                f"{graph.name} must have the one input pixel_values (float32), it has {found}; "
                "export the bundle again"
            )
        if not _fits(pixels.shape, wanted):
            raise BundleError(
                f"{graph.name} takes pixel_values {pixels.shape}, the manifest says {wanted}; "
                "export the bundle again"
            )
        self._maps: tuple[int, ...] | None = None
        self._names = ["tokens"]
        if spec.objects is not None:
            self._maps = len(spec.objects.labels) + 2, spec.objects.grid, spec.objects.grid
            self._names.append("objects")
        for name in self._names:
            if name not in graph.outputs:
                raise BundleError(
                    f"{graph.name} has no output named {name}, only {', '.join(graph.outputs)}; "
                    "export the bundle again"
                )
        if self._maps is not None:
            maps = graph.outputs["objects"]
            if maps.dtype != "float32" or not _fits(maps.shape, (None, *self._maps)):
                raise BundleError(
                    f"{graph.name} gives objects {maps.shape} ({maps.dtype}), the manifest says "
                    f"{(None, *self._maps)} (float32); export the bundle again"
                )

    @property
    def graph_name(self) -> str:
        """File of the graph, under which its runs are counted."""
        return self._graph.name

    @property
    def per_tile(self) -> int:
        """Local tokens along a tile's side, after pooling."""
        return self.spec.per_tile

    @property
    def batch_size(self) -> int:
        """Tiles encoded in one run: as many as have fitted into the device's memory so far.

        One by one on a CPU: activations of one tile stay in its caches, those of four do not
        (docs/benchmarks.md), and they would all be in memory.
        """
        return self._batch

    def filter_of(self, resampling: Resampling) -> ReadResampling:
        """How an image is read: `processor` is what the model's own image processor does."""
        return self.spec.filter if resampling == "processor" else resampling

    def normalise(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """One tile, ready for the encoder.

        Args:
            pixels: float32 [rows, cols, 3] of 0..1, at most a tile on each side.

        Returns:
            float32 [3, S, S], normalised, then padded with zeros at the bottom and right (zero is
            the mean colour; docs/algorithm.md, "Pyramid" 5).
        """
        tile = np.zeros((3, self.spec.tile, self.spec.tile), np.float32)
        rows, cols = pixels.shape[:2]
        shown = tile[:, :rows, :cols]
        np.subtract(pixels.transpose(2, 0, 1), self._mean[:, None, None], out=shown)
        shown /= self._std[:, None, None]
        return tile

    def encode(self, tiles: Sequence[NDArray[np.float32]]) -> Features:
        """Tokens float32 [N, T, D] of normalised tiles [3, S, S]; see `look_at`."""
        return self.look_at(tiles).tokens

    def look_at(self, tiles: Sequence[NDArray[np.float32]]) -> Encoded:
        """Tokens of normalised tiles [3, S, S], row-major in each tile, and the detector's maps.

        Where the device's memory does not hold a batch, it goes through in halves, and later
        batches are as small.

        Raises:
            BackendError: The engine fails.
            OutOfMemoryError: There is not memory enough for a single tile.
            BundleError: The graph's outputs have other shapes than the manifest says.
        """
        try:
            return self._run(tiles)
        except OutOfMemoryError:
            if len(tiles) == 1:
                raise
            self._batch = half = (len(tiles) + 1) // 2
            parts = self.look_at(tiles[:half]), self.look_at(tiles[half:])
            maps = [part.maps for part in parts if part.maps is not None]
            tokens = np.concatenate([part.tokens for part in parts])
            return Encoded(tokens, np.concatenate(maps) if maps else None)

    def _run(self, tiles: Sequence[NDArray[np.float32]]) -> Encoded:
        tokens, *rest = self._graph.run({"pixel_values": np.stack(tiles)}, self._names)
        maps = rest[0] if rest else None
        if tokens.shape != (len(tiles), self.spec.grid**2, self._hidden):
            raise BundleError(
                f"{self._graph.name} gives tokens {tokens.shape}, the manifest says "
                f"{(len(tiles), self.spec.grid**2, self._hidden)}; export the bundle again"
            )
        if maps is not None and maps.shape != (len(tiles), *(self._maps or ())):
            raise BundleError(
                f"{self._graph.name} gives objects {maps.shape}, the manifest says "
                f"{(len(tiles), *(self._maps or ()))}; export the bundle again"
            )
        return Encoded(tokens, maps)

    def pool(self, tokens: Features) -> Features:
        """Local tokens [per_tile**2, D] of one tile's [T, D]."""
        return pooled(tokens, self.spec.local_pool, self.spec.pooling)


def pooled(tokens: Features, pool: int, pooling: Literal["mean", "bilinear"] = "mean") -> Features:
    """Local tokens of one tile, row-major.

    Args:
        tokens: float32 [G * G, D].
        pool: By which the side G is divided, rounded up.
        pooling: `mean` of pool x pool neighbours, where pool divides G, or `bilinear`. By 2 of an
            even side, both are the same, and the reference's halving of its 24 x 24 tokens.

    Returns:
        float32 [P * P, D], P = ceil(G / pool).
    """
    side, width = math.isqrt(len(tokens)), tokens.shape[1]
    short = -(-side // pool)
    if pooling == "bilinear" and side % pool:
        weights = _bilinear(side, short)
        down = (weights @ tokens.reshape(side, side * width)).reshape(short, side, width)
        return np.ascontiguousarray((weights @ down).reshape(short * short, width))
    blocks = tokens.reshape(short, pool, short, pool, -1)
    return np.ascontiguousarray(blocks.mean((1, 3), dtype=np.float32).reshape(short * short, -1))


@cache
def _bilinear(size: int, wanted: int) -> NDArray[np.float32]:
    """Weights float32 [wanted, size] of linear interpolation between centres, edges repeated."""
    places = np.maximum((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0.0)
    below = places.astype(np.int64)
    rows, share = np.arange(wanted), places - below
    weights = np.zeros((wanted, size))
    np.add.at(weights, (rows, below), 1 - share)
    np.add.at(weights, (rows, np.minimum(below + 1, size - 1)), share)
    return weights.astype(np.float32)


def _fits(shape: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        a is None or b is None or a == b for a, b in zip(shape, wanted, strict=True)
    )


class FeatureCache:
    """Tokens of one scene's tiles, kept as long as the engine's bound allows.

    Tokens of a tile depend only on the tile, so they serve every question on a scene. The objects
    found on it stay and go with them.

    Args:
        pool: Counts them, with all else that is kept.
    """

    def __init__(self, pool: CachePool) -> None:
        self._pool = pool
        self._entries: dict[Hashable, tuple[Features, Detections | None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(_nbytes(*entry) for entry in self._entries.values())

    def get(self, key: Hashable) -> Features | None:
        """The tokens stored under a key, which becomes the most recently used; None if absent."""
        self._pool.touch(self, key)
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def objects(self, key: Hashable) -> Detections | None:
        """The objects stored with the tokens under a key; None if there are none of them."""
        entry = self._entries.get(key)
        return None if entry is None else entry[1]

    def put(self, key: Hashable, tokens: Features, objects: Detections | None = None) -> None:
        """Store tokens; what was used longest ago leaves when the bytes do not suffice."""
        self._entries[key] = tokens, objects
        if not self._pool.hold(self, key, _nbytes(tokens, objects)):
            del self._entries[key]

    def drop(self, key: Hashable) -> None:
        """Forget the tokens stored under a key; the pool asks for it."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._entries):
            self._pool.forget(self, key)
            self._entries.pop(key, None)


def _nbytes(tokens: Features, objects: Detections | None) -> int:
    return tokens.nbytes + (0 if objects is None else objects.nbytes)
