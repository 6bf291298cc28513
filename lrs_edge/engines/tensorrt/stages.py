"""Building the engines of a bundle's stages, one after the other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrs_edge.bundle.bundle import Bundle
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.engines.gather_model import gather_model
from lrs_edge.engines.tensorrt.building import BuildOptions, OnProgress, Profile, build_engine
from lrs_edge.engines.tensorrt.device import Device
from lrs_edge.engines.tensorrt.engine_cache import (
    GRAPHS,
    CachedEngine,
    EngineCache,
    EngineRecord,
    stage_hash,
)
from lrs_edge.engines.tensorrt.library import Library
from lrs_edge.engines.tensorrt.loading import MOVE
from lrs_edge.engines.tensorrt.room import BuildMemory, check_room, estimate
from lrs_edge.engines.tensorrt.targets import Target
from lrs_edge.errors import BackendError, OutOfMemoryError, UsageError

if TYPE_CHECKING:
    from lrs_edge.building.stage_graphs import StageGraph

#: Buffers are made and grow by this many places (`lrs_edge.language.kv_cache.GROWTH`).
_GROWTH = 256
#: Places of each buffer where --context does not say.
_USUAL_CONTEXT = 8192
_LARGEST_CONTEXT = 1 << 20

#: Tiles that are encoded in one run (`lrs_edge.vision.encoder.MOST_BATCH`).
MOST_TILES = 16

STAGES = ("vision", "rfm", "llm")


@dataclass(frozen=True)
class Plan:
    """What is to be built.

    Attributes:
        bundle: Of which bundle.
        stages: Which of its stages.
        target: For which GPUs.
        capacity: Places S of key/value buffers.
        workspace: Bytes that the builder may use on the GPU.
        tiles: Most tiles of one run of the vision stage.
        masked: Also the region focus module with an attention bias (`--policy reference`).
        again: Build what is in the cache already.
    """

    bundle: Bundle
    stages: tuple[str, ...]
    target: Target
    capacity: int
    workspace: int
    tiles: int = MOST_TILES
    masked: bool = False
    again: bool = False


@dataclass(frozen=True)
class Built:
    """One engine of a plan: where it lies, its seconds, and whether it was there before."""

    engine: CachedEngine
    seconds: float
    known: bool


def chosen_stages(bundle: Bundle, names: tuple[str, ...]) -> tuple[str, ...]:
    """Stages to build, all that the bundle has where none is named. Raises UsageError."""
    there = tuple(stage for stage in STAGES if getattr(bundle.manifest, stage) is not None)
    for name in names:
        if name not in there:
            raise UsageError(f"{bundle.path} has no stage {name}; it has {', '.join(there)}")
    return tuple(stage for stage in there if not names or stage in names)


def chosen_capacity(bundle: Bundle, context: int | None) -> int:
    """Places of key/value buffers for a context in tokens. Raises UsageError."""
    longest = bundle.manifest.limits.max_length
    wanted = min(longest, _USUAL_CONTEXT) if context is None else context
    if not 1 <= wanted <= _LARGEST_CONTEXT:
        raise UsageError(f"--context {wanted} is out of bounds; use 256 to {_LARGEST_CONTEXT}")
    return -(-wanted // _GROWTH) * _GROWTH


def build_stages(
    library: Library,
    plan: Plan,
    cache: EngineCache,
    device: Device | None,
    tell: Callable[[str, Plan], OnProgress | None],
) -> Iterator[Built]:
    """Build what is not in the cache yet; each engine is kept as soon as it is there.

    Args:
        library: Builds.
        plan: What.
        cache: Where engines are kept.
        device: The GPU that builds; None where none is needed.
        tell: Called with the name of each engine before it is built; gives what to tell of it.

    Raises:
        BackendError: A graph is refused; the message says where its weights may be why.
        BundleError: A stage cannot be written for TensorRT.
        OutOfMemoryError: The machine has too little memory.
    """
    library.check_operators()
    for stage, flavour in _parts(plan):
        record = _record(library, plan, stage, flavour)
        known = None if plan.again else cache.same(record)
        if known is not None and known.path.is_file():
            yield Built(known, 0.0, known=True)
            continue
        started = time.monotonic()
        progress = tell(f"{stage} ({flavour})", plan)
        data = _build(library, plan, stage, flavour, cache, device, progress)
        seconds = time.monotonic() - started
        yield Built(cache.write(record, data), seconds, known=False)


def plan_memory(bundle: Bundle, stage: str, workspace: int) -> BuildMemory:
    """What building a stage takes, by the size of the bundle's own graph; nothing is written."""
    spec = getattr(bundle.manifest, stage)
    flavour = Flavour.PLAIN if stage == "vision" else Flavour.GQA
    return estimate(weight_bytes(bundle.graph(spec.path(flavour))), workspace)


