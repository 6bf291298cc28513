"""Which engine runs each stage, and on which device: decided here, from what was asked for.

A new engine is one module in this folder, with a graph class that keeps the contract of `base.py`,
and one entry in `engines()`. Whatever else asks for a graph names a stage and what it needs of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lrs_edge.bundle.bundle import Bundle
from lrs_edge.bundle.host_nodes import host_nodes
from lrs_edge.bundle.manifest import (
    ONNXRUNTIME,
    Flavour,
    Manifest,
    StageSpec,
)
from lrs_edge.engines import onnx_kind
from lrs_edge.engines.base import BackendOptions, Graph, HostNodes
from lrs_edge.engines.devices import AUTO, PROVIDER_PREFIX, STAGE_NAMES, StageName, StagePlace
from lrs_edge.engines.joined import JoinedGraph
from lrs_edge.engines.metered import Meter, MeteredGraph
from lrs_edge.errors import BackendError, BundleError, UsageError

#: What a stage's graph is needed for: the usual, an attention bias, buffers of int8, or what
#: follows an RFM that is the language model's first layers.
Need = Literal["usual", "masked", "int8-kv", "rest"]


@dataclass(frozen=True)
class EngineKind:
    """One engine that can run graphs.

    Attributes:
        name: As `GraphFile.engines` names it.
        flavours: Of graphs that it runs, by what they are needed for, the preferred first.
        every: Devices that it has anywhere.
        devices: Those of them that it can use here, the fastest first. Raises BackendError where
            the engine is not installed.
        absent: Why a device of `every` cannot be used here, and what to do, in one line.
        load: Loads a graph on the device that the options' `provider` names.
        problem: Why a stage cannot run on a device, or empty; looks at nothing but the manifest.
        device_flavours: Flavours for the usual need that are preferred to those, by device.
        reads: Engine whose files of a bundle it takes; its own where this is empty.
    """

    name: str
    flavours: Mapping[Need, tuple[str, ...]]
    every: tuple[str, ...]
    devices: Callable[[], tuple[str, ...]]
    absent: Callable[[str], str]
    load: Callable[[Path, BackendOptions], Graph]
    problem: Callable[[StageSpec, str], str]
    device_flavours: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads: str = ""

    def flavours_on(self, device: str, need: Need) -> tuple[str, ...]:
        """Flavours that it runs on a device for a need, the preferred first."""
        first = self.device_flavours.get(device, ()) if need == "usual" else ()
        return (*first, *self.flavours.get(need, ()))


def engines() -> tuple[EngineKind, ...]:
    """All engines, the one for `auto` first."""
    onnxruntime = EngineKind(
        name=ONNXRUNTIME,
        flavours={
            "usual": (Flavour.GQA, Flavour.PLAIN),
            "masked": (Flavour.MASKED,),
            "int8-kv": (Flavour.GQA_INT8_KV,),
            "rest": (Flavour.GQA_REST,),
        },
        every=("cuda", "cpu"),
        devices=onnx_kind.devices,
        absent=onnx_kind.absent,
        load=onnx_kind.load,
        problem=onnx_kind.problem,
        device_flavours={"cuda": (Flavour.FUSED,)},
    )
    return (onnxruntime, _tensorrt("tensorrt"), _tensorrt("tensorrt-rtx"))


def _tensorrt(name: str) -> EngineKind:
    """TensorRT or TensorRT-RTX; see `lrs_edge.engines.tensorrt`, which is imported when needed.

    Its engines are built of the bundle's graphs for onnxruntime, and lie in a cache.
    """

    def devices() -> tuple[str, ...]:
        from lrs_edge.engines.tensorrt import loading

        return loading.devices(name)

    def load(path: Path, _options: BackendOptions) -> Graph:
        from lrs_edge.engines.tensorrt import loading

        return loading.load_engine(name, path)

    return EngineKind(
        name=name,
        flavours={
            "usual": (Flavour.GQA, Flavour.PLAIN),
            "masked": (Flavour.MASKED,),
            "rest": (Flavour.GQA_REST,),
        },
        every=(name,),
        devices=devices,
        absent=lambda device: f"{device} cannot be used here; see lrs-edge doctor",
        load=load,
        problem=lambda _spec, _device: "",
        reads=ONNXRUNTIME,
    )


@dataclass(frozen=True)
class Place:
    """Where a stage runs."""

    engine: EngineKind
    device: str


@dataclass(frozen=True)
class Placement:
    """Where all stages run, and what to say of the choice, one sentence each."""

    places: Mapping[StageName, Place]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One device where that is all, else `vision=cuda,rfm=cpu,...`."""
        devices = {stage: place.device for stage, place in self.places.items()}
        if len(set(devices.values())) == 1:
            return devices["vision"]
        return ",".join(f"{stage}={device}" for stage, device in devices.items())

    def on(self, device: str) -> frozenset[StageName]:
        """Stages on a device."""
        return frozenset(stage for stage, place in self.places.items() if place.device == device)


