"""Drawing training pictures from their recipes: crops set into a canvas, open water, colours."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from common import Paths
from PIL import Image, ImageEnhance, ImageFilter


@dataclass(frozen=True)
class Part:
    """A piece of a source image, set into a canvas."""

    file: str
    crop: tuple[float, float, float, float]
    at: tuple[int, int, int, int]
    """Left, top, width and height on the canvas in pixels."""
    turn: int = 0
    colour: int = 0
    feather: bool = False
    objects: tuple[tuple[str, tuple[float, float, float, float]], ...] = ()
    """Labels and boxes in pixels of the canvas."""


@dataclass(frozen=True)
class Recipe:
    """How a canvas is drawn: its size, parts from back to front, colour over all."""

    width: int
    height: int
    parts: tuple[Part, ...]
    colour: int = 0
    water: int = -1
    """Seed of open water behind the parts, or -1."""


def recoloured(image: Image.Image, seed: int) -> Image.Image:
    """Colours, haze, gamma and sharpness as other sensors and other days would have them."""
    if not seed:
        return image
    draw = random.Random(f"colour/{seed}")
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if draw.random() < 0.6:
            image = enhance(image).enhance(draw.uniform(0.65, 1.4))
    if draw.random() < 0.35:
        gains = [draw.uniform(0.85, 1.15) for _ in range(3)]
        gamma, haze = draw.uniform(0.7, 1.4), draw.choice([0.0, 0.0, 0.15, 0.3])
        ramp = (np.arange(256) / 255.0) ** gamma * (1 - haze) + haze * 0.8
        table = [int(v) for g in gains for v in np.clip(ramp * g * 255, 0, 255)]
        image = image.point(table)
    if draw.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0.4, 1.4)))
    return image


def turned_image(image: Image.Image, turn: int) -> Image.Image:
    """One of the eight turns and mirrorings: quarter turns counter-clockwise, then mirrored."""
    if turn % 4:
        turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        image = image.transpose(turns[turn % 4 - 1])
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if turn >= 4 else image


@lru_cache(maxsize=24)
def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def water_patch(draw: random.Random) -> np.ndarray:
    """Base colour of open water: dark, green, blue or grey, uint8 [3]."""
    kinds = [(12, 16, 18), (20, 40, 48), (28, 62, 80), (60, 82, 84), (72, 96, 110), (40, 66, 60)]
    base = np.array(draw.choice(kinds), float) + [draw.uniform(-10, 10) for _ in range(3)]
    return np.clip(base * draw.uniform(0.8, 1.3), 4, 150)


def open_water(width: int, height: int, seed: int) -> Image.Image:
    """Open water with swell and sensor noise."""
    draw = random.Random(f"water/{seed}")
    noise = np.random.default_rng(seed)
    field_ = np.zeros((height, width), np.float32)
    for side, strength in ((400, 5.0), (90, 3.0), (24, draw.uniform(0.5, 3.0)), (6, 2.0)):
        small = noise.normal(size=(height // side + 2, width // side + 2)).astype(np.float32)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        field_ += strength * np.asarray(image)
    grain = noise.normal(scale=draw.uniform(0.5, 3), size=(height, width)).astype(np.float32)
    pixels = water_patch(draw)[None, None, :] + (field_ + grain)[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def drawn(paths: Paths, recipe: Recipe) -> Image.Image:
    """The picture of a recipe."""
    if recipe.water >= 0:
        canvas = open_water(recipe.width, recipe.height, recipe.water)
    else:
        canvas = Image.new("RGB", (recipe.width, recipe.height), (90, 96, 88))
    for part in recipe.parts:
        image = _opened(paths.data / part.file)
        left, top, width, height = part.at
        size = (height, width) if part.turn % 2 else (width, height)
        shrinks = part.crop[2] - part.crop[0] > size[0]
        how = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
        piece = turned_image(image.resize(size, how, box=part.crop), part.turn)
        piece = recoloured(piece, part.colour)
        mask = None
        if part.feather:
            soft = min(width, height) // 6 + 1
            ramp = [np.minimum(np.arange(n), np.arange(n)[::-1]) / soft for n in (height, width)]
            alpha = np.clip(np.minimum.outer(ramp[0], ramp[1]), 0, 1) * 255
            mask = Image.fromarray(alpha.astype(np.uint8))
            if recipe.water >= 0:
                piece = _tinted(piece, canvas, (left, top, width, height))
        canvas.paste(piece, (left, top), mask)
    return recoloured(canvas, recipe.colour)


def _tinted(piece: Image.Image, canvas: Image.Image, at: tuple[int, int, int, int]) -> Image.Image:
    """A ship's surroundings in the colour of the water it is set into."""
    pixels = np.asarray(piece).astype(np.float32)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    under = np.asarray(canvas.crop((at[0], at[1], at[0] + at[2], at[1] + at[3])), np.float32)
    moved = pixels + (under.mean((0, 1)) - np.median(edge, 0))
    return Image.fromarray(np.clip(moved, 0, 255).astype(np.uint8))
