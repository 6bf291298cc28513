"""From tile to tokens: reads tiles of a scene, encodes them, and remembers their tokens."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.rows import Rows, block_sources, new_block
from lrs_edge.errors import ReadStoppedError
from lrs_edge.objects.detections import Detections, decode
from lrs_edge.pyramid.levels import Level, TileIndex
from lrs_edge.requests.clock import Clock
from lrs_edge.requests.options import Resampling
from lrs_edge.vision.colours import Colours, colours_of
from lrs_edge.vision.encoder import FeatureCache, Features, Role, VisionEncoder
from lrs_edge.vision.readahead import reading_ahead

if TYPE_CHECKING:
    from lrs_edge.raster.raster import Raster

#: Told about every step: its name, tiles read so far, tiles encoded so far.
OnTile = Callable[[Literal["read", "encode"], int, int], None]


class TileSource:
    """Tokens of the tiles of one image.

    Args:
        raster: The image.
        encoder: Turns tiles into tokens.
        cache: Shared by all questions on the image.
    """

    def __init__(self, raster: Raster, encoder: VisionEncoder, cache: FeatureCache) -> None:
        self._raster = raster
        self._encoder = encoder
        self._cache = cache
        self._colours: dict[Resampling, Colours | None] = {}
        # Tokens of one tile that are computed again, because they were forgotten, are the same.
        self._blocks: defaultdict[Hashable, int] = defaultdict(new_block)

    def session(self, resampling: Resampling, clock: Clock, on_tile: OnTile) -> TileSession:
        """A view for one question, with counts of its own."""
        known = self._colours, self._blocks
        return TileSession(
            self._raster, self._encoder, self._cache, known, resampling, clock, on_tile
        )


class TileSession:
    """Reads and encodes tiles for one question; the next tiles are read while one is encoded.

    The clock's `read` is the time that encoding waited for tiles.

    Attributes:
        read: Tiles taken from the image; up to two batches more may have been read and not used
            where the time ran out.
        encoded: Tiles encoded.
        from_cache: Tiles whose tokens were remembered.
    """

    def __init__(
        self,
        raster: Raster,
        encoder: VisionEncoder,
        cache: FeatureCache,
        known: tuple[dict[Resampling, Colours | None], defaultdict[Hashable, int]],
        resampling: Resampling,
        clock: Clock,
        on_tile: OnTile,
    ) -> None:
        self._raster = raster
        self._encoder = encoder
        self._cache = cache
        self._colours, self._blocks = known
        self._resampling = resampling
        self._clock = clock
        self._on_tile = on_tile
        self._objects: dict[tuple[object, ...], Detections] = {}
        self.read = self.encoded = self.from_cache = 0

    @property
    def colours(self) -> Colours | None:
        """Colours of the global view, as it was read for this question or an earlier one."""
        return self._colours.get(self._resampling)

    @property
    def looked_at(self) -> int:
        """Tiles whose tokens were asked for, remembered or not."""
        return self.encoded + self.from_cache

    def remembers(self, level: Level, tiles: Sequence[TileIndex]) -> int:
        """How many of these tiles of a level need not be encoded, for their tokens are known."""
        keys = (self._key(level, tile, "local") for tile in tiles)
        return sum(self._cache.get(key) is not None for key in keys)

    def global_tokens(self, level: Level) -> Rows:
        """Tokens [T, D] of the global view, not pooled."""
        return self._tokens(level, [TileIndex(0, 0)], "global")[TileIndex(0, 0)]

    def local_tokens(
        self, level: Level, tiles: Sequence[TileIndex], stop: Callable[[], bool] | None = None
    ) -> dict[TileIndex, Rows]:
        """Tokens [per_tile**2, D] of tiles of a level, pooled as the model wants it.

        Args:
            level: The level.
            tiles: Tiles to look at.
            stop: Asked before every batch and while tiles are read; tiles after a True are left
                out.

        Raises:
            ImageError: A tile cannot be read.
            BackendError: The encoder fails.
        """
        return self._tokens(level, tiles, "local", stop)

    def objects(
        self, level: Level, tiles: Sequence[TileIndex], role: Role = "local"
    ) -> dict[TileIndex, Detections]:
        """Objects on tiles whose tokens were asked for in this session.

        Args:
            level: The level.
            tiles: Of it.
            role: What they were looked at for.

        Returns:
            Nothing of tiles that were not encoded, and nothing at all without a detector.
        """
        keys = {tile: self._key(level, tile, role) for tile in tiles}
        return {tile: self._objects[key] for tile, key in keys.items() if key in self._objects}

    def _tokens(
        self,
        level: Level,
        tiles: Sequence[TileIndex],
        role: Role,
        stop: Callable[[], bool] | None = None,
    ) -> dict[TileIndex, Rows]:
        found: dict[TileIndex, Rows] = {}
        missing = []
        for tile in tiles:
            key = self._key(level, tile, role)
            tokens = self._cache.get(key)
            if tokens is None:
                missing.append(tile)
                continue
            found[tile] = self._rows(key, tokens)
            if (objects := self._cache.objects(key)) is not None:
                self._objects[key] = objects
        self.from_cache += len(found)
        step = self._encoder.batch_size
        given_up = threading.Event()
        over = self._clock.expired if stop is None else stop
        read_tile = partial(self._pixels, level, role, lambda: given_up.is_set() or over())
        threads = self._encoder.readers
        if threads > 1:
            self._raster.read_at_once(threads)
        with reading_ahead(read_tile, missing, 2 * step, given_up, threads) as pixels:
            for start in range(0, len(missing), step):
                if stop is not None and stop():
                    break
                batch = missing[start : start + step]
                read = []
                try:
                    for _ in batch:
                        with self._clock.step("read"):
                            read.append(next(pixels))
                        self.read += 1
                        self._on_tile("read", self.read, self.encoded)
                except ReadStoppedError:
                    # Without the global view there is nothing to answer from.
                    if stop is None:
                        raise
                    break
                found.update(self._encode(level, batch, read, role))
        return found

    def _pixels(
        self, level: Level, role: str, stop: Callable[[], bool], tile: TileIndex
    ) -> NDArray[np.generic]:
        """A tile, read and normalised: [3, S, S]."""
        size, window = (level.height, level.width), level.tile_window(tile)
        pixels = self._raster.read(size, window, self._encoder.filter_of(self._resampling), stop)
        if role == "global":
            self._colours[self._resampling] = colours_of(pixels)
        return self._encoder.ready(pixels)

    def _key(self, level: Level, tile: TileIndex, role: str) -> tuple[object, ...]:
        return (role, self._resampling, level.height, level.width, tile)

    def _rows(self, key: Hashable, tokens: Features) -> Rows:
        """A tile's tokens, recognised by the tile."""
        return Rows.of(tokens, block_sources(self._blocks[key], tokens.shape[0]))

    def _encode(
        self,
        level: Level,
        tiles: Sequence[TileIndex],
        pixels: Sequence[NDArray[np.generic]],
        role: Role,
    ) -> dict[TileIndex, Rows]:
        found: dict[TileIndex, Rows] = {}
        spec = self._encoder.spec.objects
        places = [(level, tile) for tile in tiles]
        with self._clock.step("encode"):
            seen = self._encoder.features(pixels, role, places)
            for tile, (tokens, maps) in zip(tiles, seen, strict=True):
                key, objects = self._key(level, tile, role), None
                if spec is not None and maps is not None:
                    objects = self._objects[key] = decode(maps, level, tile, spec)
                self._cache.put(key, tokens, objects)
                found[tile] = self._rows(key, tokens)
        self.encoded += len(tiles)
        self._on_tile("encode", self.read, self.encoded)
        return found
