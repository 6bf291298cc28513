"""Products in a folder: what belongs to one, and when one is whole.

A product is a file of a known ending with its sidecars, or a folder such as a SAFE. It is whole
when nothing of it has changed for a while: a file that is renamed into place is so at once after
that while, one that is being written is not.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

#: Names of products, by default; letters in either case.
FILES = (
    *("*.tif", "*.tiff", "*.jp2", "*.j2k", "*.ntf", "*.nitf", "*.img", "*.vrt"),
    *("*.png", "*.jpg", "*.jpeg"),
)
FOLDERS = ("*.SAFE",)
#: Which image of a folder is asked about: the first pattern that matches, its first name.
IMAGES = (
    *("GRANULE/*/IMG_DATA/R10m/*_TCI_10m.jp2", "GRANULE/*/IMG_DATA/*_TCI.jp2"),
    *("measurement/*.tiff", "*.tif", "*.tiff", "*.jp2"),
)
#: Names that writers give to what is not finished.
UNFINISHED = (".*", "*.part", "*.tmp", "*.temp", "*.filepart", "*.partial", "*.crdownload", "*~")

#: Deeper folders are not looked into.
MAX_DEPTH = 32

_CHUNK = 1 << 20

#: Raises to give up.
Check = Callable[[], None]


@dataclass(frozen=True)
class Patterns:
    """What is a product.

    Attributes:
        files: Names of files that are products.
        folders: Names of folders that are products as a whole.
        images: Paths in such a folder, with `/`, of the image that is asked about.
        wait_for: Names of files that must lie beside a product, or in a folder, before it counts
            as whole; `{name}` and `{stem}` stand for the product's.
    """

    files: tuple[str, ...] = FILES
    folders: tuple[str, ...] = FOLDERS
    images: tuple[str, ...] = IMAGES
    wait_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """One file of a product: its path relative to the watched folder, size, and times."""

    path: str
    size: int
    modified: int
    changed: int


@dataclass(frozen=True)
class Product:
    """One product as it was seen.

    Attributes:
        path: Relative to the watched folder, with the system's separators.
        is_folder: Whether it is a folder.
        image: The file that is asked about, relative to the watched folder; None where a folder
            holds none.
        parts: All of its files, sidecars included, in the order of their paths.
        missing: What it has to wait for, empty where nothing.
    """

    path: str
    is_folder: bool
    image: str | None
    parts: tuple[Part, ...]
    missing: tuple[str, ...] = ()

    @cached_property
    def signature(self) -> str:
        """Hash of names, sizes and times, in hex: another one means that it may have changed."""
        return hashlib.sha256(repr(self.parts).encode()).hexdigest()

    @property
    def oldest_first(self) -> tuple[int, str]:
        """Sorts products by when they were last written."""
        return max((part.modified for part in self.parts), default=0), self.path


def _matches(name: str, patterns: Sequence[str]) -> bool:
    lowered = name.lower()
    return any(fnmatch.fnmatchcase(lowered, pattern.lower()) for pattern in patterns)


def scan(root: Path, patterns: Patterns, leave_out: Sequence[Path] = ()) -> list[Product]:
    """All products in a folder and below it, the one that was written first in front.

    Links are not followed, and what cannot be looked at is not there.

    Args:
        root: The watched folder.
        patterns: What is a product.
        leave_out: Folders in which nothing is a product, such as where results are written.
    """
    hidden = {os.path.realpath(folder) for folder in leave_out}
    found = list(_in_folder(os.path.realpath(root), "", patterns, hidden, 0))
    return sorted(found, key=lambda product: product.oldest_first)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _in_folder(
    root: str, below: str, patterns: Patterns, hidden: set[str], depth: int
) -> Iterator[Product]:
    files: dict[str, Part] = {}
    for entry in _entries(os.path.join(root, below)):
        if _matches(entry.name, UNFINISHED) or entry.is_symlink():
            continue
        path = os.path.join(below, entry.name)
        if entry.is_dir(follow_symlinks=False):
            if os.path.join(root, path) in hidden or depth >= MAX_DEPTH:
                continue
            if _matches(entry.name, patterns.folders):
                yield _folder_product(root, path, patterns)
            else:
                yield from _in_folder(root, path, patterns, hidden, depth + 1)
        elif (part := _part(entry, path)) is not None:
            files[entry.name] = part
    yield from _file_products(below, files, patterns)


def _part(entry: os.DirEntry[str], path: str) -> Part | None:
    """A regular file, None for anything else."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return Part(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _file_products(below: str, files: dict[str, Part], patterns: Patterns) -> Iterator[Product]:
    names = [name for name in files if _matches(name, patterns.files)]
    sidecars: dict[str, list[Part]] = {}
    for name in files.keys() - set(names):
        # `a.tif.aux.xml` and `a.tfw` belong to `a.tif`: all that stands before a dot may name it.
        for place in (at for at, char in enumerate(name) if char == "."):
            sidecars.setdefault(name[:place].lower(), []).append(files[name])
    for name in names:
        stem = os.path.splitext(name)[0]
        parts = {files[name], *sidecars.get(name.lower(), ()), *sidecars.get(stem.lower(), ())}
        wanted = [template.format(name=name, stem=stem) for template in patterns.wait_for]
        yield Product(
            os.path.join(below, name),
            False,
            os.path.join(below, name),
            tuple(sorted(parts, key=lambda part: part.path)),
            tuple(one for one in wanted if one not in files),
        )


