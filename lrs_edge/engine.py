"""The engine: a loaded model, safe to share between threads, from which images are opened."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING

from lrs_edge.bundle.bundle import Bundle, open_bundle
from lrs_edge.bundle.manifest import DecoderSpec, Manifest
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.cores import thread_count
from lrs_edge.engines.devices import AUTO, StagePlace, backend_options
from lrs_edge.engines.metered import Meter
from lrs_edge.errors import UsageError
from lrs_edge.language.kv_cache import GROWTH
from lrs_edge.requests.cache_pool import CachePool
from lrs_edge.requests.clock import Clock
from lrs_edge.requests.memory import give_back
from lrs_edge.requests.queue import MAX_WAITING, RequestQueue
from lrs_edge.scene import Scene
from lrs_edge.search.scorers import MAX_KEPT_BYTES
from lrs_edge.stages import Stages, load_stages
from lrs_edge.transfer.folder import find_bundle

if TYPE_CHECKING:
    from lrs_edge.raster.appearance import Transparency
    from lrs_edge.raster.raster import Orientation

#: Room for tokens of tiles, in bytes: 130 tiles of a 7B model, 2,900 of the embedded one.
FEATURE_CACHE_BYTES = 256 << 20


class Engine:
    """A loaded model. Use as a context manager, or call `close`.

    Questions of all its scenes wait in one queue and are answered one after the other, whichever
    threads and event loops they come from. Made by `lrs_edge.load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: BackendOptions,
        *,
        cache_bytes: int | None = None,
        kv_cache: str = "float",
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._stages: Stages | None = load_stages(bundle, options, kv_cache)
        self._bundle = bundle
        if cache_bytes is None:
            cache_bytes = default_cache_bytes(bundle.manifest)
        self._pool = CachePool(cache_bytes)
        self._queue = RequestQueue(max_waiting)
        self._scenes: weakref.WeakSet[Scene] = weakref.WeakSet()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def device(self) -> str:
        """Where the graphs run: a device such as `cpu`, or `vision=cuda,rfm=cpu,llm=cpu`.

        Raises:
            UsageError: The engine is closed.
        """
        return self._loaded().provider

    @property
    def places(self) -> tuple[StagePlace, ...]:
        """Where every stage runs, and how many nodes of its graphs on what.

        Raises:
            UsageError: The engine is closed.
        """
        return self._loaded().places()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What every answer says of how the model was loaded.

        Raises:
            UsageError: The engine is closed.
        """
        return self._loaded().warnings

    @property
    def provider(self) -> str:
        """The older name of `device`."""
        return self.device

    @property
    def meter(self) -> Meter:
        """Counts what the graphs have computed since the engine was loaded.

        Raises:
            UsageError: The engine is closed.
        """
        return self._loaded().meter

    def _loaded(self) -> Stages:
        if self._stages is None:
            raise UsageError("the engine is closed; load it again")
        return self._stages

    def open(
        self,
        path: str | os.PathLike[str],
        *,
        bands: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
        crs: str | None = None,
        transparency: Transparency = "auto",
        orientation: Orientation = "exif",
        page: int | None = None,
        timeout: float | None = None,
    ) -> Scene:
        """Open an image; cheap, nothing is encoded yet.

        Args:
            path: A local image file.
            bands: Bands (from 1) taken as red, green and blue.
            value_range: Values shown as black and as white, instead of a stretch.
            crs: Coordinate reference system, such as `EPSG:32632`, of an image that has a position
                but does not name it.
            transparency: What hides pixels: `auto` (alpha, masks and nodata, but no band marked as
                alpha that holds data), `apply` (that one too) or `ignore` (nothing).
            orientation: `exif` turns photographs as their files ask; `stored`, which parity with
                the authors' code needs, does not.
            page: Which image of a TIFF that holds several, from 1; None for the largest.
            timeout: Seconds that looking at the file may take, None for no limit.

        Raises:
            ImageError: The image cannot be read in that time, or is refused.
        """
        # GDAL takes a tenth of a second to import; a loaded engine does not need it yet.
        from lrs_edge.raster.raster import Raster

        stages = self._loaded()
        stop = None if timeout is None else Clock(timeout).expired
        raster = Raster.open(
            path,
            bands=bands,
            value_range=value_range,
            crs=crs,
            transparency=transparency,
            orientation=orientation,
            page=page,
            stop=stop,
        )
        scene = Scene(raster, stages, self._queue, self._pool)
        self._scenes.add(scene)
        return scene

    def close(self) -> None:
        """Close all scenes and free the model; may be called more than once.

        Questions that wait or are under way end with a `CancelledError`.
        """
        self._queue.close()
        for scene in list(self._scenes):
            scene.close()
        self._stages = None
        give_back()


def default_cache_bytes(manifest: Manifest) -> int:
    """Bytes that an engine keeps between questions where nothing was asked for.

    Enough for what one scene keeps: tokens of its tiles, and of the RFM and the language model each
    a KV cache of `MAX_KEPT_BYTES` or one that holds the prompt's beginning, if that is larger.
    """
    prefix = -(-(manifest.vision.grid**2) // GROWTH) * GROWTH + GROWTH
    stacks = manifest.decoders
    return FEATURE_CACHE_BYTES + sum(
        max(MAX_KEPT_BYTES, prefix * _bytes_per_token(spec)) for spec in stacks
    )


def _bytes_per_token(spec: DecoderSpec) -> int:
    # The RFM has keys of one layer more.
    values = 2 * (spec.layers + 1) * spec.kv_heads * spec.head_dim
    return values * (2 if spec.floats == "float16" else 4)


def load(
    bundle: str | os.PathLike[str] | None = None,
    *,
    device: str = AUTO,
    provider: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    cache_bytes: int | None = None,
    kv_cache: str = "float",
    max_waiting: int = MAX_WAITING,
) -> Engine:
    """Load a model bundle.

    Args:
        bundle: Directory that `lrs-edge export` wrote, or the name of a model in the user's folder
            of models; None for the embedded default model.
        device: Where the stages run: `auto`, `cpu`, `cuda`, `tensorrt`, `tensorrt-rtx`, a provider
            of ONNX Runtime (`onnxruntime:NAME`), or one for each stage, such as
            `vision=cuda,llm=cpu`. A stage that cannot run where it was told is an error; `auto`
            falls back to the CPU, and every answer says so.
        provider: The older name of `device`.
        threads: Threads of one operation, at most one per core that this process may use; None for
            one per physical core.
        verify: False skips the hashes of large files.
        cache_bytes: Most bytes that are kept between questions: tokens of tiles and KV caches of
            all open scenes together; what was used longest ago leaves first. 0 keeps nothing. None
            is enough for one scene (`default_cache_bytes`). What a question works with while it is
            answered comes on top.
        kv_cache: Type of the language model's key/value buffers: `float`, or `int8` (a quarter of
            the memory; the bundle must have been exported with it).
        max_waiting: Questions that may wait for their turn, besides the one that is being answered;
            the next is refused with a `QueueFullError`.

    Raises:
        BundleError: The bundle is not as its manifest says.
        BackendError: An engine cannot be loaded.
        UsageError: An argument is not valid.
    """
    if provider is not None and device != AUTO:
        raise UsageError("provider is the older name of device; give one of them")
    options = backend_options(device if provider is None else provider, threads)
    if kv_cache not in ("float", "int8"):
        raise UsageError(f"kv_cache {kv_cache!r} is unknown; use 'float' or 'int8'")
    if cache_bytes is not None and not (isinstance(cache_bytes, int) and cache_bytes >= 0):
        raise UsageError(f"cache_bytes is {cache_bytes!r}; it must be a whole number of bytes")
    thread_count(threads)  # Refused before anything is read.
    if not (isinstance(max_waiting, int) and max_waiting >= 0):
        raise UsageError(f"max_waiting is {max_waiting!r}; it must be a whole number of at least 0")
    path = None if bundle is None else find_bundle(Path(bundle))
    with ThreadPoolExecutor(1) as pool:
        # Hashing needs no interpreter: the engine's library is imported meanwhile. No graph is
        # looked at before all hashes are right.
        stop = Event()
        opening = pool.submit(open_bundle, path, verify=verify, graphs=False, stop=stop)
        try:
            with suppress(ImportError):
                import_module("lrs_edge.engines.onnx")
            opened = opening.result()
        except BaseException:
            stop.set()
            raise
    return Engine(
        opened, options, cache_bytes=cache_bytes, kv_cache=kv_cache, max_waiting=max_waiting
    )
