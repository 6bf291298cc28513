"""The engine of a bundle's stage, found in the cache and loaded."""

from __future__ import annotations

from pathlib import Path

from lrs_edge.bundle.bundle import Bundle, read_manifest
from lrs_edge.bundle.manifest import DecoderSpec, Flavour, StageSpec
from lrs_edge.engines.tensorrt.device import Device, open_device
from lrs_edge.engines.tensorrt.engine_cache import CachedEngine, EngineCache, stage_hash
from lrs_edge.engines.tensorrt.execution import Execution
from lrs_edge.engines.tensorrt.graph import TensorRTGraph
from lrs_edge.engines.tensorrt.library import Library, find_library
from lrs_edge.errors import BackendError

#: Flavours of a bundle's graphs, and those of engines that are built of them.
ENGINE_FLAVOURS = {
    Flavour.PLAIN: "std",
    Flavour.GQA: "std",
    Flavour.GQA_REST: "std-rest",
    Flavour.MASKED: "std-masked",
}
#: The engine that compacts a decoder's buffers.
MOVE = "move"


def load_engine(name: str, path: Path) -> TensorRTGraph:
    """Load the engine that was built of a bundle's graph.

    Args:
        name: `tensorrt` or `tensorrt-rtx`.
        path: The graph's file in the bundle.

    Raises:
        BackendError: The library, a GPU, or the engine is missing.
        OutOfMemoryError: The engine does not fit into the GPU's memory.
    """
    library, device = find_library(name), open_device()
    root = next(folder for folder in path.parents if (folder / "manifest.json").is_file())
    bundle = Bundle(root, read_manifest(root))
    stage, flavour = _of_file(bundle, path.relative_to(root).as_posix())
    cache = EngineCache()
    digest = stage_hash(bundle, stage)
    engine = cache.find(library, device.gpu, digest, stage, flavour)
    mover = None
    if stage != "vision":
        capacity = engine.record.capacity
        found = cache.find(library, device.gpu, digest, stage, MOVE, capacity)
        mover = _execution(library, found, device)
    execution = _execution(library, engine, device)
    scoring = stage == "rfm"
    return TensorRTGraph(
        execution,
        path.name,
        device,
        name,
        mover=mover,
        scoring=scoring,
        in_place=library.updates_in_place,
    )


def _execution(library: Library, engine: CachedEngine, device: Device) -> Execution:
    kernels = engine.path.with_suffix(".kernels") if library.is_rtx else None
    return Execution(library, engine.read(), engine.path.name, device, kernels)


def _of_file(bundle: Bundle, name: str) -> tuple[str, str]:
    """Stage and engine flavour of a graph's file. Raises BackendError where none is built of it."""
    manifest = bundle.manifest
    for stage in ("vision", "rfm", "llm"):
        spec: StageSpec | None = getattr(manifest, stage)
        for file in () if spec is None else spec.graphs:
            if file.path == name and file.flavour in ENGINE_FLAVOURS:
                _check_whole(spec, file.flavour, stage)
                return stage, ENGINE_FLAVOURS[file.flavour]
    raise BackendError(f"TensorRT has no engine for {name}; place its stage elsewhere (--device)")


def _check_whole(spec: StageSpec | None, flavour: str, stage: str) -> None:
    """Layers that the region focus module has are not built a second time."""
    shared = isinstance(spec, DecoderSpec) and spec.has(Flavour.GQA_REST)
    if stage == "llm" and shared and flavour == Flavour.GQA:
        raise BackendError(
            "the region focus module of this bundle is the language model's first layers: place "
            "both on the same device, with a KV cache of floats"
        )


def devices(name: str) -> tuple[str, ...]:
    """The library's own name, where it can be used here. Raises BackendError."""
    find_library(name)
    open_device()
    return (name,)
