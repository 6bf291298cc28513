"""Images for the parity check: the user's, or synthetic ones that are the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.checkpoints.vision import VisionStage

#: Local tiles along a side, and images at most.
SIDE = 2
MOST = 3

#: Of the synthetic images; calibration has others.
SEEDS = (1000, 1001)

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Sample:
    """One image: normalised tiles float32 [1 + SIDE * SIDE, 3, S, S], the global view first."""

    tiles: Array


def load_samples(stage: VisionStage, folder: Path | None) -> tuple[list[Sample], str]:
    """Samples, and words for what they are.

    Args:
        stage: Tile size and normalisation.
        folder: Images; None for synthetic ones.

    Raises:
        ExportError: The folder holds no image that can be read.
    """
    if folder is None:
        images = [synthetic_image(SIDE * stage.tile, seed) for seed in SEEDS]
        return [_sample(stage, image) for image in images], f"{len(SEEDS)} synthetic images"
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; name one that holds images")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)[:MOST]
    if not paths:
        raise ExportError(f"{folder} holds no images ({', '.join(sorted(_SUFFIXES))})")
    images = [_read(path) for path in paths]
    return [_sample(stage, image) for image in images], f"{len(images)} images of {folder.name}"


def synthetic_image(side: int, seed: int) -> Image.Image:
    """Fields, roads and roofs, more or less: smooth noise with lines and rectangles."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 180, (12, 12, 3), dtype=np.uint8)
    ground = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(ground).astype(np.int16)
    pixels += rng.integers(-12, 13, pixels.shape, dtype=np.int16)
    for _ in range(6):
        place, width = int(rng.integers(side)), int(rng.integers(3, 12))
        pixels[place : place + width] = rng.integers(90, 130)
    for _ in range(60):
        row, column = rng.integers(side, size=2)
        height, width = rng.integers(side // 100 + 1, side // 12 + 2, size=2)
        pixels[row : row + height, column : column + width] = rng.integers(30, 250, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            # A thumbnail first, so that a very large image is not converted whole.
            image.draft("RGB", (2048, 2048))
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ExportError(f"{path} cannot be read ({error})") from error


def _sample(stage: VisionStage, image: Image.Image) -> Sample:
    """The image squeezed into one tile, and into SIDE x SIDE tiles."""
    tile, side = stage.tile, SIDE * stage.tile
    views = [_normalised(stage, image, tile)]
    fine = _normalised(stage, image, side).reshape(3, SIDE, tile, SIDE, tile)
    local = fine.transpose(1, 3, 0, 2, 4).reshape(SIDE * SIDE, 3, tile, tile)
    return Sample(np.ascontiguousarray(np.concatenate([np.stack(views), local])))


def _normalised(stage: VisionStage, image: Image.Image, side: int) -> NDArray[np.float32]:
    resized = image.resize((side, side), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, np.float32) / np.float32(255)
    mean, std = np.array(stage.mean, np.float32), np.array(stage.std, np.float32)
    return ((pixels - mean) / std).transpose(2, 0, 1)
