"""The user's folder of models: where it is, what lies in it, how a bundle comes and goes.

Each folder in it that holds a manifest is a bundle, whoever put it there. Beside them lie
`.records`, which remembers where bundles came from and when their hashes held, and `.partial`,
what is being fetched. Nothing here makes the folder before something is put into it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from lrs_edge.bundle.bundle import (
    MANIFEST_NAME,
    default_bundle_path,
    read_manifest,
)
from lrs_edge.bundle.files import read_limited, walk
from lrs_edge.bundle.manifest import MAX_MANIFEST_BYTES, Manifest
from lrs_edge.errors import BundleError, LrsEdgeError, UsageError
from lrs_edge.files import part_name, replacing
from lrs_edge.transfer.members import is_plain_name
from lrs_edge.transfer.writing import not_written

#: Environment variable that names the folder.
FOLDER_VARIABLE = "LRS_EDGE_MODELS"

#: What the embedded model is called where a name is asked for.
EMBEDDED = "lrs-edge-nano"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}[A-Za-z0-9_-]|[A-Za-z0-9]")
_RECORDS, _PARTIAL = ".records", ".partial"
_MAX_RECORD = 4 << 20


class Record(msgspec.Struct, frozen=True):
    """Where a bundle came from, and how its files were when all hashes held.

    Attributes:
        source: Address, hub name or path, without secrets.
        verified: Time in UTC, ISO 8601.
        manifest_sha256: In hex.
        files: Size in bytes and time of change in nanoseconds, by name.
    """

    source: str
    verified: str
    manifest_sha256: str
    files: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Model:
    """A bundle as `list` shows it.

    Attributes:
        name: What `--model` takes.
        path: Folder of the bundle.
        size: Bytes of all files that the manifest lists.
        licence: As the manifest says.
        source: Where it came from; empty where nobody noted it.
        verified: When all hashes held, if no file has changed since by size and time; else None.
        manifest_sha256: In hex; with it `pull` takes no other bundle.
        problem: Why it is not a bundle; empty where it is one.
    """

    name: str
    path: str
    size: int = 0
    licence: str = ""
    source: str = ""
    verified: str | None = None
    manifest_sha256: str = ""
    problem: str = ""


def models_folder() -> Path:
    """The folder of models: LRS_EDGE_MODELS, else `lrs-edge/models` in the user's data folder.

    That is XDG_DATA_HOME where it is an absolute path, else `~/.local/share`; on Windows
    LOCALAPPDATA. It need not exist.
    """
    named = os.environ.get(FOLDER_VARIABLE, "")
    if named:
        return Path(os.path.abspath(named))
    data = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_DATA_HOME", "")
    home = Path(data) if os.path.isabs(data) else Path("~/.local/share").expanduser()
    return home / "lrs-edge" / "models"


def find_bundle(path: Path) -> Path:
    """What a user calls a bundle: its folder as it is, else the model of that name."""
    name = str(path)
    if not is_model_name(name) or (path / MANIFEST_NAME).is_file():
        return path
    kept = models_folder() / name
    if (kept / MANIFEST_NAME).is_file():
        return kept
    return default_bundle_path() if name == EMBEDDED and not path.exists() else path


def is_model_name(name: str) -> bool:
    """True for letters, digits, `.`, `_` and `-`, at most 64, that no system takes for more."""
    return _NAME.fullmatch(name) is not None and is_plain_name(name)


def check_model_name(name: str) -> None:
    """Refuse a name that a model cannot have. Raises UsageError."""
    if not is_model_name(name) or name == EMBEDDED:
        raise UsageError(
            f"{name[:200]!r} cannot be the name of a model (letters, digits, '.', '_' and '-', at "
            f"most 64, and not {EMBEDDED}); give it one with --name"
        )


def all_models() -> list[Model]:
    """The embedded model, and all that lie in the folder, by name."""
    found = [_described(EMBEDDED, default_bundle_path(), "embedded", None)]
    folder = models_folder()
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise LrsEdgeError(f"{folder} cannot be listed ({error.strerror})") from error
    for name in names:
        if is_model_name(name):
            record = read_record(name)
            found.append(_described(name, folder / name, record.source if record else "", record))
    return found


def _described(name: str, path: Path, source: str, record: Record | None) -> Model:
    try:
        manifest = read_manifest(path)
        digest = _manifest_hash(path)
    except (BundleError, OSError) as error:
        return Model(name, str(path), source=source, problem=str(error))
    return Model(
        name,
        str(path),
        sum(entry.size for entry in manifest.files.values()),
        manifest.licence,
        source,
        record.verified if record and unchanged(path, record) else None,
        digest,
    )


def read_record(name: str) -> Record | None:
    """What is remembered of a model; None where that is nothing, or cannot be read."""
    path = models_folder() / _RECORDS / f"{name}.json"
    try:
        return msgspec.json.decode(read_limited(path, _MAX_RECORD), type=Record)
    except (OSError, BundleError, msgspec.MsgspecError, ValueError):
        return None


def write_record(name: str, source: str, manifest: Manifest) -> None:
    """Remember that all hashes of a model in the folder hold now. Raises LrsEdgeError."""
    path = models_folder() / name
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    target = models_folder() / _RECORDS / f"{name}.json"
    try:
        record = Record(source, now, _manifest_hash(path), _states(path, manifest))
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as stream:
            stream.write(msgspec.json.encode(record))
    except OSError as error:
        raise not_written(target, error) from error


def unchanged(path: Path, record: Record) -> bool:
    """Whether manifest, sizes and times are those of when the hashes held."""
    try:
        manifest = read_manifest(path)
        return (
            _manifest_hash(path) == record.manifest_sha256
            and _states(path, manifest) == record.files
        )
    except (OSError, BundleError):
        return False


def _manifest_hash(path: Path) -> str:
    return hashlib.sha256(read_limited(path / MANIFEST_NAME, MAX_MANIFEST_BYTES)).hexdigest()


def _states(path: Path, manifest: Manifest) -> dict[str, tuple[int, int]]:
    states = ((name, os.lstat(path / name)) for name in manifest.files)
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states}


def note_verified(path: Path) -> None:
    """Remember that a bundle's hashes hold, where it is one of the folder; nothing elsewhere."""
    path = Path(os.path.abspath(path))
    if path.parent == models_folder() and is_model_name(path.name):
        record = read_record(path.name)
        # Listing less than what is true is no reason to fail where the folder is read-only.
        with suppress(LrsEdgeError):
            write_record(path.name, record.source if record else "", read_manifest(path))


