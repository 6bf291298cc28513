"""Where each tile lies in one large scene: boxes and labels, no pixels.

A scene is a background of one or two labels, and places: single tiles of other labels, each in its
own box. Coordinates are scene pixels, x to the right and y downwards, boxes (x0, y0, x1, y1) with
x1 and y1 outside. Everything comes from the `random.Random` given, so the same library and seed
make the same plan.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from lrs_edge.errors import UsageError
from lrs_edge.pyramid.box import PixelBox
from lrs_edge_export.scenes.library import LabelledTile, TileLibrary
from lrs_edge_export.scenes.rules import DEFAULT_RULES, SceneRules

Setting = Literal["rural", "urban"]

#: Smallest and largest side of a scene in pixels.
MIN_SCENE, MAX_SCENE = 1000, 40_000
#: Places in one scene, at least and at most.
MIN_PLACES, MAX_PLACES = 3, 12
#: Side of a place in scene pixels.
MIN_PLACE, MAX_PLACE = 160, 720
#: Scenes from here on (pixels) may have places a quarter larger.
_HUGE = 12_000
#: Largest place as a share of the shorter side of the scene.
_LARGEST_SHARE = 0.24
#: Texture pixels of a background are enlarged by this much, where the scene is not too large.
_ENLARGED = (2.2, 5.0)
#: Longest side in pixels of a background's texture; a larger scene is enlarged further.
MAX_TEXTURE = 3200
#: Free pixels between two places planned side by side.
_TOUCHING = (4, 28)
_TRIES = 60


@dataclass(frozen=True)
class Placement:
    """One tile in the scene.

    Attributes:
        tile: What is drawn.
        label: The tile's label.
        box: (x0, y0, x1, y1) in scene pixels.
        turn: 0..7: quarter turns counter-clockwise, plus 4 when mirrored left to right first.
    """

    tile: LabelledTile
    label: str
    box: PixelBox
    turn: int

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the middle of the box in scene pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Background:
    """What lies under the places.

    Attributes:
        tiles: The tiles repeated, of all labels.
        labels: One or two labels.
        enlarged: Scene pixels per pixel of the texture.
        gains: Factors of red, green and blue for the whole scene, places too: colour of the light.
        seed: Decides which tile lies in which cell.
    """

    tiles: tuple[LabelledTile, ...]
    labels: tuple[str, ...]
    enlarged: float
    gains: tuple[float, float, float]
    seed: int


@dataclass(frozen=True)
class ScenePlan:
    """One scene before it is drawn.

    Attributes:
        name: Name of the scene, and of its file without the ending.
        width: Columns in pixels.
        height: Rows in pixels.
        setting: What most of the scene is.
        background: What lies under the places.
        placements: The places; no two boxes overlap.
        absent: Labels that are certainly not in the scene, neither as places nor in the background
            or within another place. Others that have no place may still be seen somewhere.
    """

    name: str
    width: int
    height: int
    setting: Setting
    background: Background
    placements: tuple[Placement, ...]
    absent: tuple[str, ...]


def plan_scene(
    library: TileLibrary,
    draw: random.Random,
    width: int,
    height: int,
    name: str,
    rules: SceneRules = DEFAULT_RULES,
) -> ScenePlan:
    """Plan one scene.

    Args:
        library: The tiles to choose from.
        draw: Source of every choice.
        width: Columns of the scene in pixels.
        height: Rows of the scene in pixels.
        name: Name of the scene.
        rules: Which labels are backgrounds, and which do not go together.

    Raises:
        UsageError: The size is out of range, or the library has too few labels for a scene.
    """
    if not (min(width, height) >= MIN_SCENE and max(width, height) <= MAX_SCENE):
        raise UsageError(
            f"a scene of {width} x {height} pixels is out of range; "
            f"choose sides from {MIN_SCENE} to {MAX_SCENE}"
        )
    setting, group = _choose_background(library, draw, rules)
    hidden = rules.hidden_by(group)
    pool = [label for label in library.labels if label not in hidden and rules.apart(label, group)]
    if len(pool) < 2:
        raise UsageError(
            f"{library.folder} has fewer than two labels for places on {' and '.join(group)}; "
            "add labels, or name other background labels"
        )
    wanted, absent = _choose_labels(library, pool, draw, rules)
    placements = _Layout(width, height, draw).lay(library, wanted)
    background = _background(library, group, draw, max(width, height))
    return ScenePlan(name, width, height, setting, background, tuple(placements), tuple(absent))


def _choose_background(
    library: TileLibrary, draw: random.Random, rules: SceneRules
) -> tuple[Setting, tuple[str, ...]]:
    """A setting, and one or two labels of one of its groups that the library has."""
    settings: dict[Setting, list[tuple[str, ...]]] = {}
    named: tuple[tuple[Setting, tuple[tuple[str, ...], ...]], ...] = (
        ("rural", rules.rural),
        ("urban", rules.urban),
    )
    for setting, groups in named:
        held = [tuple(label for label in group if label in library.by_label) for group in groups]
        if usable := [group for group in held if group]:
            settings[setting] = usable
    if not settings:
        raise UsageError(
            f"none of the labels of {library.folder} is known as a background; name some "
            "(--rural, --urban): " + ", ".join(library.labels)
        )
    setting = draw.choice(sorted(settings))
    group = draw.choice(settings[setting])
    count = min(len(group), draw.choice((1, 1, 2)))
    return setting, tuple(draw.sample(group, count))


def _background(
    library: TileLibrary, labels: tuple[str, ...], draw: random.Random, longest: int
) -> Background:
    """A few tiles of the labels, and how they are enlarged and coloured."""
    tiles: list[LabelledTile] = []
    for label in labels:
        held = library.by_label[label]
        tiles += draw.sample(held, min(len(held), draw.randint(4, 7)))
    least = max(_ENLARGED[0], longest / MAX_TEXTURE)
    enlarged = draw.uniform(least, max(least, _ENLARGED[1]))
    light = draw.uniform(0.9, 1.1)
    red, green, blue = (light * draw.uniform(0.96, 1.04) for _ in range(3))
    gains = (round(red, 3), round(green, 3), round(blue, 3))
    return Background(tuple(tiles), labels, round(enlarged, 3), gains, draw.getrandbits(32))


def _choose_labels(
    library: TileLibrary, pool: list[str], draw: random.Random, rules: SceneRules
) -> tuple[list[str], list[str]]:
    """Labels of the places, and labels that are absent for certain.

    Each label that is placed gets one that is absent, half of the time an easily confused one, and
    both are drawn alike: whether a label is asked about says nothing about whether it is there.
    Numbers from 2 to 5 are drawn evenly, so that counting questions have even answers.

    Returns:
        (labels of the places, with repeats; absent labels, each once)
    """
    total = draw.randint(MIN_PLACES, MAX_PLACES)
    repeats = draw.choice((0, 1, 1, 1, 2)) if total > MIN_PLACES else draw.choice((0, 1))
    left = draw.sample(pool, len(pool))
    chosen: list[str] = []
    absent: list[str] = []
    while left and len(chosen) < total:
        label = left.pop()
        if not rules.apart(label, chosen) or rules.hidden_by([label]).intersection(absent):
            continue
        number = draw.randint(2, 5) if repeats and label not in rules.uncounted else 1
        # One tile of another label at least; the same picture never twice.
        if number > 1 and number <= min(total - len(chosen) - 1, len(library.by_label[label])):
            repeats -= 1
        else:
            number = 1
        chosen += [label] * number
        free = [other for other in left if other not in rules.hidden_by(chosen)]
        near = [other for other in free if other in rules.confused_with(label)]
        if near and draw.random() < 0.5:
            free = near
        if free:
            absent.append(draw.choice(free))
            left.remove(absent[-1])
    return chosen, absent


class _Layout:
    """Boxes for places in a scene of one size."""

    def __init__(self, width: int, height: int, draw: random.Random) -> None:
        self._width, self._height, self._draw = width, height, draw
        shorter = min(width, height)
        largest = MAX_PLACE * (1.25 if max(width, height) >= _HUGE else 1.0)
        self._sides = MIN_PLACE, max(MIN_PLACE + 40, min(largest, _LARGEST_SHARE * shorter))
        self._margin = max(8, shorter // 200)
        #: Between places that are not meant to be side by side.
        self._apart = min(240, max(60, shorter // 20))
        self._boxes: list[PixelBox] = []

    def lay(self, library: TileLibrary, wanted: list[str]) -> list[Placement]:
        """A box and a tile for each label; a label for which no room is found is left out."""
        order = self._draw.sample(wanted, len(wanted))
        pairs = self._draw.choice((0, 1, 1, 2, 2))
        unused = {
            label: self._draw.sample(library.by_label[label], count)
            for label, count in Counter(wanted).items()
        }
        placed: list[Placement] = []
        for label in order:
            tile = unused[label].pop()
            turn = self._draw.randrange(8)
            size = self._size(tile, turn)
            box = None
            if pairs and placed and placed[-1].label != label:
                box = self._beside(placed[-1].box, size)
                pairs -= box is not None
            box = box or self._anywhere(size)
            if box is None:
                continue
            self._boxes.append(box)
            placed.append(Placement(tile, label, box, turn))
        return placed

    def _size(self, tile: LabelledTile, turn: int) -> tuple[int, int]:
        """(width, height) in scene pixels, near the tile's own shape."""
        low, high = self._sides
        side = math.exp(self._draw.uniform(math.log(low), math.log(high)))
        shape = tile.width / tile.height if turn % 2 == 0 else tile.height / tile.width
        shape = min(max(shape, 0.8), 1.25) * self._draw.uniform(0.94, 1.06)
        return max(MIN_PLACE, round(side * shape**0.5)), max(MIN_PLACE, round(side / shape**0.5))

    def _anywhere(self, size: tuple[int, int]) -> PixelBox | None:
        width, height = size
        margin = self._margin
        right, bottom = self._width - width - margin, self._height - height - margin
        if right < margin or bottom < margin:
            return None
        for _ in range(_TRIES):
            x, y = self._draw.randint(margin, right), self._draw.randint(margin, bottom)
            box = (x, y, x + width, y + height)
            if all(gap(box, other) >= self._apart for other in self._boxes):
                return box
        return None

    def _beside(self, neighbour: PixelBox, size: tuple[int, int]) -> PixelBox | None:
        """A box that almost touches a neighbour and keeps away from all others."""
        x0, y0, x1, y1 = neighbour
        width, height = size
        others = [box for box in self._boxes if box != neighbour]
        for side in self._draw.sample(range(4), 4):
            free = self._draw.randint(*_TOUCHING)
            x = x0 + round((x1 - x0 - width) * self._draw.random())
            y = y0 + round((y1 - y0 - height) * self._draw.random())
            x = {0: x0 - free - width, 1: x1 + free}.get(side, x)
            y = {2: y0 - free - height, 3: y1 + free}.get(side, y)
            box = (x, y, x + width, y + height)
            margin = self._margin
            inside = x >= margin and y >= margin
            inside &= box[2] <= self._width - margin and box[3] <= self._height - margin
            if inside and all(gap(box, other) >= self._apart for other in others):
                return box
        return None


def gap(one: PixelBox, other: PixelBox) -> float:
    """Shortest distance between two boxes in pixels; negative where they overlap."""
    across = max(one[0], other[0]) - min(one[2], other[2])
    down = max(one[1], other[1]) - min(one[3], other[3])
    if across > 0 and down > 0:
        return math.hypot(across, down)
    return float(max(across, down))
