"""Resizing as image processors do it: Pillow is the judge, window by window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster import window as window_reader
from lrs_edge.raster.processor import FILTERS
from lrs_edge.raster.raster import Raster


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize(
    ("source", "target"),
    [((90, 117), (28, 28)), ((28, 28), (61, 47)), ((80, 80), (80, 28)), ((40, 40), (40, 40))],
)
def test_windows_equal_those_of_the_whole_resized_image(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    source: tuple[int, int],
    target: tuple[int, int],
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    (high, wide), method = target, getattr(Image.Resampling, kind.upper())
    wanted = np.asarray(image.resize((wide, high), method))
    windows = [LevelWindow(0, 0, high, wide), LevelWindow(high // 3, wide // 4, high // 2, 9)]
    # Strips of a few rows.
    monkeypatch.setattr(window_reader, "STRIP_VALUES", 1000)
    with Raster.open(tmp_path / "image.png") as raster:
        for part in windows:
            found = raster.read(target, part, kind)  # type: ignore[arg-type]
            rows, cols = slice(part.row0, part.row0 + part.rows), part.col0
            cut = wanted[rows, cols : cols + part.cols]
            assert np.array_equal(np.rint(found * 255).astype(np.uint8), cut)
            assert np.allclose(found * 255, cut, atol=1e-4)
        with pytest.raises(ImageError, match="lanczos"):
            raster.read(target, windows[0], "nearest")  # type: ignore[arg-type]
