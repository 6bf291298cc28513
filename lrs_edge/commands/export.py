"""`lrs-edge export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lrs_edge.commands.common import (
    check_checkpoint,
    debug_option,
    export_packages,
    step_teller,
    write_result,
)
from lrs_edge.commands.search_options import layer_list
from lrs_edge.errors import UsageError

if TYPE_CHECKING:
    from lrs_edge.bundle.parity import Figure
    from lrs_edge_export import ExportOptions, ExportResult

#: A `--rfm` that is layers of the language model, alone or before a colon and their number.
FROM_LLM = "from-llm"

#: `lrs_edge_export.quantization.precision.REQUESTS`, which needs the `export` extra.
_PRECISION = click.Choice(
    ["fp32", "fp16", "int8", "int8-dynamic", "int8-static", "int8-weight", "int4-weight"]
)


class _RfmChoice(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """A precision, or `from-llm:LAYERS`, which becomes the number of layers.

    Without LAYERS it stays `from-llm`.
    """

    name = "rfm"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | int:
        """See click. Raises click.BadParameter."""
        start, layers = f"{FROM_LLM}:", str(value).removeprefix(f"{FROM_LLM}:")
        if value == FROM_LLM:
            return FROM_LLM
        if not str(value).startswith(start):
            return str(_PRECISION.convert(value, param, ctx))
        if not (layers.isascii() and layers.isdigit() and len(layers) <= 4):
            self.fail(f"{value!r} names no number of layers, such as {start}2", param, ctx)
        return int(layers)


@click.command("export")
@click.argument("checkpoint")
@click.option(
    "-o",
    "--output",
    "target_folder",
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="Directory of the bundle.",
)
@click.option(
    "--vision-tower",
    metavar="PATH",
    help="Folder or hub name of the vision tower; default: what config.json names, beside or "
    "inside the checkpoint.",
)
@click.option(
    "--revision",
    metavar="REVISION",
    help="Branch, tag or commit of a checkpoint on the hub; default: its main branch.",
)
@click.option("--name", help="Name of the bundle; default: the checkpoint's.")
@click.option(
    "--precision",
    type=_PRECISION,
    default="fp32",
    show_default=True,
    help="Of all stages. int8 measures ways to compute in int8 and takes the better one; -weight "
    "keeps only weights small.",
)
@click.option("--vision", type=_PRECISION, help="Precision of the vision encoder.")
@click.option(
    "--rfm",
    type=_RfmChoice(),
    metavar="PRECISION|from-llm[:LAYERS]",
    help="Precision of the Region Focus Module; or the language model's own first LAYERS in place "
    "of one, by reference to its weights: no byte more, and none has to be trained. Without LAYERS "
    "as many as the recipe or the family says (docs/distill.md).",
)
@click.option(
    "--relative-to",
    metavar="TEXT",
    default="",
    help="Divide a token's attention under the question by that under TEXT, a generic instruction "
    "such as 'Write a general description of the image.'; default: do not.",
)
@click.option("--llm", type=_PRECISION, help="Precision of the language model.")
@click.option(
    "--target",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Engine that the bundle is for. cuda (ONNX Runtime) and tensorrt keep all that is not "
    "quantized in float16, and refuse what they do not run or run no faster.",
)
@click.option(
    "--symmetric",
    is_flag=True,
    help="Make a vision encoder in int8-static one that TensorRT builds, as --target tensorrt "
    "always does: no zero points, biases and scalar constants in floats; less faithful.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Images, and questions.txt or questions.jsonl, that ranges and weights are fitted to; "
    "default: those that come with the package.",
)
@click.option(
    "--keep-higher",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    help="Keep so much of each stage's weights, the most sensitive by measurement, at a higher "
    "precision; default: 15 for int8-static and int4-weight, else 0.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Report each weight's error when it alone is quantized.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep layers rounded to 4 bits here until the bundle is written, so that an export that "
    "is killed goes on; default: beside BUNDLE, where a stage has more than 134 million weights.",
)
@click.option(
    "--int8-kv",
    is_flag=True,
    help="Also write the language model over an int8 KV cache (ask --kv-cache int8). For CUDA: on "
    "a CPU, prefill over it takes 3 to 4 times as long.",
)
@click.option(
    "--attention-layers",
    type=layer_list,
    metavar="K[,K...]",
    help="Also cut the language model after these layers, for --prune fastv (the paper: 2) and "
    "pdrop (8,16,24 of 32); adds small graphs, no weights.",
)
@click.option(
    "--vision-attention",
    is_flag=True,
    help="Also write a CLIP tower and the projector as graphs of their own, for --prune visionzip; "
    "adds small graphs, no weights.",
)
@click.option(
    "--local-pool",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tiles get N times fewer tokens along a side, pooled; default: as the family was trained.",
)
@click.option("--licence", metavar="TEXT", help="Licence of the weights, for the manifest.")
@click.option(
    "--parity-images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Images for the parity check; default: synthetic ones.",
)
@click.option(
    "--eval",
    "questions",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Questions (as for lrs-edge eval) that the finished bundle is asked.",
)
@click.option(
    "--eval-images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Images of those questions.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask only the first N.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Asked the same; the export fails if it is more than --most-lost points better.",
)
@click.option(
    "--most-lost",
    type=click.FloatRange(0, 100),
    default=2.0,
    show_default=True,
    metavar="POINTS",
    help="Accuracy that may be lost.",
)
@click.option("--no-parity", is_flag=True, help="Leave out the comparison with PyTorch.")
@click.option("--force", is_flag=True, help="Replace BUNDLE if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr.")
@debug_option
def export(checkpoint: str, target_folder: Path, quiet: bool, **values: Any) -> None:
    """Turn CHECKPOINT into a bundle and compare it with PyTorch.

    CHECKPOINT is a folder, the name of a recipe (`lrs-edge models recipes`), or a name on the
    Hugging Face hub.
    """
    check_checkpoint(checkpoint)
    with export_packages("exporting"):
        from lrs_edge_export import export_bundle

        options = _options(values)
    result = export_bundle(checkpoint, target_folder, options, step_teller(quiet=quiet))
    write_result(_report(result), None)


def _options(values: dict[str, Any]) -> ExportOptions:
    from lrs_edge_export import AccuracyCheck, ExportOptions, Precisions

    every = values.pop("precision")
    layers: int | Literal["default"] | None = None
    if isinstance(values["rfm"], int) or values["rfm"] == FROM_LLM:
        layers = "default" if values["rfm"] == FROM_LLM else values["rfm"]
        values["rfm"] = None
    stages = {name: values.pop(name) or every for name in ("vision", "rfm", "llm")}
    questions, images = values.pop("questions"), values.pop("eval_images")
    if (questions is None) != (images is None):
        raise UsageError("--eval and --eval-images go together; give both or neither")
    asked = {name: values.pop(name) for name in ("limit", "baseline", "most_lost")}
    check = None if questions is None else AccuracyCheck(questions, images, **asked)
    return ExportOptions(
        precisions=Precisions(**stages),
        accuracy=check,
        rfm_layers=layers,
        parity=not values.pop("no_parity"),
        attention_layers=values.pop("attention_layers") or (),
        **values,
    )


def _report(result: ExportResult) -> str:
    """What was written, what was measured, and how well it agrees, as text."""
    from lrs_edge_export.quantization.sensitivity import sensitivity_table

    files = result.manifest.files.values()
    size = sum(entry.size for entry in files)
    lines = [f"{result.path}: {len(files)} files, {size / 1e6:.1f} MB"]
    for stage, errors in result.planned.errors.items():
        lines += ["", sensitivity_table(errors, result.planned.plans.of(stage).higher)]
    for stage, candidates in result.planned.choices.items():
        lines.append(f"int8 of {stage}, the chosen way first:")
        lines += [f"  {one.precision:<13} cosine {one.cosine:.6f}" for one in candidates]
    if result.report is None:
        lines.append("parity: not checked")
    else:
        lines.append(f"parity with PyTorch on {result.report.images}:")
        lines += [_row(one.stage, row) for one in result.report.stages for row in one.figures]
    if result.accuracy is not None:
        lines.append(result.accuracy.shown)
    return "\n".join(lines) + "\n"


def _row(stage: str, row: Figure) -> str:
    return f"  {stage:<8} {row.measure:<17} {row.shown:<10} (limit: {row.sign} {row.limit:g})"
