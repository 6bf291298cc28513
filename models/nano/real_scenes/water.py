"""Ships on open water: scenes made of vhr10_rgb's test images, for evaluation only.

    python models/nano/real_scenes/water.py ../shared/data -o FOLDER

Water is spread over 2,000 to 2,800 pixels from patches without boats, turned, mirrored and faded
into each other; ships are pasted at their own resolution with the water around them and soft edges.
FOLDER receives images, and questions.jsonl with the ships' boxes; scenes without ships answer "no".
The same DATA gives the same scenes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from labels import Box, read
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float32]
"""RGB, [rows, cols, 3], 0 to 255."""

QUESTION = "Are there any ships?"
MARGIN = 14
"""Pixels of water around a ship that are pasted with it, fading."""
_PATCH = 150
_APART = 40

_WATER: dict[str, tuple[tuple[str, tuple[int, int, int, int]], ...]] = {
    "grey": (("501", (130, 180, 460, 420)), ("501", (560, 290, 740, 450))),
    "dark green": (("506", (620, 360, 940, 540)), ("506", (170, 200, 480, 350))),
    "blue": (("517", (690, 140, 1000, 400)),),
    "black": (("302", (220, 150, 640, 390)),),
    "teal": (("307", (720, 40, 960, 360)),),
    "murky": (("309", (480, 20, 940, 270)),),
    "rough": (("290", (600, 60, 960, 330)),),
}
"""Water without boats, as x0, y0, x1, y1 of vhr10_rgb's test images (looked at by eye)."""

_SHIPS: dict[str, tuple[int, ...]] = {
    "501": (0, 1, 2, 3, 4, 5, 6),
    "506": (1, 2, 3, 4, 5, 6, 7, 8),
    "503": (0, 1, 2, 3, 5, 6, 7),
    "517": (0, 1, 2, 3, 5, 6),
    "302": (0, 1),
    "307": (0, 1, 2, 3),
}
"""Ships that lie alone in the water: places among the ship boxes of an image."""


@dataclass(frozen=True)
class Plan:
    """One scene: its size in pixels, its water, and how many ships of which images."""

    width: int
    height: int
    water: str
    ships: int = 0
    of: tuple[str, ...] = ()


PLANS = (
    Plan(2400, 2000, "grey", 4, ("501", "503")),
    Plan(2800, 2400, "dark green", 8, ("506", "503")),
    Plan(2560, 2560, "blue", 12, ("517", "501")),
    Plan(2000, 2800, "black", 2, ("302", "506")),
    Plan(2700, 2100, "teal", 6, ("307", "501", "517")),
    Plan(2000, 2000, "murky", 3, ("506", "302", "503")),
    Plan(2800, 2800, "rough", 5, ("302", "517", "506")),
    Plan(2560, 2560, "grey", 10, ("501", "503", "307")),
    Plan(2400, 2400, "teal"),
    Plan(2560, 2000, "murky"),
    Plan(2800, 2100, "blue"),
    Plan(2000, 2400, "rough"),
)


def spread(patches: list[Pixels], width: int, height: int, draw: np.random.Generator) -> Pixels:
    """Water of any size from patches: cuts of them, turned and mirrored, faded into each other.

    Differences from the mean are added with weights whose squares add up to one, so that the waves
    are as strong as in the patches.
    """
    side = min(_PATCH, *(min(patch.shape[:2]) for patch in patches))
    step = side // 2
    mean = np.mean([patch.mean((0, 1)) for patch in patches], axis=0)
    ramp = np.sin(np.pi * (np.arange(side) + 0.5) / side)
    window = (ramp[:, None] * ramp)[..., None].astype(np.float32)
    rows, cols = height + 2 * side, width + 2 * side
    total = np.zeros((rows, cols, 3), np.float32)
    weights = np.zeros((rows, cols, 1), np.float32)
    for row in range(0, rows - side, step):
        for col in range(0, cols - side, step):
            patch = patches[draw.integers(len(patches))]
            top = draw.integers(patch.shape[0] - side + 1)
            left = draw.integers(patch.shape[1] - side + 1)
            cut = patch[top : top + side, left : left + side]
            # Waves run one way: half a turn and mirrors, no quarter turns.
            cut = cut[:: draw.choice((-1, 1)), :: draw.choice((-1, 1))]
            place = slice(row, row + side), slice(col, col + side)
            total[place] += window * (cut - cut.mean((0, 1)))
            weights[place] += window**2
    inner = slice(side, side + height), slice(side, side + width)
    water = (
        total[inner] / np.sqrt(np.maximum(weights[inner], 1e-3)) + mean + _haze(width, height, draw)
    )
    return np.clip(water, 0, 255).astype(np.float32)


