"""Ships on open water: scenes made of vhr10_rgb's test images, for evaluation only.

    python models/nano/real_scenes/water.py ../shared/data -o FOLDER

Water is spread over 2,000 to 2,800 pixels from patches without boats, turned, mirrored and faded
into each other; ships are pasted with the water around them and soft edges, at their own resolution
or at half of it. Half of the scenes have what draws a search away from ships: a coast with houses,
clouds. FOLDER receives images, and questions.jsonl with the ships' boxes; scenes without ships
answer "no". The same DATA gives the same scenes.
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
    """One scene.

    Attributes:
        width: Pixels.
        height: Pixels.
        water: Of `_WATER`.
        ships: How many.
        of: Images that they are from.
        scale: Size of the ships, 1 for their own.
        coast: Image of the land along the left edge, "" for open water on all sides.
        clouds: How many.
    """

    width: int
    height: int
    water: str
    ships: int = 0
    of: tuple[str, ...] = ()
    scale: float = 1.0
    coast: str = ""
    clouds: int = 0


PLANS = (
    Plan(2400, 2000, "grey", 4, ("501", "503")),
    Plan(2800, 2400, "dark green", 8, ("506", "503"), scale=0.5),
    Plan(2560, 2560, "blue", 12, ("517", "501"), clouds=8),
    Plan(2000, 2800, "black", 2, ("302", "506"), coast="263"),
    Plan(2700, 2100, "teal", 6, ("307", "501", "517"), coast="131"),
    Plan(2000, 2000, "murky", 3, ("506", "302", "503"), scale=0.5, clouds=5),
    Plan(2800, 2800, "rough", 5, ("302", "517", "506")),
    Plan(2560, 2560, "grey", 10, ("501", "503", "307"), scale=0.5, coast="212"),
    Plan(2400, 2400, "teal"),
    Plan(2560, 2000, "murky", coast="257"),
    Plan(2800, 2100, "blue", clouds=8),
    Plan(2000, 2400, "rough"),
)
"""Land and clouds are from vhr10_rgb's test images too."""
_CLOUDS = ("513", ((620, 180, 800, 350), (530, 410, 660, 555)))
_COAST = 0.28
"""Share of the width that is land, more or less."""


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


def add_coast(scene: Pixels, land: Pixels, draw: np.random.Generator) -> NDArray[np.float32]:
    """Put land along the left edge, with a winding line of surf; `scene` is changed in place.

    Returns:
        How much of every pixel is land, 0 to 1, [rows, cols, 1].
    """
    height, width = scene.shape[:2]
    knots = draw.uniform(0.6, 1.4, 9)
    steps = np.linspace(0, 8, height)
    edge = _COAST * width * np.interp(steps, np.arange(9), knots)
    edge += 6 * np.interp(np.linspace(0, 60, height), np.arange(61), draw.normal(0, 1, 61))
    inland = edge[:, None] - np.arange(width)[None]
    wide = int(edge.max()) + 9
    # The picture of the land and its mirror image, again and again.
    rows, cols = (
        np.abs((np.arange(size) + sides) % (2 * sides) - sides).clip(0, sides - 1)
        for size, sides in ((height, land.shape[0]), (wide, land.shape[1]))
    )
    share = np.clip(inland / 6, 0, 1)[..., None].astype(np.float32)
    surf = np.clip(1 - np.abs(inland + 4) / 4, 0, 1)[..., None].astype(np.float32)
    scene += 60 * surf
    scene[:, :wide] += share[:, :wide] * (land[np.ix_(rows, cols)] - scene[:, :wide])
    np.clip(scene, 0, 255, out=scene)
    return np.maximum(share, surf)


def add_cloud(scene: Pixels, cloud: Pixels, left: int, top: int) -> NDArray[np.float32]:
    """Put a cloud, bright in its picture, over the scene; returns where, [rows, cols, 1]."""
    rows, cols = cloud.shape[:2]
    place = slice(top, top + rows), slice(left, left + cols)
    fade = np.sin(np.pi * (np.arange(rows) + 0.5) / rows)[:, None] * np.sin(
        np.pi * (np.arange(cols) + 0.5) / cols
    )
    bright = np.clip((cloud.mean(2) - 75) / 70, 0, 1) * np.clip(4 * fade, 0, 1)
    alpha = bright[..., None].astype(np.float32)
    scene[place] += alpha * (cloud - scene[place])
    return alpha


def _cuts(data: Path, plan: Plan, ships: dict[str, tuple[Box, ...]]) -> list[Pixels]:
    """The ships that a scene may show, each with its margin, in the scene's size."""
    found = []
    margin = round(MARGIN / plan.scale)
    for number in plan.of:
        pixels = _pixels(data, number)
        for index in _SHIPS[number]:
            x0, y0, x1, y1 = (round(edge) for edge in ships[number][index])
            if min(x0, y0) >= margin and x1 + margin <= pixels.shape[1]:
                cut = pixels[y0 - margin : y1 + margin, x0 - margin : x1 + margin]
                found.append(_resized(cut, plan.scale))
    return found


def _resized(pixels: Pixels, scale: float) -> Pixels:
    if scale == 1:
        return pixels
    image = Image.fromarray(np.rint(pixels).astype(np.uint8))
    size = round(image.width * scale), round(image.height * scale)
    return np.asarray(image.resize(size, Image.Resampling.BOX), np.float32)


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
    taken = np.zeros((plan.height, plan.width, 1), np.float32)
    if plan.coast:
        taken = add_coast(scene, _pixels(data, plan.coast), draw)
    for _ in range(plan.clouds):
        x0, y0, x1, y1 = _CLOUDS[1][draw.integers(len(_CLOUDS[1]))]
        cloud = np.rot90(_pixels(data, _CLOUDS[0])[y0:y1, x0:x1], draw.integers(4))
        top = int(draw.integers(plan.height - cloud.shape[0]))
        left = int(draw.integers(plan.width - cloud.shape[1]))
        place = slice(top, top + cloud.shape[0]), slice(left, left + cloud.shape[1])
        taken[place] = np.maximum(taken[place], add_cloud(scene, cloud, left, top))
    boxes: list[Box] = []
    cuts = _cuts(data, plan, ships)
    while len(boxes) < plan.ships:
        cut = np.rot90(cuts[draw.integers(len(cuts))], draw.integers(4))
        cut = cut[:, :: draw.choice((-1, 1))]
        top = int(draw.integers(plan.height - cut.shape[0]))
        left = int(draw.integers(plan.width - cut.shape[1]))
        bottom, right = top + cut.shape[0] + _APART, left + cut.shape[1] + _APART
        free = not taken[top : top + cut.shape[0], left : left + cut.shape[1]].any()
        if free and all(
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
