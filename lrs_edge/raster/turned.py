"""A source whose pixels are turned as the file's EXIF orientation asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lrs_edge.pyramid.box import PixelBox
from lrs_edge.raster.orientation import Turn
from lrs_edge.raster.source import ImageHeader, Pixels, Source


class TurnedSource:
    """Windows in the shown image, read from the stored one. See `Source` for the contract."""

    def __init__(self, source: Source) -> None:
        """Turns `source` by its header's orientation.

        Args:
            source: The stored image; closed with this one.
        """
        self._source = source
        self._turn = Turn.of(source.header.orientation)
        self.header = _turned_header(source.header, self._turn)

    @property
    def stored(self) -> Source:
        """The stored image."""
        return self._source

    @property
    def bytes_read(self) -> int:
        """See `Source.bytes_read`."""
        return self._source.bytes_read

    def size(self, overview: int | None) -> tuple[int, int] | None:
        """See `Source.size`."""
        size = self._source.size(overview)
        return size[::-1] if size is not None and self._turn.transposed else size

    def read(
        self,
        bands: Sequence[int],
        box: PixelBox,
        *,
        overview: int | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Pixels:
        """See `Source.read`."""
        height, width = self.size(overview) or (self.header.height, self.header.width)
        x0, y0, x1, y1 = box
        if self._turn.rows:
            y0, y1 = height - y1, height - y0
        if self._turn.cols:
            x0, x1 = width - x1, width - x0
        if self._turn.transposed:
            box, shape = (y0, x0, y1, x1), shape and shape[::-1]
        else:
            box = (x0, y0, x1, y1)
        raw, mask = self._source.read(bands, box, overview=overview, shape=shape)
        rows, cols = (slice(None, None, -1 if back else 1) for back in self._reversed)
        if self._turn.transposed:
            raw, mask = raw.swapaxes(1, 2), None if mask is None else mask.T
        return (
            np.ascontiguousarray(raw[:, rows, cols]),
            None if mask is None else np.ascontiguousarray(mask[rows, cols]),
        )

    @property
    def _reversed(self) -> tuple[bool, bool]:
        return self._turn.rows, self._turn.cols

    def close(self) -> None:
        """See `Source.close`."""
        self._source.close()


def _turned_header(header: ImageHeader, turn: Turn) -> ImageHeader:
    backwards = (turn.rows, turn.cols)
    if not turn.transposed:
        return replace(header, backwards=backwards)
    rows, cols = header.block_shape
    return replace(
        header,
        height=header.width,
        width=header.height,
        # Stored strips are blocks from the top to the bottom now.
        block_shape=(cols, rows),
        tiled=rows < header.height,
        backwards=backwards,
    )
