"""`lrs-edge models`: verify bundles, list what can become one; `models_kept.py` has the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrs_edge.commands.common import (
    BundlePath,
    debug_option,
    format_option,
    printable,
    write_json,
    write_result,
)
from lrs_edge.commands.models_kept import (
    list_models,
    pack_model,
    pull_model,
    remove_model,
    unpack_file,
)
from lrs_edge.errors import BundleError

if TYPE_CHECKING:
    from lrs_edge_export.families.recipes import Recipe


@click.group()
def models() -> None:
    """Fetch, list, verify, pack and remove model bundles, and list recipes.

    They lie in a folder of their own: LRS_EDGE_MODELS, else lrs-edge/models in the user's data
    folder (XDG_DATA_HOME, ~/.local/share). `--model NAME` finds them there.
    """


for command in (list_models, pull_model, pack_model, unpack_file, remove_model):
    models.add_command(command)


@models.command()
@click.argument("bundle", type=BundlePath(), required=False)
@debug_option
def verify(bundle: Path | None) -> None:
    """Check the size and SHA-256 of every file of BUNDLE (the embedded model when left out).

    BUNDLE is a directory, or a name of `lrs-edge models list`, which then shows when this was.
    Exit code 4 where a file is not what the manifest says.
    """
    from lrs_edge.bundle.bundle import default_bundle_path, verify_bundle
    from lrs_edge.transfer.folder import note_verified

    path = default_bundle_path() if bundle is None else bundle
    checks = verify_bundle(path)
    width = max((len(check.path) for check in checks), default=0)
    lines = [
        f"{'BAD' if check.problem else 'ok':<4} {check.path:<{width}} {check.size:>13,}"
        + (f"  {check.problem}" if check.problem else "")
        for check in checks
    ]
    write_result(printable("\n".join(lines)) + "\n", None)
    failed = [f"{check.path} ({check.problem})" for check in checks if check.problem]
    if failed:
        raise BundleError(
            f"{path}: {len(failed)} of {len(checks)} files are not as the manifest says: "
            f"{', '.join(failed)}; copy or export the bundle again"
        )
    note_verified(path)


@models.command()
@click.option(
    "--fits",
    type=click.IntRange(min=1),
    metavar="GB",
    help="Only what a device of so much memory holds.",
)
@format_option("text", "json")
@debug_option
def recipes(fits: int | None, output_format: str) -> None:
    """List checkpoints that are recommended, with what they take in memory.

    `lrs-edge export NAME -o BUNDLE` makes a bundle of one; `lrs-edge info --memory NAME` says what
    each stage takes. Memory is reckoned with as long a context as the model has, at most 8,192
    tokens; `-` is what takes more than a device of --fits GB holds.
    """
    from lrs_edge_export.families.recipes import all_recipes

    found = [(recipe, _needs(recipe, fits)) for recipe in all_recipes()]
    shown = [(recipe, needs) for recipe, needs in found if any(needs.values())]
    if output_format == "json":
        write_json([_recipe_facts(recipe, needs) for recipe, needs in shown])
    else:
        write_result(printable("\n".join(_recipe_lines(shown))) + "\n", None)


def _needs(recipe: Recipe, fits: int | None) -> dict[str, int | None]:
    """Bytes at each precision; None where a device of so many GB does not hold it."""
    from lrs_edge.bundle.memory_sizes import PRECISIONS

    needs = {precision: recipe.need(precision) for precision in PRECISIONS}
    return {
        precision: need.total if fits is None or need.fits(fits) else None
        for precision, need in needs.items()
    }


def _recipe_facts(recipe: Recipe, needs: dict[str, int | None]) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "checkpoint": recipe.checkpoint,
        "architecture": recipe.architecture,
        "taken": recipe.taken,
        "weights": recipe.size.weights,
        "licence": recipe.licence,
        "memory": needs,
        "context": recipe.size.context,
        "command": recipe.command,
        "source": recipe.source,
        "notes": recipe.notes.strip(),
    }


def _recipe_lines(shown: list[tuple[Recipe, dict[str, int | None]]]) -> list[str]:
    """A line for each recipe; those that export does not take yet are marked."""
    from lrs_edge.bundle.memory_sizes import PRECISIONS

    titles = ["name", "weights", *(f"{name} GB" for name in PRECISIONS), "licence"]
    rows = [titles]
    for recipe, needs in shown:
        sizes = ("-" if size is None else f"{size / 1e9:.1f}" for size in needs.values())
        mark = "" if recipe.taken else " *"
        weights = f"{recipe.size.weights / 1e9:.2f} B"
        rows.append([f"{recipe.name}{mark}", weights, *sizes, recipe.licence])
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = []
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]))
    if any(not recipe.taken for recipe, _ in shown):
        lines += ["", "* export does not take this layout yet (docs/families.md)"]
    return lines
