"""How much each weight suffers from a precision: the stage's error when it alone is quantized."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lrs_edge.engines.placement import StageName
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.graphs import decoder_graph, vision_graph
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization import CalibrationData, StaticVision, spread
from lrs_edge_export.quantization.precision import Plan
from lrs_edge_export.quantization.probe import Probe, relative_error

#: Tiles that ranges are calibrated on here, for every layer anew.
_TILES = 16


@dataclass(frozen=True)
class LayerError:
    """One weight: its stage, its layer's name, its elements, the error it causes alone."""

    stage: StageName
    name: str
    elements: int
    error: float


def measure_sensitivity(
    stage: StageName,
    plan: Plan,
    model: Model,
    data: CalibrationData,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> list[LayerError]:
    """Quantize every weight of a stage alone, and compare the stage's output with its float one.

    The whole stage is in memory in float32, several times its size on disk in the worst case.

    Args:
        stage: Which.
        plan: Its precision.
        model: The checkpoint.
        data: Calibration data.
        folder: Where graphs lie for a moment.
        progress: Called with one line per ten layers.

    Returns:
        Errors, relative to the output's size, the largest first.
    """
    probe = Probe(stage, data)
    static_vision = stage == "vision" and plan.precision == "int8-static"
    floats = Plan() if static_vision else Plan(target=plan.target)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / probe.graph
        with WeightFile(Path(place) / f"{probe.graph}.data", floats) as weights:
            write = _writer(stage, model, path, weights)
            write()
            wanted = probe.outputs(path, "fp32")
            sizes = weights.quantizable()
            target, write_alone = path, _Alone(weights, plan, write).write
            if static_vision:
                # All convolutions are quantized here, the smallest among them.
                sizes = weights.sizes
                tiles = spread(data.tiles, _TILES)
                target = path.with_name("alone.onnx")
                static = StaticVision(path, tiles, Path(place), symmetric=plan.symmetric)
                write_alone = partial(static.write_alone, target)
            found = []
            for number, (name, elements) in enumerate(sizes.items()):
                if number % 10 == 0:
                    progress(f"sensitivity of {stage}: layer {number + 1} of {len(sizes)}")
                write_alone(name)
                error = relative_error(probe.outputs(target, plan.precision), wanted)
                found.append(LayerError(stage, name, elements, error))
    return sorted(found, key=lambda one: -one.error)


class _Alone:
    """Writes a stage's graph with one weight quantized."""

    def __init__(self, weights: WeightFile, plan: Plan, write: Callable[[], None]) -> None:
        self._weights = weights
        self._plan = plan
        self._write = write

    def write(self, name: str) -> None:
        self._weights.plan = self._plan.alone(name)
        self._write()


def kept_higher(errors: Sequence[LayerError], percent: float) -> frozenset[str]:
    """The most sensitive layers that together hold at most `percent` of a stage's weights."""
    room = sum(one.elements for one in errors) * percent / 100
    kept = set()
    for one in sorted(errors, key=lambda one: -one.error):
        if one.elements <= room:
            kept.add(one.name)
            room -= one.elements
    return frozenset(kept)


def sensitivity_table(errors: Iterable[LayerError], higher: frozenset[str]) -> str:
    """A Markdown table, the most sensitive layer first."""
    lines = ["| stage | layer | weights | error alone | kept higher |", "|---|---|---|---|---|"]
    for one in errors:
        kept = "yes" if one.name in higher else ""
        lines.append(f"| {one.stage} | {one.name} | {one.elements:,} | {one.error:.2e} | {kept} |")
    return "\n".join(lines) + "\n"


def _writer(stage: StageName, model: Model, path: Path, weights: WeightFile) -> Callable[[], None]:
    """Writes the stage's main graph, as often as it is called."""
    if stage == "vision":
        return lambda: vision_graph.write_vision(model.vision, path, weights)
    if stage == "rfm":
        return lambda: decoder_graph.write_rfm(model.region_focus, "gqa", path, weights)
    head = decoder_graph.LanguageHead(model.vocabulary, model.lm_head)
    return lambda: decoder_graph.write_llm(model.llm, head, path, weights)
