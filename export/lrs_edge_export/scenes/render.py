"""Pixels of a planned scene: any window at any size, without the whole scene in memory.

    pixels = SceneRenderer(plan).read(x0, y0, x1, y1, 384, 384)

Every window shows the same scene: where pixels are enlarged they are interpolated linearly, where
they are reduced they are averaged over the area that they cover, as overviews of a COG are. Two
scales differ by a few grey levels at most where a place's soft edge blends into the background,
because the layers are averaged before they are blended.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lrs_edge_export.scenes.background import BackgroundTexture
from lrs_edge_export.scenes.plan import Placement, ScenePlan
from lrs_edge_export.scenes.tiles import MARGIN, TileCache, area_weights

#: From this many tile pixels per output pixel on, averages are computed exactly; Pillow's linear
#: interpolation, which is faster for large outputs, agrees with them below.
_AVERAGED = 0.5
#: Width of a place's soft edge, as a share of its side and at least and at most in scene pixels.
_EDGE, _MIN_EDGE, _MAX_EDGE = 0.04, 4.0, 20.0


class SceneRenderer:
    """Draws one scene. Not to be shared between threads.

    Args:
        plan: What lies where.
        cache: Decoded tiles, shared by renderers of one library's scenes; None for one of its own.
    """

    def __init__(self, plan: ScenePlan, cache: TileCache | None = None) -> None:
        self.plan = plan
        self._cache = cache or TileCache()
        gains = plan.background.gains
        self._light = [min(255, round(v * gain)) for gain in gains for v in range(256)]

    @cached_property
    def _background(self) -> BackgroundTexture:
        return BackgroundTexture(self.plan.background, self.plan.width, self.plan.height)

    def read(
        self, x0: float, y0: float, x1: float, y1: float, out_width: int, out_height: int
    ) -> NDArray[np.uint8]:
        """Draw a window.

        Args:
            x0: Left edge in scene pixels.
            y0: Upper edge.
            x1: Right edge, within the scene.
            y1: Lower edge, within the scene.
            out_width: Columns of the result.
            out_height: Rows of the result.

        Returns:
            [out_height, out_width, 3] uint8, red, green, blue.

        Raises:
            ValueError: The window is empty or sticks out of the scene, or the result is empty.
            ImageError: A tile cannot be decoded.
        """
        plan = self.plan
        if not (0 <= x0 < x1 <= plan.width and 0 <= y0 < y1 <= plan.height):
            raise ValueError(
                f"window {(x0, y0, x1, y1)} is not within {plan.width} x {plan.height}"
            )
        if out_width < 1 or out_height < 1:
            raise ValueError(f"a result of {out_width} x {out_height} pixels is empty")
        canvas = self._background.read(x0, y0, x1, y1, (out_width, out_height))
        step = (x1 - x0) / out_width, (y1 - y0) / out_height
        for placement in plan.placements:
            left, top, right, bottom = placement.box
            if left < x1 and right > x0 and top < y1 and bottom > y0:
                self._draw(canvas, placement, (x0, y0), step)
        return np.asarray(canvas.point(self._light))

    def _draw(
        self,
        canvas: Image.Image,
        placement: Placement,
        origin: tuple[float, float],
        step: tuple[float, float],
    ) -> None:
        """Paste one place where it shows."""
        across = _Span(placement.box[0], placement.box[2], origin[0], step[0], canvas.width)
        down = _Span(placement.box[1], placement.box[3], origin[1], step[1], canvas.height)
        tile = self._cache.get(placement.tile, placement.turn)
        rows, columns = tile.pixels.shape[:2]
        kx, ky = columns / across.length, rows / down.length
        if max(kx * step[0], ky * step[1]) <= _AVERAGED:
            box = (
                across.start * kx + MARGIN,
                down.start * ky + MARGIN,
                (across.start + across.count * step[0]) * kx + MARGIN,
                (down.start + down.count * step[1]) * ky + MARGIN,
            )
            size = (across.count, down.count)
            shown = tile.padded.resize(size, Image.Resampling.BILINEAR, box)
        else:
            wide = area_weights(columns, across.start * kx, step[0] * kx, across.count)
            high = area_weights(rows, down.start * ky, step[1] * ky, down.count)
            lines = high @ tile.pixels.reshape(rows, -1).astype(np.float32)
            averaged = wide @ lines.reshape(down.count, columns, 3)
            shown = Image.fromarray((averaged + 0.5).astype(np.uint8))
        edge = _EDGE * min(across.length, down.length)
        edge = min(max(edge, _MIN_EDGE), _MAX_EDGE)
        opacity = np.outer(255 * down.opacity(edge), across.opacity(edge)) + 0.5
        canvas.paste(shown, (across.first, down.first), Image.fromarray(opacity.astype(np.uint8)))


class _Span:
    """The part of a window's row or column that shows one place.

    Attributes:
        first: First output pixel that the place touches.
        count: How many it touches.
        start: Where output pixel `first` begins, in scene pixels from the place's edge.
        length: Side of the place in scene pixels.
    """

    def __init__(self, low: int, high: int, origin: float, step: float, limit: int) -> None:
        self.first = max(0, math.floor((low - origin) / step))
        last = min(limit, math.ceil((high - origin) / step))
        self.count = max(1, last - self.first)
        self.first = min(self.first, limit - self.count)
        self.start = origin + self.first * step - low
        self.length = high - low
        self._step = step

    def opacity(self, edge: float) -> NDArray[np.float64]:
        """[count] in 0..1: the place's opacity, rising over `edge` scene pixels at both ends."""
        at = np.clip(self.start + self._step * np.arange(self.count + 1), 0, self.length)
        rising = np.where(at < edge, at**2 / (2 * edge), at - edge / 2)
        falling = np.clip(at - (self.length - edge), 0, None) ** 2 / (2 * edge)
        opacity: NDArray[np.float64] = np.diff(rising - falling) / self._step
        return np.clip(opacity, 0, 1)