def _haze(width: int, height: int, draw: np.random.Generator) -> Pixels:
    """Slow changes of brightness, [height, width, 1]."""
    coarse = Image.fromarray(draw.normal(0, 4, (4, 4)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))[..., None]


def paste(scene: Pixels, cut: Pixels, margin: int, left: int, top: int) -> Box:
    """Paste a ship with the water around it; its edge fades and takes the scene's colour.

    Args:
        scene: Changed in place.
        cut: The ship with `margin` pixels of water on every side.
        margin: Pixels.
        left: Column of the cut's left edge in the scene.
        top: Row of its upper edge.

    Returns:
        The ship's box in the scene.
    """
    rows, cols = cut.shape[:2]
    place = slice(top, top + rows), slice(left, left + cols)
    edge = np.minimum(
        np.minimum(np.arange(rows), np.arange(rows)[::-1])[:, None],
        np.minimum(np.arange(cols), np.arange(cols)[::-1])[None],
    )
    alpha = np.clip(edge / margin, 0, 1)[..., None].astype(np.float32)
    ring = edge < margin
    offset = np.median(scene[place][ring], axis=0) - np.median(cut[ring], axis=0)
    scene[place] = (1 - alpha) * scene[place] + alpha * np.clip(cut + offset, 0, 255)
    return (left + margin, top + margin, left + cols - margin, top + rows - margin)


def _cuts(data: Path, plan: Plan, ships: dict[str, tuple[Box, ...]]) -> list[Pixels]:
    """The ships that a scene may show, each with its margin."""
    found = []
    for number in plan.of:
        pixels = _pixels(data, number)
        for index in _SHIPS[number]:
            x0, y0, x1, y1 = (round(edge) for edge in ships[number][index])
            if min(x0, y0) >= MARGIN and x1 + MARGIN <= pixels.shape[1]:
                found.append(pixels[y0 - MARGIN : y1 + MARGIN, x0 - MARGIN : x1 + MARGIN])
    return found


def _pixels(data: Path, number: str) -> Pixels:
    with Image.open(data / "vhr10_rgb" / "images" / f"{number}.webp") as image:
        return np.asarray(image.convert("RGB"), np.float32)


def compose(
    data: Path, plan: Plan, ships: dict[str, tuple[Box, ...]], seed: int
) -> tuple[Pixels, list[Box]]:
    """One scene and the boxes of its ships."""
    draw = np.random.default_rng(seed)
    patches = [
        _pixels(data, number)[y0:y1, x0:x1] for number, (x0, y0, x1, y1) in _WATER[plan.water]
    ]
    scene = spread(patches, plan.width, plan.height, draw)
    boxes: list[Box] = []
    cuts = _cuts(data, plan, ships)
    while len(boxes) < plan.ships:
        cut = np.rot90(cuts[draw.integers(len(cuts))], draw.integers(4))
        cut = cut[:, :: draw.choice((-1, 1))]
        top = int(draw.integers(plan.height - cut.shape[0]))
        left = int(draw.integers(plan.width - cut.shape[1]))
        bottom, right = top + cut.shape[0] + _APART, left + cut.shape[1] + _APART
        if all(
            right < box[0] or box[2] + _APART < left or bottom < box[1] or box[3] + _APART < top
            for box in boxes
        ):
            boxes.append(paste(scene, cut, MARGIN, left, top))
    return scene, boxes


def write(data: Path, folder: Path) -> Path:
    """Write all scenes and their questions, if they are not there; returns the question file."""
    questions = folder / "questions.jsonl"
    if questions.exists():
        return questions
    (folder / "images").mkdir(parents=True, exist_ok=True)
    ships = {
        Path(image.file).stem: image.boxes["ship"]
        for image in read(data)
        if image.folder == "vhr10_rgb" and "ship" in image.boxes
    }
    rows = []
    for number, plan in enumerate(PLANS, 1):
        scene, boxes = compose(data, plan, ships, number)
        name = f"images/water_{number}.jpg"
        Image.fromarray(np.rint(scene).astype(np.uint8)).save(folder / name, quality=95)
        rows.append(
            {
                "question_id": f"water_{number}",
                "image": name,
                "category": "presence",
                "text": QUESTION,
                "ground_truth": "yes" if boxes else "no",
                "hbox": boxes,
            }
        )
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return questions


def main() -> None:
    """Write the scenes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with vhr10_rgb")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    options = parser.parse_args()
    print(write(options.data, options.output))


if __name__ == "__main__":
    main()
