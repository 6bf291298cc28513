"""Run the fine-tuned vision encoder once over all training pictures and cache its features.

What lands in `<work>/features`:
    scenes_{v}.u8   [images, 144, 1280] for variant v of every aid150_rsicd image: 0 is the plain
                    one, the others are turns and random crops, made for training images only
    pictures.u8     [tiles, 144, 1280] for all tiles and global views of `pictures.json`
    pictures.json   larger pictures: levels, tiles, regions, rows of their tiles

Features are ReLU6 outputs stored by `common.compress`. Every finished block is recorded in a
`.done` file, so that a killed run continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from common import FEATURES, TILE, TOKENS, Paths, compress, labels, normalised, write_atomically
from pictures import all_pictures, jobs

VARIANTS = 2


def export_encoder(path: Path, tower_file: Path) -> None:
    """Write the fine-tuned encoder without its head as an ONNX file, for a fast CPU pass."""
    import torch
    from vision import load_tower

    tower = load_tower(tower_file)
    tower.forward = tower.extract_features
    part = path.with_suffix(".part")
    torch.onnx.export(
        tower,
        (torch.zeros(1, 3, TILE, TILE),),
        str(part),
        dynamo=False,
        input_names=["pixels"],
        output_names=["features"],
    )
    part.rename(path)


class Encoder:
    """Tiles of uint8 RGB pixels to ReLU6 features [144, 1280]."""

    def __init__(self, path: Path, threads: int = 2) -> None:
        from lrs_edge.engines.runtime import ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Features of one tile; padding (beyond the picture) is zero after normalisation."""
        features = self.session.run(None, {"pixels": normalised(pixels)[None]})[0]
        return features.reshape(FEATURES, TOKENS).T


def scene_pixels(path: Path, variant: int) -> np.ndarray:
    """One scene image at tile size; variants above 0 are turned, cropped and recoloured."""
    from vision import scene_tile

    # Other crops than those the encoder was fine-tuned on.
    return scene_tile(path, 0, variant and variant + 100)[0]


def prefetched(jobs: Iterable[Callable[[], Any]], ahead: int = 16) -> Iterator[Any]:
    """Results of the jobs in order, computed a little ahead on one thread."""
    with ThreadPoolExecutor(1) as pool:
        iterator = iter(jobs)
        pending = [pool.submit(job) for job in islice(iterator, ahead)]
        while pending:
            result = pending.pop(0).result()
            pending += [pool.submit(job) for job in islice(iterator, 1)]
            yield result


def open_store(path: Path, rows: int) -> np.memmap:
    """The memory-mapped feature file, made when missing or of another size."""
    shape = (rows, TOKENS, FEATURES)
    mode = "r+" if path.exists() and path.stat().st_size == np.prod(shape) else "w+"
    return np.memmap(path, np.uint8, mode, shape=shape)


def fill(
    store: np.memmap,
    rows: list[int],
    jobs: Iterable[Callable[[], np.ndarray]],
    encoder: Encoder,
    done: Path,
) -> None:
    """Fill the rows of one store in order; the number finished is kept in `done`."""
    start = int(done.read_text()) if done.exists() else 0
    begun = time.time()
    for i, pixels in enumerate(prefetched(islice(jobs, start, None)), start):
        store[rows[i]] = compress(encoder(pixels))
        if (i + 1) % 500 == 0 or i + 1 == len(rows):
            store.flush()
            done.write_text(str(i + 1))
            rate = (i + 1 - start) / (time.time() - begun)
            print(f"features {done.stem}: {i + 1}/{len(rows)}, {rate:.0f} tiles/s", flush=True)


def extract(paths: Paths, variants: int = VARIANTS) -> None:
    """Cache everything that is not cached yet."""
    paths.features.mkdir(parents=True, exist_ok=True)
    graph = paths.features / "encoder.onnx"
    if not graph.exists():
        export_encoder(graph, paths.tower)
    encoder = Encoder(graph)
    scenes = labels(paths, "aid150_rsicd")
    root = paths.data / "aid150_rsicd"

    def scene_variant(variant: int) -> None:
        rows = [i for i, s in enumerate(scenes) if variant == 0 or s["split"] == "train"]
        todo = (lambda i=i: scene_pixels(root / scenes[i]["file"], variant) for i in rows)
        store = open_store(paths.features / f"scenes_{variant}.u8", len(scenes))
        fill(store, rows, todo, encoder, paths.features / f"scenes_{variant}.done")

    scene_variant(0)
    pictures = all_pictures(paths)
    described = json.dumps([picture.as_dict() for picture in pictures])
    write_atomically(paths.features / "pictures.json", described)
    total = sum(1 + sum(len(level.tiles) for level in p.levels) for p in pictures)
    store = open_store(paths.features / "pictures.u8", total)
    todo = (job for picture in pictures for job in jobs(picture, paths))
    fill(store, list(range(total)), todo, encoder, paths.features / "pictures.done")
    for variant in range(1, variants):
        scene_variant(variant)


if __name__ == "__main__":
    extract(Paths())
