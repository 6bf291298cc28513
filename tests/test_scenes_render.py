"""Pixels of scenes: every window and every scale shows the same scene."""

from __future__ import annotations

import dataclasses
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lrs_edge.errors import ImageError
from lrs_edge_export.scenes.library import LabelledTile, TileLibrary, read_library
from lrs_edge_export.scenes.plan import ScenePlan, plan_scene
from lrs_edge_export.scenes.render import SceneRenderer
from lrs_edge_export.scenes.tiles import TileCache, area_weights, decode, turned
from tests.scene_tiles import make_tiles, picture

SIDE = 1200


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> TileLibrary:
    return read_library(make_tiles(tmp_path_factory.mktemp("tiles") / "set"), None)


@pytest.fixture(scope="module")
def plan(library: TileLibrary) -> ScenePlan:
    return plan_scene(library, random.Random(3), SIDE, SIDE, "scene")


@pytest.fixture(scope="module")
def renderer(plan: ScenePlan) -> SceneRenderer:
    return SceneRenderer(plan)


@pytest.fixture(scope="module")
def whole(renderer: SceneRenderer) -> np.ndarray:
    return renderer.read(0, 0, SIDE, SIDE, SIDE, SIDE).astype(float)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_window_is_a_part_of_the_whole(
    renderer: SceneRenderer, whole: np.ndarray, data: st.DataObject
) -> None:
    x0, y0 = data.draw(st.integers(0, SIDE - 2)), data.draw(st.integers(0, SIDE - 2))
    x1 = data.draw(st.integers(x0 + 1, min(SIDE, x0 + 300)))
    y1 = data.draw(st.integers(y0 + 1, min(SIDE, y0 + 300)))
    part = renderer.read(x0, y0, x1, y1, x1 - x0, y1 - y0)
    assert part.shape == (y1 - y0, x1 - x0, 3)
    assert part.dtype == np.uint8
    assert np.abs(part - whole[y0:y1, x0:x1]).max() <= 3


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 8, 10, 12, 20, 40])
def test_reduced_is_the_average_of_what_it_covers(
    renderer: SceneRenderer, whole: np.ndarray, factor: int
) -> None:
    count = SIDE // factor
    got = renderer.read(0, 0, SIDE, SIDE, count, count)
    wanted = whole.reshape(count, factor, count, factor, 3).mean(axis=(1, 3))
    error = np.abs(got - wanted)
    # Only seams of the background and soft edges may differ by more than rounding.
    assert error.mean() < (1.2 if factor < 40 else 1.6)
    assert np.percentile(error, 99) < 8
    assert abs((got - wanted).mean()) < 0.6


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_windows_agree_at_reduced_scales_too(renderer: SceneRenderer, data: st.DataObject) -> None:
    step = data.draw(st.sampled_from([2, 3, 4, 6]))
    size = SIDE // step
    all_of_it = renderer.read(0, 0, SIDE, SIDE, size, size).astype(int)
    x, y = data.draw(st.integers(0, size - 50)), data.draw(st.integers(0, size - 50))
    part = renderer.read(x * step, y * step, (x + 50) * step, (y + 50) * step, 50, 50)
    assert np.abs(part - all_of_it[y : y + 50, x : x + 50]).max() <= 3


def test_enlarged_is_interpolated(renderer: SceneRenderer, whole: np.ndarray) -> None:
    got = renderer.read(400, 400, 500, 500, 400, 400).astype(float)
    averaged = got.reshape(100, 4, 100, 4, 3).mean(axis=(1, 3))
    assert np.abs(averaged - whole[400:500, 400:500]).max() < 8
    assert (
        np.abs(np.diff(got, axis=0)).max() <= np.abs(np.diff(whole[390:510, 390:510], axis=0)).max()
    )


def test_places_show_their_tiles(plan: ScenePlan, renderer: SceneRenderer) -> None:
    for placement in plan.placements:
        x0, y0, x1, y1 = placement.box
        got = renderer.read(x0, y0, x1, y1, 24, 24).astype(float)[3:-3, 3:-3]
        tile = turned(decode(placement.tile), placement.turn).resize((24, 24))
        light = np.array(plan.background.gains)
        wanted = np.clip(np.asarray(tile, float) * light, 0, 255)[3:-3, 3:-3]
        assert np.abs(got - wanted).mean() < 4
        other = turned(decode(placement.tile), (placement.turn + 1) % 8).resize((24, 24))
        assert np.abs(got - np.asarray(other, float)[3:-3, 3:-3] * light).mean() > 6


def test_the_background_lies_outside_of_the_boxes(plan: ScenePlan, whole: np.ndarray) -> None:
    bare = dataclasses.replace(plan, placements=())
    background = SceneRenderer(bare).read(0, 0, SIDE, SIDE, SIDE, SIDE)
    outside = np.ones((SIDE, SIDE), bool)
    for placement in plan.placements:
        x0, y0, x1, y1 = placement.box
        outside[y0:y1, x0:x1] = False
    assert (background[outside] == whole[outside]).all()
    assert (background != whole).any(axis=-1)[~outside].mean() > 0.95


