"""How far 8-bit decoders for TensorRT move a language model: divergence from fp32 on a fixed text.

Weights alone in 8 bits (`int8-weight`), and weights and activations (`int8-static` without zero
points, with ranges of the calibration data): as they are, smoothed, and with down projections at
`int8-weight`. All in one run, measured as `benchmarks.int4_text` does, over a text that nothing is
fitted to.

Without `--checkpoint` the weights are those of the embedded bundle.

    python -m benchmarks.int8_text [--checkpoint DIR]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.embedded_checkpoint import write_checkpoint
from benchmarks.int4_text import COLUMNS, Apart, Reference, down_projections, table_cells
from benchmarks.measure import head, parser_for
from lrs_edge_export.bundle.stages import calibrated
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.quantization import CalibrationData, load_calibration
from lrs_edge_export.quantization.precision import Plan
from lrs_edge_export.quantization.smoothing import smoothed


def measure(model: Model, data: CalibrationData, folder: Path) -> Iterator[tuple[str, Apart]]:
    """Every way by name, and how far it is from fp32."""
    reference = Reference(model)
    smooth = replace(model, llm=smoothed(model.llm, data.pruned))
    static = Plan("int8-static", symmetric=True)
    ways = (
        ("int8-weight", model, Plan("int8-weight")),
        ("int8-static", model, static),
        ("int8-static, smoothed", smooth, static),
        (
            "int8-static, smoothed, down projections at int8-weight",
            smooth,
            replace(static, higher=down_projections(model)),
        ),
    )
    for number, (name, which, way) in enumerate(ways):
        plan = calibrated(way, "llm", which, lambda: data)
        yield name, reference.compare(which, plan, folder / str(number))


def main() -> None:
    """Print the table."""
    parser = parser_for(__doc__)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint = arguments.checkpoint or write_checkpoint(None, folder / "checkpoint")
        model = read_model(find_checkpoint(str(checkpoint)), None)
        print(head(("decoder", *COLUMNS)))
        for name, apart in measure(model, load_calibration(None, model), folder):
            print(f"| {name} | {table_cells(apart)} |", flush=True)


if __name__ == "__main__":
    main()
