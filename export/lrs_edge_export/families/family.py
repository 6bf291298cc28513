"""What one family of checkpoints declares: whose it is, what it takes, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.scoring import LLAVA, ScoringLayer

#: Reads a checkpoint, with the folder or the hub name of the vision tower that the user named.
Reader = Callable[[Checkpoint, str | None], Model]


def _every(_: Settings) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """One family; `registry.FAMILIES` lists all.

    Attributes:
        name: Of the family, as `Model.family` and the manifest have it.
        architectures: Values of `architectures` in config.json that it reads.
        title: What people call such checkpoints; in messages and in the docs.
        read: Reads a checkpoint. Raises ExportError where it cannot be used.
        claims: Whether a config.json with one of the architectures is of this family; for
            architectures that several families share. May raise ExportError with the reason why
            no family takes it: it is asked before weights are fetched.
        scoring: The layer that scores where `--rfm from-llm` names none.
    """

    name: str
    architectures: tuple[str, ...]
    title: str
    read: Reader
    claims: Callable[[Settings], bool] = _every
    scoring: ScoringLayer = LLAVA
