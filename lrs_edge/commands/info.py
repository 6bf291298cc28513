"""`lrs-edge info`: facts about an image, or about a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lrs_edge.bundle.parity import StageParity
from lrs_edge.commands.common import (
    BundlePath,
    ImagePath,
    bands_option,
    crs_option,
    debug_option,
    format_option,
    printable,
    restrict_image_formats,
    take_view,
    view_options,
    write_json,
    write_result,
)
from lrs_edge.commands.search_options import device_name
from lrs_edge.errors import BundleError, UsageError

if TYPE_CHECKING:
    from lrs_edge.bundle.bundle import Bundle
    from lrs_edge.bundle.calibration import Calibration
    from lrs_edge.bundle.parity import Accuracy, Figure, ParityReport
    from lrs_edge.raster.raster import RasterInfo

_MANIFEST = "manifest.json"

#: No model here has a longer context.
MOST_CONTEXT = 1 << 20


@click.command()
@click.argument("path", metavar="IMAGE|BUNDLE|CHECKPOINT", type=ImagePath())
@click.option(
    "--memory",
    is_flag=True,
    help="What a bundle takes in memory while it answers, stage by stage, and which devices hold "
    "it; of a checkpoint, or the name of a recipe, what it would take at each precision.",
)
@click.option(
    "--context",
    type=click.IntRange(1, MOST_CONTEXT),
    metavar="N",
    help="With --memory: tokens in the language model's cache; default: as many as it may have.",
)
@click.option(
    "-m",
    "--model",
    "bundle",
    type=BundlePath(),
    metavar="BUNDLE",
    help="Show the levels that this model would search; the embedded model when left out.",
)
@click.option(
    "--device",
    type=device_name,
    metavar="DEVICE",
    help="Load BUNDLE there (as `ask --device` takes it) and show where every node of its graphs "
    "runs.",
)
@bands_option
@crs_option
@view_options[0]
@view_options[1]
@view_options[2]
@format_option("text", "json")
@debug_option
def info(
    path: Path,
    memory: bool,
    context: int | None,
    bundle: Path | None,
    device: str | None,
    bands: tuple[int, ...] | None,
    crs: str | None,
    output_format: str,
    **view: Any,
) -> None:
    """Show what lrs-edge knows about IMAGE or BUNDLE.

    For an image: its size, bands and place, and the levels that a search would visit. For a bundle:
    its files, precisions, limits, and how exactly it agrees with its checkpoint. With --memory:
    what a bundle, or a checkpoint by its config.json alone, takes in memory.
    """
    if memory:
        from lrs_edge.commands.memory_table import memory_facts, memory_lines

        facts = memory_facts(path, context)
        if output_format == "json":
            write_json(facts)
        else:
            write_result(printable("\n".join(memory_lines(facts))) + "\n", None)
        return
    if context is not None:
        raise UsageError("--context says how much memory a model takes; add --memory")
    if path.is_dir() or path.name == _MANIFEST:
        facts = _bundle_facts(path.parent if path.name == _MANIFEST else path, device)
    elif device is not None:
        raise UsageError(f"--device says where a bundle runs, and {path} is none")
    else:
        facts = _image_facts(path, bundle, bands, crs, take_view(view))
    if output_format == "json":
        write_json(facts)
    else:
        write_result(printable("\n".join(_lines(facts))) + "\n", None)


def _image_facts(
    path: Path,
    bundle: Path | None,
    bands: tuple[int, ...] | None,
    crs: str | None,
    view: dict[str, Any],
) -> dict[str, Any]:
    from lrs_edge.raster.raster import Raster

    restrict_image_formats()
    with Raster.open(path, bands=bands, crs=crs, **view) as raster:
        facts = _raster_facts(raster.info)
    try:
        model, levels = _levels(facts["height"], facts["width"], bundle)
    except BundleError:
        # Facts about an image need no model, unless the user named one.
        if bundle is not None:
            raise
        return facts
    return {**facts, "model": model, "levels": levels}


def _raster_facts(info: RasterInfo) -> dict[str, Any]:
    return {
        "path": str(info.path),
        "driver": info.driver,
        "width": info.width,
        "height": info.height,
        "band_count": info.band_count,
        "dtype": info.dtype,
        "bands": list(info.bands),
        "crs": info.crs,
        "gsd": info.gsd,
        "centre_wgs84": None if info.centre_wgs84 is None else list(info.centre_wgs84),
        "nodata": info.nodata,
        "has_alpha": info.has_alpha,
        "orientation": info.orientation,
        "page": info.page,
        "tiled": info.tiled,
        "block_shape": list(info.block_shape),
        "overviews": list(info.overviews),
        "stretch": None if info.stretch is None else [list(pair) for pair in info.stretch],
        "warnings": list(info.warnings),
    }


def _levels(height: int, width: int, bundle: Path | None) -> tuple[str, list[dict[str, int]]]:
    """Name of the model, and the levels that it would search under the `full` policy."""
    from lrs_edge.bundle.bundle import default_bundle_path, read_manifest
    from lrs_edge.pyramid.levels import build_pyramid

    manifest = read_manifest(default_bundle_path() if bundle is None else bundle)
    pyramid = build_pyramid(
        height,
        width,
        tile=manifest.vision.tile,
        base_side=manifest.search.base_side,
        stretched=manifest.vision.stretched,
    )
    levels = [
        {
            "level": index,
            "width": level.width,
            "height": level.height,
            "tile_rows": level.tile_rows,
            "tile_cols": level.tile_cols,
            "tiles": level.tile_count,
        }
        for index, level in enumerate(pyramid.levels)
    ]
    return manifest.name, levels


def _bundle_facts(path: Path, device: str | None) -> dict[str, Any]:
    from lrs_edge.bundle.bundle import open_bundle
    from lrs_edge.engines.placement import refusals

    bundle = open_bundle(path, verify=False)
    refused = refusals(bundle.manifest)
    facts = {
        **_manifest_facts(bundle),
        "runs_on": [name for name, problem in refused.items() if not problem],
        "refused_on": {name: problem for name, problem in refused.items() if problem},
    }
    if device is None:
        return facts
    from lrs_edge.engine import load

    with load(path, device=device, verify=False) as engine:
        return {
            **facts,
            "placement": [asdict(place) for place in engine.places],
            "warnings": list(engine.warnings),
        }


def _manifest_facts(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "name": manifest.name,
        "family": manifest.family,
        "licence": manifest.licence,
        "source": manifest.source.name,
        "created": manifest.created,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "files": [
            {"path": name, "role": entry.role, "bytes": entry.size}
            for name, entry in manifest.files.items()
        ],
        "tile": manifest.vision.tile,
        "tokens_per_tile": manifest.vision.per_tile**2,
        "base_side": manifest.search.base_side,
        "keep_ratio": manifest.search.keep_ratio,
        "precisions": {
            "vision": manifest.vision.precision,
            "rfm": manifest.rfm.precision if manifest.rfm else None,
            "llm": manifest.llm.precision,
        },
        "layers": {"rfm": manifest.rfm.layers if manifest.rfm else 0, "llm": manifest.llm.layers},
        "hidden": manifest.llm.hidden,
        "max_length": manifest.limits.max_length,
        "max_positions": manifest.limits.max_positions,
        "parity": _parity(manifest.parity),
        "stages": _stages(manifest.parity),
        "choices": msgspec.to_builtins(manifest.parity.choices),
        "accuracy": _accuracy(manifest.parity.accuracy),
        "calibration": _calibration(manifest.calibration),
        "tools": manifest.tools,
    }


def _calibration(fitted: Calibration | None) -> dict[str, Any] | None:
    """What the calibration of a bundle covers; None without one."""
    if fitted is None:
        return None
    domain = fitted.domain
    return {
        "questions": fitted.questions,
        "calibration_error": fitted.calibration_error,
        "threshold": None if fitted.yes_no is None else fitted.yes_no.threshold,
        "other_answers": fitted.open is not None,
        "ground_resolution": [] if domain is None else [list(part) for part in domain.resolutions],
        "colours": domain is not None and domain.colours is not None,
    }


def _parity(report: ParityReport) -> dict[str, Any]:
    """Whether and on what a bundle was compared with its checkpoint."""
    if report.images is None:
        return {}
    return {"images": report.images, "passed": report.passed}


def _stages(report: ParityReport) -> list[dict[str, Any]]:
    """What the exporter measured of each stage; what it did not note is left out."""
    found = []
    compared = {stage.stage for stage in report.stages}
    others = [StageParity(name, ()) for name in report.kept_higher if name not in compared]
    for stage in (*report.stages, *others):
        known = {"precision": stage.precision, "bytes": stage.bytes, "mode": stage.mode}
        if stage.stage in report.kept_higher:
            known["kept_higher"] = " ".join(report.kept_higher[stage.stage])
        figures = {one.measure.replace(" ", "_"): _figure_facts(one) for one in stage.figures}
        facts = {name: value for name, value in known.items() if value is not None}
        found.append({"stage": stage.stage, "figures": figures, **facts})
    return found


def _figure_facts(figure: Figure) -> dict[str, Any]:
    if figure.limit is None:
        return {"value": figure.value}
    at_most = figure.sign == "<="
    return {
        "value": figure.value,
        "limit": figure.limit,
        "at_most": at_most,
        "passed": figure.passed,
    }


def _accuracy(accuracy: Accuracy | None) -> dict[str, Any]:
    """Answers to questions, where the exporter asked any."""
    if accuracy is None:
        return {}
    known = msgspec.structs.asdict(accuracy).items()
    return {
        "share": accuracy.share,
        **{name: value for name, value in known if value is not None},
    }


def _parity_lines(facts: dict[str, Any]) -> list[str]:
    """Parity as a table, one line per stage; accuracy below it."""
    parity = facts["parity"]
    if not parity:
        lines = ["parity with the checkpoint: not checked"]
    else:
        lines = [f"parity with the checkpoint, on {parity['images']}:"]
    for stage in facts["stages"]:
        figures = stage["figures"]
        known = [figure["passed"] for figure in figures.values() if "passed" in figure]
        cells = [stage["stage"].ljust(7), str(stage.get("precision", "")).ljust(12)]
        if "bytes" in stage:
            cells.append(f"{stage['bytes'] / 1e6:9,.1f} MB")
        cells += [_figure(name, figure) for name, figure in figures.items()]
        if "mode" in stage:
            cells.append(stage["mode"])
        if "kept_higher" in stage:
            cells.append(f"{len(str(stage['kept_higher']).split())} layers kept higher")
        if known:
            cells.append("passed" if all(known) else "FAILED")
        lines.append("  " + "  ".join(cells))
    accuracy = facts["accuracy"]
    if accuracy:
        before = accuracy.get("baseline_correct")
        lines.append(
            f"accuracy on {accuracy.get('dataset')}: {accuracy.get('correct')} of "
            f"{accuracy.get('total')} right"
            + (f"; {before} before quantization" if before is not None else "")
        )
    return lines


def _figure(name: str, figure: dict[str, Any]) -> str:
    """Such as `cosine 0.99993 (>= 0.98)`."""
    shown = f"{name.replace('_', ' ')} {figure['value']:.5g}"
    if "limit" not in figure:
        return shown
    return f"{shown} ({'<=' if figure['at_most'] else '>='} {figure['limit']:g})"


def _lines(facts: dict[str, Any]) -> list[str]:
    """Facts one to a line; lists of tables below them, indented."""
    width = max(len(name) for name in facts)
    lines = []
    for name, value in facts.items():
        label = name.replace("_", " ").ljust(width)
        if name == "parity":
            lines += _parity_lines(facts)
        elif name in ("stages", "choices", "accuracy"):
            continue
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [label.rstrip(), *("  " + _row(row) for row in value)]
        else:
            lines.append(f"{label}  {_text(value)}")
    return lines


def _row(row: dict[str, Any]) -> str:
    if "nodes" in row:
        nodes = ", ".join(f"{count} nodes by {name}" for name, count in row["nodes"].items())
        return f"{row['stage']}: {row['engine']} on {row['device']}, {nodes or 'not told by what'}"
    if "tile_rows" in row:
        return (
            f"{row['level']}: {row['width']} x {row['height']} px, "
            f"{row['tile_rows']} x {row['tile_cols']} = {row['tiles']} tiles"
        )
    return f"{row['path']} ({row['role']}, {row['bytes']:,} bytes)"


def _text(value: object) -> str:
    if value is None or value in ([], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(_text(part) for part in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
