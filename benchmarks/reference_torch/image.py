"""Preprocessing as the reference does it: the whole image decoded, every level built from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Resized:
    """One level, cut into tiles.

    Attributes:
        height: Rows of the resized image in pixels, without padding.
        width: Columns of the resized image in pixels, without padding.
        rows: Tiles from top to bottom.
        cols: Tiles from left to right.
        tiles: float32 [rows * cols, 3, S, S], row-major, zeros where there is no image.
    """

    height: int
    width: int
    rows: int
    cols: int
    tiles: Tensor


@dataclass(frozen=True)
class Levels:
    """What one image becomes.

    Attributes:
        height: Rows of the image in pixels.
        width: Columns of the image in pixels.
        view: The global view, one tile.
        levels: From coarse to fine.
    """

    height: int
    width: int
    view: Resized
    levels: list[Resized]


def decode(path: Path) -> Image.Image:
    """The image file, decoded to RGB by Pillow."""
    limit = Image.MAX_IMAGE_PIXELS
    # These files are the user's own; the limit guards services.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def open_levels(
    image: Image.Image,
    *,
    tile: int,
    base_side: int,
    mean: Triple,
    std: Triple,
    device: str = "cpu",
) -> Levels:
    """All levels of an image, every one resampled from the full normalised image.

    Args:
        image: RGB.
        tile: Tile side S in pixels.
        base_side: Long side of the base level in pixels.
        mean: Per channel, on pixels of 0..1.
        std: Per channel, on pixels of 0..1.
        device: Where it is normalised and resampled, and where the levels lie.

    Raises:
        ValueError: The authors' code fails on an image of this shape.
    """
    pixels = _normalised(image, mean, std, device)
    height, width = pixels.shape[1:]
    longest = max(height, width)
    smallest = min(base_side / longest, 1.0)
    ratios = {min(tile / height, tile / width), smallest}
    ratio = 1.0
    while ratio >= smallest:
        ratios.add(ratio)
        ratio /= 2
    view, *finer = [_resized(pixels, ratio, tile) for ratio in sorted(ratios)]
    if not finer:
        raise ValueError(f"the reference fails on images whose long side is {tile} pixels")
    return Levels(height, width, view, finer)


def _normalised(image: Image.Image, mean: Triple, std: Triple, device: str) -> Tensor:
    """float32 [3, H, W]."""
    pixels = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)
    pixels = pixels.to(torch.float32).contiguous()
    pixels.div_(255)
    pixels.sub_(torch.tensor(mean, device=device)[:, None, None])
    return pixels.div_(torch.tensor(std, device=device)[:, None, None])


def _resized(pixels: Tensor, ratio: float, tile: int) -> Resized:
    height, width = (round(side * ratio) for side in pixels.shape[1:])
    rows, cols = math.ceil(height / tile), math.ceil(width / tile)
    scale = min(tile * rows / height, tile * cols / width)
    height, width = round(height * scale), round(width * scale)
    rows, cols = math.ceil(height / tile), math.ceil(width / tile)
    resized = F.interpolate(pixels[None], (height, width), mode="bilinear", align_corners=False)[0]
    padded = F.pad(resized, (0, cols * tile - width, 0, rows * tile - height))
    blocks = padded.view(3, rows, tile, cols, tile).permute(1, 3, 0, 2, 4)
    return Resized(height, width, rows, cols, blocks.reshape(rows * cols, 3, tile, tile))
