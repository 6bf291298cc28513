"""The directory that an export or a training leaves: made beside its target, then moved there.

One that is killed leaves `.TARGET.xxxxxxxx` there. The next one for the same target removes it,
where it is surely such a folder, and nobody holds its lock.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lrs_edge.errors import ExportError

#: What a folder beside the target holds: a file by which it is known, and two directories.
_MARK, _NEW, _OLD = ".lrs-edge-export", "new", "old"


def check_target(
    target: Path,
    *,
    mark: str,
    made_by: str,
    force: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Refuse a target that is in the way, before any work is done.

    What was left beside it by a process that was killed is removed first. A directory that such a
    process had moved aside, and not yet replaced, is put back.

    Args:
        target: The directory that will be written.
        mark: A file that every such directory has.
        made_by: What it would be, for the message.
        force: An existing directory that has the mark may be replaced.
        progress: Called with a line for what is removed.

    Raises:
        ExportError: The target is a file, or a directory that is not empty and may not be replaced.
    """
    _clear_leftovers(target.absolute(), progress)
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
    lock = _locked(work)
    try:
        # Only now: what has the mark and no lock was left behind.
        (work / _MARK).touch()
        folder = work / _NEW
        folder.mkdir()
        yield folder
        _swap(folder, target, work / _OLD)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _clear_leftovers(target: Path, progress: Callable[[str], None]) -> None:
    """Remove folders that `replacing_folder` made for a target and could not remove itself."""
    # As mkdtemp names them.
    ours = re.compile(re.escape(f".{target.name}.") + "[a-z0-9_]{8}")
    try:
        beside = [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]
    except OSError:
        # Not there yet, or not to be listed: whether it can be written to is found out later.
        return
    for path in beside:
        if path.is_symlink() or not (path / _MARK).is_file():
            continue
        if {entry.name for entry in path.iterdir()} - {_MARK, _NEW, _OLD}:
            continue
        lock = _locked(path)
        if lock is None:
            continue
        try:
            if (path / _OLD).is_dir() and not target.exists():
                (path / _OLD).rename(target)
                progress(f"put back {target}, which a process that was killed had moved aside")
            shutil.rmtree(path, ignore_errors=True)
            progress(f"removed {path}, which a process that was killed left")
        finally:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed or the process ends.

    Returns:
        None where another process holds it, or nobody can.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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
