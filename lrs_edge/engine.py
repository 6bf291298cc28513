"""The engine: a loaded model, safe to share between threads, from which images are opened."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

from lrs_edge.backends.base import BackendOptions, Graph
from lrs_edge.bundle import Bundle, Embeddings, open_bundle
from lrs_edge.decoder import Decoder
from lrs_edge.errors import BackendError, UsageError
from lrs_edge.llm import LanguageModel
from lrs_edge.manifest import Manifest
from lrs_edge.prompt import Prompt
from lrs_edge.queueing import RequestQueue
from lrs_edge.raster import Raster
from lrs_edge.rfm import RegionFocus
from lrs_edge.scene import Scene
from lrs_edge.search import Model
from lrs_edge.vision import VisionEncoder

#: Tokens of tiles kept per scene, in bytes: 570 tiles of a 7B model, all tiles of most scenes.
FEATURE_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Models:
    """The loaded stages of one bundle."""

    manifest: Manifest
    prompt: Prompt
    embeddings: Embeddings
    vision: VisionEncoder
    focus: RegionFocus
    llm: LanguageModel
    search_model: Model
    provider: str


class Engine:
    """A loaded model. Use as a context manager, or call `close`.

    Requests from several threads queue. Made by `lrs_edge.load`.
    """

    def __init__(
        self, bundle: Bundle, options: BackendOptions, *, feature_cache_bytes: int
    ) -> None:
        self._models: Models | None = load_models(bundle, options)
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

    def _loaded(self) -> Models:
        if self._models is None:
            raise UsageError("the engine is closed; load it again")
        return self._models

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
        models = self._loaded()
        raster = Raster.open(path, bands=bands, value_range=value_range)
        scene = Scene(raster, models, self._queue, self._feature_cache_bytes)
        self._scenes.add(scene)
        return scene

    def close(self) -> None:
        """Close all scenes and free the model; may be called more than once."""
        for scene in list(self._scenes):
            scene.close()
        self._models = None


def load(
    bundle: str | os.PathLike[str] | None = None,
    *,
    provider: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    feature_cache_bytes: int = FEATURE_CACHE_BYTES,
) -> Engine:
    """Load a model bundle.

    Args:
        bundle: Directory that `lrs-edge export` wrote; None for the embedded default model.
        provider: `auto`, `cpu` or `cuda`.
        threads: Threads of one operation; None lets the engine choose.
        verify: False skips the hashes of large files.
        feature_cache_bytes: Tokens of tiles kept per scene.

    Raises:
        BundleError: The bundle is not as its manifest says.
        BackendError: An engine cannot be loaded.
        UsageError: An argument cannot be meant.
    """
    if provider not in ("auto", "cpu", "cuda"):
        raise UsageError(f"provider {provider!r} is unknown; use 'auto', 'cpu' or 'cuda'")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; it must be at least 1")
    opened = open_bundle(None if bundle is None else Path(bundle), verify=verify)
    options = BackendOptions(provider, threads)
    return Engine(opened, options, feature_cache_bytes=feature_cache_bytes)


def load_models(bundle: Bundle, options: BackendOptions) -> Models:
    """Load all stages of a bundle.

    Raises:
        BundleError: A graph, the tokenizer or the embeddings do not fit the manifest.
        BackendError: An engine cannot be loaded.
    """
    manifest = bundle.manifest
    hidden, vocabulary = manifest.llm.hidden, manifest.llm.vocabulary
    embeddings = Embeddings(bundle.file(manifest.embeddings), hidden, vocabulary)
    prompt = Prompt(bundle.file(manifest.tokenizer), manifest.prompt, vocabulary)
    vision_graph = _graph(bundle, manifest.vision.graph, replace(options, unpack_weights=True))
    vision = VisionEncoder(vision_graph, manifest.vision, hidden)
    masked = manifest.rfm.masked_graph
    rfm = Decoder(
        _graph(bundle, manifest.rfm.graph, options),
        manifest.rfm,
        scoring=True,
        load_masked=None if masked is None else partial(_graph, bundle, masked, options),
    )
    llm_decoder = Decoder(_graph(bundle, manifest.llm.graph, options), manifest.llm, scoring=False)
    focus = RegionFocus(rfm)
    return Models(
        manifest=manifest,
        prompt=prompt,
        embeddings=embeddings,
        vision=vision,
        focus=focus,
        llm=LanguageModel(
            llm_decoder,
            prompt,
            embeddings,
            stop_ids=manifest.prompt.stop_ids,
            stop_texts=manifest.prompt.stop_texts,
        ),
        search_model=Model(
            focus=focus,
            newline=embeddings.newline,
            per_tile=vision.per_tile,
            tile=manifest.vision.tile,
            base_side=manifest.search.base_side,
            keep_ratio=manifest.search.keep_ratio,
            max_length=manifest.limits.max_length,
            max_positions=manifest.limits.max_positions,
        ),
        provider=vision_graph.provider,
    )


def _graph(bundle: Bundle, name: str, options: BackendOptions) -> Graph:
    try:
        from lrs_edge.backends.onnx import OnnxGraph
    except ImportError as error:
        raise BackendError(
            "onnxruntime is not installed; install lrs-edge[cpu], or lrs-edge[gpu] on an NVIDIA GPU"
        ) from error
    return OnnxGraph.load(bundle.file(name), options)
