"""A folder of labelled tiles, made for the tests: smooth random pictures under names of AID."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

#: Two backgrounds of each setting, and places: some countable, some not, some easily confused.
LABELS = (
    "Farmland", "Forest", "DenseResidential", "Industrial", "Airport", "BaseballField", "Beach",
    "Bridge", "Church", "Playground", "Pond", "RailwayStation", "Stadium", "StorageTanks",
    "Viaduct", "Desert",
)  # fmt: skip
SIDE = 48


def picture(seed: int, side: int = SIDE) -> Image.Image:
    """Soft patches of colour around a colour of its own."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 210, 3) + rng.uniform(-40, 40, (6, 6, 3))
    return Image.fromarray(coarse.astype(np.uint8)).resize((side, side))


def write_labels(folder: Path, lines: Iterable[Any]) -> None:
    """labels.jsonl; text goes in as it is."""
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "labels.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def make_tiles(folder: Path, each: int = 6) -> Path:
    """Tiles of every label, in splits train and test.

    Returns:
        `folder`.
    """
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, label in enumerate(LABELS):
        for member in range(each):
            file = f"images/{label.lower()}_{member}.png"
            picture(100 * number + member).save(folder / file)
            split = "test" if member % 2 else "train"
            facts = {"file": file, "width": SIDE, "height": SIDE, "scene": label, "split": split}
            lines.append({**facts, "captions": ["not used"]})
    write_labels(folder, lines)
    return folder