def place_of(name: str) -> Path:
    """Where a new model of a name will lie.

    Raises:
        UsageError: The name cannot be one, or is taken.
    """
    check_model_name(name)
    place = models_folder() / name
    if os.path.lexists(place):
        raise UsageError(
            f"{place} is there already; remove it (lrs-edge models remove {name}), or give the new "
            "one another name with --name"
        )
    return place


def partial_folder() -> Path:
    """Where bundles lie while they are fetched; made here. Raises LrsEdgeError."""
    folder = models_folder() / _PARTIAL
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(folder, error) from error
    return folder


@contextmanager
def temporary_beside(parent: Path) -> Iterator[Path]:
    """A path in a folder for a bundle that is being written; removed where it is left there."""
    path = parent / part_name()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def take_place(staged: Path, place: Path) -> None:
    """Give a bundle whose hashes all hold its own name. Raises LrsEdgeError."""
    try:
        if os.path.lexists(place):
            raise UsageError(f"{place} is there already; remove it first")
        os.rename(staged, place)
    except OSError as error:
        raise not_written(place, error) from error


def removable(name: str) -> Path:
    """The folder of a model that may be removed: a bundle of this folder, with nothing besides.

    Raises:
        UsageError: No such model lies in the folder, it is a link, no bundle, or holds other files.
    """
    folder = models_folder()
    path = folder / name
    if name == EMBEDDED and not os.path.lexists(path):
        raise UsageError(f"{EMBEDDED} is part of this installation; pip uninstall removes it")
    if not is_model_name(name) or path.is_symlink() or not path.is_dir():
        raise UsageError(f"{name[:200]!r} is no model in {folder}; lrs-edge models list shows them")
    try:
        manifest = read_manifest(path)
        known = {MANIFEST_NAME, *manifest.files}
    except BundleError as error:
        record = read_record(name)
        if record is None:
            raise UsageError(
                f"{path} is not a bundle ({error}); remove it by other means"
            ) from error
        known = {MANIFEST_NAME, *record.files}
    others = sorted({entry for entry, _ in walk(path)} - known)
    if others:
        raise UsageError(
            f"{path} holds {others[0]}, which is not of the bundle; move it away first"
        )
    return path


def remove(name: str) -> None:
    """Remove a model: first its name, then its files. Raises UsageError, LrsEdgeError."""
    path = removable(name)
    staged = partial_folder() / f"removed-{uuid.uuid4().hex}"
    try:
        os.rename(path, staged)
        shutil.rmtree(staged)
        (models_folder() / _RECORDS / f"{name}.json").unlink(missing_ok=True)
    except OSError as error:
        raise LrsEdgeError(f"{path} cannot be removed ({error.strerror or error})") from error
