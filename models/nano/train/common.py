"""Constants and paths that all training steps of the nano model share; knows no model code."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrs_edge.pyramid.levels import Pyramid, build_pyramid

TILE = 384
"""Side of one tile in pixels."""
STRIDE = 32
GRID = TILE // STRIDE
"""Tokens along one side of a tile."""
TOKENS = GRID * GRID
BASE_SIDE = 1152
"""Long side of the base level in pixels."""
FEATURES = 1280
IMAGE_MEAN = 127.0 / 255.0
IMAGE_STD = 128.0 / 255.0
SEPARATOR = ":"
PROMPT_PREFIX = "<|im_start|>user\n"
PROMPT_NOTE = "\nSeen: {objects}"
"""What was detected, between the image and the question."""
PROMPT_SUFFIX = "\n{question}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
POSITIONS = 16
"""Entries of the row and column embeddings."""
KEEP = 0.25
"""Share of the local tokens that the runtime keeps."""

SCENES: dict[str, str] = {
    "Airport": "airport",
    "BareLand": "bare land",
    "BaseballField": "baseball field",
    "Beach": "beach",
    "Bridge": "bridge",
    "Center": "center",
    "Church": "church",
    "Commercial": "commercial area",
    "DenseResidential": "dense residential area",
    "Desert": "desert",
    "Farmland": "farmland",
    "Forest": "forest",
    "Industrial": "industrial area",
    "Meadow": "meadow",
    "MediumResidential": "medium residential area",
    "Mountain": "mountain",
    "Park": "park",
    "Parking": "parking lot",
    "Playground": "playground",
    "Pond": "pond",
    "Port": "port",
    "RailwayStation": "railway station",
    "Resort": "resort",
    "River": "river",
    "School": "school",
    "SparseResidential": "sparse residential area",
    "Square": "square",
    "Stadium": "stadium",
    "StorageTanks": "storage tanks",
    "Viaduct": "viaduct",
}

SCENE_QUESTION = "What kind of place is this?"
"""The wording that the held-out scene figure is measured with."""


@dataclass(frozen=True)
class Paths:
    """Where the data lies and where this training keeps its work."""

    data: Path = field(default_factory=lambda: Path(os.environ.get("NANO_DATA", "data")))
    work: Path = field(default_factory=lambda: Path(os.environ.get("NANO_WORK", "work")))
    every: int = field(default_factory=lambda: int(os.environ.get("NANO_EVERY", "1")))
    """One picture and one scene of so many is used, to try the steps out."""

    @property
    def features(self) -> Path:
        """Cached vision features."""
        return self.work / "features"

    @property
    def tower(self) -> Path:
        """The fine-tuned vision encoder."""
        return self.work / "vision" / "tower.pt"

    @property
    def neck(self) -> Path:
        """The vision encoder's neck."""
        return self.work / "vision" / "neck.pt"

    @property
    def objects(self) -> Path:
        """The head that detects objects, with its labels and thresholds."""
        return self.work / "vision" / "objects.pt"

    @property
    def base(self) -> Path:
        """The cut language model and tokenizer that training starts from."""
        return self.work / "base"


def labels(paths: Paths, name: str) -> list[dict[str, Any]]:
    """All lines of one data folder's labels.jsonl."""
    with open(paths.data / name / "labels.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def is_dev(file: str) -> bool:
    """Whether a training scene belongs to the development set (every 18th by number: about 500)."""
    return int(file.rsplit("_", 1)[1].split(".", maxsplit=1)[0]) % 18 == 7


def has_variant(index: int, variant: int, every: int) -> bool:
    """Whether a variant of an AID image is made: the plain one of all, another of every third."""
    return index % every == 0 and (variant == 0 or index % 3 == 0)


def tile_rows(picture: dict[str, Any]) -> range:
    """Rows of a picture of pictures.json in the stores: its global view, then all its tiles."""
    first = picture["first_row"]
    return range(first, first + 1 + sum(len(level["tiles"]) for level in picture["levels"]))


def pyramid(width: int, height: int) -> Pyramid:
    """The levels of an image of this size, as the runtime lays them out."""
    return build_pyramid(height, width, tile=TILE, base_side=BASE_SIDE)


def compress(features: np.ndarray) -> np.ndarray:
    """ReLU6 features as uint8 on a square-root scale (error at most 0.024, less near zero)."""
    return np.rint(np.sqrt(np.clip(features, 0, 6) / 6.0) * 255.0).astype(np.uint8)


def normalised(pixels: np.ndarray) -> np.ndarray:
    """A tile of uint8 RGB [rows, cols, 3] as the encoder takes it, float32 [3, 384, 384].

    Padding (beyond the picture) is zero after normalisation.
    """
    feed = np.zeros((3, TILE, TILE), np.float32)
    scaled = (pixels.astype(np.float32) / 255.0 - IMAGE_MEAN) / IMAGE_STD
    feed[:, : pixels.shape[0], : pixels.shape[1]] = scaled.transpose(2, 0, 1)
    return feed


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if isinstance(data, str):
        part.write_text(data, encoding="utf-8")
    else:
        part.write_bytes(data)
    os.replace(part, path)
