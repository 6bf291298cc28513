"""`lrs-edge models pull`: a bundle from an address, a hub or a path, into the folder of models.

A bundle that lies as a folder on a server is fetched manifest first, then file by file, each
checked against the manifest's SHA-256. What has arrived stays in `.partial`, under a name made
of the source, until all of it is there: the next pull of the same source goes on.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event
from urllib.parse import quote, unquote, urlsplit

from lrs_edge.bundle.bundle import MANIFEST_NAME, open_bundle, read_manifest
from lrs_edge.bundle.files import open_plain, read_limited, sha256_of
from lrs_edge.bundle.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest
from lrs_edge.errors import BundleError, LrsEdgeError, UsageError
from lrs_edge.files import hold_lock
from lrs_edge.transfer.archive import unpack
from lrs_edge.transfer.download import Http, check_url
from lrs_edge.transfer.folder import (
    check_model_name,
    models_folder,
    partial_folder,
    place_of,
    read_record,
    take_place,
    temporary_beside,
    unchanged,
    write_record,
)
from lrs_edge.transfer.members import MAX_BYTES, check_members
from lrs_edge.transfer.writing import NewFile, check_manifest_hash, not_written, require_space

#: How a packed bundle's file is called, by which an address of one is known.
PACKED_SUFFIX = ".tar"

_HUB = "https://huggingface.co"
_HUB_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]+))?",
    re.ASCII,
)
#: Bytes of a packed file beside the bundle's own: headers, padding, the manifest.
_PACKED_BESIDE = 8 << 20

#: Told of what is done, one line a step.
Tell = Callable[[str], None]


@dataclass(frozen=True)
class PullOptions:
    """How a bundle is pulled.

    Attributes:
        name: What the model is called here; empty for the last part of the source.
        offline: Takes nothing but what lies on this machine.
        insecure: Takes http from other machines.
        max_bytes: Most bytes of the bundle.
        manifest_sha256: In hex; empty for any.

    Raises:
        UsageError: The hash is no SHA-256; said before anything is fetched.
    """

    name: str = ""
    offline: bool = False
    insecure: bool = False
    max_bytes: int = MAX_BYTES
    manifest_sha256: str = ""

    def __post_init__(self) -> None:
        wanted = self.manifest_sha256
        if wanted and (len(wanted) != 64 or set(wanted.lower()) - set("0123456789abcdef")):
            raise UsageError(f"{wanted!r} is not a SHA-256 of 64 hexadecimal digits")


@dataclass(frozen=True)
class Remote:
    """What is fetched over HTTP: one packed file, or a folder whose address ends in a slash."""

    shown: str
    url: str
    name: str
    token: str = ""

    @property
    def packed(self) -> bool:
        """Whether it is one file."""
        return not self.url.endswith("/")


def pull(
    source: str, options: PullOptions, tell: Tell = lambda _: None, http: Http | None = None
) -> Path:
    """Put a bundle into the folder of models.

    Args:
        source: A path of a bundle or of a packed one, `https://...` of either, or `ORG/NAME`,
            `ORG/NAME@REVISION` on the hub.
        options: Name, limits, what is allowed.
        tell: Told of each file.
        http: Fetches; None for one as the options say.

    Returns:
        Where the bundle lies now. One that came from there before and has not changed is left.

    Raises:
        UsageError: The source or the name cannot be one, is refused, or the name is taken.
        BundleError: What arrived is not as its manifest says; nothing of it is left.
        LrsEdgeError: It cannot be fetched or written; what has arrived is kept for the next try.
    """
    remote = None if os.path.exists(source) else find_remote(source, options.insecure)
    path = Path(os.path.abspath(source))
    name = options.name or (remote.name if remote else _stem(path.name))
    check_model_name(name)
    shown = remote.shown if remote else str(path)
    record = read_record(name)
    kept = models_folder() / name
    if record and record.source == shown and unchanged(kept, record):
        check_manifest_hash(
            read_limited(kept / MANIFEST_NAME, MAX_MANIFEST_BYTES), options.manifest_sha256, kept
        )
        tell(f"{name} is there already, from {shown}")
        return kept
    place = place_of(name)
    if remote is None:
        with temporary_beside(partial_folder()) as staged:
            _take(path, staged, options)
            take_place(staged, place)
    elif options.offline:
        raise UsageError(f"{shown} is not on this machine, and --offline is given; name a path")
    else:
        if http is None:
            http = Http(insecure=options.insecure, token=remote.token)
        with _staging(shown) as staging:
            staged = _fetch(http, remote, staging, options, tell)
            take_place(staged, place)
            shutil.rmtree(staging, ignore_errors=True)
    write_record(name, shown, read_manifest(place))
    return place


def find_remote(source: str, insecure: bool) -> Remote:
    """What a source that is no path names. Raises UsageError."""
    if "://" in source:
        parts = check_url(source, insecure=insecure)
        path, plain = parts.path, f"{parts.scheme}://{parts.netloc}{parts.path}"
        if path.endswith(PACKED_SUFFIX):
            url = plain + (f"?{parts.query}" if parts.query else "")
            return Remote(plain, url, _stem(PurePosixPath(unquote(path)).name))
        if parts.query or parts.fragment:
            raise UsageError(
                f"{plain} is a folder's address, which takes no query; one of a packed bundle ends "
                f"in {PACKED_SUFFIX}"
            )
        folder = plain.removesuffix(MANIFEST_NAME).rstrip("/") + "/"
        return Remote(folder, folder, PurePosixPath(unquote(urlsplit(folder).path)).name)
    found = _HUB_NAME.fullmatch(source)
    if found is None:
        raise UsageError(
            f"{source[:200]!r} is neither a path, nor an address, nor a hub name such as ORG/NAME"
        )
    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _HUB
    check_url(hub, insecure=insecure)
    repository, revision = found["repository"], found["revision"] or "main"
    url = f"{hub}/{repository}/resolve/{quote(revision, safe='')}/"
    name = repository.partition("/")[2]
    return Remote(source, url, name, os.environ.get("HF_TOKEN", ""))


def unpack_model(packed: Path, options: PullOptions, folder: Path | None = None) -> Path:
    """Unpack a file into the folder of models, or as another folder; where it lies now.

    Raises:
        UsageError: The name or the folder is taken, or cannot be one.
        BundleError: What is in the file is not as its manifest says; nothing of it is left.
        LrsEdgeError: It cannot be read or written.
    """
    name = options.name or _stem(packed.name)
    place = place_of(name) if folder is None else Path(os.path.abspath(folder))
    parent = partial_folder() if folder is None else place.parent
    if os.path.lexists(place):
        raise UsageError(f"{place} is there already; name a folder that is not")
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a folder; create it first")
    with temporary_beside(parent) as staged:
        manifest = unpack(
            packed,
            staged,
            max_bytes=options.max_bytes,
            manifest_sha256=options.manifest_sha256,
        )
        take_place(staged, place)
    if folder is None:
        write_record(name, str(Path(os.path.abspath(packed))), manifest)
    return place


def _stem(name: str) -> str:
    return name.removesuffix(PACKED_SUFFIX)


@contextmanager
def _staging(shown: str) -> Iterator[Path]:
    """A folder that each pull of one source finds again, for one process at a time.

    Raises:
        LrsEdgeError: Another process pulls the same, or the folder cannot be made.
    """
    folder = partial_folder() / hashlib.sha256(shown.encode()).hexdigest()[:16]
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder.with_suffix(".lock")).open("ab")
    except OSError as error:
        raise not_written(folder, error) from error
    with lock:
        # Where there is no such lock, two pulls of one source are the user's to avoid.
        if not hold_lock(lock):
            raise LrsEdgeError(f"another process is fetching {shown}; wait for it")
        # Made again where the process that held the lock before has finished and removed it.
        folder.mkdir(exist_ok=True)
        yield folder


def _take(path: Path, staged: Path, options: PullOptions) -> None:
    """Copy a bundle, or unpack one, from this machine. Raises BundleError, LrsEdgeError."""
    if not path.is_dir():
        unpack(path, staged, max_bytes=options.max_bytes, manifest_sha256=options.manifest_sha256)
        return
    manifest = open_bundle(path).manifest
    total = check_members(manifest, options.max_bytes)
    data = read_limited(path / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    check_manifest_hash(data, options.manifest_sha256, path)
    staged.mkdir()
    require_space(staged, total)
    with NewFile(staged, MANIFEST_NAME) as file:
        file.write(data)
    for name in manifest.files:
        with NewFile(staged, name) as file, open_plain(path / name) as source:
            while piece := source.read(1 << 20):
                file.write(piece)
    open_bundle(staged)


def _fetch(http: Http, remote: Remote, staging: Path, options: PullOptions, tell: Tell) -> Path:
    """The bundle of an address, whole and checked, in the staging folder."""
    if remote.packed:
        return _fetch_packed(http, remote, staging, options, tell)
    bundle = staging / "bundle"
    manifest = _fetch_manifest(http, remote, bundle, options)
    total = check_members(manifest, options.max_bytes)
    tell(f"{manifest.name}: {len(manifest.files)} files, {total / 1e6:.1f} MB")
    for name, entry in manifest.files.items():
        _fetch_file(http, remote.url + quote(name), bundle / name, entry)
        tell(f"{name}: {entry.size:,} bytes, SHA-256 as in the manifest")
    try:
        # Every hash was held against the file itself just now, also of those from an earlier run.
        open_bundle(bundle, verify=False)
    except BundleError:
        shutil.rmtree(bundle, ignore_errors=True)
        raise
    return bundle


def _fetch_manifest(http: Http, remote: Remote, bundle: Path, options: PullOptions) -> Manifest:
    """Fetch a manifest; files that were fetched under another one are removed."""
    data = http.read(remote.url + MANIFEST_NAME, MAX_MANIFEST_BYTES)
    check_manifest_hash(data, options.manifest_sha256, remote.shown)
    place = bundle / MANIFEST_NAME
    if not place.is_file() or read_limited(place, MAX_MANIFEST_BYTES) != data:
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.mkdir()
        with NewFile(bundle, MANIFEST_NAME) as file:
            file.write(data)
    try:
        return read_manifest(bundle)
    except BundleError:
        shutil.rmtree(bundle, ignore_errors=True)
        raise


def _fetch_file(http: Http, url: str, target: Path, entry: FileEntry) -> None:
    """Fetch a file; what was there of it is not trusted. Raises BundleError, LrsEdgeError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        resumed = target.exists()
        http.save(url, target, entry.size, entry.size)
        if sha256_of(target, entry.size, Event()) == entry.sha256:
            return
        target.unlink()
        # Fetched from its beginning it is what the server has.
        if not resumed:
            raise BundleError(f"{url}: the file's SHA-256 is not the manifest's; do not use it")


def _fetch_packed(
    http: Http, remote: Remote, staging: Path, options: PullOptions, tell: Tell
) -> Path:
    """Fetch a packed bundle and unpack it. Raises BundleError, LrsEdgeError."""
    packed, bundle = staging / "packed", staging / "bundle"
    while True:
        resumed = packed.exists()
        http.save(remote.url, packed, options.max_bytes + _PACKED_BESIDE)
        tell(f"{remote.name}: {packed.stat().st_size / 1e6:.1f} MB have arrived")
        shutil.rmtree(bundle, ignore_errors=True)
        try:
            unpack(
                packed,
                bundle,
                max_bytes=options.max_bytes,
                manifest_sha256=options.manifest_sha256,
            )
            return bundle
        except BundleError:
            shutil.rmtree(bundle, ignore_errors=True)
            packed.unlink()
            if not resumed:
                raise
