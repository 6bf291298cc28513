"""Tiles to tokens: normalising, padding, encoding, pooling, and the tile-feature cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.manifest import VisionSpec
from lrs_edge.engines.base import Graph, Tensor
from lrs_edge.engines.cores import available_cores
from lrs_edge.errors import BundleError, OutOfMemoryError
from lrs_edge.objects.detections import Detections
from lrs_edge.pyramid.levels import Level, TileIndex
from lrs_edge.requests.cache_pool import CachePool
from lrs_edge.requests.options import Resampling
from lrs_edge.vision.on_device import DeviceTiles
from lrs_edge.vision.pooling import pooled
from lrs_edge.vision.positions import ImagePositions

if TYPE_CHECKING:
    from lrs_edge.raster.window import Resampling as ReadResampling

#: Tiles encoded in one run at most.
MOST_BATCH = 16

#: Tiles read at once at most, each in a thread and an opening of the image of its own.
MOST_READERS = 8

#: Tokens float32 [T, D] of one tile, on the host or on a device.
Features: TypeAlias = NDArray[np.float32] | Tensor

#: What a tile is looked at for.
Role = Literal["global", "local"]

#: A tile of a level.
Place: TypeAlias = tuple[Level, TileIndex]

Run = TypeVar("Run")


class Encoded(NamedTuple):
    """What the graph gives of N tiles: tokens [N, T, D], and its detector's maps, if any.

    The maps are float32 [N, C + 2, G, G] (`VisionSpec.objects`).
    """

    tokens: NDArray[np.float32]
    maps: NDArray[np.float32] | None


class VisionEncoder:
    """The vision encoder with its projector.

    Args:
        graph: The graph; its inputs are checked against `spec`.
        spec: Tile size, token grid, normalisation.
        hidden: Width D of a token.
        positions: Added to tokens where the model was trained so.
        device: What is done around the graph on its device, where tokens stay there.

    Raises:
        BundleError: The graph's input or output is not that of its role.
    """

    def __init__(
        self,
        graph: Graph,
        spec: VisionSpec,
        hidden: int,
        positions: ImagePositions | None = None,
        device: DeviceTiles | None = None,
    ) -> None:
        self.spec = spec
        self._device = device
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

    @property
    def readers(self) -> int:
        """Tiles that had better be read at once.

        One on a CPU, whose cores are the encoder's. A GPU encodes a tile in the time that a core
        takes to read a tenth of one.
        """
        if self._graph.device == "cpu":
            return 1
        return max(min(available_cores() - 1, MOST_READERS), 1)

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

    def ready(self, pixels: NDArray[np.float32]) -> NDArray[np.generic]:
        """As `normalise`, in float16 where the graph would round to it in any case."""
        tile = self.normalise(pixels)
        half = self._device is not None and self._device.half
        return tile.astype(np.float16) if half else tile

    def encode(self, tiles: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
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
        parts = self._halved(tiles, self._run)
        if len(parts) == 1:
            return parts[0]
        maps = [part.maps for part in parts if part.maps is not None]
        tokens = np.concatenate([part.tokens for part in parts])
        return Encoded(tokens, np.concatenate(maps) if maps else None)

    def features(
        self, tiles: Sequence[NDArray[np.generic]], role: Role, places: Sequence[Place]
    ) -> Iterator[tuple[Features, NDArray[np.float32] | None]]:
        """Of each tile its tokens as sequences take them, and its detector's map.

        On the host, or on the device where the encoder runs and the language model takes them.

        Args:
            tiles: As `ready` gives them.
            role: What they are looked at for: local tiles are pooled.
            places: Where they are.

        Raises:
            As `look_at`.
        """
        if self._device is None:
            batch = self.look_at([np.asarray(tile, np.float32) for tile in tiles])
            for number, (level, tile) in enumerate(places):
                tokens = batch.tokens[number]
                kept = self.pool(tokens) if role == "local" else tokens.copy()
                if self.positions is not None:
                    kept += self.positions.of_tile(level, tile, math.isqrt(len(kept)))
                yield kept, None if batch.maps is None else batch.maps[number]
            return
        side = self.per_tile if role == "local" else self.spec.grid
        rest = iter(places)
        for together, maps in self._halved(tiles, self._run_kept):
            for number, (level, tile) in enumerate(islice(rest, together.shape[0])):
                mixed = None
                if self.positions is not None:
                    mixed = self.positions.mixed(level, tile, side)
                found = self._device.tokens(role, together, number, mixed)
                yield found, None if maps is None else maps[number]

    def _halved(
        self,
        tiles: Sequence[NDArray[np.generic]],
        run: Callable[[Sequence[NDArray[np.generic]]], Run],
    ) -> list[Run]:
        """What `run` gives of all tiles, or of parts of them that fit into memory."""
        try:
            return [run(tiles)]
        except OutOfMemoryError:
            if len(tiles) == 1:
                raise
            self._batch = half = (len(tiles) + 1) // 2
            return [*self._halved(tiles[:half], run), *self._halved(tiles[half:], run)]

    def _run(self, tiles: Sequence[NDArray[np.generic]]) -> Encoded:
        tokens, *rest = self._graph.run({"pixel_values": np.stack(tiles)}, self._names)
        maps = rest[0] if rest else None
        self._check(len(tiles), tokens.shape, maps)
        return Encoded(tokens, maps)

    def _run_kept(
        self, tiles: Sequence[NDArray[np.generic]]
    ) -> tuple[Tensor, NDArray[np.float32] | None]:
        """As `_run`; the tokens stay on the device."""
        assert self._device is not None
        pixels = self._device.pixels(tiles)
        tokens, *rest = self._graph.run_on_device({"pixel_values": pixels}, self._names)
        maps: NDArray[np.float32] | None = rest[0].numpy() if rest else None
        self._check(len(tiles), tokens.shape, maps)
        return tokens, maps

    def _check(self, count: int, shape: tuple[int, ...], maps: NDArray[np.float32] | None) -> None:
        """Raises BundleError where outputs of `count` tiles have other shapes than they should."""
        if shape != (count, self.spec.grid**2, self._hidden):
            raise BundleError(
                f"{self._graph.name} gives tokens {shape}, the manifest says "
                f"{(count, self.spec.grid**2, self._hidden)}; export the bundle again"
            )
        if maps is not None and maps.shape != (count, *(self._maps or ())):
            raise BundleError(
                f"{self._graph.name} gives objects {maps.shape}, the manifest says "
                f"{(count, *(self._maps or ()))}; export the bundle again"
            )

    def pool(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Local tokens [per_tile**2, D] of one tile's [T, D]."""
        return pooled(tokens, self.spec.local_pool, self.spec.pooling)


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
    held = tokens.nbytes if isinstance(tokens, np.ndarray) else 4 * math.prod(tokens.shape)
    return held + (0 if objects is None else objects.nbytes)
