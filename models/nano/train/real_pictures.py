"""Training pictures from real boxed images: crops, canvases of several, land cover of Dubai.

Every picture is described by numbers alone (`Recipe`) and drawn again from them. Crops are turned,
rescaled and recoloured; canvases are larger than the base level, so that things are small there,
with objects among what they are mistaken for: other things, towns, sand, dark and open water.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import Paths, is_dev, labels, pyramid
from drawing import Part, Recipe, turned_image
from pictures import LevelTiles, Picture, chosen_tiles
from PIL import Image
from words import BOXED, NATURAL, complete_of

VARIANTS = {"vhr10_rgb": 2, "airport_338": 2, "simd552_640": 2, "open_objects": 2}
CANVASES = 240
DUBAI_TRAIN = {"scene2": 16, "scene3": 12, "scene6": 16, "scene7": 30}
"""Crops of the scenes that are trained on; 1, 4 and 5 are kept out."""
DUBAI_ABSENT = {
    "scene2": ["airplane", "baseball diamond", "ship", "harbor", "helicopter"],
    "scene3": ["airplane", "baseball diamond"],
    "scene6": ["airplane", "baseball diamond", "storage tank", "ground track field"],
    "scene7": ["airplane", "baseball diamond", "ship", "harbor"],
}
"""What was looked for in the scenes, by eye, and is not there."""
DUBAI_NO_PLACES = ["Airport", "Forest", "Mountain", "BaseballField", "Farmland", "RailwayStation"]
FINEST_TILES = 14


@dataclass
class Source:
    """One labelled image."""

    folder: str
    file: str
    width: int
    height: int
    objects: list[tuple[str, list[float]]]
    complete: list[str] = field(default_factory=list)


def sources(paths: Paths, folder: str, split: str = "train") -> list[Source]:
    """The labelled images of one source."""
    found = []
    for row in labels(paths, folder):
        if (row["split"] == "train") != (split == "train"):
            continue
        objects = [(o["class"], [float(v) for v in o["bbox"]]) for o in row["objects"]]
        held = {label for label, _ in objects}
        complete = complete_of(folder, row.get("labelled_classes", []), held)
        name = f"{folder}/{row['file']}"
        found.append(Source(folder, name, row["width"], row["height"], objects, complete))
    return found


def turned_box(box: list[float], turn: int) -> list[float]:
    """A box in shares of the picture after `turned_image`."""
    x0, y0, x1, y1 = box
    for _ in range(turn % 4):
        x0, y0, x1, y1 = y0, 1 - x1, y1, 1 - x0
    return [1 - x1, y0, 1 - x0, y1] if turn >= 4 else [x0, y0, x1, y1]


def part_of(
    source: Source,
    draw: random.Random,
    at: tuple[int, int],
    size: tuple[int, int],
    scale: float,
    around: list[float] | None = None,
) -> Part:
    """A random crop of a source at a scale (canvas pixels per source pixel), no larger than size.

    Args:
        source: The image.
        draw: Random numbers.
        at: Left and top on the canvas.
        size: Width and height there at most, in pixels.
        scale: Canvas pixels per pixel of the source.
        around: A box in pixels of the source that the crop shall show.
    """
    turn = draw.randrange(8)
    wide, high = (size[1], size[0]) if turn % 2 else size
    w, h = min(source.width, wide / scale), min(source.height, high / scale)
    if around is not None:
        cx, cy = (around[0] + around[2]) / 2, (around[1] + around[3]) / 2
        x, y = cx - w * draw.uniform(0.3, 0.7), cy - h * draw.uniform(0.3, 0.7)
    else:
        x, y = draw.uniform(0, source.width - w), draw.uniform(0, source.height - h)
    x, y = min(max(x, 0), source.width - w), min(max(y, 0), source.height - h)
    shown = (round(w * scale), round(h * scale))
    width, height = (shown[1], shown[0]) if turn % 2 else shown
    objects = []
    for label, (x0, y0, x1, y1) in source.objects:
        a, b, c, d = max(x0, x), max(y0, y), min(x1, x + w), min(y1, y + h)
        # A sliver of a thing at the edge is neither there nor absent; less than a third is left.
        if c <= a or d <= b or (c - a) * (d - b) < 0.3 * (x1 - x0) * (y1 - y0):
            continue
        box = turned_box([(a - x) / w, (b - y) / h, (c - x) / w, (d - y) / h], turn)
        left, top = at
        objects.append((label, (left + box[0] * width, top + box[1] * height,
                                left + box[2] * width, top + box[3] * height)))  # fmt: skip
    colour = draw.randrange(1, 1 << 30) if draw.random() < 0.5 else 0
    place = (*at, max(width, 1), max(height, 1))
    return Part(source.file, (x, y, x + w, y + h), place, turn, colour, False, tuple(objects))


def picture_of(
    kind: str, recipe: Recipe, complete: list[str], draw: random.Random, **more: Any
) -> Picture:
    """The picture of a recipe with its levels and the tiles that are extracted."""
    width, height = recipe.width, recipe.height
    regions = []
    for part in recipe.parts:
        for label, (x0, y0, x1, y1) in part.objects:
            box = [x0 / width, y0 / height, min(x1 / width, 1.0), min(y1 / height, 1.0)]
            regions.append({"label": label, "box": box})
    found = pyramid(width, height).levels
    levels = []
    for index, level in enumerate(found):
        tiles = [(t.row, t.col) for t in level.tiles()]
        if index > 0:
            boxes = [r["box"] for r in regions]
            tiles = chosen_tiles(level, boxes, FINEST_TILES, draw)
        levels.append(LevelTiles(level.height, level.width, tiles))
    return Picture(kind, "train", width, height, regions, levels, complete, recipe=recipe, **more)


def crops(paths: Paths) -> Iterator[Picture]:
    """Every boxed image whole, then crops of it at other scales."""
    for folder, count in VARIANTS.items():
        for number, source in enumerate(sources(paths, folder)):
            places = ["Airport"] if folder == "airport_338" else []
            for variant in range(count):
                draw = random.Random(f"crop/{source.file}/{variant}")
                if variant == 0 and folder != "open_objects":
                    whole = (0.0, 0.0, float(source.width), float(source.height))
                    boxes = tuple((label, tuple(box)) for label, box in source.objects)
                    part = Part(source.file, whole, (0, 0, source.width, source.height),
                                objects=boxes)  # type: ignore[arg-type]  # fmt: skip
                else:
                    long = max(source.width, source.height)
                    side = draw.uniform(0.4, 1.0) * long
                    scale = math.exp(draw.uniform(math.log(0.5), math.log(1.3)))
                    size = (round(side * scale), round(side * scale * draw.uniform(0.7, 1.0)))
                    around = (
                        draw.choice(source.objects)[1]
                        if draw.random() < 0.6 and source.objects
                        else None
                    )
                    part = part_of(source, draw, (0, 0), size, scale, around)
                recipe = Recipe(part.at[2], part.at[3], (part,))
                yield picture_of("boxed", recipe, source.complete, draw,
                                 source=folder, places=places, seed=number)  # fmt: skip


def canvas(seed: int, pools: dict[str, list[Source]]) -> Picture:
    """One canvas: a mosaic, open water with ships, or a part of Dubai with things set into it."""
    draw = random.Random(f"canvas/{seed}")
    width = round(math.exp(draw.uniform(math.log(1500), math.log(3400))))
    height = round(width * draw.uniform(0.65, 1.0))
    if draw.random() < 0.5:
        width, height = height, width
    colour = draw.randrange(1, 1 << 30) if draw.random() < 0.5 else 0
    roll = seed % 10
    if roll < 5:
        return _mosaic(draw, width, height, colour, pools)
    if roll < 8:
        return _ships(draw, width, height, colour, pools["ship"])
    return _set_into_dubai(draw, width, height, pools)


def _mosaic(
    draw: random.Random, width: int, height: int, colour: int, pools: dict[str, list[Source]]
) -> Picture:
    """Neighbouring crops; now and then natural land between them."""
    side = draw.choice([420, 520, 640, 800])
    airports = draw.random() < 0.25
    parts, complete = [], set(BOXED) - {"vehicle"}
    natural = draw.uniform(0, 0.6)
    only = draw.choice([None, None, draw.choice(BOXED[:9])])
    for top in range(0, height, side):
        for left in range(0, width, side):
            size = (min(side, width - left), min(side, height - top))
            if draw.random() < natural:
                parts.append(_stretched(draw.choice(pools["natural"]), draw, (left, top), size))
                continue
            pool = pools["airport"] if airports and draw.random() < 0.5 else pools["vhr10"]
            if only is not None and pool is pools["vhr10"] and draw.random() < 0.5:
                pool = pools[only]
            source = draw.choice(pool)
            scale = max(draw.uniform(0.55, 1.1), size[0] / min(source.width, source.height),
                        size[1] / min(source.width, source.height))  # fmt: skip
            parts.append(part_of(source, draw, (left, top), size, scale))
            complete &= set(source.complete)
    recipe = Recipe(width, height, tuple(parts), colour)
    return picture_of("canvas", recipe, sorted(complete), draw)


def _stretched(
    source: Source, draw: random.Random, at: tuple[int, int], size: tuple[int, int]
) -> Part:
    """A whole image in any shape (natural land has no shape)."""
    turn = draw.randrange(8)
    whole = (0.0, 0.0, float(source.width), float(source.height))
    return Part(source.file, whole, (*at, *size), turn, draw.randrange(1 << 20))


def _ships(
    draw: random.Random, width: int, height: int, colour: int, pool: list[Source]
) -> Picture:
    """Open water with some ships, or none; now and then land at one side."""
    parts: list[Part] = []
    for _ in range(draw.choice([0, 1, 1, 2, 3, 4, 6, 8])):
        source = draw.choice(pool)
        box = draw.choice([b for label, b in source.objects if label == "ship"])
        scale = draw.uniform(0.5, 1.2)
        margin = 1.35 * max(box[2] - box[0], box[3] - box[1]) * scale + 8
        side = round(min(margin, 500))
        at = (draw.randrange(max(width - side, 1)), draw.randrange(max(height - side, 1)))
        part = part_of(source, draw, at, (side, side), scale, box)
        parts.append(Part(part.file, part.crop, part.at, part.turn, 0, True, part.objects))
    recipe = Recipe(width, height, tuple(parts), colour, draw.randrange(1, 1 << 30))
    return picture_of("canvas", recipe, list(BOXED), draw)


def _set_into_dubai(
    draw: random.Random, width: int, height: int, pools: dict[str, list[Source]]
) -> Picture:
    """Part of a scene of Dubai, with up to five crops set into it."""
    back = draw.choice(pools["dubai"])
    scale = draw.uniform(0.7, 1.2)
    width, height = min(width, int(back.width * scale)), min(height, int(back.height * scale))
    parts = [part_of(back, draw, (0, 0), (width, height), scale)]
    width, height = parts[0].at[2:]
    complete = set(back.complete) & set(BOXED)
    for _ in range(draw.choice([0, 1, 2, 3, 5])):
        source = draw.choice(pools["airport"] if draw.random() < 0.4 else pools["vhr10"])
        side = draw.randint(200, 560)
        at = (draw.randrange(max(width - side, 1)), draw.randrange(max(height - side, 1)))
        around = draw.choice(source.objects)[1] if source.objects else None
        part = part_of(source, draw, at, (side, side), draw.uniform(0.6, 1.1), around)
        parts.append(part)
        complete &= set(source.complete)
    recipe = Recipe(width, height, tuple(parts), draw.randrange(1 << 20))
    return picture_of("canvas", recipe, sorted(complete), draw)


def pools_of(paths: Paths) -> dict[str, list[Source]]:
    """What canvases are made of."""
    boxed = sources(paths, "vhr10_rgb")
    pools = {"vhr10": boxed, "airport": sources(paths, "airport_338")}
    for name in BOXED:
        pools[name] = [s for s in boxed if any(label == name for label, _ in s.objects)]
    pools["natural"] = [
        Source("aid150_rsicd", f"aid150_rsicd/{row['file']}", 150, 150, [], list(BOXED))
        for row in labels(paths, "aid150_rsicd")
        if row["split"] == "train" and row["scene"] in NATURAL and not is_dev(row["file"])
    ]
    pools["dubai"] = dubai_sources(paths)
    return pools


def dubai_sources(paths: Paths) -> list[Source]:
    """The scenes of Dubai that are trained on."""
    found = []
    for row in labels(paths, "dubai_cc0"):
        name = Path(row["file"]).stem
        if name in DUBAI_TRAIN:
            file = f"dubai_cc0/{row['file']}"
            absent = DUBAI_ABSENT[name]
            found.append(Source("dubai_cc0", file, row["width"], row["height"], [], absent))
    return found


def dubai(paths: Paths) -> Iterator[Picture]:
    """Crops of the training scenes with the land cover of their nine parts."""
    for source in dubai_sources(paths):
        name = Path(source.file).stem
        for seed in range(DUBAI_TRAIN[name]):
            draw = random.Random(f"dubai/{name}/{seed}")
            long = math.exp(draw.uniform(math.log(600), math.log(4200)))
            scale = draw.uniform(0.6, 1.2)
            if seed == 0:
                long, scale = 9000, 1.0
            size = (round(long * scale), round(long * scale * draw.uniform(0.7, 1.0)))
            part = part_of(source, draw, (0, 0), size, scale)
            recipe = Recipe(part.at[2], part.at[3], (part,))
            yield picture_of("cover", recipe, source.complete, draw,
                             source=name, absent_places=DUBAI_NO_PLACES)  # fmt: skip


def cover_of(paths: Paths, picture: Picture) -> np.ndarray | None:
    """Land cover of a picture of Dubai, uint8 [height, width] (0 unknown, then `COVERS`)."""
    if picture.kind != "cover":
        return None
    part = picture.recipe.parts[0]
    mask = part.file.replace("/images/", "/masks/").replace(".webp", ".png")
    with Image.open(paths.data / mask) as image:
        crop = image.convert("L") if image.mode not in ("L", "P") else image.copy()
    width, height = part.at[2:]
    size = (height, width) if part.turn % 2 else (width, height)
    crop = crop.resize(size, Image.Resampling.NEAREST, box=part.crop)
    return np.asarray(turned_image(crop, part.turn))


def real_pictures(paths: Paths) -> Iterator[Picture]:
    """All of them."""
    yield from crops(paths)
    pools = pools_of(paths)
    yield from (canvas(seed, pools) for seed in range(CANVASES))
    yield from dubai(paths)
