"""What `lrs-edge info --memory` tells: of a bundle, or of a checkpoint by its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrs_edge.bundle.memory import DEVICES_GB, USABLE
from lrs_edge.errors import UsageError

if TYPE_CHECKING:
    from lrs_edge.bundle.memory import Need

_MANIFEST, _CONFIG = "manifest.json", "config.json"


def memory_facts(path: Path, context: int | None) -> dict[str, Any]:
    """Memory of a model while it answers, in bytes.

    Args:
        path: A bundle, a checkpoint's folder, or the name of a recipe.
        context: Tokens in the language model's cache; None for as many as it may have.

    Raises:
        UsageError: It is none of these.
        BundleError: The bundle is damaged.
        ExportError: The checkpoint's config is damaged, or of an architecture that is not known.
    """
    needs, source = _needs(path, context)
    return {
        "name": needs[0].name,
        "source": source,
        "context": needs[0].context,
        "devices": {
            f"{size} GB": [_precision(need) for need in needs if need.fits(size)]
            for size in DEVICES_GB
        },
        "precisions": [_need_facts(need) for need in needs],
    }


def _needs(path: Path, context: int | None) -> tuple[list[Need], str]:
    folder = path.parent if path.name in (_MANIFEST, _CONFIG) else path
    if (folder / _MANIFEST).is_file():
        from lrs_edge.bundle.bundle import open_bundle
        from lrs_edge.bundle.memory import of_bundle

        return [of_bundle(open_bundle(folder, verify=False), context)], "bundle"
    from lrs_edge.bundle.memory_sizes import PRECISIONS, of_sizes
    from lrs_edge_export.checkpoints.checkpoint import Settings
    from lrs_edge_export.families.recipes import find_recipe
    from lrs_edge_export.families.sizes import read_sizes

    if (folder / _CONFIG).is_file():
        size = read_sizes(Settings.load(folder / _CONFIG), folder.resolve().name)
        source = "config.json"
    elif (recipe := find_recipe(str(path))) is not None:
        size, source = recipe.size, "recipe"
    else:
        raise UsageError(
            f"{path} is neither a bundle nor a checkpoint's folder nor a recipe, so that its "
            "memory cannot be told; `lrs-edge models recipes` lists recipes, and of a checkpoint "
            "on the hub its config.json is enough"
        )
    return [of_sizes(size, precision, context) for precision in PRECISIONS], source


def _precision(need: Need) -> str:
    """Of the language model, which most memory is for."""
    return need.stages[-1].precision


def _need_facts(need: Need) -> dict[str, Any]:
    return {
        "precision": _precision(need),
        "device": need.device,
        "stages": [
            {
                "stage": stage.name,
                "precision": stage.precision,
                "file": stage.file,
                "weights": stage.weights,
                "kv_cache": stage.kv,
                "workspace": stage.workspace,
                "total": stage.total,
            }
            for stage in need.stages
        ],
        "embeddings": need.embeddings,
        "kept_tokens": need.kept,
        "process": need.process,
        "total": need.total,
        "fits_gb": [size for size in DEVICES_GB if need.fits(size)],
    }


def memory_lines(facts: dict[str, Any]) -> list[str]:
    """The same as text: a block for each precision."""
    what = {"bundle": "its files", "config.json": "its config.json alone", "recipe": "its recipe"}
    lines = [
        f"{facts['name']}, reckoned from {what[facts['source']]}; "
        f"{facts['context']:,} tokens in the language model's cache; MB of 10^6 bytes"
    ]
    for need in facts["precisions"]:
        where = "a CPU" if need["device"] == "cpu" else "CUDA"
        lines += ["", f"{need['precision']} on {where}", _row("", *_COLUMNS)]
        for stage in need["stages"]:
            numbers = (stage[key] for key in ("file", "weights", "kv_cache", "workspace", "total"))
            lines.append(_row(f"{stage['stage']}, {stage['precision']}", *map(_mb, numbers)))
        others = need["embeddings"] + need["kept_tokens"] + need["process"]
        lines.append(_row("others", "", "", "", "", _mb(others)))
        lines.append(_row("total", "", "", "", "", _mb(need["total"])))
        lines.append(f"  {_fits(need['fits_gb'])}")
    share = f"{USABLE:.0%}"
    lines += [
        "",
        f"A device holds what takes at most {share} of its memory. Others: embeddings in memory, "
        "tokens of tiles, and the process itself.",
    ]
    return lines


_COLUMNS = ("on disk", "weights", "KV cache", "workspace", "total")


def _row(name: str, *cells: str) -> str:
    return f"  {name:<20}" + "".join(cell.rjust(11) for cell in cells)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def _fits(sizes: list[int]) -> str:
    if not sizes:
        return f"fits none of {', '.join(map(str, DEVICES_GB))} GB"
    others = [size for size in DEVICES_GB if size not in sizes]
    text = f"fits {', '.join(map(str, sizes))} GB"
    return text + (f", not {', '.join(map(str, others))} GB" if others else "")
