"""What the fixed blocks of the encoder make of every training tile, cached as int8.

What lands in `<work>/low`:
    scale.npy       one scale per channel
    pictures.json   larger pictures: levels, tiles, regions, rows of their tiles
    pictures.i8     [tiles, 24, 24, 112] of all their global views and tiles
    cover.u8        [tiles, 12, 12] bits of land cover per token (bit 7: known), of dubai_cc0 only
    scenes_0.i8     [images, 24, 24, 112] of every training image of aid150_rsicd
    scenes_1.i8     the same of every third one, cropped, turned and recoloured
    *.done          which chunks are finished: a killed run goes on
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from common import GRID, TILE, TOKENS, Paths, has_variant, labels, normalised, write_atomically
from drawing import recoloured, turned_image
from pictures import SCENES, Picture, jobs, large_scene, windows
from PIL import Image
from real_pictures import cover_of, real_pictures
from tower import LOW_CHANNELS, LOW_GRID
from words import COVERS

MAP = (LOW_GRID, LOW_GRID, LOW_CHANNELS)
CHUNK = {"pictures": 12, "scenes_0": 250, "scenes_1": 250}
"""Pictures, or scenes, in one piece of work."""


def export_lower(path: Path) -> None:
    """The fixed blocks as an ONNX graph: float32 [1, 3, 384, 384] to [1, 112, 24, 24]."""
    import torch
    from tower import load_tower, lower

    tower = load_tower()
    tower.forward = lambda pixels: lower(tower, pixels)
    part = path.with_suffix(".part")
    torch.onnx.export(tower, (torch.zeros(1, 3, TILE, TILE),), str(part), dynamo=False)
    part.rename(path)


def runner(graph: Path) -> Callable[[np.ndarray], np.ndarray]:
    """One tile of uint8 RGB to its map, float32 [24, 24, 112]; one thread."""
    from lrs_edge.engines.runtime import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(graph), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(pixels: np.ndarray) -> np.ndarray:
        low = session.run(None, {name: normalised(pixels)[None]})[0][0]
        return low.transpose(1, 2, 0)

    return run


def scene_pixels(path: Path, variant: int) -> np.ndarray:
    """One scene at tile size; variants above 0 are cropped, turned and recoloured."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if variant == 0:
        return np.asarray(image.resize((TILE, TILE), Image.Resampling.BILINEAR))
    draw = random.Random(f"tile/{variant}/{path.name}")
    side = draw.uniform(0.55, 1.0)
    left, top = draw.uniform(0, 1 - side) * image.width, draw.uniform(0, 1 - side) * image.height
    box = (left, top, left + side * image.width, top + side * image.height)
    image = image.resize((TILE, TILE), Image.Resampling.BILINEAR, box=box)
    image = recoloured(image, draw.randrange(1, 1 << 30))
    return np.asarray(turned_image(image, draw.randrange(8)))


