"""The model bundle on disk: found, checked, read. Nothing here runs a model.

A bundle is a directory with a `manifest.json` that lists every file with its size and SHA-256. It
is untrusted: paths must stay inside, sizes and hashes must agree, the schema version must be known.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lrs_edge.errors import BundleError
from lrs_edge.manifest import (
    EMBED_TOKENS,
    IMAGE_NEWLINE,
    MAX_MANIFEST_BYTES,
    POSITION_COLS,
    POSITION_ROWS,
    SCHEMA_VERSION,
    DecoderSpec,
    FileEntry,
    Manifest,
    VisionSpec,
)
from lrs_edge.position import ImagePositions

MANIFEST_NAME = "manifest.json"

#: With verification off, files above this size in bytes are still checked for their size only.
SMALL_FILE = 4 << 20

_MAX_DIMENSION = 1 << 20
_MAX_POSITIONS = 1 << 12
#: Operations of a vision graph for one tile; those of the largest towers have 10^13.
_MAX_FLOPS = 1 << 48


@dataclass(frozen=True)
class FileCheck:
    """Result of checking one file: `problem` is empty where it is as the manifest says."""

    path: str
    role: str
    size: int
    problem: str


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been read and whose files have been checked."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: The manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path}: the manifest names {name} but does not list it among its files; "
                "export the bundle again"
            )
        return self.path / name


def default_bundle_path() -> Path:
    """Where the embedded default model lies.

    Raises:
        BundleError: This installation has none.
    """
    try:
        models = Path(str(resources.files("lrs_edge.models")))
    except ModuleNotFoundError:
        # A checkout that is not installed: models/ lies beside the package.
        models = Path(__file__).resolve().parent.parent / "models"
    path = models / "nano" / "bundle"
    if not (path / MANIFEST_NAME).is_file():
        raise BundleError(
            f"the embedded default model is missing ({path}); install lrs-edge again, or name a "
            "bundle with -m"
        )
    return path


def open_bundle(path: str | Path | None = None, *, verify: bool = True) -> Bundle:
    """Read and check a bundle.

    Args:
        path: The bundle's directory; None for the embedded default.
        verify: False skips the hashes of files above `SMALL_FILE`, never their sizes.

    Raises:
        BundleError: Anything about the bundle is not as its manifest says.
    """
    root = default_bundle_path() if path is None else Path(path)
    manifest = read_manifest(root)
    for name, problem in zip(manifest.files, _problems(root, manifest, verify), strict=True):
        if problem:
            raise BundleError(f"{root / name}: {problem}; copy or export the bundle again")
    for name in _unlisted(root, manifest):
        raise BundleError(
            f"{root / name} is not listed in the manifest; a graph could read it unverified: "
            "remove it, or export the bundle again"
        )
    bundle = Bundle(root, manifest)
    for name in _named_files(manifest):
        bundle.file(name)
    return bundle


def verify_bundle(path: str | Path) -> list[FileCheck]:
    """Check every file of a bundle against its manifest, all hashes included.

    Raises:
        BundleError: There is no readable manifest.
    """
    root = Path(path)
    manifest = read_manifest(root)
    listed = [
        FileCheck(name, entry.role, entry.size, problem)
        for (name, entry), problem in zip(
            manifest.files.items(), _problems(root, manifest, verify=True), strict=True
        )
    ]
    problem = "the file is not listed in the manifest"
    named = [name for name in _named_files(manifest) if name not in manifest.files]
    unlisted = sorted({*named, *_unlisted(root, manifest)})
    return listed + [FileCheck(name, "", 0, problem) for name in unlisted]


def read_manifest(root: Path) -> Manifest:
    """Read a manifest and check what can be checked without touching the other files.

    Raises:
        BundleError: It is missing, too large, not valid, of another schema version, or names
            paths outside the bundle.
    """
    path = root / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; not a manifest")
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{root} is not a bundle: {MANIFEST_NAME} cannot be read ({error.strerror}); name the "
            "directory that `lrs-edge export` wrote"
        ) from error
    _check_version(path, data)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a valid manifest: {error}") from error
    for name in manifest.files:
        if not _is_inside(name):
            raise BundleError(f"{path} names the file {name!r}, which is not inside the bundle")
    _check_shapes(path, manifest)
    return manifest


def _check_version(path: Path, data: bytes) -> None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version!r}, this lrs-edge reads {SCHEMA_VERSION}; "
            "update lrs-edge or export the bundle again"
        )


def _check_shapes(path: Path, manifest: Manifest) -> None:
    """Refuse numbers that no model has, before anything is allocated from them."""
    vision = manifest.vision
    decoders: tuple[DecoderSpec, ...] = (manifest.rfm, manifest.llm)
    numbers = [vision.tile, vision.grid, vision.local_pool, manifest.search.base_side]
    numbers += [manifest.limits.max_length, manifest.limits.max_positions]
    for spec in decoders:
        numbers += [spec.layers, spec.heads, spec.kv_heads, spec.head_dim, spec.hidden]
    sound = (
        all(0 < number <= _MAX_DIMENSION for number in numbers)
        and vision.grid % vision.local_pool == 0
        and 0 <= vision.positions <= _MAX_POSITIONS
        and all(0 <= number <= _MAX_FLOPS for number in _flops(vision))
        and all(0 <= spec.intermediate <= _MAX_DIMENSION for spec in decoders)
        and _are_whole(manifest.llm)
        and manifest.rfm.hidden == manifest.llm.hidden
        and all(spec.heads % spec.kv_heads == 0 for spec in decoders)
        and 0 < manifest.search.keep_ratio <= 1
        and manifest.search.base_side >= vision.tile
        and all(deviation > 0 for deviation in vision.std)
        and manifest.repetition_penalty > 0
        and all(0 <= token < manifest.llm.vocabulary for token in manifest.penalised_ids)
        and manifest.limits.max_length > vision.grid**2
        and "{question}" in manifest.prompt.suffix
    )
    if not sound:
        raise BundleError(
            f"{path} holds numbers that do not fit together (tile, grid, heads, limits or prompt); "
            "export the bundle again"
        )


def _flops(vision: VisionSpec) -> tuple[int, ...]:
    """Operations that the manifest says of the vision graphs."""
    tower = vision.tower
    return (vision.flops,) if tower is None else (vision.flops, tower.flops, tower.projector_flops)


def _are_whole(spec: DecoderSpec) -> bool:
    """Whether the segments, where there are any, are all layers, each once and in order."""
    end = 0
    for segment in spec.segments:
        if segment.first_layer != end or segment.layers < 1:
            return False
        end += segment.layers
    return end in (0, spec.layers)


def _named_files(manifest: Manifest) -> list[str]:
    names = [manifest.vision.graph, manifest.rfm.graph, manifest.llm.graph]
    names += [manifest.embeddings, manifest.tokenizer]
    names += [name for name in (manifest.rfm.masked_graph, manifest.llm.int8_kv_graph) if name]
    if manifest.vision.tower is not None:
        names += [manifest.vision.tower.graph, manifest.vision.tower.projector]
    names += [segment.graph for segment in manifest.llm.segments]
    return names


def _unlisted(root: Path, manifest: Manifest) -> list[str]:
    """Files in the bundle that nobody vouches for; a graph's external data could be among them."""
    known = {root / MANIFEST_NAME, *(root / name for name in manifest.files)}
    found = (path for path in root.rglob("*") if not path.is_dir() and path not in known)
    return sorted(str(path.relative_to(root)) for path in found)