def test_it_is_deterministic(plan: ScenePlan, whole: np.ndarray) -> None:
    again = SceneRenderer(plan, TileCache(max_bytes=1))
    assert (again.read(0, 0, SIDE, SIDE, SIDE, SIDE) == whole).all()


@pytest.mark.parametrize(
    "window", [(-1, 0, 10, 10), (0, 0, SIDE + 1, 10), (10, 10, 10, 20), (0, 5, 10, 4)]
)
def test_windows_that_stick_out_are_the_callers_error(
    renderer: SceneRenderer, window: tuple[int, int, int, int]
) -> None:
    with pytest.raises(ValueError, match="is not within"):
        renderer.read(*window, 10, 10)
    with pytest.raises(ValueError, match="is empty"):
        renderer.read(0, 0, 10, 10, 0, 10)


def test_a_huge_scene_is_not_built(library: TileLibrary) -> None:
    plan = plan_scene(library, random.Random(0), 40_000, 30_000, "huge")
    overview = SceneRenderer(plan).read(0, 0, 40_000, 30_000, 400, 300)
    assert overview.shape == (300, 400, 3)
    assert overview.std() > 3


class TestTiles:
    @given(
        source=st.integers(2, 60),
        start=st.floats(-3, 40),
        step=st.floats(0.3, 30),
        count=st.integers(1, 20),
    )
    @settings(deadline=None)
    def test_weights_are_averages(self, source: int, start: float, step: float, count: int) -> None:
        weights = area_weights(source, start, step, count)
        assert weights.shape == (count, source)
        assert weights.min() >= -1e-5
        assert np.allclose(weights.sum(axis=1), 1, atol=1e-4)

    def test_weights_keep_a_ramp(self) -> None:
        # A straight line, averaged where it does not end, is the line at the middle.
        weights = area_weights(40, 10.0, 2.5, 8)
        middles = 10 + 2.5 * (np.arange(8) + 0.5)
        assert np.allclose(weights @ (np.arange(40) + 0.5), middles, atol=1e-3)

    def test_the_eight_turns_differ_and_keep_the_picture(self) -> None:
        image = picture(4, 16)
        seen = {turned(image, turn).tobytes() for turn in range(8)}
        assert len(seen) == 8
        assert turned(image, 4).tobytes() == np.asarray(image)[:, ::-1].tobytes()
        assert turned(image, 1).tobytes() == np.rot90(np.asarray(image)).tobytes()

    @pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 99])
    def test_damaged_tiles_are_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "tile.png"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=r"tile\.png cannot be decoded"):
            decode(LabelledTile(path, "pond", 48, 48))

    def test_a_tile_that_claims_gigapixels_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "tile.png"
        picture(1, 48).save(path)
        data = bytearray(path.read_bytes())
        # Width and height in the header, whose checksum follows.
        data[16:24] = struct.pack(">II", 60_000, 60_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        path.write_bytes(data)
        with pytest.raises(ImageError, match=r"tile\.png cannot be decoded"):
            decode(LabelledTile(path, "pond", 48, 48))

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
    def test_tiles_of_more_than_8_bits_are_refused(self, tmp_path: Path, dtype: type) -> None:
        path = tmp_path / "tile.tif"
        Image.fromarray(np.full((48, 48), 3000, dtype)).save(path)
        with pytest.raises(ImageError, match="more than 8 bits"):
            decode(LabelledTile(path, "pond", 48, 48))

    def test_a_cut_off_tile_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "tile.png"
        picture(1, 200).save(path)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ImageError, match="cannot be decoded"):
            decode(LabelledTile(path, "pond", 200, 200))

    def test_other_sizes_than_listed_are_refused_before_decoding(self, tmp_path: Path) -> None:
        path = tmp_path / "tile.png"
        Image.new("L", (5000, 5000)).save(path)
        with pytest.raises(ImageError, match=r"has 5000 x 5000 pixels, not 48 x 48"):
            decode(LabelledTile(path, "pond", 48, 48))

    def test_grey_and_narrow_tiles_are_made_to_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "tile.png"
        Image.new("L", (300, 100), 90).save(path)
        tile = decode(LabelledTile(path, "pond", 300, 100))
        assert (tile.mode, tile.size) == ("RGB", (125, 100))

    def test_the_cache_forgets(self, library: TileLibrary) -> None:
        cache = TileCache(max_bytes=3 * 2 * 48 * 48 * 3)
        tiles = library.by_label["pond"]
        first = cache.get(tiles[0], 0)
        assert cache.get(tiles[0], 0) is first
        for tile in tiles[1:5]:
            cache.get(tile, 0)
        again = cache.get(tiles[0], 0)
        assert again is not first
        assert (again.pixels == first.pixels).all()
