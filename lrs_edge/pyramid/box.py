"""Boxes: one form of a rectangle in an image, wherever one is named."""

from __future__ import annotations

#: A rectangle in pixels of an image: x0, y0, x1, y1 from the upper left corner; x to the right, y
#: down, the last two excluded. Parts of pixels count.
Box = tuple[float, float, float, float]

#: A `Box` of whole pixels.
PixelBox = tuple[int, int, int, int]
