"""What a report shows of the image: small views, north and the size of a pixel. Never all of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lrs_edge.answer.answer import Answer, Region
from lrs_edge.answer.report import best_regions
from lrs_edge.errors import ImageError
from lrs_edge.pyramid.box import Box
from lrs_edge.pyramid.levels import LevelWindow

if TYPE_CHECKING:
    from lrs_edge.raster.raster import Raster

_EARTH_RADIUS_M = 6371008.8

#: Steps of a scale bar, times a power of ten.
_ROUND = (5, 2, 1)

#: What stands for a part of the image that cannot be read (any more): grey.
_UNREAD = (110, 110, 110)


#: Longer side of the only view of the whole image that is read, in pixels.
OVERVIEW = 1600


class Views:
    """Reads views of an image, until a deadline; what cannot be read is grey, and noted.

    Several reports of an answer share them: the whole image is read once, and each part.

    A report is written when the answer is there: an image that was deleted meanwhile, or that
    takes too long to read again, must not cost it.

    Args:
        raster: The image.
        seconds: How long reading may take, all views together; None for as long as it takes.
    """

    def __init__(self, raster: Raster, seconds: float | None = None) -> None:
        self.raster = raster
        self.notes: list[str] = []
        self._whole: Image.Image | None = None
        self._parts: dict[tuple[Box, int], Image.Image] = {}
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def overview(self, longest: int) -> Image.Image:
        """The whole image, its longer side so many pixels at most, `OVERVIEW` and no more."""
        if self._whole is None:
            height, width = self._level(OVERVIEW)
            self._whole = self._read((height, width), LevelWindow(0, 0, height, width))
        height, width = self._level(longest)
        if (width, height) == self._whole.size:
            return self._whole
        return self._whole.resize((width, height), Image.Resampling.BOX)

    def part(self, bounds: Box, longest: int) -> Image.Image:
        """A window of the image, its longer side so many pixels at most, none of them magnified.

        Args:
            bounds: x0, y0, x1, y1 in pixels of the image.
            longest: Pixels.
        """
        key = (bounds, longest)
        if key not in self._parts:
            self._parts[key] = self._part(bounds, longest)
        return self._parts[key]

    def _part(self, bounds: Box, longest: int) -> Image.Image:
        side = max(bounds[2] - bounds[0], bounds[3] - bounds[1], 1.0)
        scale = min(longest / side, 1.0)
        height = max(round(self.raster.height * scale), 1)
        width = max(round(self.raster.width * scale), 1)
        across, down = width / self.raster.width, height / self.raster.height
        left, right = _inside(bounds[0] * across, bounds[2] * across, width)
        top, bottom = _inside(bounds[1] * down, bounds[3] * down, height)
        return self._read((height, width), LevelWindow(top, left, bottom - top, right - left))

    def _level(self, longest: int) -> tuple[int, int]:
        longest = min(longest, OVERVIEW)
        scale = min(longest / max(self.raster.height, self.raster.width), 1.0)
        return (
            max(round(self.raster.height * scale), 1),
            max(round(self.raster.width * scale), 1),
        )

    def _read(self, level: tuple[int, int], window: LevelWindow) -> Image.Image:
        try:
            pixels = self.raster.read(level, window, stop=self._is_late)
        except ImageError as error:
            note = f"the report lacks a part of the image: {error}"
            if note not in self.notes:
                self.notes.append(note)
            return Image.new("RGB", (window.cols, window.rows), _UNREAD)
        pixels *= 255
        return Image.fromarray(np.rint(pixels, out=pixels).astype(np.uint8))

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline


def _inside(start: float, end: float, limit: int) -> tuple[int, int]:
    """Whole pixels of an interval, one at least, within 0..limit."""
    first = min(max(math.floor(start), 0), limit - 1)
    return first, min(max(math.ceil(end), first + 1), limit)


@dataclass(frozen=True)
class Compass:
    """Directions and sizes at the image's centre.

    Attributes:
        north: Degrees from the image's top to north, clockwise.
        metres: Metres on the ground that a pixel measures from left to right.
    """

    north: float
    metres: float


def compass(raster: Raster) -> Compass | None:
    """Where north is and how large a pixel is, None where the image has no such place.

    Measured between the centres of neighbouring pixels, in WGS 84: an image may be turned, and
    units of a CRS need not be metres on the ground.
    """
    x, y = (raster.width - 1) / 2, (raster.height - 1) / 2
    centres = []
    for across, down in ((0, 0), (1, 0), (0, 1)):
        place = raster.place((x + across, y + down, x + across + 1, y + down + 1))
        if place is None or place.centre_wgs84 is None:
            return None
        centres.append(place.centre_wgs84)
    here, right, below = centres
    shrunk = math.cos(math.radians(here[1]))
    # Metres to the east and to the north of one pixel to the right, and of one down.
    (a, c), (b, d) = (
        (
            math.radians((there[0] - here[0] + 180) % 360 - 180) * shrunk * _EARTH_RADIUS_M,
            math.radians(there[1] - here[1]) * _EARTH_RADIUS_M,
        )
        for there in (right, below)
    )
    determinant = a * d - b * c
    metres = math.hypot(a, c)
    if not metres or not math.isfinite(determinant) or abs(determinant) < 1e-12 * metres**2:
        return None
    # Pixels to the right and down that lead one metre to the north.
    rightwards, downwards = -b / determinant, a / determinant
    return Compass(math.degrees(math.atan2(rightwards, -downwards)), metres)


def scale_bar(metres_per_pixel: float, longest: float) -> tuple[float, str]:
    """A round length that fits, in pixels, and its name.

    Args:
        metres_per_pixel: Of what is drawn on.
        longest: Pixels that the bar may measure.
    """
    most = metres_per_pixel * longest
    power = 10.0 ** math.floor(math.log10(most))
    length = power * next(step for step in _ROUND if step * power <= most * (1 + 1e-9))
    name = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    return length / metres_per_pixel, name


#: Longer side of a tile shown by itself, in pixels.
PART = 448


def evidence_of(answer: Answer) -> list[Region]:
    """What is outlined as evidence: the best kept tiles of the finest level that was searched."""
    if not answer.levels:
        return []
    finest = answer.levels[-1].level
    return [region for region in best_regions(answer) if region.level == finest]


def heat(scores: Sequence[float]) -> list[float]:
    """Scores as shares of the best one, 0..1; all 1 where they say nothing.

    Square roots: attention has few high peaks, beside which all else would look the same.
    """
    best = max(scores, default=0.0)
    return [math.sqrt(max(score, 0.0) / best) if best > 0 else 1.0 for score in scores]


def confidence_words(answer: Answer) -> str:
    """The confidence for a reader."""
    if answer.confidence is None:
        return "confidence unknown"
    return f"confidence {100 * answer.confidence:.0f} %"


def shown(text: str, longest: int | None = None) -> str:
    """Untrusted text on one line: without control characters, cut where it is too long."""
    line = "".join(
        char for char in " ".join(text.split()) if char.isprintable() or char == "\u200d"
    )
    return line if longest is None or len(line) <= longest else line[: longest - 1] + "\u2026"
