"""Recipes: what is known about released checkpoints, one TOML file each in `models/`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from lrs_edge.bundle.memory import Need
from lrs_edge.bundle.memory_sizes import ModelSize, of_sizes
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Settings, find_checkpoint
from lrs_edge_export.checkpoints.hub import is_hub_name, unknown


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to export one released checkpoint, and how large it is.

    Attributes:
        name: Short name for the command line.
        checkpoint: Hub name.
        licence: Of the weights, as far as their publishers state it.
        source: Where the fields of `config` are from.
        config: The fields of its config.json that say how large it is, and `architectures`.
        vision_tower: Hub name of its vision tower; None where it is in the checkpoint.
        template: Conversation template, where the checkpoint does not bring it.
        rfm_layers: Of `--rfm from-llm` without a number; 0 for the family's default.
        rfm_source: Where that number is from.
        notes: For the reader of the file.
    """

    name: str
    checkpoint: str
    licence: str
    source: str
    config: dict[str, Any]
    vision_tower: str | None = None
    template: str = ""
    rfm_layers: int = 0
    rfm_source: str = ""
    notes: str = ""

    @property
    def architecture(self) -> str:
        """Of its config.json."""
        return str(self.config["architectures"][0])

    @property
    def size(self) -> ModelSize:
        """Sizes by the config's fields. Raises ExportError where they are damaged."""
        from lrs_edge_export.families.sizes import read_sizes

        return read_sizes(Settings(self.config, Path(f"models/{self.name}.toml")), self.name)

    @property
    def taken(self) -> bool:
        """Whether `export` has a reader for its layout."""
        from lrs_edge_export.families.registry import FAMILIES

        return any(self.architecture in family.architectures for family in FAMILIES)

    def need(self, precision: str, context: int | None = None) -> Need:
        """What it takes in memory at one of `PRECISIONS`."""
        return of_sizes(self.size, precision, context, self.rfm_layers or None)

    @property
    def command(self) -> str:
        """Makes a bundle of it."""
        return f"lrs-edge export {self.name} -o {self.name}-int8 --precision int8"


def all_recipes() -> list[Recipe]:
    """All recipes of this installation, the smallest model first.

    Raises:
        ExportError: A file is not a recipe, or they cannot be read.
    """
    files = (entry for entry in resources.files("lrs_edge_models").iterdir())
    found = []
    for entry in sorted((f for f in files if f.name.endswith(".toml")), key=lambda f: f.name):
        try:
            found.append(msgspec.toml.decode(entry.read_bytes(), type=Recipe))
        except msgspec.DecodeError as error:
            raise ExportError(f"models/{entry.name} is not a recipe ({error})") from error
        except ImportError as error:
            raise ExportError(
                "Python before 3.11 needs the package tomli to read recipes; run: pip install tomli"
            ) from error
    return sorted(found, key=lambda recipe: (recipe.size.weights, recipe.name))


def find_recipe(name: str) -> Recipe | None:
    """The recipe whose short name or hub name this is; None when there is none.

    Raises:
        ExportError: A file is not a recipe.
    """
    wanted = name.lower()
    if not wanted:
        return None
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
