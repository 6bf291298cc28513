"""Vision towers that lie beside a checkpoint or inside it, in folders of their own."""

from __future__ import annotations

from pathlib import Path

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.hub import download, is_hub_name
from lrs_edge_export.checkpoints.tensors import Scoped, TensorSource


def find_tower(checkpoint: Checkpoint, given: str | None) -> Path:
    """The vision tower's folder.

    Looked for, in this order: what the user names; `config.mm_vision_tower` as a path, beside the
    checkpoint, and inside it; on the hub, if the user named a hub tower or a hub checkpoint.

    Raises:
        ExportError: It is nowhere, or cannot be downloaded.
    """
    if given is not None:
        if Path(given).is_dir():
            return Path(given)
        if is_hub_name(given):
            return download(given)
        raise ExportError(f"--vision-tower {given} is neither a folder nor a hub name")
    name = checkpoint.config.text("mm_vision_tower")
    root = checkpoint.path.resolve()
    last = name.rstrip("/").rsplit("/", 1)[-1]
    for candidate in (Path(name), root.parent / name, root.parent / last, root / name, root / last):
        if last and (candidate / "config.json").is_file():
            return candidate
    if checkpoint.from_hub and is_hub_name(name):
        return download(name)
    raise ExportError(
        f"the vision tower {name} of {checkpoint.name} is neither beside the checkpoint nor inside "
        "it; pass its folder, or its hub name, with --vision-tower"
    )


def tower_settings(folder: Path) -> Settings:
    """The tower's `vision_config`, or all of its config where it is a vision model alone."""
    config = Settings.load(folder / "config.json")
    nested = config.values.get("vision_config")
    return Settings(nested, config.path) if isinstance(nested, dict) else config


def tower_tensors(source: TensorSource, prefix: str) -> Scoped:
    """A tower's weights: CLIPVisionModel wrote `vision_model.` first, since transformers 5 not."""
    nested = f"{prefix}vision_model."
    return Scoped(source, nested if any(n.startswith(nested) for n in source.names()) else prefix)
