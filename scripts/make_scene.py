r"""Compose the large scene of the README's picture from the sample images, whose licence is clear.

    python scripts/make_scene.py scene.tif
    lrs-edge ask scene.tif "Where is the forest?" --tiles-per-level 8 --format json \
        --trace trace.npz > answer.json
    python scripts/draw_search.py answer.json trace.npz docs/search.png

A meadow of 9,000 x 7,000 pixels (the open western part of examples/yellowstone.tif, repeated) with
one small wood (part of examples/road.tif) in it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import rasterio
from PIL import Image
from rasterio.windows import Window

from lrs_edge_export.scenes.geotiff import Encoding, write_scene
from lrs_edge_export.scenes.library import LabelledTile
from lrs_edge_export.scenes.plan import Background, Placement, ScenePlan

EXAMPLES = Path(__file__).parents[1] / "examples"
WIDTH, HEIGHT = 9000, 7000
SIDE = 400
#: Column and row offsets of meadow tiles in yellowstone.tif, and of the wood in road.tif.
MEADOW = ((20, 60), (20, 700), (120, 1150), (60, 300))
WOOD = (780, 420, 460)
#: Where the wood lies, in scene pixels.
BOX = (6500, 700, 7500, 1700)


def main(target: str) -> None:
    """Cut the tiles, plan the scene, and write it."""
    with tempfile.TemporaryDirectory() as folder:
        meadow = [
            cut("yellowstone.tif", (*offset, SIDE), Path(folder) / f"meadow{number}.png", "meadow")
            for number, offset in enumerate(MEADOW)
        ]
        wood = cut("road.tif", WOOD, Path(folder) / "wood.png", "forest")
        background = Background(tuple(meadow), ("meadow",), 2.0, (1.0, 1.0, 1.0), 7)
        placement = Placement(wood, "forest", BOX, 0)
        plan = ScenePlan("meadow", WIDTH, HEIGHT, "rural", background, (placement,), ("forest",))
        write_scene(plan, Path(target), Encoding(), "readme")


def cut(source: str, part: tuple[int, int, int], target: Path, label: str) -> LabelledTile:
    """A square part (column, row, side) of a sample image as a labelled tile."""
    column, row, side = part
    with rasterio.open(EXAMPLES / source) as image:
        pixels = image.read((1, 2, 3), window=Window(column, row, side, side))
    Image.fromarray(pixels.transpose(1, 2, 0)).save(target)
    return LabelledTile(target, label, side, side)


if __name__ == "__main__":
    main(*sys.argv[1:])