def requested(options: BackendOptions) -> dict[StageName, str]:
    """What is asked for each stage: `auto`, a device, or an engine.

    The RFM follows the language model where it is not named, since it may be layers of it.

    Raises:
        UsageError: A stage that there is not.
    """
    given = dict(options.stages)
    unknown = sorted(set(given) - set(STAGE_NAMES))
    if unknown:
        raise UsageError(
            f"there is no stage {unknown[0]!r} to place; name vision, rfm or llm, such as "
            "vision=cuda"
        )
    if "llm" in given:
        given.setdefault("rfm", given["llm"])
    return {stage: given.get(stage, options.provider) for stage in STAGE_NAMES}


def placements(bundle: Bundle, options: BackendOptions) -> tuple[Placement, ...]:
    """Placements to try, the best first: more than one only where something is `auto`.

    Raises:
        BundleError: The bundle would answer wrongly where a stage was asked to run.
        BackendError: No engine that is installed can run a stage.
        UsageError: A stage, device or engine that there is not.
    """
    wanted = requested(options)
    stages = _specs(bundle.manifest)
    wanted = {stage: name for stage, name in wanted.items() if stage in stages}
    choices: dict[StageName, list[Place]] = {}
    notes: list[str] = []
    for stage, name in wanted.items():
        places = _places(name)
        problems = [place.engine.problem(stages[stage], place.device) for place in places]
        choices[stage] = [
            place for place, problem in zip(places, problems, strict=True) if not problem
        ]
        if not choices[stage]:
            raise BundleError(f"{bundle.path} {problems[0]}")
        if problems[0] and not notes and onnx_kind.has_driver():
            notes.append(f"auto takes no {places[0].device} here: this bundle {problems[0]}")
    first = Placement({stage: places[0] for stage, places in choices.items()}, tuple(notes))
    last = Placement({stage: places[-1] for stage, places in choices.items()}, tuple(notes))
    # `auto` is one decision: stages that nobody placed run together where all of them can.
    free = [stage for stage, name in wanted.items() if name == AUTO]
    if len({first.places[stage].device for stage in free}) > 1:
        first = last
    return (first,) if first == last else (first, last)


def refusals(manifest: Manifest) -> dict[str, str]:
    """Why a bundle cannot run on a device as a whole, by device; empty text where it can.

    As far as the manifest tells, and whether the device is there or not.
    """
    found = {}
    for engine in engines():
        for device in engine.every:
            problems = (engine.problem(spec, device) for spec in _specs(manifest).values())
            found[device] = next((problem for problem in problems if problem), "")
    return found


def _places(name: str) -> list[Place]:
    """Places that a name stands for, the best first. Raises BackendError or UsageError."""
    known = engines()
    if name == AUTO:
        return [Place(known[0], device) for device in known[0].devices()]
    if name.startswith(PROVIDER_PREFIX):
        return [Place(known[0], onnx_kind.provider_device(name))]
    for engine in known:
        if name in engine.every:
            if name not in engine.devices():
                raise BackendError(engine.absent(name))
            return [Place(engine, name)]
    for engine in known:
        if name == engine.name:
            return [Place(engine, device) for device in engine.devices()[:1]]
    raise UsageError(
        f"there is no device or engine {name!r}; use {AUTO}, "
        f"{', '.join(device for engine in known for device in engine.every)} or {known[0].name}"
    )


def _specs(manifest: Manifest) -> dict[StageName, StageSpec]:
    found: dict[StageName, StageSpec] = {"vision": manifest.vision, "llm": manifest.llm}
    return found if manifest.rfm is None else {**found, "rfm": manifest.rfm}


