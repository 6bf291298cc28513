"""Vision tokens of tiles, computed once by the runtime's own code and kept on disk.

The vision stage is exported and run as the bundle will run it; tiles are read, normalised, pooled
and given their place by `lrs_edge.vision.tiles`, so that training sees exactly what inference sees,
but for the rounding of tokens to float16 on disk.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.manifest import Flavour, GraphFile, VisionSpec
from lrs_edge.engines.base import (
    BackendOptions,
    Feed,
    Graph,
    HostTensor,
    KVBuffers,
    Tensor,
    TensorSpec,
)
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.engines.rows import Rows
from lrs_edge.errors import BackendError
from lrs_edge.files import replacing
from lrs_edge.objects.detections import Detections
from lrs_edge.pyramid.levels import Level, LevelWindow, Pyramid, TileIndex, build_pyramid
from lrs_edge.raster.image_thread import Stop
from lrs_edge.raster.raster import Raster
from lrs_edge.raster.window import Resampling
from lrs_edge.requests.cache_pool import CachePool
from lrs_edge.requests.clock import Clock
from lrs_edge.vision.encoder import FeatureCache, Features, VisionEncoder
from lrs_edge.vision.positions import ImagePositions
from lrs_edge.vision.tiles import TileSession, TileSource
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.graphs import vision_graph
from lrs_edge_export.graphs.weight_file import WeightFile

#: Tokens beyond this do not fit float16 and are kept as float32.
_HALF_MAX = 6e4

_GRAPH = "vision.onnx"


def open_encoder(
    model: Model, folder: Path, threads: int | None
) -> tuple[VisionEncoder, VisionGraph]:
    """The vision stage as the runtime runs it, and its graph, which can be released.

    Args:
        model: The checkpoint.
        folder: The graph is written there.
        threads: Of the engine; None lets it choose.

    Raises:
        ExportError: Weights are damaged.
    """
    stage = model.vision
    with WeightFile(folder / f"{_GRAPH}.data") as weights:
        vision_graph.write_vision(stage, folder / _GRAPH, weights)
    spec = VisionSpec(
        graphs=(GraphFile(_GRAPH, Flavour.PLAIN),),
        tile=stage.tile,
        grid=stage.grid,
        local_pool=stage.local_pool,
        mean=stage.mean,
        std=stage.std,
        precision="fp32",
        flops=0,
        stretched=stage.stretched,
        pooling=stage.pooling,
    )
    positions = None
    if model.positions is not None:
        positions = ImagePositions(model.positions.rows(), model.positions.cols())
    graph = VisionGraph(folder / _GRAPH, stage, threads)
    return VisionEncoder(graph, spec, stage.hidden, positions), graph


class VisionGraph:
    """The vision graph, loaded when a tile is encoded, and given up by `release`.

    Args:
        path: The graph file.
        stage: What it was made from.
        threads: Of the engine; None lets it choose.
    """

    name = _GRAPH
    device = "cpu"
    nodes: ClassVar[Mapping[str, int]] = {}

    def __init__(self, path: Path, stage: VisionStage, threads: int | None) -> None:
        self._path = path
        self._options = BackendOptions(provider="cpu", threads=threads)
        self._graph: OnnxGraph | None = None
        pixels = TensorSpec("pixel_values", "float32", (None, 3, stage.tile, stage.tile))
        tokens = TensorSpec("tokens", "float32", (None, stage.grid**2, stage.hidden))
        self.inputs = {"pixel_values": pixels}
        self.outputs = {"tokens": tokens}

    def run(
        self,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str],
        buffers: KVBuffers | None = None,
    ) -> list[NDArray[np.float32]]:
        """Encode tiles. Raises BackendError."""
        return self._loaded().run(feeds, outputs, buffers)

    def run_on_device(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[Tensor]:
        """Encode tiles. Raises BackendError."""
        return [HostTensor(array) for array in self.run(feeds, outputs, buffers)]

    def new_buffers(self, names: Sequence[str]) -> KVBuffers:
        """There are none. Raises BackendError."""
        raise BackendError(f"{self._path.name} has no key and value buffers {list(names)}")

    def upload(self, array: NDArray[Any]) -> Tensor:
        """The array itself."""
        return HostTensor(array)

    def gather_rows(self, tables: Sequence[Feed], places: NDArray[np.int64]) -> Tensor:
        """See `Graph.gather_rows`."""
        return self._loaded().gather_rows(tables, places)

    def beside(self, model: bytes) -> Graph:
        """See `Graph.beside`."""
        return self._loaded().beside(model)

    def _loaded(self) -> OnnxGraph:
        if self._graph is None:
            self._graph = OnnxGraph.load(self._path, self._options)
        return self._graph

    def release(self) -> None:
        """Free the weights; the next tile loads them again."""
        self._graph = None


class DiskFeatures(FeatureCache):
    """Tokens of one image's tiles, one file each, in place of the runtime's cache in memory.

    Args:
        folder: Made when the first tokens are stored.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(CachePool(0))
        self._folder = folder

    def get(self, key: Hashable) -> Features | None:
        """The tokens stored under a key as float32; None if absent."""
        path = self._path(key)
        if not path.is_file():
            return None
        return np.asarray(np.load(path, allow_pickle=False), np.float32)

    def put(
        self,
        key: Hashable,
        tokens: Features,
        objects: Detections | None = None,  # noqa: ARG002 (no score depends on them)
    ) -> None:
        """Store tokens, as float16 where they fit."""
        self._folder.mkdir(parents=True, exist_ok=True)
        values = tokens if isinstance(tokens, np.ndarray) else tokens.numpy()
        fits = float(np.abs(values).max(initial=0.0)) < _HALF_MAX
        with replacing(self._path(key)) as stream:
            np.save(stream, values.astype(np.float16) if fits else values, allow_pickle=False)

    def _path(self, key: Hashable) -> Path:
        assert isinstance(key, tuple)
        role, resampling, height, width, tile = key
        name = f"{role}-{resampling}-{height}x{width}-{tile.row}-{tile.col}.npy"
        return self._folder / name