def token_cover(cover: np.ndarray, picture: Picture) -> Iterator[np.ndarray]:
    """Bits of land cover of every token of a picture's tiles, uint8 [12, 12]."""
    for window, width, height in windows(picture):
        bits = np.zeros((GRID, GRID), np.uint8)
        if width and height:
            part = Image.fromarray(cover).resize(
                (width, height), Image.Resampling.NEAREST, box=window
            )
            padded = np.zeros((TILE, TILE), np.uint8)
            padded[:height, :width] = np.asarray(part)
            cells = padded.reshape(GRID, TILE // GRID, GRID, TILE // GRID).transpose(0, 2, 1, 3)
            cells = cells.reshape(GRID, GRID, -1)
            for value in range(1, len(COVERS) + 1):
                bits |= ((cells == value).mean(-1) >= 0.25).astype(np.uint8) << (value - 1)
            bits |= ((cells > 0).mean(-1) >= 0.5).astype(np.uint8) << 7
        yield bits


def nine_parts(cover: np.ndarray) -> dict[str, list[list[float]]]:
    """Share of each land cover in each of the nine parts of a picture, rows from the top."""
    rows = np.array_split(cover, 3, axis=0)
    parts = [np.array_split(row, 3, axis=1) for row in rows]
    return {
        name: [[round(float((part == value).mean()), 4) for part in row] for row in parts]
        for value, name in enumerate(COVERS, 1)
    }


def all_pictures(paths: Paths) -> tuple[list[Picture], int]:
    """Every larger picture with the rows of its tiles in the store, and how many rows there are."""
    pictures = list(islice(real_pictures(paths), 0, None, paths.every))
    pictures += [large_scene(paths, "train", seed) for seed in range(0, SCENES, paths.every)]
    row = 0
    for picture in pictures:
        picture.first_row = row
        row += 1
        for level in picture.levels:
            level.first_row = row
            row += len(level.tiles)
    return pictures, row


class Stores:
    """The memory-mapped files, made when missing or of another size."""

    def __init__(self, paths: Paths, tiles: int, scenes: int) -> None:
        self.folder = paths.work / "low"
        self.pictures = self._open("pictures.i8", (tiles, *MAP), np.int8)
        self.cover = self._open("cover.u8", (tiles, GRID, GRID), np.uint8)
        self.scenes = [self._open(f"scenes_{v}.i8", (scenes, *MAP), np.int8) for v in range(2)]

    @classmethod
    def filled(cls, paths: Paths, scenes: int) -> Stores:
        """Those that `fill` has written."""
        return cls(paths, (paths.work / "low" / "cover.u8").stat().st_size // TOKENS, scenes)

    def _open(self, name: str, shape: tuple[int, ...], kind: type) -> np.memmap:
        path = self.folder / name
        fits = path.exists() and path.stat().st_size == math.prod(shape)
        return np.memmap(path, kind, "r+" if fits else "w+", shape=shape)


class Filler:
    """Does one chunk of work; made once in every worker process."""

    def __init__(self, paths: Paths) -> None:
        self.paths, folder = paths, paths.work / "low"
        self.pictures, tiles = all_pictures(paths)
        self.rows = labels(paths, "aid150_rsicd")
        self.run = runner(folder / "lower.onnx")
        self.scale = np.load(folder / "scale.npy")
        self.stores = Stores(paths, tiles, len(self.rows))

    def low(self, pixels: np.ndarray) -> np.ndarray:
        """A tile's map as int8."""
        return np.clip(np.rint(self.run(pixels) / self.scale), -127, 127).astype(np.int8)

    def chunk(self, name: str, number: int) -> int:
        """One chunk of one store; how many tiles it held."""
        first, count = number * CHUNK[name], 0
        if name == "pictures":
            for picture in self.pictures[first : first + CHUNK[name]]:
                count += self._picture(picture)
        else:
            variant = int(name[-1])
            for index in range(first, min(first + CHUNK[name], len(self.rows))):
                row = self.rows[index]
                if row["split"] == "train" and has_variant(index, variant, self.paths.every):
                    path = self.paths.data / "aid150_rsicd" / row["file"]
                    self.stores.scenes[variant][index] = self.low(scene_pixels(path, variant))
                    count += 1
        (self.paths.work / "low" / f"{name}.{number}.done").touch()
        return count

    def _picture(self, picture: Picture) -> int:
        row = picture.first_row
        for job in jobs(picture, self.paths):
            self.stores.pictures[row] = self.low(job())
            row += 1
        cover = cover_of(self.paths, picture)
        if cover is not None:
            for place, bits in enumerate(token_cover(cover, picture), picture.first_row):
                self.stores.cover[place] = bits
        return row - picture.first_row


_FILLER: list[Filler] = []


def _start(paths: Paths) -> None:
    _FILLER.append(Filler(paths))


def _work(job: tuple[str, int]) -> int:
    return _FILLER[0].chunk(*job)


def prepare(paths: Paths, pictures: list[Picture]) -> None:
    """Graph, scales, and the description of the pictures."""
    folder = paths.work / "low"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "lower.onnx").exists():
        export_lower(folder / "lower.onnx")
    if not (folder / "scale.npy").exists():
        run = runner(folder / "lower.onnx")
        draw = random.Random(0)
        rows = [r for r in labels(paths, "aid150_rsicd") if r["split"] == "train"]
        tiles = [scene_pixels(paths.data / "aid150_rsicd" / r["file"], 0)
                 for r in draw.sample(rows, 80)]  # fmt: skip
        tiles += [next(jobs(p, paths))() for p in draw.sample(pictures, 60)]
        low = np.stack([run(tile) for tile in tiles])
        spread = np.quantile(np.abs(low), 0.9999, (0, 1, 2)).astype(np.float32)
        np.save(folder / "scale.npy", np.maximum(spread, 1e-3) / 127)
    if not (folder / "pictures.json").exists():
        described = []
        for picture in pictures:
            cover = cover_of(paths, picture)
            if cover is not None:
                picture.cover = nine_parts(cover)
            described.append(picture.as_dict())
        write_atomically(folder / "pictures.json", json.dumps(described))


def fill(paths: Paths, workers: int = 2) -> None:
    """Compute what is not there yet."""
    pictures, tiles = all_pictures(paths)
    prepare(paths, pictures)
    scenes = len(labels(paths, "aid150_rsicd"))
    Stores(paths, tiles, scenes)
    sizes = {"pictures": len(pictures), "scenes_0": scenes, "scenes_1": scenes}
    todo = [(n, i) for n, size in sizes.items() for i in range(-(-size // CHUNK[n]))]
    random.Random(5).shuffle(todo)
    folder = paths.work / "low"
    todo = [job for job in todo if not (folder / f"{job[0]}.{job[1]}.done").exists()]
    begun, count = time.time(), 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, partial(_start, paths)) as pool:
        for number, done in enumerate(pool.imap_unordered(_work, todo), 1):
            count += done
            if number % 20 == 0 or number == len(todo):
                rate = count / (time.time() - begun)
                print(f"low: {number}/{len(todo)} chunks, {rate:.0f} tiles/s", flush=True)


if __name__ == "__main__":
    fill(Paths())
