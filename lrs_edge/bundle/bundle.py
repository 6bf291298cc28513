"""The model bundle on disk: found, checked, read. Nothing here runs a model.

A bundle is a directory with a `manifest.json` that lists every file with its size and SHA-256. It
is untrusted: paths must stay inside, sizes and hashes must agree, the schema version must be known.
Right hashes say that nobody changed the bundle, not that its maker is honest: what stands in graphs
(`graphs.py`) and in the tokenizer (`tokenizer.py`) is checked too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lrs_edge.bundle.embeddings import check_embeddings
from lrs_edge.bundle.files import is_inside, leads_out, read_limited, sha256_of, walk
from lrs_edge.bundle.graphs import GraphFacts, check_graph, read_facts
from lrs_edge.bundle.limits import check_limits
from lrs_edge.bundle.manifest import (
    EMBED_TOKENS,
    IMAGE_NEWLINE,
    MAX_MANIFEST_BYTES,
    POSITION_COLS,
    POSITION_ROWS,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
)
from lrs_edge.bundle.tokenizer import check_tokenizer
from lrs_edge.bundle.version1 import upgraded
from lrs_edge.errors import BundleError
from lrs_edge.vision.positions import ImagePositions

MANIFEST_NAME = "manifest.json"

#: With verification off, files above this size in bytes are still checked for their size only.
SMALL_FILE = 4 << 20

#: What is told of files that should not be there; the rest are not looked for.
_MAX_UNLISTED = 20
UNLISTED = "the file is not listed in the manifest"
LINKED_FOLDER = "it is a link to a folder, whose files cannot be verified"


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
    _ahead: dict[str, Future[None]] = field(default_factory=dict, compare=False, repr=False)

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

    def graph(self, name: str) -> Path:
        """Path of a graph file, whose content has been checked for what a bundle may hold.

        Raises:
            BundleError: The manifest does not list it, or it holds anything else.
        """
        path = self.file(name)
        ahead = self._ahead.pop(name, None)
        if ahead is None:
            check_graph(self.path, name, _sizes(self.manifest))
        else:
            ahead.result()
        return path

    def graph_facts(self, name: str) -> GraphFacts:
        """What a graph file says of its nodes. Raises BundleError as `graph` does."""
        self.file(name)
        return read_facts(self.path, name, _sizes(self.manifest))

    @contextmanager
    def checking_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, graphs that will soon be asked for are checked while others are loaded.

        Args:
            names: Files, in the order in which `graph` will be asked for them.
        """
        sizes = _sizes(self.manifest)
        with ThreadPoolExecutor(1) as pool:
            for name in names:
                if name in sizes:
                    self._ahead[name] = pool.submit(check_graph, self.path, name, sizes)
            try:
                yield
            finally:
                for ahead in self._ahead.values():
                    ahead.cancel()
                self._ahead.clear()


def default_bundle_path() -> Path:
    """Where the embedded default model lies.

    Raises:
        BundleError: This installation has none.
    """
    try:
        models = Path(str(resources.files("lrs_edge_models")))
    except ModuleNotFoundError:
        # A checkout that is not installed: models/ lies beside the package.
        models = Path(__file__).resolve().parents[2] / "models" / "lrs_edge_models"
    path = models / "nano" / "bundle"
    if not (path / MANIFEST_NAME).is_file():
        raise BundleError(
            f"the embedded default model is missing ({path}); install lrs-edge again, or name a "
            "bundle with -m"
        )
    return path


def open_bundle(
    path: str | Path | None = None,
    *,
    verify: bool = True,
    graphs: bool = True,
    stop: Event | None = None,
) -> Bundle:
    """Read and check a bundle: manifest, files, and what stands in graphs and tokenizer.

    Args:
        path: The bundle's directory; None for the embedded default.
        verify: False skips the hashes of files above `SMALL_FILE`, never their sizes.
        graphs: False leaves graphs to `Bundle.graph`, which checks each before it is loaded.
        stop: Ends the hashing when it is set, from another thread.

    Raises:
        BundleError: Anything about the bundle is not as its manifest says, or is nothing that a
            bundle may contain (docs/bundles.md).
    """
    root = default_bundle_path() if path is None else Path(path)
    manifest = read_manifest(root)
    for name, problem in zip(
        manifest.files, _problems(root, manifest, verify, stop or Event()), strict=True
    ):
        if problem:
            raise BundleError(f"{root / name}: {problem}; copy or export the bundle again")
    for name, problem in _unlisted(root, manifest):
        raise BundleError(
            f"{root / name}: {problem}; a graph could read it unverified: "
            "remove it, or export the bundle again"
        )
    bundle = Bundle(root, manifest)
    for name in _named_files(manifest):
        bundle.file(name)
    for problem in _content_problems(root, manifest, graphs).values():
        raise BundleError(problem)
    return bundle


