"""`lrs-edge distill`: a region focus module learns where the language model looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lrs_edge.commands.common import (
    check_checkpoint,
    debug_option,
    export_packages,
    format_option,
    step_teller,
    write_json,
    write_result,
)
from lrs_edge.commands.search_options import layer_list as layer_list_type
from lrs_edge.commands.search_options import threads_callback
from lrs_edge.errors import UsageError

if TYPE_CHECKING:
    from lrs_edge_export.distill import DistillResult


@click.command()
@click.argument("checkpoint")
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    metavar="DIR",
    help="Folder with question files (*.jsonl) in the form of LRS-VQA, or one such file.",
)
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Folder of the new checkpoint; required but for --measure.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Train nothing: print how well each layer of the LLM finds the evidence, for `export "
    "--rfm from-llm:LAYERS`.",
)
@click.option(
    "--relative-to",
    metavar="TEXT",
    help="With --measure: the generic instruction of relative scores; default: 'Write a general "
    "description of the image.'",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Folder of the images; default: that of the data, or `images` in it.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of features, targets and training state; default: OUT.work. A run that was "
    "broken off goes on from there.",
)
@click.option(
    "--vision-tower",
    metavar="PATH",
    help="Folder or hub name of the vision tower; default: what config.json names.",
)
@click.option(
    "--layers",
    type=click.IntRange(1, 64),
    help="Layers of the LLM to learn from; default: as many as the checkpoint lists, else 2.",
)
@click.option(
    "--layer-list",
    type=layer_list_type,
    metavar="5,9",
    help="Learn from these layers (counted from 0) instead of measuring which localise best.",
)
@click.option(
    "--from-existing",
    is_flag=True,
    help="Start from the checkpoint's own RFM instead of the LLM's layers.",
)
@click.option("--steps", type=click.IntRange(min=0), help="Steps of training; default: 1000.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    help="Minutes of training, in place of --steps or whichever ends first.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    default=2e-4,
    show_default=True,
    help="Highest learning rate.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Sequences in one step.",
)
@click.option(
    "--evidence-weight",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Weight of the loss that rewards attention on evidence boxes; 0 learns from the LLM only.",
)
@click.option(
    "--tiles-per-level",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Most tiles of a sequence on levels finer than the base.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Use about N questions; whole images."
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 0.9),
    default=0.1,
    show_default=True,
    metavar="SHARE",
    help="Share of the images whose questions are only measured on.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the student's products; auto takes bf16 where the processor has it.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where LLM and student run; the vision tower runs on the CPU.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(min=1), callback=threads_callback, help="Threads of the CPU."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@format_option("table", "json")
@click.option("-q", "--quiet", is_flag=True, is_eager=True, help="Say nothing on stderr.")
@debug_option
def distill(
    checkpoint: str,
    data: Path,
    target: Path | None,
    measure: bool,
    relative_to: str | None,
    images: Path | None,
    work: Path | None,
    vision_tower: str | None,
    layers: int | None,
    layer_list: tuple[int, ...] | None,
    from_existing: bool,
    steps: int | None,
    minutes: float | None,
    rate: float,
    batch: int,
    evidence_weight: float,
    tiles_per_level: int,
    limit: int | None,
    held_out: float,
    precision: str,
    device: str,
    threads: int | None,
    seed: int,
    force: bool,
    output_format: str,
    quiet: bool,
) -> None:
    """Train the region focus module of CHECKPOINT and write a new checkpoint.

    The RFM learns the language model's own attention to the image (attention distillation). Which
    layers it learns from is measured on questions with evidence boxes. CHECKPOINT is a folder, the
    name of a recipe, or a name on the Hugging Face hub; it is only read.
    """
    if target is None and not measure:
        raise UsageError("name the folder of the new checkpoint with -o, or give --measure")
    if relative_to is not None and not (measure and relative_to.strip()):
        raise UsageError("--relative-to is a text for --measure")
    check_checkpoint(checkpoint)
    with export_packages("distilling"):
        from lrs_edge_export import distill as distillation

    if steps is None and minutes is None:
        steps = distillation.TrainOptions().steps
    options = distillation.DistillOptions(
        images=images,
        work=work,
        vision_tower=vision_tower,
        layers=layers,
        layer_list=layer_list,
        from_existing=from_existing,
        sampling=distillation.Sampling(tiles=tiles_per_level, seed=seed),
        limit=limit,
        held_out=held_out,
        train=distillation.TrainOptions(
            steps=steps,
            minutes=minutes,
            batch=batch,
            rate=rate,
            weights=distillation.LossWeights(evidence=evidence_weight),
            seed=seed,
        ),
        precision="fp32" if precision == "fp32" else "bf16" if precision == "bf16" else "auto",
        device=device,
        threads=threads,
        force=force,
    )
    if measure or target is None:
        generic = relative_to or distillation.GENERIC
        survey = distillation.survey_layers(
            checkpoint, data, options, generic, step_teller(quiet=quiet)
        )
        if output_format == "json":
            write_json(survey.report)
        else:
            write_result(distillation.survey_table(survey) + "\n", None)
        return
    result = distillation.distill(checkpoint, data, target, options, step_teller(quiet=quiet))
    if output_format == "json":
        write_json(dict(result.report))
    else:
        write_result(_report(result), None)


def _report(result: DistillResult) -> str:
    """What was learned, as text."""
    lines = [f"{result.path}: learned from layers {', '.join(map(str, result.layer_list))}"]
    if result.layer_table:
        lines += ["", "where the language model's layers look (questions with boxes):"]
        lines.append(result.layer_table)
    lines += ["", "held-out questions:", result.measure_table]
    return "\n".join(lines) + "\n"
