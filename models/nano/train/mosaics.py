"""Larger training pictures: mosaics of scenes, and the photographs that have object boxes.

A picture is described by its base level and by regions (label and box, in shares of the picture's
width and height). Local tiles of an aligned mosaic are the cached scene features themselves; all
other tiles are cut from the level and run through the encoder.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from common import TILE, Level, Paths, base_level, global_size, is_dev, labels
from PIL import Image

ALIGNED = {"train": 4000, "dev": 240}
FREE = {"train": 500, "dev": 60}
SHAPES = [(2, 2)] * 8 + [(3, 3)] * 8 + [(1, 2), (2, 1), (2, 3), (3, 2), (1, 3), (3, 1)]
"""Rows and columns of mosaics, as often as they are drawn."""


@dataclass
class Picture:
    """One larger picture and where its tile features lie."""

    kind: str
    split: str
    width: int
    height: int
    regions: list[dict[str, Any]]
    labelled: list[str] = field(default_factory=list)
    source: str = ""
    mirrored: bool = False
    cells: list[tuple[int, int]] = field(default_factory=list)
    """Aligned mosaics: (scene, variant) of every local tile, row-major."""
    scenes: list[int] = field(default_factory=list)
    """Free mosaics: the scene in each region."""
    shape: tuple[int, int] = (1, 1)
    first_row: int = 0
    """Row of the global view in the pictures' store; extracted local tiles follow it."""

    @property
    def level(self) -> Level:
        """The base level."""
        return base_level(self.width, self.height)

    @property
    def tiles_to_extract(self) -> int:
        """How many encoder runs this picture needs."""
        return 1 if self.cells else 1 + self.level.tile_rows * self.level.tile_columns

    def as_dict(self) -> dict[str, Any]:
        """For pictures.json."""
        return {**asdict(self), "level": asdict(self.level)}

    def jobs(self, paths: Paths) -> Iterator[Callable[[], np.ndarray]]:
        """Pixels of the global view, then of the local tiles that must be extracted."""
        opened: list[Image.Image] = []

        def picture() -> Image.Image:
            if not opened:
                opened.append(self.compose(paths))
            return opened[0]

        size = global_size(self.width, self.height)
        yield lambda: np.asarray(picture().resize(size, Image.Resampling.BOX))
        if self.cells:
            return
        level = self.level
        whole: list[np.ndarray] = []

        def tile(row: int, column: int) -> np.ndarray:
            if not whole:
                image = picture()
                shrinks = image.width > level.width
                how = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
                whole.append(np.asarray(image.resize((level.width, level.height), how)))
            top, left = row * TILE, column * TILE
            return whole[0][top : top + TILE, left : left + TILE]

        for row in range(level.tile_rows):
            for column in range(level.tile_columns):
                yield lambda row=row, column=column: tile(row, column)

    def compose(self, paths: Paths) -> Image.Image:
        """The whole picture's pixels."""
        from features import scene_pixels

        if self.source:
            image = Image.open(paths.data / self.source).convert("RGB")
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else image
        names = [s["file"] for s in labels_of_scenes(paths)]
        canvas = Image.new("RGB", (self.width, self.height))
        members = self.cells or [(scene, 0) for scene in self.scenes]
        for region, (scene, variant) in zip(self.regions, members, strict=True):
            file = paths.data / "aid150_rsicd" / names[scene]
            cell = Image.fromarray(np.ascontiguousarray(scene_pixels(file, variant, 0)))
            x0, y0, x1, y1 = region["box"]
            left, top = round(x0 * self.width), round(y0 * self.height)
            size = (round(x1 * self.width) - left, round(y1 * self.height) - top)
            if cell.size != size:
                cell = cell.resize(size, Image.Resampling.BILINEAR)
            canvas.paste(cell, (left, top))
        return canvas


_scenes: list[dict[str, Any]] = []


def labels_of_scenes(paths: Paths) -> list[dict[str, Any]]:
    """The scene labels, read once."""
    if not _scenes:
        _scenes.extend(labels(paths, "aid150_rsicd"))
    return _scenes


def edges(parts: int, draw: random.Random, uneven: bool) -> list[float]:
    """Cut 0..1 into parts, evenly or not."""
    sizes = [draw.uniform(0.7, 1.4) if uneven else 1.0 for _ in range(parts)]
    total = sum(sizes)
    return [sum(sizes[:i]) / total for i in range(parts + 1)]


def mosaic(draw: random.Random, pool: dict[str, list[int]], split: str, free: bool) -> Picture:
    """One mosaic of scenes of distinct classes."""
    rows, columns = draw.choice([(2, 2), (3, 3), (2, 3)] if free else SHAPES)
    classes = draw.sample(sorted(pool), rows * columns)
    scenes = [draw.choice(pool[c]) for c in classes]
    xs, ys = edges(columns, draw, free), edges(rows, draw, free)
    boxes = [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]
    regions = [{"label": c, "box": list(b)} for c, b in zip(classes, boxes, strict=True)]
    if free:
        width = draw.randrange(900, 2000)
        height = int(width * rows / columns * draw.uniform(0.85, 1.15))
        return Picture("free", split, width, height, regions, scenes=scenes, shape=(rows, columns))
    variants = [draw.randrange(2) if split == "train" else 0 for _ in scenes]
    cells = list(zip(scenes, variants, strict=True))
    size = (columns * TILE, rows * TILE)
    return Picture("mosaic", split, *size, regions, cells=cells, shape=(rows, columns))


def photographs(paths: Paths) -> Iterator[Picture]:
    """SIMD and open_objects pictures; SIMD training pictures also mirrored."""
    for folder in ("simd552_640", "open_objects"):
        for line in labels(paths, folder):
            width, height = line["width"], line["height"]
            split = "train" if line["split"] == "train" else "dev"
            flips = (False, True) if split == "train" else (False,)
            for mirrored in flips:
                regions = []
                for item in line["objects"]:
                    x0, y0, x1, y1 = item["bbox"]
                    if mirrored:
                        x0, x1 = width - x1, width - x0
                    box = [x0 / width, y0 / height, x1 / width, y1 / height]
                    regions.append({"label": item["class"], "box": box})
                kind = "simd" if folder.startswith("simd") else "open"
                known = line.get("labelled_classes", [])
                yield Picture(
                    kind, split, width, height, regions, known, f"{folder}/{line['file']}", mirrored
                )


def all_pictures(paths: Paths, seed: int) -> list[Picture]:
    """Every larger picture, the same list for the same seed."""
    draw = random.Random(seed)
    pools: dict[str, dict[str, list[int]]] = {"train": {}, "dev": {}}
    for i, scene in enumerate(labels_of_scenes(paths)):
        if scene["split"] == "train":
            split = "dev" if is_dev(scene["file"]) else "train"
            pools[split].setdefault(scene["scene"], []).append(i)
    pictures = list(photographs(paths))
    for split in ("dev", "train"):
        pictures += [mosaic(draw, pools[split], split, False) for _ in range(ALIGNED[split])]
        pictures += [mosaic(draw, pools[split], split, True) for _ in range(FREE[split])]
    return pictures