def _folder_product(root: str, path: str, patterns: Patterns) -> Product:
    name = os.path.basename(path)
    parts = sorted(_below(root, path, 0), key=lambda part: part.path)
    inside = {os.path.relpath(part.path, path).replace(os.sep, "/"): part for part in parts}
    image = next(
        (
            inside[one].path
            for pattern in patterns.images
            for one in sorted(inside)
            if one.count("/") == pattern.count("/") and _matches(one, (pattern,))
        ),
        None,
    )
    stem = os.path.splitext(name)[0]
    wanted = [template.format(name=name, stem=stem) for template in patterns.wait_for]
    unfinished = [one for one in inside if _matches(os.path.basename(one), UNFINISHED[1:])]
    missing = (
        *(one for one in wanted if one not in inside),
        *(f"{one}'s end" for one in unfinished),
    )
    return Product(path, True, image, tuple(parts), missing)


def _below(root: str, path: str, depth: int) -> Iterator[Part]:
    for entry in _entries(os.path.join(root, path)):
        below = os.path.join(path, entry.name)
        if entry.is_symlink():
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth < MAX_DEPTH:
                yield from _below(root, below, depth + 1)
        elif (part := _part(entry, below)) is not None:
            yield part


def content_digest(root: Path, product: Product, check: Check) -> str:
    """SHA-256 of all files of a product with their names, in hex.

    Args:
        root: The watched folder.
        product: The product.
        check: Called before every mebibyte; what it raises ends the reading.

    Raises:
        OSError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for part in product.parts:
        digest.update(os.fsencode(part.path) + f"\0{part.size}\0".encode())
        with (root / part.path).open("rb") as stream:
            while True:
                check()
                data = stream.read(_CHUNK)
                if not data:
                    break
                digest.update(data)
    return digest.hexdigest()


class Settling:
    """Tells which products have stayed as they are for a while.

    Args:
        seconds: For how long nothing of a product may have changed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: dict[str, tuple[str, float]] = {}

    def update(self, found: Sequence[Product], now: float) -> list[Product]:
        """Those of the products that are whole.

        Args:
            found: All products that are there.
            now: Seconds, of a clock that nobody sets.
        """
        seen = self._seen
        self._seen = {}
        whole = []
        for product in found:
            signature = product.signature
            old, since = seen.get(product.path, ("", now))
            since = since if old == signature else now
            self._seen[product.path] = signature, since
            if not product.missing and product.parts and now - since >= self._seconds:
                whole.append(product)
        return whole

    def next_look(self, now: float) -> float:
        """Seconds until the next of the products that are not whole may be; infinite for none."""
        left = [self._seconds - (now - since) for _, since in self._seen.values()]
        return min((seconds for seconds in left if seconds > 0), default=float("inf"))

    def is_waiting(self, now: float) -> bool:
        """Whether a product has not been the same for long enough yet."""
        return self.next_look(now) < float("inf")


def is_unchanged(root: Path, product: Product) -> bool:
    """Whether all files of a product are as they were when it was seen."""
    for part in product.parts:
        try:
            status = os.stat(root / part.path, follow_symlinks=False)
        except OSError:
            return False
        if (status.st_size, status.st_mtime_ns) != (part.size, part.modified):
            return False
    return True
