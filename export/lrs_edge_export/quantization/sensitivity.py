"""How much weights suffer from a precision: the stage's error when they alone are quantized.

Layers of one kind (all down projections, all depthwise convolutions) suffer alike, so all of a kind
are quantized together first, and only of the most sensitive kinds single layers are. A layer that
was not measured alone has its share of what its kind has: independent errors add up in squares.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lrs_edge.engines.devices import StageName
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.graphs import decoder_graph, vision_graph
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization import CalibrationData, StaticVision, spread
from lrs_edge_export.quantization.precision import Plan
from lrs_edge_export.quantization.probe import Probe, relative_error

#: Tiles that ranges are calibrated on here.
_TILES = 16

#: Tiles, and prompts, that every error is measured on.
_PROBED_TILES, _PROBED_PROMPTS = 4, 3

#: Single layers measured of a stage, beside its kinds.
MOST_SINGLE = 16

#: Gives the error of a stage of which some layers are quantized.
Measure = Callable[[Collection[str]], float]


@dataclass(frozen=True)
class LayerError:
    """One weight: its stage, its layer's name, its elements, the error it causes alone.

    `measured` is False where the error is the layer's share of its kind's.
    """

    stage: StageName
    name: str
    elements: int
    error: float
    measured: bool = True


def measure_sensitivity(
    stage: StageName,
    plan: Plan,
    model: Model,
    data: CalibrationData,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> list[LayerError]:
    """Quantize weights of a stage alone, and compare the stage's output with its float one.

    The whole stage is in memory in float32, several times its size on disk in the worst case.

    Args:
        stage: Which.
        plan: Its precision.
        model: The checkpoint.
        data: Calibration data.
        folder: Where graphs lie for a moment.
        progress: Called with one line per ten measurements.

    Returns:
        Errors, relative to the output's size, the largest first.
    """
    probe = Probe(stage, data, tiles=_PROBED_TILES, prompts=_PROBED_PROMPTS)
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
            number = 0

            def measure(names: Collection[str]) -> float:
                nonlocal number
                if number % 10 == 0:
                    progress(f"sensitivity of {stage}, {len(sizes)} layers: {number} measured")
                number += 1
                write_alone(names)
                return relative_error(probe.outputs(target, plan.precision), wanted)

            errors = layer_errors(list(sizes), measure)
    found = [LayerError(stage, name, size, *errors[name]) for name, size in sizes.items()]
    return sorted(found, key=lambda one: -one.error)


def layer_errors(
    names: Sequence[str], measure: Measure, most_single: int = MOST_SINGLE
) -> dict[str, tuple[float, bool]]:
    """Errors of layers, by name, and whether they were measured alone.

    Args:
        names: Of all layers.
        measure: Gives the error of some of them together.
        most_single: Layers that are measured alone, at most.
    """
    if len(names) <= most_single:
        return {name: (measure([name]), True) for name in names}
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    together = {kind: measure(layers) for kind, layers in kinds.items()}
    alone = {layers[0]: together[kind] for kind, layers in kinds.items() if len(layers) == 1}
    order = sorted(kinds, key=lambda kind: -_share(together[kind], len(kinds[kind])))
    left = most_single
    for kind in order:
        layers = kinds[kind]
        if len(layers) == 1 or left <= 0:
            continue
        places = np.linspace(0, len(layers) - 1, min(left, len(layers))).round().astype(int)
        alone |= {layers[place]: measure([layers[place]]) for place in places.tolist()}
        left -= len(places)
    return {
        name: (alone[name], True) if name in alone else (_rest(kinds[kind], alone, error), False)
        for kind, error in together.items()
        for name in kinds[kind]
    }


def kind_of(name: str) -> str:
    """A layer's name with stars for numbers, such as `layers.*.mlp.down_proj`."""
    return re.sub(r"\d+", "*", name)


def _share(error: float, layers: int) -> float:
    """Error of one of some layers that are alike, of which together it is known."""
    return error / math.sqrt(max(layers, 1))


def _rest(layers: Sequence[str], alone: Mapping[str, float], together: float) -> float:
    """Error of each of a kind's layers that were not measured alone."""
    known = [alone[name] for name in layers if name in alone]
    left = math.sqrt(max(together**2 - sum(error**2 for error in known), 0.0))
    return _share(left, len(layers) - len(known))


class _Alone:
    """Writes a stage's graph with some weights quantized."""

    def __init__(self, weights: WeightFile, plan: Plan, write: Callable[[], None]) -> None:
        self._weights = weights
        self._plan = plan
        self._write = write

    def write(self, names: Collection[str]) -> None:
        self._weights.plan = self._plan.alone(*names)
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
    """A Markdown table, the most sensitive layer first; a `~` marks a share of a kind's error."""
    lines = ["| stage | layer | weights | error alone | kept higher |", "|---|---|---|---|---|"]
    for one in errors:
        kept = "yes" if one.name in higher else ""
        error = f"{'' if one.measured else '~'}{one.error:.2e}"
        lines.append(f"| {one.stage} | {one.name} | {one.elements:,} | {error} | {kept} |")
    return "\n".join(lines) + "\n"


def _writer(stage: StageName, model: Model, path: Path, weights: WeightFile) -> Callable[[], None]:
    """Writes the stage's main graph, as often as it is called."""
    if stage == "vision":
        return lambda: vision_graph.write_vision(model.vision, path, weights)
    if stage == "rfm":
        return lambda: decoder_graph.write_rfm(model.region_focus, "gqa", path, weights)
    head = decoder_graph.LanguageHead(model.vocabulary, model.lm_head)
    return lambda: decoder_graph.write_llm(model.llm, head, path, weights)
