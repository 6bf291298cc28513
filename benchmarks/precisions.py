"""Every precision of every stage against fp32: bytes, time, error, and answers that stay right.

Stages are written in all precisions (sensitive weights kept higher as `lrs-edge export` does it),
and timed in turns on the calibration data: one tile through the vision encoder, one level's prompt
through the RFM, one pruned prompt and 16 decoded tokens through the LLM. Error and cosine are
against fp32 on the same data. With questions, every precision is exported as a whole bundle that
answers them.

Without `--checkpoint` the weights are those of the embedded bundle, which lie on a grid of int8
already: errors of `int8-weight` come out too small then, and speeds are what they are.

    python -m benchmarks.precisions [--checkpoint DIR] [--questions FILE --images DIR --limit N]
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.embedded_checkpoint import write_checkpoint
from benchmarks.measure import head, parser_for
from lrs_edge.engines.devices import STAGE_NAMES, StageName
from lrs_edge.errors import ExportError
from lrs_edge_export import AccuracyCheck, ExportOptions, Precisions, export_bundle
from lrs_edge_export.bundle.stages import StageWriter, check_plan
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.quantization import CalibrationData
from lrs_edge_export.quantization.planning import Planner
from lrs_edge_export.quantization.precision import PRECISIONS, Plan, Precision
from lrs_edge_export.quantization.probe import Probe, least_cosine, relative_error

#: Precisions of a whole bundle, vision first; a convolutional tower has no dynamic int8 or int4.
BUNDLES: dict[str, Precisions] = {
    "fp32": Precisions.all("fp32"),
    "int8 (measured)": Precisions.all("int8"),
    "int8-weight": Precisions.all("int8-weight"),
    "int4-weight": Precisions("int8-weight", "int4-weight", "int4-weight"),
}


def plans_of(stage: StageName, model: Model, folder: Path) -> dict[Precision, Plan]:
    """What `lrs-edge export` would do for each precision that a stage can have."""
    found = {}
    for precision in PRECISIONS:
        try:
            check_plan(stage, precision, model)
        except ExportError:
            continue
        options = ExportOptions(precisions=Precisions(**{stage: precision}))
        planner = Planner(model, options, folder, lambda _: None)
        found[precision] = planner.plan().plans.of(stage)
    return found


def measure_stage(
    stage: StageName, model: Model, data: CalibrationData, folder: Path, rounds: int
) -> list[dict[str, float | str]]:
    """One row per precision of a stage."""
    probe, plans, paths = Probe(stage, data), plans_of(stage, model, folder), {}
    for precision, plan in plans.items():
        place = folder / f"{stage}-{precision}"
        place.mkdir()
        with StageWriter(model, place, tiles=lambda: data.tiles) as writer:
            writer.write(stage, plan)
        paths[precision] = place / probe.graph
    wanted = probe.outputs(paths["fp32"], "fp32")
    times: dict[Precision, list[float]] = {precision: [] for precision in paths}
    for _ in range(rounds):
        for precision, path in paths.items():
            times[precision].append(probe.seconds(path, precision))
    rows: list[dict[str, float | str]] = []
    for precision, path in paths.items():
        outputs = probe.outputs(path, precision)
        weights = path.with_name(f"{path.name}.data")
        rows.append(
            {
                "stage": stage,
                "precision": precision,
                "mb": (path.stat().st_size + weights.stat().st_size) / 1e6,
                "ms": min(times[precision]) * 1e3,
                "ratio": min(times["fp32"]) / min(times[precision]),
                "error": relative_error(outputs, wanted),
                "cosine": least_cosine(outputs, wanted),
            }
        )
    return rows


def answer_questions(
    checkpoint: Path, folder: Path, check: AccuracyCheck
) -> list[dict[str, float | str]]:
    """Accuracy of whole bundles."""
    rows: list[dict[str, float | str]] = []
    for name, precisions in BUNDLES.items():
        options = ExportOptions(precisions=precisions, parity=False, accuracy=check)
        result = export_bundle(str(checkpoint), folder / name.split()[0], options)
        assert result.accuracy is not None
        size = sum(entry.size for entry in result.manifest.files.values())
        found: dict[str, float | str] = {"bundle": name, "mb": size / 1e6}
        rows.append(found | {"answers": result.accuracy.shown})
    return rows


def main() -> None:
    """Measure, print tables and one line of JSON."""
    parser = parser_for(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: the embedded bundle, dequantized")
    parser.add_argument("--stages", nargs="+", choices=STAGE_NAMES, default=list(STAGE_NAMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = options.checkpoint or write_checkpoint(None, folder / "checkpoint")
        model = read_model(find_checkpoint(str(checkpoint)), None)
        data = Planner(model, ExportOptions(), folder, lambda _: None).data
        print(head(("stage", "precision", "MB", "ms", "times fp32's speed", "error", "cosine")))
        for stage in options.stages:
            for row in measure_stage(stage, model, data, folder, options.rounds):
                rows.append(row)
                print(
                    f"| {stage} | {row['precision']} | {row['mb']:.1f} | {row['ms']:.1f} | "
                    f"{row['ratio']:.2f} | {row['error']:.4f} | {row['cosine']:.5f} |",
                    flush=True,
                )
        if options.questions is not None:
            check = AccuracyCheck(options.questions, options.images, options.limit)
            print("\n" + head(("bundle", "MB", "answers")))
            for row in answer_questions(checkpoint, folder, check):
                rows.append(row)
                print(f"| {row['bundle']} | {row['mb']:.1f} | {row['answers']} |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
