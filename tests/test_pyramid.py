"""Geometry against the reference's table, and properties that hold for every size."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.errors import ImageError
from lrs_edge.pyramid.levels import MIN_ZOOM, TileIndex, build_pyramid, reference_fails, token_grid
from tests.golden_data import ROOT

TABLE = json.loads((ROOT / "geometry_table.json").read_text())
EDGE_CASES = json.loads((ROOT / "edge_cases.json").read_text())

sides = st.integers(1, 40_000)


def reference(height: int, width: int):
    return build_pyramid(height, width, tile=336, base_side=1008, policy="reference")


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case['w']}x{case['h']}")
def test_levels_are_those_of_the_reference(case: dict) -> None:
    pyramid = reference(case["h"], case["w"])
    if "levels" not in case:
        assert reference_fails(pyramid, 12)
        return
    for level, wanted in zip(pyramid.all_levels, case["levels"], strict=True):
        assert [level.height, level.width] == wanted["resize_hw"]
        assert [level.padded_height, level.padded_width] == wanted["resize_padding_hw"]
        assert [level.tile_rows, level.tile_cols] == wanted["block_num_hw"]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: f"{case['w']}x{case['h']}")
def test_token_grids_are_those_of_the_reference(case: dict) -> None:
    if "level0_token_hw_unpadded" not in case:
        pytest.skip("the reference fails on this size")
    pyramid = reference(case["h"], case["w"])
    base, finer = pyramid.levels[0], pyramid.all_levels[case["next_level_index"]]
    assert pyramid.levels[-1] == finer
    grids = (
        token_grid(base, 12, (case["h"], case["w"]), min_cols=0),
        token_grid(finer, 12, (finer.height, finer.width), min_cols=0),
    )
    wanted = (case["level0_token_hw_unpadded"], case["next_level_token_hw_unpadded"])
    for grid, (rows, cols) in zip(grids, wanted, strict=True):
        # Where the reference leaves no row it crashes, and one is kept here.
        assert [grid.rows, grid.cols] == [max(rows, 1), cols]
        assert rows > 0 or reference_fails(pyramid, 12)


@pytest.mark.parametrize("size", EDGE_CASES)
def test_sizes_that_crash_the_reference_are_known(size: str) -> None:
    width, height = map(int, size.split("x"))
    assert reference_fails(reference(height, width), 12) == (not EDGE_CASES[size]["ok"])


@given(sides, sides, st.sampled_from([(336, 1008), (384, 1152)]))
def test_tiles_cover_every_level_exactly_once(
    height: int, width: int, sizes: tuple[int, int]
) -> None:
    tile, base_side = sizes
    pyramid = build_pyramid(height, width, tile=tile, base_side=base_side)
    for level in (pyramid.global_view, *pyramid.levels):
        for axis in ("row", "col"):
            size = level.height if axis == "row" else level.width
            count = level.tile_rows if axis == "row" else level.tile_cols
            ends = 0
            for place in range(count):
                index = TileIndex(place, 0) if axis == "row" else TileIndex(0, place)
                window = level.tile_window(index)
                start = window.row0 if axis == "row" else window.col0
                length = window.rows if axis == "row" else window.cols
                assert start == ends
                assert 0 <= length <= tile
                ends += length
            assert ends == size
    assert pyramid.global_view.tile_count == 1


@given(sides, sides)
def test_full_levels_zoom_and_reach_the_original_resolution(height: int, width: int) -> None:
    levels = build_pyramid(height, width, tile=336, base_side=1008).levels
    longest = [max(level.height, level.width) for level in levels]
    assert all(b >= MIN_ZOOM * a for a, b in pairwise(longest))
    assert longest[-1] * MIN_ZOOM > max(height, width) or len(levels) == 1
    assert len(levels) <= 8


@given(sides, sides)
def test_token_grid_shows_image_only(height: int, width: int) -> None:
    pyramid = build_pyramid(height, width, tile=336, base_side=1008)
    for level in pyramid.levels:
        grid = token_grid(level, 12, (level.height, level.width))
        assert 1 <= grid.rows <= level.tile_rows * 12
        assert 1 <= grid.cols <= level.tile_cols * 12
        assert grid.count == grid.rows * (grid.cols + 1)


def test_a_side_below_one_pixel_is_refused() -> None:
    with pytest.raises(ImageError, match="0x5"):
        build_pyramid(5, 0, tile=336, base_side=1008)


def test_a_tile_outside_its_level_is_refused() -> None:
    level = build_pyramid(500, 700, tile=336, base_side=1008).levels[0]
    with pytest.raises(ImageError, match="outside"):
        level.tile_window(TileIndex(level.tile_rows, 0))