def verify_bundle(path: str | Path) -> list[FileCheck]:
    """Check every file of a bundle against its manifest, all hashes included, and its content.

    Raises:
        BundleError: There is no readable manifest, or a folder cannot be listed.
    """
    root = Path(path)
    manifest = read_manifest(root)
    problems = dict(zip(manifest.files, _problems(root, manifest, True, Event()), strict=True))
    if not any(problems.values()):
        problems |= _content_problems(root, manifest, graphs=True)
    listed = [
        FileCheck(name, entry.role, entry.size, problems[name])
        for name, entry in manifest.files.items()
    ]
    unlisted = {name: UNLISTED for name in _named_files(manifest) if name not in manifest.files}
    unlisted |= dict(_unlisted(root, manifest))
    return listed + [FileCheck(name, "", 0, problem) for name, problem in sorted(unlisted.items())]


def _content_problems(root: Path, manifest: Manifest, graphs: bool) -> dict[str, str]:
    """What is wrong inside of the files that are to be used, by file."""
    sizes = _sizes(manifest)
    checks: dict[str, Callable[[], None]] = {}
    if graphs:
        checks = {name: partial(check_graph, root, name, sizes) for name in _graphs(manifest)}
        # Where graphs are checked when they are loaded, so is the tokenizer (`Prompt`).
        checks[manifest.tokenizer] = partial(check_tokenizer, root / manifest.tokenizer)
    checks[manifest.embeddings] = partial(check_embeddings, root / manifest.embeddings, manifest)
    found = {}
    for name, check in checks.items():
        # What is not listed is told as such.
        if name not in sizes:
            continue
        try:
            check()
        except BundleError as error:
            found[name] = str(error)
    return found


def read_manifest(root: Path) -> Manifest:
    """Read a manifest and check what can be checked without touching the other files.

    Raises:
        BundleError: It is missing, no plain file, too large, not valid, of another schema version,
            names paths outside the bundle, or holds values that no model has.
    """
    path = root / MANIFEST_NAME
    try:
        if leads_out(root, MANIFEST_NAME):
            raise BundleError(f"{path} leads out of the bundle; copy or export the bundle again")
        data = read_limited(path, MAX_MANIFEST_BYTES)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{root} is not a bundle: {MANIFEST_NAME} cannot be read ({_reason(error)}); name the "
            "directory that `lrs-edge export` wrote"
        ) from error
    try:
        manifest = msgspec.convert(_current(path, data), type=Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(
            f"{path} is not a valid manifest: {error}; export the bundle again"
        ) from error
    for name in (*manifest.files, *_named_files(manifest)):
        if not is_inside(name):
            raise BundleError(
                f"{path} names the file {name[:200]!r}, which is not inside the bundle; "
                "do not use it"
            )
    check_limits(path, manifest)
    return manifest


def _current(path: Path, data: bytes) -> dict[str, Any]:
    """What a manifest holds, in the layout of today. Raises BundleError."""
    try:
        content = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path} is not JSON: {error}; copy or export the bundle again"
        ) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    # True == 1, but is not a version.
    if isinstance(version, int) and not isinstance(version, bool):
        if version == SCHEMA_VERSION:
            return dict(content)
        if version == 1:
            return upgraded(content)
    raise BundleError(
        f"{path} has schema version {version!r}, this lrs-edge reads 1 and {SCHEMA_VERSION}; "
        "update lrs-edge or export the bundle again"
    )


def _sizes(manifest: Manifest) -> dict[str, int]:
    return {str(PurePosixPath(name)): entry.size for name, entry in manifest.files.items()}


def _graphs(manifest: Manifest) -> list[str]:
    stages = manifest.vision, *manifest.decoders
    names = [file.path for stage in stages for file in stage.graphs]
    if manifest.vision.tower is not None:
        names += [manifest.vision.tower.graph, manifest.vision.tower.projector]
    names += [segment.graph for segment in manifest.llm.segments]
    return names