class ImageTokens:
    """Vision tokens of one image; a context manager. The image is opened when a tile is missing.

    Attributes:
        pyramid: Levels of the image.
        session: Reads and encodes its tiles.

    Args:
        path: The image.
        size_hw: Its height and width in pixels; None opens it to see.
        encoder: Turns tiles into tokens.
        folder: Where its tokens are kept.
        base_side: Long side of the base level in pixels.

    Raises:
        ImageError: The image cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        size_hw: tuple[int, int] | None,
        encoder: VisionEncoder,
        folder: Path,
        base_side: int,
    ) -> None:
        self._raster = _LazyRaster(path)
        if size_hw is None:
            size_hw = self._raster.size_hw
        self.pyramid: Pyramid = build_pyramid(
            *size_hw,
            tile=encoder.spec.tile,
            base_side=base_side,
            policy="full",
            stretched=encoder.spec.stretched,
        )
        # A session only ever reads windows of its raster.
        source = TileSource(cast(Raster, self._raster), encoder, DiskFeatures(folder))
        self.session: TileSession = source.session("area", Clock(None), lambda *_: None)

    def __enter__(self) -> ImageTokens:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._raster.close()

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.pyramid.image_height, self.pyramid.image_width

    @property
    def encoded(self) -> int:
        """Tiles encoded so far, the rest was kept on disk."""
        return self.session.encoded

    def global_tokens(self) -> Rows:
        """Tokens float32 [T, D] of the global view. Raises ImageError."""
        encoded = self.encoded
        tokens = self.session.global_tokens(self.pyramid.global_view)
        if self.encoded > encoded:
            # Read back, so that the first use sees the same rounding as every later one.
            tokens = self.session.global_tokens(self.pyramid.global_view)
        return tokens

    def local_tokens(self, level: Level, tiles: Sequence[TileIndex]) -> dict[TileIndex, Rows]:
        """Tokens float32 [per_tile**2, D] of tiles of a level. Raises ImageError."""
        encoded = self.encoded
        tokens = self.session.local_tokens(level, tiles)
        return tokens if self.encoded == encoded else self.session.local_tokens(level, tiles)


class _LazyRaster:
    """A raster that is opened when a window is first read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._raster: Raster | None = None

    @property
    def size_hw(self) -> tuple[int, int]:
        raster = self._open()
        return raster.height, raster.width

    def read(
        self,
        level_hw: tuple[int, int],
        window: LevelWindow,
        resampling: Resampling = "area",
        stop: Stop | None = None,
    ) -> NDArray[np.float32]:
        return self._open().read(level_hw, window, resampling, stop)

    def close(self) -> None:
        if self._raster is not None:
            self._raster.close()

    def _open(self) -> Raster:
        if self._raster is None:
            self._raster = Raster.open(self._path)
        return self._raster
