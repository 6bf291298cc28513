"""Engines that were built, in a cache of this user on this machine.

    <cache>/engines/<bundle>/<stage>-<flavour>-<capability>-<key>.engine    the engine
                             ... .json                                      what it was built for

An engine runs where it was built for and nowhere else, and is as good as a program: so it lies
outside of bundles, in a folder that nobody else may write to, and what differs from this machine is
refused by name.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from lrs_edge.bundle.bundle import Bundle
from lrs_edge.engines.tensorrt.device import Gpu
from lrs_edge.engines.tensorrt.library import Library
from lrs_edge.engines.tensorrt.targets import this_system
from lrs_edge.errors import BackendError, LrsEdgeError
from lrs_edge.files import replacing

#: Environment variable that names the folder of all caches of lrs-edge.
CACHE_VARIABLE = "LRS_EDGE_CACHE"

#: Counts changes of how graphs are written for TensorRT: older engines are built again.
GRAPHS = 2

_MAX_RECORD = 1 << 16


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine was built for.

    Attributes:
        library: `tensorrt` or `tensorrt-rtx`.
        version: Of the library.
        stage: `vision`, `rfm` or `llm`.
        flavour: `std`, `std-rest`, `std-masked`, or `move`, which compacts buffers.
        bundle: Hash of the stage's files in the bundle.
        capability: Compute capability, such as `sm_86`.
        gpu: Name of the GPU; empty where any of the capability will do.
        driver: Version of its driver; empty where any will do.
        system: Operating system and processor; empty where any will do.
        profile: Open dimensions, such as `L=1..256`.
        capacity: Places of each key/value buffer; 0 for vision.
        graphs: `GRAPHS` when it was built.
        created: Time, ISO 8601; of being written to the cache where it is left out.
        size: Bytes of the engine.
        sha256: Of the engine, in hex.
    """

    library: str
    version: str
    stage: str
    flavour: str
    bundle: str
    capability: str
    gpu: str
    driver: str
    system: str
    profile: str
    capacity: int
    graphs: int
    created: str = ""
    size: int = 0
    sha256: str = ""

    @property
    def key(self) -> str:
        """16 digits that stand for everything above `created`."""
        identity = msgspec.structs.replace(self, created="", size=0, sha256="")
        return hashlib.sha256(msgspec.json.encode(identity)).hexdigest()[:16]

    @property
    def file(self) -> str:
        """Name of the engine's file."""
        return f"{self.stage}-{self.flavour}-{self.capability}-{self.key}.engine"

    def differs(self, library: Library, gpu: Gpu) -> str:
        """Why it cannot run here, as a clause; empty where it can."""
        here = {"GPU": gpu.name, "driver": gpu.driver, "system": this_system()}
        built = {"GPU": self.gpu, "driver": self.driver, "system": self.system}
        if self.capability != gpu.capability:
            return (
                f"it was built for {self.capability} and this GPU, {gpu.name}, is {gpu.capability}"
            )
        if self.version != library.version:
            return f"{library.name} {self.version} built it and {library.version} is installed"
        if self.graphs != GRAPHS:
            return "another version of lrs-edge built it"
        for what, value in built.items():
            if value and value != here[what]:
                return f"it was built for the {what} {value} and here is {here[what]}"
        return ""


@dataclass(frozen=True)
class CachedEngine:
    """One engine in the cache."""

    record: EngineRecord
    path: Path

    def read(self) -> mmap.mmap:
        """The engine, checked against its record, and mapped: it may be as large as half of memory.

        Raises:
            BackendError: It is damaged, or cannot be read.
        """
        try:
            with self.path.open("rb") as stream:
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is empty"
            raise BackendError(f"{self.path}: {reason}; run lrs-edge build again") from error
        if hashlib.sha256(data).hexdigest() != self.record.sha256:
            raise BackendError(f"{self.path} is damaged; run lrs-edge build again")
        return data