def _is_inside(name: str) -> bool:
    """True for a plain relative path in both path syntaxes, without `..`."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return (
        bool(name)
        and "\0" not in name
        and not posix.is_absolute()
        and not windows.is_absolute()
        and not windows.drive
        and ".." not in posix.parts
        and ".." not in windows.parts
    )


def _problems(root: Path, manifest: Manifest, verify: bool) -> list[str]:
    """What is wrong with each file, in the manifest's order; empty where nothing is."""

    def check(item: tuple[str, FileEntry]) -> str:
        name, entry = item
        return _problem(root, name, entry, hashed=verify or entry.size <= SMALL_FILE)

    # hashlib lets other threads run while it works; more than a few would only wait for the disk.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        return list(pool.map(check, manifest.files.items()))


def _problem(root: Path, name: str, entry: FileEntry, *, hashed: bool) -> str:
    path = root / name
    try:
        # A link could point anywhere; what the manifest vouches for must lie in the bundle itself.
        if not path.resolve().is_relative_to(root.resolve()):
            return "leads out of the bundle"
        if not path.is_file():
            return "the file is missing"
        size = path.stat().st_size
        if size != entry.size:
            return f"the file has {size} bytes, the manifest says {entry.size}"
        if hashed and _sha256(path) != entry.sha256:
            return "the file's SHA-256 is not the manifest's"
    except OSError as error:
        return f"the file cannot be read ({error.strerror})"
    return ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    # One buffer that stays in the processor's cache.
    buffer = memoryview(bytearray(256 << 10))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


class Embeddings:
    """Token embeddings, looked up row by row in a memory-mapped safetensors file.

    Args:
        path: File with `embed_tokens` [V, D] and `image_newline` [D]; with positions, also
            `position_rows` and `position_cols` [G, D].
        hidden: D as the manifest says.
        vocabulary: V as the manifest says.
        positions: G as the manifest says, 0 for none.

    Raises:
        BundleError: The file is damaged or its tensors have other shapes.
    """

    def __init__(self, path: Path, hidden: int, vocabulary: int, positions: int = 0) -> None:
        names = (POSITION_ROWS, POSITION_COLS) if positions else ()
        try:
            self._file: Any = safe_open(str(path), framework="numpy")
            self._rows = self._file.get_slice(EMBED_TOKENS)
            newline = self._file.get_tensor(IMAGE_NEWLINE)
            tables = [self._file.get_tensor(name).astype(np.float32) for name in names]
        except (OSError, SafetensorError) as error:
            raise BundleError(
                f"{path} cannot be read ({error}); export the bundle again"
            ) from error
        shape = tuple(self._rows.get_shape())
        if shape != (vocabulary, hidden) or newline.shape != (hidden,):
            raise BundleError(
                f"{path} holds embeddings {shape} and a newline {newline.shape}, the manifest says "
                f"({vocabulary}, {hidden}); export the bundle again"
            )
        if any(table.shape != (positions, hidden) for table in tables):
            raise BundleError(
                f"{path} holds position embeddings {[table.shape for table in tables]}, the "
                f"manifest says ({positions}, {hidden}); export the bundle again"
            )
        self.newline: NDArray[np.float32] = newline.astype(np.float32)
        self.positions = ImagePositions(*tables) if tables else None

    def lookup(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings float32 [n, D] of token ids int64 [n]."""
        rows = np.empty((len(ids), len(self.newline)), np.float32)
        for place, token in enumerate(ids.tolist()):
            rows[place] = self._rows[token : token + 1][0]
        return rows
