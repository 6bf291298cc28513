"""Checkpoint folders: found on disk or on the hub, their JSON files read with suspicion."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.hub import download
from lrs_edge_export.checkpoints.tensors import Scoped, open_tensors, weight_files

#: Small files that belong to a checkpoint besides its weights.
SIDE_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)

#: A JSON file longer than this is refused unread (the largest is a tokenizer of some 10 MB).
MAX_JSON_BYTES = 64 << 20

#: Longest MODEL_CARD.md that is taken over.
MAX_CARD_BYTES = 1 << 18


class Settings:
    """One JSON object, whose values are checked as they are read.

    Args:
        values: The object.
        path: Named in messages.
        section: Of the file, whose values these are; named in messages too.
    """

    def __init__(self, values: dict[str, Any], path: Path, section: str = "") -> None:
        self.values = values
        self.path = path
        self._section = section

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read a JSON file.

        Raises:
            ExportError: It is missing, too large or not a JSON object.
        """
        values = read_json(path)
        if not isinstance(values, dict):
            raise ExportError(f"{path} is not a JSON object; download it again")
        return cls(values, path)

    @classmethod
    def load_optional(cls, path: Path) -> Settings:
        """Read a JSON file, or nothing where there is none. Raises ExportError when damaged."""
        return cls.load(path) if path.is_file() else cls({}, path)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer of low..high. Raises ExportError when absent or out of bounds."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"must be an integer of {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number of low..high. Raises ExportError when absent or out of bounds."""
        value = self._get(key, default)
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        if not sound or not math.isfinite(value) or not low <= value <= high:
            raise self.wrong(key, f"must be a number of {low:g}..{high:g}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises ExportError when absent or of another type."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "must be a string")
        return value

    def flag(self, key: str) -> bool:
        """A boolean, False when absent. Raises ExportError when of another type."""
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def triple(
        self, key: str, default: tuple[float, float, float] | None = None
    ) -> tuple[float, float, float]:
        """Three finite numbers. Raises ExportError when absent or anything else."""
        value = self._get(key, default)
        sound = isinstance(value, list | tuple) and len(value) == 3
        if not sound or not all(_is_finite(part) for part in value):
            raise self.wrong(key, "must be three numbers")
        first, second, third = (float(part) for part in value)
        return first, second, third

    def integers(self, key: str) -> tuple[int, ...]:
        """One integer or a list of them, none when absent. Raises ExportError."""
        value = self._get(key, [])
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.wrong(key, "must be an integer or a list of integers")
        return tuple(items)

    def replaced(self, values: dict[str, Any]) -> Settings:
        """The same place with other values."""
        return Settings(values, self.path, self._section)

    def section(self, key: str) -> Settings | None:
        """An object inside, None when absent. Raises ExportError when of another type."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "must be an object")
        return Settings(value, self.path, f"{self._section}{key}.")

    def wrong(self, key: str, rule: str) -> ExportError:
        """The error for one value."""
        shown = repr(self.values.get(key, "absent"))[:60]
        name = f"{self._section}{key}"
        return ExportError(f"{self.path}: {name} is {shown}, it {rule}; correct the file")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        path: The folder.
        name: What the user called it.
        config: Its `config.json`.
        from_hub: Whether it came from a hub, so that its vision tower may, too.
    """

    path: Path
    name: str
    config: Settings
    from_hub: bool = False

    def tensors(self) -> Scoped:
        """All weights. Raises ExportError."""
        return Scoped(open_tensors(self.path), "")

    def card(self) -> str:
        """The checkpoint's own MODEL_CARD.md; empty where there is none, or an absurd one."""
        path = self.path / "MODEL_CARD.md"
        if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
            return ""
        return path.read_bytes().decode("utf-8", errors="replace").strip()

    def side_file(self, name: str) -> Settings:
        """One of the optional JSON files; empty where it is missing. Raises ExportError."""
        return Settings.load_optional(self.path / name)


def find_checkpoint(
    name: str,
    look: Callable[[Checkpoint], object] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Checkpoint:
    """A local folder, or else a hub name such as `owner/model`, which is downloaded.

    Args:
        name: The folder, or `owner/model`, or `owner/model@revision`.
        look: Looks at the checkpoint, before the weights of a hub's are fetched.
        tell: Told of downloads, one line a step.

    Raises:
        ExportError: There is no such folder, the download fails, or `config.json` is not readable.
    """
    path = Path(name)
    if path.is_dir():
        return _opened(path, name)

    def look_inside(folder: Path) -> None:
        opened = _opened(folder, name, from_hub=True)
        if look is not None:
            look(opened)

    return _opened(download(name, look_inside, tell), name, from_hub=True)


def _opened(path: Path, name: str, *, from_hub: bool = False) -> Checkpoint:
    if not (path / "config.json").is_file():
        raise ExportError(f"{path} holds no config.json; name the folder of a checkpoint")
    return Checkpoint(path, name, Settings.load(path / "config.json"), from_hub)


def source_hash(folders: Iterable[Path]) -> str:
    """SHA-256 over names and contents of all files that an export may read, in a fixed order."""
    digest = hashlib.sha256()
    for folder in folders:
        side = [folder / name for name in SIDE_FILES if (folder / name).is_file()]
        for path in sorted({*side, *weight_files(folder)}, key=lambda path: path.name):
            digest.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of one file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Any JSON file of a checkpoint.

    Raises:
        ExportError: It is missing, too large or not JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ExportError(
                f"{path} is larger than {MAX_JSON_BYTES} bytes, which no checkpoint's is; "
                "download it again"
            )
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ExportError(
            f"{path} cannot be read ({error.strerror}); check its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not JSON ({error}); download it again") from error


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