def cache_folder() -> Path:
    """Folder of all caches of lrs-edge for this user; it need not exist."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lrs-edge"


def stage_hash(bundle: Bundle, stage: str) -> str:
    """Hash of a stage's files, by the hashes in the manifest: 16 hexadecimal digits.

    What else a bundle holds (calibration, tokenizer) changes no engine.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(bundle.manifest.files.items()):
        # A region focus module may be layers of the language model, and share its weights.
        if entry.role in ({stage} if stage == "vision" else {"rfm", "llm"}):
            digest.update(f"{name} {entry.sha256}\n".encode())
    return digest.hexdigest()[:16]


class EngineCache:
    """The engines of this user on this machine.

    Args:
        folder: Where they lie; the user's cache when left out.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or cache_folder()) / "engines"

    def write(self, record: EngineRecord, data: bytes | memoryview) -> CachedEngine:
        """Keep an engine. Raises LrsEdgeError where that cannot be."""
        record = msgspec.structs.replace(
            record,
            created=record.created or datetime.now(timezone.utc).isoformat(timespec="seconds"),
            size=memoryview(data).nbytes,
            sha256=hashlib.sha256(data).hexdigest(),
        )
        place = self.folder / record.bundle / record.file
        try:
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._check_owned(place.parent)
            with replacing(place) as stream:
                stream.write(data)
            with replacing(place.with_suffix(".json")) as stream:
                stream.write(msgspec.json.format(msgspec.json.encode(record), indent=1))
        except OSError as error:
            raise LrsEdgeError(
                f"the engine cannot be kept in {error.filename or place.parent} "
                f"({error.strerror}); name another folder with {CACHE_VARIABLE}"
            ) from error
        return CachedEngine(record, place)

    def _check_owned(self, folder: Path) -> None:
        """Refuse a folder in which others could put an engine. Raises BackendError."""
        if not hasattr(os, "getuid"):
            return
        for place in (folder, self.folder):
            found = place.stat()
            if found.st_uid not in (os.getuid(), 0) or found.st_mode & stat.S_IWOTH:
                raise BackendError(
                    f"{place} can be written by others, and an engine is a program; name a folder "
                    f"of your own with {CACHE_VARIABLE}"
                )

    def of(self, bundle: str) -> Iterator[CachedEngine]:
        """All engines of a stage's hash (`stage_hash`), the newest first.

        Raises:
            BackendError: Others may write to the cache.
        """
        folder = self.folder / bundle
        if not folder.is_dir():
            return
        self._check_owned(folder)
        found = []
        for place in folder.glob("*.json"):
            try:
                with place.open("rb") as stream:
                    record = msgspec.json.decode(stream.read(_MAX_RECORD), type=EngineRecord)
            except (OSError, msgspec.DecodeError):
                continue
            if place.with_suffix(".engine").name == record.file:
                found.append(CachedEngine(record, place.with_suffix(".engine")))
        yield from sorted(found, key=lambda engine: engine.record.created, reverse=True)

    def same(self, record: EngineRecord) -> CachedEngine | None:
        """The engine that was built for just what a record says; None for none.

        Raises:
            BackendError: Others may write to the cache.
        """
        key = record.key
        return next((engine for engine in self.of(record.bundle) if engine.record.key == key), None)

    def find(
        self, library: Library, gpu: Gpu, bundle: str, stage: str, flavour: str, capacity: int = 0
    ) -> CachedEngine:
        """The newest engine of a stage that runs here.

        Args:
            library: Runs it.
            gpu: This machine's.
            bundle: `stage_hash`.
            stage: `vision`, `rfm` or `llm`.
            flavour: As `EngineRecord.flavour`.
            capacity: Places of its buffers; 0 for any.

        Raises:
            BackendError: There is none; the message says what is there, and why it does not do.
        """
        refused = ""
        for engine in self.of(bundle):
            record = engine.record
            wanted = (library.name, stage, flavour)
            if (record.library, record.stage, record.flavour) != wanted:
                continue
            if capacity and record.capacity != capacity:
                continue
            reason = record.differs(library, gpu)
            if not reason:
                return engine
            refused = refused or f"; {engine.path.name} was refused: {reason}"
        raise BackendError(
            f"there is no {library.name} engine of {stage} ({flavour}) of this bundle for "
            f"{gpu.name} ({gpu.capability}){refused}; run: lrs-edge build BUNDLE --device "
            f"{library.name}{' --masked' if flavour == 'std-masked' else ''}"
        )