class GraphLoader:
    """Loads graphs of a bundle where their stages are placed.

    Args:
        bundle: The bundle.
        placement: Where its stages run.
        options: Threads.
        meter: Counts what the graphs compute.
    """

    def __init__(
        self, bundle: Bundle, placement: Placement, options: BackendOptions, meter: Meter
    ) -> None:
        self._bundle = bundle
        self._placement = placement
        self._options = options
        self._meter = meter
        self._loaded: list[tuple[StageName, Graph]] = []

    def places(self) -> tuple[StagePlace, ...]:
        """Where every stage runs, with the nodes of those of its graphs that are loaded by now."""
        found = []
        for stage, place in self._placement.places.items():
            nodes: Counter[str] = Counter()
            for _, graph in filter(lambda one: one[0] == stage, self._loaded):
                nodes.update(graph.nodes)
            found.append(StagePlace(stage, place.engine.name, place.device, dict(nodes)))
        return tuple(found)

    def path(self, stage: StageName, need: Need = "usual") -> str | None:
        """The file in the bundle that serves a stage's need where it is placed; None for none."""
        spec, place = _specs(self._bundle.manifest)[stage], self._placement.places[stage]
        engine = place.engine
        reads = engine.reads or engine.name
        for flavour in engine.flavours_on(place.device, need):
            if spec.has(flavour, reads):
                return spec.path(flavour, reads)
        return None

    def stage(self, stage: StageName, need: Need = "usual") -> Graph:
        """Load a stage's graph.

        Raises:
            BundleError: The bundle has none for its engine, or it is not a graph.
            BackendError: The engine fails.
        """
        path = self._path(stage, need)
        spec = _specs(self._bundle.manifest)[stage]
        return self.file(stage, path, unpack_weights=unpacks_weights(stage, spec.precision))

    def _path(self, stage: StageName, need: Need) -> str:
        """As `path`. Raises BundleError where there is none."""
        path = self.path(stage, need)
        if path is None:
            name = self._placement.places[stage].engine.name
            raise BundleError(
                f"{self._bundle.path} has no graph of {stage} for {name}; export the checkpoint "
                "again, or place the stage elsewhere"
            )
        return path

    def shares_layers(self) -> bool:
        """Whether the RFM can be the language model's first layers in memory, too."""
        places = self._placement.places
        if "rfm" not in places or self.path("llm", "rest") is None:
            return False
        rfm, llm = places["rfm"], places["llm"]
        return (rfm.engine.name, rfm.device) == (llm.engine.name, llm.device)

    def joined(self) -> tuple[Graph, Graph]:
        """RFM and language model, of which the first layers are one graph; raises as `stage` does.

        Only where they share layers (`shares_layers`).
        """
        first, second = self._path("rfm", "usual"), self._path("llm", "rest")
        front = self._load("rfm", first)
        llm = JoinedGraph(front, self._load("llm", second))
        return MeteredGraph(front, first, self._meter), MeteredGraph(llm, second, self._meter)

    def file(self, stage: StageName, path: str, *, unpack_weights: bool = False) -> Graph:
        """Load any graph of the bundle where a stage is placed; raises as `stage` does."""
        graph = self._load(stage, path, unpack_weights=unpack_weights)
        return MeteredGraph(graph, path, self._meter)

    def _load(self, stage: StageName, path: str, *, unpack_weights: bool = False) -> Graph:
        """A graph whose runs are not counted."""
        place = self._placement.places[stage]
        options = replace(
            self._options,
            provider=place.device,
            unpack_weights=unpack_weights,
            stages={},
            host_nodes=None if place.device == "cpu" else self._host_nodes(path),
        )
        graph = place.engine.load(self._bundle.graph(path), options)
        self._loaded.append((stage, graph))
        return graph

    def _host_nodes(self, path: str) -> HostNodes:
        facts = self._bundle.graph_facts(path)
        may = host_nodes(facts)
        return HostNodes(may, frozenset(node.name for node in facts.nodes) - may)


def unpacks_weights(stage: StageName, precision: str) -> bool:
    """Whether a graph's weights are better dequantized once, when the graph is loaded.

    Those of vision are, since they are convolutions: but not in a graph that computes in int8,
    where the engine works on the integers.
    """
    return stage == "vision" and precision != "int8-static"