def weight_bytes(path: Path) -> int:
    """Bytes of a graph with its weights, those that lie in a file of several graphs included."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    outside = (
        int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    )
    return path.stat().st_size + sum(outside)


def _parts(plan: Plan) -> Iterator[tuple[str, str]]:
    """Stage and flavour of every engine."""
    for stage in plan.stages:
        if stage == "llm" and plan.bundle.manifest.llm.has(Flavour.GQA_REST):
            yield stage, "std-rest"
        else:
            yield stage, "std"
        if stage == "rfm" and plan.masked:
            yield stage, "std-masked"
        if stage != "vision":
            yield stage, MOVE


def _record(library: Library, plan: Plan, stage: str, flavour: str) -> EngineRecord:
    target = plan.target
    decoder = stage != "vision"
    return EngineRecord(
        library=library.name,
        version=library.version,
        stage=stage,
        flavour=flavour,
        bundle=stage_hash(plan.bundle, stage),
        capability=target.capability,
        gpu=target.gpu,
        driver=target.driver,
        system=target.system,
        profile="" if flavour == MOVE else "L=1..256" if decoder else f"N=1..{plan.tiles}",
        capacity=plan.capacity if decoder else 0,
        graphs=GRAPHS,
    )


def _build(
    library: Library,
    plan: Plan,
    stage: str,
    flavour: str,
    cache: EngineCache,
    device: Device | None,
    on_progress: OnProgress | None,
) -> memoryview:
    # TensorRT keeps times of one GPU's kernels; it leaves those of another alone.
    timings = None
    if not library.is_rtx:
        cache.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        timings = cache.folder / f"{plan.target.capability}-{library.version}.timings"
    options = BuildOptions(plan.target, plan.workspace, timings, on_progress)
    with tempfile.TemporaryDirectory(prefix="lrs-edge-build-") as folder:
        path, profile = _graph(library, plan, stage, flavour, Path(folder))
        # TensorRT-RTX tries nothing on a GPU.
        workspace = 0 if library.is_rtx else plan.workspace
        need = estimate(weight_bytes(path), workspace)
        free = None if library.is_rtx or device is None else device.free_memory()
        shared = device is not None and device.gpu.shares_memory
        check_room(stage, need, free, shared=shared)
        try:
            return build_engine(library, path, profile, options)
        except OutOfMemoryError:
            raise
        except BackendError as error:
            precision = getattr(plan.bundle.manifest, stage).precision
            if library.updates_in_place or not precision.startswith("int8") or flavour == MOVE:
                raise
            raise BackendError(
                f"{error}; {library.name} {library.version} may not take weights of {precision} "
                f"(docs/tensorrt.md): export {stage} at fp16 or int4-weight"
            ) from error


def _graph(
    library: Library, plan: Plan, stage: str, flavour: str, folder: Path
) -> tuple[Path, Profile]:
    """Write the graph of an engine; its shapes."""
    if flavour == MOVE:
        spec = getattr(plan.bundle.manifest, stage)
        shape = (1, spec.kv_heads, plan.capacity, spec.head_dim)
        path = folder / f"{MOVE}.onnx"
        path.write_bytes(gather_model("float16"))
        return path, {"x": (shape,) * 3, "indices": ((plan.capacity,),) * 3}
    written = _stage_graph(plan, stage, flavour, folder, older=not library.updates_in_place)
    profile = written.profile()
    if stage == "vision":
        for name, (least, *_) in profile.items():
            profile[name] = (least, (plan.tiles, *least[1:]), (plan.tiles, *least[1:]))
    return written.path, profile


def _stage_graph(plan: Plan, stage: str, flavour: str, folder: Path, *, older: bool) -> StageGraph:
    writers: Any
    try:
        from lrs_edge.building import stage_graphs as writers
    except ImportError as error:
        raise BackendError(
            f"lrs-edge build needs the package {error.name}, which is not installed; run, where "
            "lrs-edge was installed from: pip install '.[tensorrt-rtx]' (or '.[tensorrt]')"
        ) from error
    if stage == "vision":
        found: StageGraph = writers.write_vision_graph(plan.bundle, folder, older=older)
        return found
    masked = flavour == "std-masked"
    found = writers.write_std_graph(
        plan.bundle, stage, plan.capacity, folder, masked=masked, older=older
    )
    return found
