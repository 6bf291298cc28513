"""`lrs-edge export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lrs_edge.commands.common import debug_option, export_packages, step_teller, write_result
from lrs_edge.commands.search_options import layer_list

if TYPE_CHECKING:
    from lrs_edge.export import ExportResult
    from lrs_edge.export.parity import ParityRow


@click.command("export")
@click.argument("checkpoint")
@click.option(
    "-o",
    "--output",
    "target",
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
@click.option("--name", help="Name of the bundle; default: the checkpoint's.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the weights; int8 (experimental) keeps one scale per output channel.",
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
@click.option("--licence", metavar="TEXT", help="Licence of the weights, for the manifest.")
@click.option(
    "--parity-images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Images for the parity check; default: synthetic ones.",
)
@click.option("--no-parity", is_flag=True, help="Leave out the comparison with PyTorch.")
@click.option("--force", is_flag=True, help="Replace BUNDLE if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr.")
@debug_option
def export(
    checkpoint: str,
    target: Path,
    vision_tower: str | None,
    name: str | None,
    precision: str,
    attention_layers: tuple[int, ...] | None,
    vision_attention: bool,
    licence: str | None,
    parity_images: Path | None,
    no_parity: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Turn CHECKPOINT into a bundle and compare it with PyTorch.

    CHECKPOINT is a folder, the name of a recipe (models/*.toml), or a name on the Hugging Face hub.
    """
    with export_packages("exporting"):
        from lrs_edge.export import ExportOptions, Precisions, export_bundle

    options = ExportOptions(
        vision_tower=vision_tower,
        name=name,
        precisions=Precisions.all("int8" if precision == "int8" else "fp32"),
        licence=licence,
        parity=not no_parity,
        parity_images=parity_images,
        force=force,
        attention_layers=attention_layers or (),
        vision_attention=vision_attention,
    )
    result = export_bundle(checkpoint, target, options, step_teller(quiet=quiet))
    write_result(_report(result), None)


def _report(result: ExportResult) -> str:
    """What was written and how well it agrees, as text."""
    files = result.manifest.files.values()
    size = sum(entry.size for entry in files)
    lines = [f"{result.path}: {len(files)} files, {size / 1e6:.1f} MB"]
    if result.report is None:
        lines.append("parity: not checked")
    else:
        lines.append(f"parity with PyTorch on {result.report.images}:")
        lines += [_row(row) for row in result.report.rows]
    return "\n".join(lines) + "\n"


def _row(row: ParityRow) -> str:
    return f"  {row.stage:<7} {row.measure:<17} {row.shown:<10} (limit: {row.sign} {row.limit:g})"
