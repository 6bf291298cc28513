"""The directory that an export or a training leaves: made beside its target, then moved there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrs_edge.errors import ExportError


def check_target(target: Path, *, mark: str, made_by: str, force: bool) -> None:
    """Refuse a target that is in the way, before any work is done.

    Args:
        target: The directory that will be written.
        mark: A file that every such directory has.
        made_by: What it would be, for the message.
        force: An existing directory that has the mark may be replaced.

    Raises:
        ExportError: The target is a file, or a directory that is not empty and may not be replaced.
    """
    if target.is_dir():
        if any(target.iterdir()) and not force:
            raise ExportError(f"{target} exists and is not empty; pass --force to replace it")
        if any(target.iterdir()) and not (target / mark).is_file():
            raise ExportError(f"{target} is not {made_by} (no {mark}); remove it yourself")
    elif target.exists() or target.is_symlink():
        raise ExportError(f"{target} exists and is not a directory; name another one")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new directory beside the target that takes its place if all goes well."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder = work / "new"
        folder.mkdir()
        yield folder
        _swap(folder, target, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(folder: Path, target: Path, old: Path) -> None:
    """Put a directory in another's place; that cannot be one step, but it can be undone."""
    if target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
