"""Which files of a manifest are taken from elsewhere: their names, their number and their sizes.

A bundle that is used where it lies needs names inside of it. One that is written to a disk needs
more: names that every file system keeps apart and takes as they are.
"""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath

from lrs_edge.bundle.bundle import MANIFEST_NAME
from lrs_edge.bundle.files import is_inside
from lrs_edge.bundle.manifest import Manifest
from lrs_edge.errors import BundleError

#: Bytes of a whole bundle, unless the user allows more.
MAX_BYTES = 64_000_000_000

#: Bytes of a path in UTF-8: what a tar header of the oldest kind holds.
MAX_NAME_BYTES = 100

#: Names of devices on Windows, and characters that it gives a meaning.
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{n}{i}" for n in ("com", "lpt") for i in range(10)}
_RESERVED = frozenset('\\:*?"<>|')


def check_members(manifest: Manifest, max_bytes: int = MAX_BYTES) -> int:
    """Refuse files that cannot be written safely on every file system.

    Args:
        manifest: Checked by `read_manifest`, which bounds the number of files.
        max_bytes: Most bytes of all files together.

    Returns:
        Bytes of all files together.

    Raises:
        BundleError: A name is not plain, two names differ in case only, one is a folder of another,
            a size is negative, or all sizes together are too large.
    """
    spellings: dict[str, str] = {}
    files = {_folded(MANIFEST_NAME)}
    for name in manifest.files:
        if not is_plain_name(name):
            raise BundleError(f"the manifest names the file {name[:200]!r}, which is not taken")
        if _folded(name) in files:
            raise BundleError(f"the manifest names {name} twice, in another case or as itself")
        files.add(_folded(name))
        for part in (PurePosixPath(name), *PurePosixPath(name).parents):
            if spellings.setdefault(_folded(str(part)), str(part)) != str(part):
                raise BundleError(f"the manifest names {part} in two spellings")
    for name in manifest.files:
        if any(_folded(str(parent)) in files for parent in PurePosixPath(name).parents):
            raise BundleError(f"the manifest names {name} inside of a file")
    if any(entry.size < 0 for entry in manifest.files.values()):
        raise BundleError("the manifest has a negative size")
    total = sum(entry.size for entry in manifest.files.values())
    if total > max_bytes:
        raise BundleError(
            f"the bundle has {total / 1e9:.1f} GB, and at most {max_bytes / 1e9:.1f} GB are taken; "
            "allow more with --max-size where you trust it"
        )
    return total


def is_plain_name(name: str) -> bool:
    """True for a relative path that means the same on every system, in its shortest spelling."""
    parts = name.split("/")
    return (
        is_inside(name)
        and str(PurePosixPath(name)) == name
        and len(name.encode()) <= MAX_NAME_BYTES
        and not _RESERVED & set(name)
        and all(
            part[-1:] not in (".", " ") and part.split(".")[0].casefold() not in _DEVICES
            for part in parts
        )
    )


def _folded(name: str) -> str:
    """What a file system that knows no case, or composes characters, takes a name for."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
