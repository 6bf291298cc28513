"""Windows of one image read at once, through openings of their own: as one after the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from benchmarks.measure import write_image
from lrs_edge.errors import ImageError
from lrs_edge.pyramid.levels import build_pyramid
from lrs_edge.raster.handles import Handle, Handles
from lrs_edge.raster.image_thread import ImageThread
from lrs_edge.raster.raster import Raster
from lrs_edge.raster.window import WindowReader

THREADS = 4


def tiled(folder: Path) -> Path:
    """A GeoTIFF of blocks, with overviews."""
    path = folder / "tiled.tif"
    write_image(path, 900, overviews=True, block=128)
    return path


def in_memory(folder: Path) -> Path:
    """A PNG, which is decoded once and kept."""
    path = folder / "kept.png"
    pixels = np.random.default_rng(0).integers(0, 255, (500, 700, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def turned(folder: Path) -> Path:
    """A photograph that lies on its side."""
    path = folder / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(in_memory(folder)) as picture:
        picture.convert("RGB").save(path, exif=exif)
    return path


def windows(raster: Raster) -> list[tuple[tuple[int, int], object]]:
    """All tiles of all levels."""
    levels = build_pyramid(raster.height, raster.width, tile=128, base_side=256).levels
    return [((lv.height, lv.width), lv.tile_window(tile)) for lv in levels for tile in lv.tiles()]


@pytest.mark.parametrize("image", [tiled, in_memory, turned])
@pytest.mark.parametrize("resampling", ["area", "bicubic"])
def test_the_same_pixels_come_from_every_opening(
    tmp_path: Path, image: object, resampling: str
) -> None:
    path = image(tmp_path)  # type: ignore[operator]
    with Raster.open(path) as raster, ThreadPoolExecutor(THREADS) as pool:
        asked = windows(raster)
        wanted = [raster.read(*one, resampling) for one in asked]  # type: ignore[arg-type]
        read, alone = raster.windows_read, raster.bytes_read
        raster.read_at_once(THREADS)
        found = list(pool.map(lambda one: raster.read(*one, resampling), asked))  # type: ignore[arg-type]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
        assert raster.windows_read == 2 * read
        assert raster.bytes_read >= alone


def test_as_many_are_read_at_once_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(THREADS, timeout=20)
    resample = WindowReader.resample

    def waiting(self: WindowReader, *arguments: object) -> object:
        together.wait()
        return resample(self, *arguments)  # type: ignore[arg-type]

    with Raster.open(tiled(tmp_path)) as raster, ThreadPoolExecutor(THREADS) as pool:
        raster.read_at_once(THREADS)
        monkeypatch.setattr(WindowReader, "resample", waiting)
        asked = windows(raster)[:THREADS]
        assert len(list(pool.map(lambda one: raster.read(*one), asked))) == THREADS  # type: ignore[arg-type]


def test_asking_again_while_the_file_is_opened_allows_no_more_openings() -> None:
    """Another question on the same image allows as many as the first one did."""
    opened: list[Handle] = []

    def again(_first: Handle) -> Handle:
        handles.allow(2)
        opened.append(Mock(Handle))
        return opened[-1]

    handles = Handles(Mock(Handle), again)
    handles.allow(2)
    with handles.taken(), handles.taken(), handles.taken() as third:
        assert len(opened) == 1
        assert third not in opened


def test_an_image_that_changed_is_read_as_it_was_opened(tmp_path: Path) -> None:
    """Where it cannot be opened again, one window is read at a time from what is open."""
    path = tiled(tmp_path)
    with Raster.open(path) as raster, ThreadPoolExecutor(THREADS) as pool:
        asked = windows(raster)
        wanted = [raster.read(*one) for one in asked]  # type: ignore[arg-type]
        other = tmp_path / "other.tif"
        write_image(other, 900, overviews=True, block=256)
        other.replace(path)
        raster.read_at_once(THREADS)
        found = list(pool.map(lambda one: raster.read(*one), asked))  # type: ignore[arg-type]
        for one, again in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, again)


def test_closing_ends_every_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ImageThread] = []
    first = ImageThread.__init__

    def noted(self: ImageThread, name: str) -> None:
        first(self, name)
        made.append(self)

    monkeypatch.setattr(ImageThread, "__init__", noted)
    raster = Raster.open(tiled(tmp_path))
    raster.read_at_once(THREADS)
    asked = windows(raster)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda one: raster.read(*one), asked))  # type: ignore[arg-type]
    raster.close()
    assert len(made) > 1
    for thread in made:
        with pytest.raises(ImageError, match="closed"):
            thread.run(lambda: None)
    with pytest.raises(ImageError, match="closed"):
        raster.read(*asked[0])  # type: ignore[arg-type]
