"""Tiles that each show one labelled kind of place, as listed in a folder's labels.jsonl.

One line of labels.jsonl is one JSON object with `file` (relative to the folder), `width`, `height`,
`scene` (the label) and, where the folder is split, `split`. The folder may be anyone's: a path that
leaves it, an oversized tile or a malformed line is refused. No image is opened here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrs_edge.errors import LrsEdgeError, UsageError

LABELS = "labels.jsonl"

#: Longest line of labels.jsonl in characters, and most lines.
MAX_LINE = 1 << 20
MAX_LINES = 1_000_000
#: Smallest and largest side of a tile in pixels.
MIN_SIDE, MAX_SIDE = 16, 4096
#: Longest label in characters.
MAX_LABEL = 64

#: Spoken names of the classes of AID (Xia et al. 2017) that splitting CamelCase does not give.
SPOKEN = {
    "Commercial": "commercial area",
    "DenseResidential": "dense residential area",
    "Industrial": "industrial area",
    "MediumResidential": "medium residential area",
    "Parking": "parking lot",
    "SparseResidential": "sparse residential area",
}


@dataclass(frozen=True)
class LabelledTile:
    """One small image and what it shows.

    Attributes:
        path: Absolute path of the image file.
        label: Spoken name of what it shows, such as "baseball field".
        width: Columns in pixels, as listed.
        height: Rows in pixels, as listed.
    """

    path: Path
    label: str
    width: int
    height: int


@dataclass(frozen=True)
class TileLibrary:
    """All tiles that scenes may be made of.

    Attributes:
        by_label: Tiles of each label in the order of labels.jsonl; never an empty tuple.
        folder: Absolute path of the folder that the tiles lie in.
    """

    by_label: dict[str, tuple[LabelledTile, ...]]
    folder: Path

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, sorted."""
        return tuple(sorted(self.by_label))


def spoken_name(label: str) -> str:
    """The name that people use for a class: "BaseballField" and "baseball_field" alike.

    Args:
        label: A class name as data sets write it.

    Returns:
        Lower-case words with one space between.
    """
    if label in SPOKEN:
        return SPOKEN[label]
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", label)
    return " ".join(re.sub(r"[_\-\s]+", " ", apart).lower().split())


def read_library(
    folder: Path,
    splits: Collection[str] | None,
    accept: Callable[[dict[str, Any]], bool] | None = None,
) -> TileLibrary:
    """Read which tiles a folder has.

    Args:
        folder: Has labels.jsonl and the files that it names.
        splits: Only lines whose `split` is one of these; None for all lines.
        accept: Called with each line's object; False leaves the tile out.

    Raises:
        UsageError: There is no such folder, or it lists no tile of these splits.
        LrsEdgeError: labels.jsonl is malformed or names a file that is missing or outside.
    """
    root = folder.resolve()
    listing = root / LABELS
    if not listing.is_file():
        raise UsageError(f"{folder} has no {LABELS}; name a folder of labelled tiles")
    found: dict[str, list[LabelledTile]] = {}
    seen: set[str] = set()
    for number, line in _lines(listing):
        where = f"{listing}, line {number}"
        facts = _parse(line, where)
        if "scene" not in facts:
            continue
        seen.add(str(facts.get("split")))
        if splits is not None and facts.get("split") not in splits:
            continue
        if accept is not None and not accept(facts):
            continue
        tile = _tile(root, facts, where)
        found.setdefault(tile.label, []).append(tile)
    if not found:
        wanted = "" if splits is None else f" of split {', '.join(sorted(splits))}"
        has = f"; it has {', '.join(sorted(seen))}" if seen else "; no line has a 'scene'"
        raise UsageError(
            f"{listing} lists no usable tile{wanted}{has}; name another folder or split"
        )
    by_label = {label: tuple(found[label]) for label in sorted(found)}
    return TileLibrary(by_label, root)


def _lines(listing: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, without reading more than the limit of a line."""
    try:
        with listing.open(encoding="utf-8") as stream:
            for number in range(1, MAX_LINES + 2):
                line = stream.readline(MAX_LINE + 1)
                if not line:
                    return
                if len(line) > MAX_LINE:
                    raise LrsEdgeError(
                        f"{listing}, line {number} has over {MAX_LINE} characters; correct it"
                    )
                if number > MAX_LINES:
                    raise LrsEdgeError(f"{listing} has over {MAX_LINES} lines; split the folder")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise LrsEdgeError(
            f"{listing} is not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise LrsEdgeError(
            f"{listing} cannot be read ({error.strerror}); check its permissions"
        ) from error


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        facts = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LrsEdgeError(f"{where} is not JSON; write one object per line") from error
    if not isinstance(facts, dict):
        raise LrsEdgeError(f"{where} is not a JSON object; write one object per line")
    return facts


def _tile(root: Path, facts: dict[str, Any], where: str) -> LabelledTile:
    """One line as a tile, with everything checked that needs no pixels."""
    file, label = facts.get("file"), facts["scene"]
    if not isinstance(file, str) or not file or "\0" in file:
        raise LrsEdgeError(f"{where}: 'file' must be a path relative to {root}")
    try:
        path = (root / file).resolve()
        exists = path.is_file()
    # A name that is too long or no Unicode; links in a circle.
    except (OSError, ValueError, RuntimeError) as error:
        raise LrsEdgeError(
            f"{where}: 'file' {file[:80]!r} is not a usable path ({error})"
        ) from error
    if Path(file).is_absolute() or not path.is_relative_to(root):
        raise LrsEdgeError(f"{where}: {file!r} lies outside {root}; keep tiles inside the folder")
    if not exists:
        raise LrsEdgeError(f"{where}: {file!r} does not exist in {root}; correct the line")
    name = spoken_name(label) if isinstance(label, str) else ""
    if not name or len(name) > MAX_LABEL or not re.fullmatch(r"[^\W_](?:[\w' ]*\w)?", name):
        raise LrsEdgeError(f"{where}: 'scene' must be a name of up to {MAX_LABEL} characters")
    sides = facts.get("width"), facts.get("height")
    for side in sides:
        if type(side) is not int or not MIN_SIDE <= side <= MAX_SIDE:
            raise LrsEdgeError(
                f"{where}: 'width' and 'height' must be whole numbers from {MIN_SIDE} to "
                f"{MAX_SIDE} pixels, not {sides}"
            )
    return LabelledTile(path, name, int(facts["width"]), int(facts["height"]))