def _named_files(manifest: Manifest) -> list[str]:
    return [*_graphs(manifest), manifest.embeddings, manifest.tokenizer]


def _unlisted(root: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Files in the bundle that nobody vouches for, and what is wrong with each.

    A graph's external data could be among them. A linked folder is refused whatever it holds: files
    in it lie elsewhere, under other names than those that are verified.
    """
    known = {MANIFEST_NAME, *(str(PurePosixPath(name)) for name in manifest.files)}
    found = []
    for name, linked_folder in walk(root):
        if linked_folder:
            found.append((name, LINKED_FOLDER))
        elif name not in known:
            found.append((name, UNLISTED))
        if len(found) == _MAX_UNLISTED:
            break
    return sorted(found)


def _problems(root: Path, manifest: Manifest, verify: bool, stop: Event) -> list[str]:
    """What is wrong with each file, in the manifest's order; empty where nothing is."""

    def check(item: tuple[str, FileEntry]) -> str:
        name, entry = item
        hashed = verify or entry.size <= SMALL_FILE
        return _problem(root, name, entry, stop if hashed else None)

    # hashlib lets other threads run while it works; more than a few would only wait for the disk.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        try:
            return list(pool.map(check, manifest.files.items()))
        # Ctrl-C does not wait until large files are read to their ends.
        except BaseException:
            stop.set()
            raise


def _problem(root: Path, name: str, entry: FileEntry, stop: Event | None) -> str:
    """What is wrong with a file; hashed only where there is a way to stop that."""
    path = root / name
    try:
        # A link could point anywhere; what the manifest vouches for must lie in the bundle itself.
        if leads_out(root, name):
            return "leads out of the bundle"
        if not path.is_file():
            return "the file is missing, or no plain file"
        size = path.stat().st_size
        if size != entry.size:
            return f"the file has {size} bytes, the manifest says {entry.size}"
        if stop is not None and sha256_of(path, size, stop) != entry.sha256:
            return "the file's SHA-256 is not the manifest's"
    # ValueError: a name that the file system cannot have.
    except (OSError, ValueError) as error:
        return f"the file cannot be read ({_reason(error)})"
    return ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


#: Files of embeddings up to this size in bytes are read as a whole when the bundle is loaded.
HELD_BYTES = 16 << 20


class Embeddings:
    """Token embeddings: held in memory where they are small, else in a memory-mapped file.

    A mapped file that is shortened in place while it is used ends the process (SIGBUS); one that is
    replaced does no harm.

    Args:
        path: File with `embed_tokens` [V, D] and `image_newline` [D]; with positions, also
            `position_rows` and `position_cols` [G, D].
        hidden: D as the manifest says.
        vocabulary: V as the manifest says.
        positions: G as the manifest says, 0 for none.
        width: Of a token as graphs take it, D or more: zeros follow the embedding.

    Raises:
        BundleError: The file is damaged or its tensors have other shapes.
    """

    def __init__(
        self,
        path: Path,
        hidden: int,
        vocabulary: int,
        positions: int = 0,
        width: int | None = None,
    ) -> None:
        names = (POSITION_ROWS, POSITION_COLS) if positions else ()
        try:
            self._file: Any = safe_open(str(path), framework="numpy")
            small = path.stat().st_size <= HELD_BYTES
            read: Any = self._file.get_tensor if small else self._file.get_slice
            self._rows: Any = read(EMBED_TOKENS)
            newline = self._file.get_tensor(IMAGE_NEWLINE)
            tables = [self._file.get_tensor(name).astype(np.float32) for name in names]
        except (OSError, SafetensorError) as error:
            raise BundleError(
                f"{path} cannot be read ({error}); export the bundle again"
            ) from error
        shape = tuple(self._rows.shape if small else self._rows.get_shape())
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
        self._hidden, self._width = hidden, hidden if width is None else width
        self.newline: NDArray[np.float32] = np.zeros(self._width, np.float32)
        self.newline[:hidden] = newline
        self.positions = ImagePositions(*tables) if tables else None

    def lookup(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings float32 [n, width] of token ids int64 [n]."""
        rows = np.zeros((len(ids), self._width), np.float32)
        for place, token in enumerate(ids.tolist()):
            rows[place, : self._hidden] = self._rows[token : token + 1][0]
        return rows
