"""Recipes: what is known about released checkpoints, one TOML file each in `models/`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.hub import is_hub_name, unknown


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to export one released checkpoint.

    Attributes:
        name: Short name for the command line.
        checkpoint: Hub name.
        family: Reader that reads it.
        vision_tower: Hub name of its vision tower.
        template: Conversation template.
        licence: Of the weights, as far as their publishers state it.
        rfm_layers: Of `--rfm from-llm` without a number; 0 for the family's default.
        rfm_source: Where that number is from.
        notes: For the reader of the file.
    """

    name: str
    checkpoint: str
    family: str
    vision_tower: str
    template: str
    licence: str
    rfm_layers: int = 0
    rfm_source: str = ""
    notes: str = ""


def all_recipes() -> list[Recipe]:
    """All recipes of this installation, sorted by file name.

    Raises:
        ExportError: A file is not a recipe.
    """
    files = (entry for entry in resources.files("lrs_edge_models").iterdir())
    found = []
    for entry in sorted((f for f in files if f.name.endswith(".toml")), key=lambda f: f.name):
        try:
            found.append(msgspec.toml.decode(entry.read_bytes(), type=Recipe))
        except msgspec.DecodeError as error:
            raise ExportError(f"models/{entry.name} is not a recipe ({error})") from error
        except ImportError:
            # Python 3.10 reads no TOML by itself; folders and hub names still work.
            return []
    return found


def find_recipe(name: str) -> Recipe | None:
    """The recipe whose short name or hub name this is; None when there is none.

    Raises:
        ExportError: A file is not a recipe.
    """
    wanted = name.lower()
    for recipe in all_recipes():
        if wanted in (recipe.name.lower(), recipe.checkpoint.lower()):
            return recipe
    return None


def resolve(name: str) -> tuple[str, Recipe | None]:
    """What the user calls a checkpoint: a folder, or else a recipe's name, or else a hub name.

    Returns:
        Folder or hub name, and the recipe, if there is one for it.

    Raises:
        ExportError: A file is not a recipe.
    """
    recipe = None if Path(name).is_dir() else find_recipe(name)
    return (recipe.checkpoint if recipe else name), recipe


def check_name(name: str) -> None:
    """Refuse what cannot be a checkpoint, before anything is imported for it or downloaded.

    Args:
        name: As for `resolve`.

    Raises:
        ExportError: It is none of these, or a folder without a `config.json` that can be read.
    """
    found, recipe = resolve(name)
    if Path(found).is_dir():
        find_checkpoint(found)
    elif Path(found).exists():
        raise ExportError(f"{found} is a file; name the folder of a checkpoint")
    elif recipe is None and not is_hub_name(found):
        raise unknown(found)
