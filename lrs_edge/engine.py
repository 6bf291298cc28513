"""The engine: a loaded model, safe to share between threads, from which images are opened."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType

from lrs_edge.backends.base import BackendOptions
from lrs_edge.backends.metered import Meter
from lrs_edge.bundle import Bundle, open_bundle
from lrs_edge.errors import UsageError
from lrs_edge.manifest import Manifest
from lrs_edge.queueing import RequestQueue
from lrs_edge.scene import Scene
from lrs_edge.stages import Stages, load_stages

#: Tokens of tiles kept per scene, in bytes: 130 tiles of a 7B model, 800 of the embedded one.
FEATURE_CACHE_BYTES = 256 << 20

#: Threads of one operation that can be asked for; more would only be waited for.
MAX_THREADS = 1024


class Engine:
    """A loaded model. Use as a context manager, or call `close`.

    Requests from several threads queue. Made by `lrs_edge.load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: BackendOptions,
        *,
        feature_cache_bytes: int,
        kv_cache: str = "float",
    ) -> None:
        self._stages: Stages | None = load_stages(bundle, options, kv_cache)
        self._bundle = bundle
        self._feature_cache_bytes = feature_cache_bytes
        self._queue = RequestQueue()
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
    def provider(self) -> str:
        """Where the graphs run: `cpu` or `cuda`.

        Raises:
            UsageError: The engine is closed.
        """
        return self._loaded().provider

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
    ) -> Scene:
        """Open an image; cheap, nothing is encoded yet.

        Args:
            path: A local image file.
            bands: Bands (from 1) taken as red, green and blue.
            value_range: Values shown as black and as white, instead of a stretch.

        Raises:
            ImageError: The image cannot be read, or is refused.
        """
        # GDAL takes a tenth of a second to import; a loaded engine does not need it yet.
        from lrs_edge.raster import Raster

        stages = self._loaded()
        raster = Raster.open(path, bands=bands, value_range=value_range)
        scene = Scene(raster, stages, self._queue, self._feature_cache_bytes)
        self._scenes.add(scene)
        return scene

    def close(self) -> None:
        """Close all scenes and free the model; may be called more than once."""
        for scene in list(self._scenes):
            scene.close()
        self._stages = None


def load(
    bundle: str | os.PathLike[str] | None = None,
    *,
    provider: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    feature_cache_bytes: int = FEATURE_CACHE_BYTES,
    kv_cache: str = "float",
) -> Engine:
    """Load a model bundle.

    Args:
        bundle: Directory that `lrs-edge export` wrote; None for the embedded default model.
        provider: `auto`, `cpu` or `cuda`.
        threads: Threads of one operation; None lets the engine choose.
        verify: False skips the hashes of large files.
        feature_cache_bytes: Tokens of tiles kept per scene.
        kv_cache: Type of the language model's key/value buffers: `float`, or `int8` (a quarter of
            the memory; the bundle must have been exported with it).

    Raises:
        BundleError: The bundle is not as its manifest says.
        BackendError: An engine cannot be loaded.
        UsageError: An argument cannot be meant.
    """
    if provider not in ("auto", "cpu", "cuda"):
        raise UsageError(f"provider {provider!r} is unknown; use 'auto', 'cpu' or 'cuda'")
    if kv_cache not in ("float", "int8"):
        raise UsageError(f"kv_cache {kv_cache!r} is unknown; use 'float' or 'int8'")
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
        raise UsageError(f"threads is {threads!r}; it must be a whole number of 1..{MAX_THREADS}")
    path = None if bundle is None else Path(bundle)
    with ThreadPoolExecutor(1) as pool:
        # Hashing needs no interpreter: the engine's library is imported meanwhile. No graph is
        # looked at before all hashes are right.
        opening = pool.submit(open_bundle, path, verify=verify)
        with suppress(ImportError):
            import_module("lrs_edge.backends.onnx")
        opened = opening.result()
    options = BackendOptions(provider, threads)
    return Engine(opened, options, feature_cache_bytes=feature_cache_bytes, kv_cache=kv_cache)
