"""A bundle with another calibration in its manifest; all other files stay as they are."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from lrs_edge.bundle.bundle import MANIFEST_NAME, Bundle
from lrs_edge.bundle.calibration import Calibration
from lrs_edge.bundle.limits import check_limits
from lrs_edge.bundle.manifest import Manifest
from lrs_edge.errors import LrsEdgeError, UsageError
from lrs_edge.files import replacing


def check_target(bundle: Path, target: Path) -> None:
    """Refuse a target that is in the way, before any work is done.

    Raises:
        UsageError: It is there, and neither the bundle itself nor an empty folder.
    """
    if _is_same(bundle, target):
        return
    if os.path.isdir(target) and not os.listdir(target):
        return
    if os.path.lexists(target):
        raise UsageError(
            f"{target} exists; name a new folder, or {bundle} itself to change its manifest"
        )


def write_calibrated(bundle: Bundle, target: Path, calibration: Calibration) -> Manifest:
    """Write a copy of a bundle with a calibration; the hashes of its files stay right.

    A copy appears whole or not at all. Where the target is the bundle itself, its manifest alone is
    replaced.

    Args:
        bundle: Opened, so that its files are as its manifest says.
        target: A folder that is not there, is empty, or is the bundle's.
        calibration: In place of any that it has.

    Returns:
        The manifest that was written.

    Raises:
        BundleError: The calibration holds values that no bundle may have.
        UsageError: See `check_target`.
        LrsEdgeError: The target cannot be written.
    """
    check_target(bundle.path, target)
    manifest = msgspec.structs.replace(bundle.manifest, calibration=calibration)
    check_limits(target / MANIFEST_NAME, manifest)
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    try:
        if _is_same(bundle.path, target):
            with replacing(target / MANIFEST_NAME) as stream:
                stream.write(data)
        else:
            _copy(bundle, target, data)
    except OSError as error:
        raise LrsEdgeError(
            f"{target} cannot be written ({error.strerror or error}); check the free space and the "
            "permissions"
        ) from error
    return manifest


def _copy(bundle: Bundle, target: Path, manifest: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".lrs-edge-", dir=target.parent))
    try:
        folder = work / "new"
        folder.mkdir()
        for name in bundle.manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(bundle.file(name), folder / name)
        (folder / MANIFEST_NAME).write_bytes(manifest)
        if target.is_dir():
            target.rmdir()
        folder.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_same(bundle: Path, target: Path) -> bool:
    return os.path.isdir(target) and os.path.samefile(bundle, target)
