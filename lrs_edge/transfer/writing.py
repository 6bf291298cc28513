"""Writing files of a bundle that comes from elsewhere: never over another, never without space."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import TracebackType

from lrs_edge.errors import BundleError, LrsEdgeError

#: Bytes of a disk that are left free.
_SPARE = 16 << 20


class NewFile:
    """A file that was not there, opened for writing.

    Args:
        root: Folder of the bundle.
        name: Checked by `check_members`; its folders are made.

    Raises:
        LrsEdgeError: It is there already, or cannot be written.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._path = root / name
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Fails where the name stands for anything already, a link included.
            self._file = self._path.open("xb")
        except OSError as error:
            raise not_written(self._path, error) from error

    def __enter__(self) -> NewFile:
        return self

    def write(self, data: bytes) -> None:
        """Write all of the data. Raises LrsEdgeError."""
        try:
            self._file.write(data)
        except OSError as error:
            raise not_written(self._path, error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError as failed:
            if kind is None:
                raise not_written(self._path, failed) from failed


def not_written(path: Path, error: OSError) -> LrsEdgeError:
    """The error for a file or folder that cannot be written."""
    return LrsEdgeError(f"{path} cannot be written ({error.strerror or error})")


def require_space(folder: Path, size: int) -> None:
    """Refuse to begin what does not fit on the disk.

    Raises:
        LrsEdgeError: The folder's disk has fewer than `size` bytes free.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if free < size + _SPARE:
        raise LrsEdgeError(
            f"{folder} has {free / 1e9:.2f} GB free, and {size / 1e9:.2f} GB are needed; free some "
            "space, or set LRS_EDGE_MODELS to a folder elsewhere"
        )


def check_manifest_hash(data: bytes, wanted: str, what: object) -> None:
    """Refuse a manifest that is not the one that was wanted.

    Args:
        data: The manifest's bytes.
        wanted: Its SHA-256 in hex; empty for any.
        what: Where it comes from, for the message.

    Raises:
        BundleError: It is another one.
    """
    found = hashlib.sha256(data).hexdigest()
    if wanted and found != wanted.lower():
        raise BundleError(f"{what}: the manifest's SHA-256 is {found}, not {wanted}; do not use it")
