"""Which family reads which checkpoint. A new family is its file, its test, and its line below."""

from __future__ import annotations

from importlib import import_module

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.refusals import REFUSED

#: Modules of this package, each with its `FAMILY`, in the order in which they are asked.
_MODULES = (
    "llava_qwen",
    "llava_llama",
    "llava_original",
    "llava_1_5",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics3",
    "internvl",
    "nano",
)

FAMILIES: tuple[Family, ...] = tuple(
    import_module(f"lrs_edge_export.families.{module}").FAMILY for module in _MODULES
)


def read_model(checkpoint: Checkpoint, vision_tower: str | None = None) -> Model:
    """Read a checkpoint with the reader of its family, and check all of its tensors.

    Args:
        checkpoint: The folder.
        vision_tower: Folder or hub name of the vision tower, where the family needs one.

    Raises:
        ExportError: No family takes the architecture, or the checkpoint is not usable.
    """
    model = find_family(checkpoint).read(checkpoint, vision_tower)
    model.check()
    return model


def find_family(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint.

    Raises:
        ExportError: There is none; it names the reason and all that is taken.
    """
    config = checkpoint.config
    architectures = config.values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES:
        if name in family.architectures and family.claims(config):
            return family
    reason = REFUSED.get(name, "") if isinstance(name, str) else "config.json names none"
    if not reason:
        known = any(name in family.architectures for family in FAMILIES)
        reason = (
            "a checkpoint of it must have one of the layouts below" if known else "it is not known"
        )
    raise ExportError(
        f"{config.path}: checkpoints of architecture {str(name)[:80]!r} are not taken: {reason}. "
        f"Taken are {taken()} (docs/families.md)"
    )


def taken() -> str:
    """All families in words, with their architectures."""
    return "; ".join(f"{family.title} ({', '.join(family.architectures)})" for family in FAMILIES)
