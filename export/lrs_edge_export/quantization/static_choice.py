"""How many sensitive layers of a statically quantized vision graph are kept in float32.

Errors of single layers do not tell: errors of several add up in other ways. So the first few of the
most sensitive layers are left out together, and what comes out is measured. A float layer between
quantized ones costs two conversions, so as few are left out as serve; no clock decides, so that the
same checkpoint gives the same bundle on every machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.graphs import vision_graph
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization import CalibrationData, StaticVision, spread
from lrs_edge_export.quantization.precision import Plan
from lrs_edge_export.quantization.probe import Probe, relative_error
from lrs_edge_export.quantization.sensitivity import LayerError

#: Numbers of layers that are tried.
COUNTS = (0, 1, 2, 3, 4, 6, 8)

#: Of the variants whose error is within this factor of the smallest, that with the fewest layers in
#: float32 is taken.
_NEARLY = 1.2


@dataclass(frozen=True)
class Variant:
    """Layers kept in float32, and the error relative to the graph in float32."""

    kept: frozenset[str]
    error: float


def static_variants(
    errors: Sequence[LayerError],
    model: Model,
    data: CalibrationData,
    tiles: int,
    folder: Path,
    *,
    symmetric: bool = False,
) -> list[Variant]:
    """Measure variants that keep the most sensitive 0, 1, 2, ... layers.

    Args:
        errors: Sensitivity of every layer, the most sensitive first.
        model: The checkpoint.
        data: Calibration data.
        tiles: Of them, so many are used to find ranges.
        folder: Where graphs lie for a moment.
        symmetric: See `static_vision`.
    """
    probe = Probe("vision", data)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "float.onnx"
        with WeightFile(Path(place) / "float.onnx.data", Plan()) as weights:
            vision_graph.write_vision(model.vision, path, weights)
        wanted = probe.outputs(path, "fp32")
        chosen = spread(data.tiles, tiles)
        static = StaticVision(path, chosen, Path(place), symmetric=symmetric)
        kept, paths = [], []
        for count in COUNTS:
            kept.append(frozenset(one.name for one in errors[:count]))
            paths.append(Path(place) / f"kept{count}.onnx")
            static.write(paths[-1], exclude=kept[-1])
        return [
            Variant(names, relative_error(probe.outputs(one, "int8-static"), wanted))
            for names, one in zip(kept, paths, strict=True)
        ]


def best_variant(variants: Sequence[Variant]) -> Variant:
    """That with the fewest layers in float32 of those nearly as faithful as the most faithful."""
    least = min(one.error for one in variants)
    near = [one for one in variants if one.error <= _NEARLY * least]
    return min(near, key=lambda one: len(one.kept))
