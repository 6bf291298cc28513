"""Draw what a question led to: tiles looked at, tokens kept at every level, and the answer.

lrs-edge ask IMAGE QUESTION --format json --trace trace.npz > answer.json
python scripts/draw_search.py answer.json trace.npz docs/search.png
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lrs_edge.pyramid.box import Box
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster.raster import Raster

#: Pixels of the picture's panels and text.
PANEL = 380
MARGIN = 16
TEXT = 17
BACKGROUND = (255, 255, 255)
INK = (30, 30, 30)
KEPT = (255, 196, 0)
SEEN = (255, 255, 255)
EVIDENCE = (0, 220, 255)
#: What is asked about is shown with so many pixels of the image around it, at least.
AROUND = 100

#: Colours of a palette picture: photographs of this size stay well below 400 kB.
COLOURS = 128


def main(source: str, trace: str, target: str) -> None:
    """Draw one answer."""
    answer = json.loads(Path(source).read_text(encoding="utf-8"))
    with np.load(trace) as arrays:
        picture = draw(answer, dict(arrays))
    picture.quantize(COLOURS).save(target, optimize=True)
    print(f"{target}: {picture.width}x{picture.height}, {Path(target).stat().st_size:,} bytes")


def draw(answer: dict[str, Any], trace: dict[str, Any], evidence: Box | None = None) -> Image.Image:
    """One panel per level from coarse to fine, question above, answer below.

    Args:
        answer: What `lrs-edge ask --format json` wrote.
        trace: What its `--trace` wrote.
        evidence: Box of what is asked about, in pixels of the image: marked in every panel, and
            shown in one of its own.
    """
    panels = [
        panel(answer, level, kept_tokens(trace, number), tokens_across(trace, number))
        for number, level in enumerate(answer["levels"], 1)
    ]
    captions = [caption(answer, level) for level in answer["levels"]]
    if evidence is not None:
        for part in panels:
            mark(part, evidence, part.width / answer["image"]["width"])
        panels.append(close_up(answer["image"]["path"], evidence, panels[0].height))
        captions.append("what is asked about")
    width = MARGIN + sum(part.width + MARGIN for part in panels)
    question = wrapped(f"Q: {answer['question']}", width)
    reply = wrapped(f"A: {answer['answer']}", width)
    heights = [len(lines) * TEXT * 3 // 2 for lines in (question, reply)]
    tallest = max(part.height for part in panels)
    picture = Image.new("RGB", (width, sum(heights) + tallest + TEXT * 2 + MARGIN * 3), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    top = write(pen, question, MARGIN)
    left = MARGIN
    for part, text in zip(panels, captions, strict=True):
        picture.paste(part, (left, top))
        pen.text((left, top + part.height + 6), text, INK, font())
        left += part.width + MARGIN
    write(pen, reply, top + tallest + TEXT * 2)
    return picture


def kept_tokens(trace: dict[str, Any], number: int) -> list[tuple[int, int]]:
    """Row and column of the tokens kept at the search's level `number`, counted from 1."""
    kept = trace[f"topk{number}_raw_indices"]
    width = tokens_across(trace, number)
    places = [divmod(int(index), width + 1) for index in kept]
    return [(row, col) for row, col in places if col < width]


def tokens_across(trace: dict[str, Any], number: int) -> int:
    """Tokens in a row of the search's level `number`, the newline at its end not counted."""
    return int(trace[f"seq{number}_local_hw_incl_newline"][1]) - 1


def panel(
    answer: dict[str, Any], level: dict[str, Any], tokens: list[tuple[int, int]], across: int
) -> Image.Image:
    """The image with one level's tiles: looked at in white, others dark; kept tokens in yellow."""
    shown = overview(answer["image"])
    scale = shown.width / answer["image"]["width"]
    regions = [region for region in answer["regions"] if region["level"] == level["level"]]
    light = Image.new("L", shown.size, 90)
    for region in regions:
        ImageDraw.Draw(light).rectangle(box(region["window"], scale, shown), fill=255)
    shown = Image.composite(shown, Image.new("RGB", shown.size), light)
    marked = shown.copy()
    side = shown.width / across
    for row, col in tokens:
        corner = (col * side, row * side)
        ImageDraw.Draw(marked).rectangle(
            (*corner, corner[0] + side - 0.5, corner[1] + side - 0.5), fill=KEPT
        )
    shown = Image.blend(shown, marked, 0.55)
    pen = ImageDraw.Draw(shown)
    for region in regions:
        pen.rectangle(box(region["window"], scale, shown), outline=SEEN, width=1)
    return shown


def overview(image: dict[str, Any]) -> Image.Image:
    """The whole image, small."""
    scale = PANEL / max(image["width"], image["height"])
    width, height = round(image["width"] * scale), round(image["height"] * scale)
    with Raster.open(image["path"]) as raster:
        pixels = raster.read((height, width), LevelWindow(0, 0, height, width))
    return Image.fromarray((pixels * 255).round().astype("uint8"))


def mark(shown: Image.Image, evidence: Box, scale: float) -> None:
    """Draw a frame around a box of the image, with room between them where it is small."""
    x0, y0, x1, y1 = (value * scale for value in evidence)
    ImageDraw.Draw(shown).rectangle((x0 - 4, y0 - 4, x1 + 4, y1 + 4), outline=EVIDENCE, width=2)


def close_up(path: str, evidence: Box, height: int) -> Image.Image:
    """The place of a box in the image's own pixels, brought to a panel's height."""
    with Raster.open(path) as raster:
        size = (raster.height, raster.width)
        longer = max(evidence[2] - evidence[0], evidence[3] - evidence[1])
        side = min(round(longer) + 2 * AROUND, *size)
        left, top = (
            min(max(round((evidence[axis] + evidence[axis + 2] - side) / 2), 0), limit - side)
            for axis, limit in ((0, raster.width), (1, raster.height))
        )
        pixels = raster.read(size, LevelWindow(top, left, side, side))
    shown = Image.fromarray((pixels * 255).round().astype("uint8")).resize((height, height))
    scale = height / side
    x0, y0, x1, y1 = evidence
    mark(shown, (x0 - left, y0 - top, x1 - left, y1 - top), scale)
    return shown


def box(window: list[float], scale: float, shown: Image.Image) -> tuple[int, int, int, int]:
    """A pixel window of the image in a panel, its last row and column included."""
    x0, y0, x1, y1 = (round(value * scale) for value in window)
    return x0, y0, min(x1, shown.width) - 1, min(y1, shown.height) - 1


def caption(answer: dict[str, Any], level: dict[str, Any]) -> str:
    """Size of a level and tiles looked at."""
    tiles = sum(region["level"] == level["level"] for region in answer["regions"])
    total = level["tile_rows"] * level["tile_cols"]
    return f"level {level['level']}: {level['width']} px wide, {tiles} of {total} tiles"


def wrapped(text: str, width: int) -> list[str]:
    """Lines that fit a width in pixels, about."""
    return textwrap.wrap(text, max(width * 2 // TEXT - 4, 20))


def write(pen: ImageDraw.ImageDraw, lines: list[str], top: int) -> int:
    """Write lines; returns the place below them."""
    for line in lines:
        pen.text((MARGIN, top), line, INK, font())
        top += TEXT * 3 // 2
    return top + MARGIN // 2


def font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font."""
    return ImageFont.load_default(TEXT)


if __name__ == "__main__":
    main(*sys.argv[1:])
