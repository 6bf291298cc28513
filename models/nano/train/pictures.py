"""Larger training pictures: what is known of one, composed large scenes, and reading windows.

The tiles of a picture's levels that show its regions are extracted, and some others. Regions are
labels with boxes in shares of width and height; `real_pictures.py` makes pictures of boxed images.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from common import STRIDE, TILE, Paths, is_dev, pyramid
from drawing import drawn
from PIL import Image

from lrs_edge.pyramid.levels import Level
from lrs_edge_export.scenes.library import TileLibrary, read_library
from lrs_edge_export.scenes.plan import ScenePlan, plan_scene
from lrs_edge_export.scenes.render import SceneRenderer

SCENES = 170
"""Composed large scenes."""
SMALLEST, LARGEST = 1400, 16000
MOST_TILES = {"middle": 14, "finest": 22}
"""Tiles of one level that are extracted at most."""
MIDDLE_SHARE = 0.6
"""Share of the levels between base and finest that are extracted."""


@dataclass
class LevelTiles:
    """The extracted tiles of one level, and where their features lie."""

    height: int
    width: int
    tiles: list[tuple[int, int]]
    first_row: int = 0


@dataclass
class Picture:
    """One larger picture and where its tile features lie."""

    kind: str
    """boxed, canvas, cover or large."""
    split: str
    width: int
    height: int
    regions: list[dict[str, Any]]
    levels: list[LevelTiles]
    complete: list[str] = field(default_factory=list)
    """Labels that are boxed densely: what is not boxed is not there."""
    source: str = ""
    seed: int = -1
    """Of a large scene's plan."""
    first_row: int = 0
    """Row of the global view in the pictures' store."""
    recipe: Any = None
    """How a picture of `real_pictures` is drawn."""
    places: list[str] = field(default_factory=list)
    """Classes of scenes that the whole picture shows."""
    absent_places: list[str] = field(default_factory=list)
    """Classes of scenes of which nothing is in it."""
    cover: dict[str, Any] = field(default_factory=dict)
    """Land cover: shares of the nine parts, rows from the top."""

    def as_dict(self) -> dict[str, Any]:
        """For pictures.json: without how it is drawn."""
        found = asdict(replace(self, recipe=None))
        del found["recipe"]
        return found


@lru_cache(maxsize=2)
def library(folder: Path, split: str) -> TileLibrary:
    """Labelled tiles of the training split, or of the development set."""
    return read_library(folder, ["train"], lambda row: is_dev(row["file"]) == (split == "dev"))


def scene_plan(paths: Paths, split: str, seed: int) -> ScenePlan:
    """The plan of one large scene, always the same for the same seed."""
    draw = random.Random(f"large/{split}/{seed}")
    long = round(math.exp(draw.uniform(math.log(SMALLEST), math.log(LARGEST))))
    short = max(round(long * draw.uniform(0.6, 1.0)), 1000)
    width, height = (long, short) if draw.random() < 0.6 else (short, long)
    tiles = library(paths.data / "aid150_rsicd", split)
    return plan_scene(tiles, draw, width, height, f"{split}_{seed}")


def chosen_tiles(
    level: Level, boxes: list[list[float]], most: int, draw: random.Random
) -> list[tuple[int, int]]:
    """Tiles under the places as far as there is room, and a quarter of others."""
    under: set[tuple[int, int]] = set()
    for x0, y0, x1, y1 in boxes:
        rows = range(int(y0 * level.height) // TILE, int(y1 * level.height - 1e-6) // TILE + 1)
        cols = range(int(x0 * level.width) // TILE, int(x1 * level.width - 1e-6) // TILE + 1)
        under |= {(r, c) for r in rows for c in cols}
    shown = sorted(under)
    draw.shuffle(shown)
    others = [(t.row, t.col) for t in level.tiles() if (t.row, t.col) not in under]
    draw.shuffle(others)
    count = max(most // 4, most - len(shown))
    return sorted(shown[: most - min(count, len(others))] + others[:count])


def large_scene(paths: Paths, split: str, seed: int) -> Picture:
    """One large scene."""
    plan = scene_plan(paths, split, seed)
    draw = random.Random(f"tiles/{split}/{seed}")
    regions = []
    for placement in plan.placements:
        x0, y0, x1, y1 = placement.box
        box = [x0 / plan.width, y0 / plan.height, x1 / plan.width, y1 / plan.height]
        regions.append({"label": placement.label, "box": box, "tile": placement.tile.path.name})
    boxes = [r["box"] for r in regions]
    levels = []
    found = pyramid(plan.width, plan.height).levels
    for index, level in enumerate(found):
        if 0 < index < len(found) - 1 and draw.random() > MIDDLE_SHARE:
            continue
        most = MOST_TILES["finest" if index == len(found) - 1 else "middle"]
        tiles = [(t.row, t.col) for t in level.tiles()]
        if index > 0:
            tiles = chosen_tiles(level, boxes, most, draw)
        levels.append(LevelTiles(level.height, level.width, tiles))
    return Picture("large", split, plan.width, plan.height, regions, levels, seed=seed)


Reader = Callable[[float, float, float, float, int, int], np.ndarray]
"""Window x0, y0, x1, y1 of a picture in pixels, width and height wanted: uint8 RGB."""


def reader(picture: Picture, paths: Paths) -> Reader:
    """What reads windows of one picture; it is drawn at the first one."""
    if picture.kind == "large":
        renderer: list[SceneRenderer] = []

        def read(x0: float, y0: float, x1: float, y1: float, width: int, height: int) -> np.ndarray:
            if not renderer:
                renderer.append(SceneRenderer(scene_plan(paths, picture.split, picture.seed)))
            return renderer[0].read(x0, y0, x1, y1, width, height)

        return read
    opened: list[Image.Image] = []

    def resized(x0: float, y0: float, x1: float, y1: float, width: int, height: int) -> np.ndarray:
        if not opened:
            opened.append(drawn(paths, picture.recipe))
        how = Image.Resampling.BOX if x1 - x0 > width else Image.Resampling.BILINEAR
        return np.asarray(opened[0].resize((width, height), how, box=(x0, y0, x1, y1)))

    return resized


def windows(picture: Picture) -> Iterator[tuple[tuple[float, float, float, float], int, int]]:
    """Window in pixels, width and height of the global view, then of every extracted tile.

    A tile that lies wholly in the padding has an empty window.
    """
    view = pyramid(picture.width, picture.height).global_view
    yield (0, 0, picture.width, picture.height), view.width, view.height
    for level in picture.levels:
        down, right = picture.height / level.height, picture.width / level.width
        for row, col in level.tiles:
            top, left = row * TILE, col * TILE
            bottom, end = min(top + TILE, level.height), min(left + TILE, level.width)
            if bottom - top < 1 or end - left < 1:
                yield (0, 0, 0, 0), 0, 0
                continue
            x1, y1 = min(end * right, picture.width), min(bottom * down, picture.height)
            yield (left * right, top * down, x1, y1), end - left, bottom - top


def jobs(picture: Picture, paths: Paths) -> Iterator[Callable[[], np.ndarray]]:
    """Pixels of the global view, then of the tiles of every level, in the store's order."""
    read = reader(picture, paths)
    for window, width, height in windows(picture):
        if not width or not height:
            yield lambda: np.full((STRIDE, STRIDE, 3), 127, np.uint8)
        else:
            yield lambda w=window, x=width, y=height: read(*w, x, y)
