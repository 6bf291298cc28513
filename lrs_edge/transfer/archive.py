"""A bundle in one file: the same bytes for the same bundle, and read as data from a stranger.

The file is a tar archive without compression, since weights hardly compress: the manifest first,
then the files that it lists by name, each a plain file of mode 0644 without owner and time, then
two empty blocks. `tar` lists and extracts it. Nothing else is read: no links, folders, devices,
extended headers or sparse files, so that no header can make the reader take memory or write
anywhere but where the manifest says.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lrs_edge.bundle.bundle import MANIFEST_NAME, open_bundle, read_manifest
from lrs_edge.bundle.files import open_plain, read_limited
from lrs_edge.bundle.manifest import MAX_MANIFEST_BYTES, Manifest
from lrs_edge.errors import BundleError, LrsEdgeError
from lrs_edge.files import replacing
from lrs_edge.transfer.members import MAX_BYTES, check_members
from lrs_edge.transfer.writing import NewFile, check_manifest_hash, not_written, require_space

#: A tar archive consists of blocks of so many bytes.
BLOCK = 512

#: Bytes that are read and written at a time.
_PIECE = 1 << 20

#: Archives end with two empty blocks; tools append more, up to a record.
_END = 2 * BLOCK
_MAX_END = 20 * BLOCK


@dataclass(frozen=True)
class Packed:
    """A packed file: its size in bytes, its SHA-256, and that of the manifest in it."""

    size: int
    sha256: str
    manifest_sha256: str


def pack(root: Path, target: Path) -> Packed:
    """Write a bundle as one file, which appears whole or not at all.

    Raises:
        BundleError: The bundle is not as its manifest says, has names that not every system takes,
            or changes meanwhile.
        LrsEdgeError: The file cannot be written.
    """
    manifest = open_bundle(root).manifest
    check_members(manifest, max_bytes=1 << 62)
    data = read_limited(root / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    digest = hashlib.sha256()
    size = 0

    def write(stream: BinaryIO, piece: bytes) -> None:
        nonlocal size
        digest.update(piece)
        size += len(piece)
        stream.write(piece)

    try:
        with replacing(target) as stream:
            write(stream, _header(MANIFEST_NAME, len(data)))
            write(stream, data + bytes(-len(data) % BLOCK))
            for name, entry in sorted(manifest.files.items()):
                write(stream, _header(name, entry.size))
                held = hashlib.sha256()
                with open_plain(root / name) as source:
                    while piece := source.read(_PIECE):
                        held.update(piece)
                        write(stream, piece)
                if held.hexdigest() != entry.sha256:
                    raise BundleError(f"{root / name} has changed while it was packed; try again")
                write(stream, bytes(-entry.size % BLOCK))
            write(stream, bytes(_END))
    except OSError as error:
        raise not_written(target, error) from error
    return Packed(size, digest.hexdigest(), hashlib.sha256(data).hexdigest())


def unpack(
    packed: Path, root: Path, *, max_bytes: int = MAX_BYTES, manifest_sha256: str = ""
) -> Manifest:
    """Write the bundle of a packed file into a new folder, every hash checked.

    Args:
        packed: What `pack` wrote.
        root: Made here. What was written stays where this fails.
        max_bytes: Most bytes of the bundle.
        manifest_sha256: In hex; empty for any.

    Raises:
        BundleError: The file is no packed bundle, is cut short, holds anything that its manifest
            does not list, or a file is not as the manifest says.
        LrsEdgeError: There is no space, or the folder cannot be written to.
    """
    try:
        stream = open_plain(packed)
    except OSError as error:
        raise LrsEdgeError(f"{packed} cannot be read ({error.strerror or error})") from error
    with stream:
        held = os.fstat(stream.fileno()).st_size
        name, size = _read_header(packed, stream) or ("", 0)
        if name != MANIFEST_NAME or not 0 < size <= MAX_MANIFEST_BYTES:
            raise BundleError(f"{packed} is not a packed bundle: {MANIFEST_NAME} is not its first")
        data = _exactly(packed, stream, size)
        check_manifest_hash(data, manifest_sha256, packed)
        _exactly(packed, stream, -size % BLOCK)
        root.mkdir()
        with NewFile(root, MANIFEST_NAME) as file:
            file.write(data)
        manifest = read_manifest(root)
        total = check_members(manifest, max_bytes)
        sizes = (size, *(entry.size for entry in manifest.files.values()))
        if held < sum(BLOCK + length + -length % BLOCK for length in sizes) + _END:
            raise BundleError(f"{packed} is cut short; copy it again")
        require_space(root, total)
        left = dict(manifest.files)
        while (found := _read_header(packed, stream)) is not None:
            name, size = found
            entry = left.pop(name, None)
            if entry is None or entry.size != size:
                raise BundleError(
                    f"{packed} holds {name[:200]!r} of {size} bytes, which its manifest does not "
                    "list, or not twice, or with another size; do not use it"
                )
            _extract(packed, stream, root, name, size, entry.sha256)
        if left:
            raise BundleError(f"{packed} lacks {min(left)}; pack the bundle again")
        # The first empty block is read already; what follows must be as empty.
        rest = stream.read(_MAX_END + 1)
        if not BLOCK <= len(rest) <= _MAX_END or rest.strip(b"\0"):
            raise BundleError(f"{packed} holds more than the bundle; pack the bundle again")
    return open_bundle(root).manifest


def _header(name: str, size: int) -> bytes:
    """Header of a plain file; sizes from 8 GiB on are binary in it, as GNU tar writes them."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _read_header(packed: Path, stream: BinaryIO) -> tuple[str, int] | None:
    """Name and size in bytes of the next file; None at an empty block. Raises BundleError."""
    block = _exactly(packed, stream, BLOCK)
    if not block.strip(b"\0"):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise BundleError(f"{packed} is not a packed bundle ({error})") from error
    if info.type != tarfile.REGTYPE:
        raise BundleError(
            f"{packed} holds {info.name[:200]!r}, which is no plain file; do not use it"
        )
    return info.name, info.size


def _extract(packed: Path, stream: BinaryIO, root: Path, name: str, size: int, sha256: str) -> None:
    """Write the next file, which is known to be listed. Raises BundleError, LrsEdgeError."""
    digest = hashlib.sha256()
    left = size
    with NewFile(root, name) as file:
        while left:
            piece = _exactly(packed, stream, min(left, _PIECE))
            digest.update(piece)
            file.write(piece)
            left -= len(piece)
    if digest.hexdigest() != sha256:
        raise BundleError(f"{packed}: the SHA-256 of {name} is not the manifest's; copy it again")
    _exactly(packed, stream, -size % BLOCK)


def _exactly(packed: Path, stream: BinaryIO, count: int) -> bytes:
    """So many bytes. Raises BundleError at the end of the file, LrsEdgeError where it fails."""
    data = bytearray()
    while len(data) < count:
        try:
            piece = stream.read(count - len(data))
        except OSError as error:
            raise LrsEdgeError(f"{packed} cannot be read ({error.strerror})") from error
        if not piece:
            raise BundleError(f"{packed} is cut short; copy it again")
        data += piece
    return bytes(data)
