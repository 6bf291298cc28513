"""Evidence boxes against tiles: exact areas, unions, chance."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_edge.answer.evidence import source_bounds
from lrs_edge.evaluation.coverage import Coverage, coverage, is_covered, random_covered, tile_areas
from lrs_edge.pyramid.levels import Level, build_pyramid

#: Two rows and three columns of tiles of 10 pixels; the image is the level.
LEVEL = Level(20, 30, 2, 3, 10)
IMAGE_HW = (20, 30)

numbers = st.integers(-5, 60)


@st.composite
def box_lists(draw: st.DrawFn) -> list[tuple[float, float, float, float]]:
    count = draw(st.integers(1, 4))
    found = []
    for _ in range(count):
        x0, y0 = draw(numbers), draw(numbers)
        found.append((x0, y0, x0 + draw(st.integers(1, 40)), y0 + draw(st.integers(1, 40))))
    return [tuple(float(number) for number in box) for box in found]


def test_a_box_in_one_tile() -> None:
    found = coverage([(2, 2, 8, 8)], LEVEL, IMAGE_HW, [(0, 0)])
    assert found is not None
    assert found.covered
    # One of six tiles: it is the right one in one draw of six.
    assert found == Coverage(1.0, pytest.approx(1 / 6), pytest.approx(1 / 6))
    missed = coverage([(2, 2, 8, 8)], LEVEL, IMAGE_HW, [(1, 2), (1, 1)])
    assert missed is not None
    assert (missed.share, missed.covered) == (0.0, False)
    assert missed.random_covered == pytest.approx(2 / 6)


def test_half_is_enough_and_less_is_not() -> None:
    across = [(5.0, 0.0, 15.0, 10.0)]
    found = coverage(across, LEVEL, IMAGE_HW, [(0, 0)])
    assert found is not None
    assert found.share == pytest.approx(0.5)
    assert found.covered
    less = coverage([(5.1, 0.0, 15.1, 10.0)], LEVEL, IMAGE_HW, [(0, 0)])
    assert less is not None
    assert not less.covered


def test_overlapping_boxes_count_once() -> None:
    found = coverage([(0, 0, 10, 10), (0, 0, 10, 10), (20, 10, 30, 20)], LEVEL, IMAGE_HW, [(0, 0)])
    assert found is not None
    assert found.share == pytest.approx(0.5)


def test_boxes_are_cut_at_the_image() -> None:
    found = coverage([(-50, -50, 10, 10)], LEVEL, IMAGE_HW, [(0, 0)])
    assert found is not None
    assert found.share == 1.0
    assert coverage([(30, 0, 40, 10)], LEVEL, IMAGE_HW, [(0, 0)]) is None
    assert coverage([], LEVEL, IMAGE_HW, []) is None


def test_no_tile_covers_nothing() -> None:
    assert coverage([(0, 0, 5, 5)], LEVEL, IMAGE_HW, []) == Coverage(0.0, 0.0, 0.0)


def test_all_tiles_cover_everything() -> None:
    tiles = [(tile.row, tile.col) for tile in LEVEL.tiles()]
    assert coverage([(1, 1, 29, 19)], LEVEL, IMAGE_HW, tiles) == Coverage(1.0, 1.0, 1.0)


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    boxes=box_lists(),
    place=st.integers(0, 5),
)
def test_areas_equal_the_pixels_counted_one_by_one(
    height: int, width: int, boxes: list[tuple[float, float, float, float]], place: int
) -> None:
    pyramid = build_pyramid(height, width, tile=8, base_side=16)
    level = pyramid.levels[min(place, len(pyramid.levels) - 1)]
    areas = tile_areas(boxes, level, (height, width))
    # Boxes have whole corners, so that pixels are inside or outside.
    inside = np.zeros((height, width))
    for x0, y0, x1, y1 in boxes:
        inside[max(int(y0), 0) : max(int(y1), 0), max(int(x0), 0) : max(int(x1), 0)] = 1
    assert areas.sum() == pytest.approx(inside.sum())
    for tile in level.tiles():
        x0, y0, x1, y1 = source_bounds(pyramid, level, level.tile_window(tile))
        rows = np.clip(
            np.minimum(np.arange(height) + 1, y1) - np.maximum(np.arange(height), y0), 0, 1
        )
        cols = np.clip(
            np.minimum(np.arange(width) + 1, x1) - np.maximum(np.arange(width), x0), 0, 1
        )
        assert areas[tile.row, tile.col] == pytest.approx(rows @ inside @ cols, abs=1e-6)


@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    others=st.integers(0, 5),
    data=st.data(),
)
def test_chance_equals_all_choices_counted(
    weights: list[int], others: int, data: st.DataObject
) -> None:
    shares = [weight / sum(weights) for weight in weights]
    tiles = len(shares) + others
    chosen = data.draw(st.integers(0, tiles))
    every = list(combinations([*shares, *([0.0] * others)], chosen))
    wanted = sum(is_covered(sum(choice)) for choice in every) / len(every)
    assert random_covered(shares, tiles, chosen) == pytest.approx(wanted)


def test_chance_is_drawn_where_it_cannot_be_counted() -> None:
    shares = [1 / 40] * 40
    # Half of the evidence needs 20 of its 40 tiles: of 80 tiles, 40 chosen, as often as not.
    found = random_covered(shares, 80, 40)
    assert found == random_covered(shares, 80, 40)
    assert found == pytest.approx(0.59, abs=0.05)
    assert random_covered(shares, 80, 10) == random_covered(shares, 80, 0) == 0.0
    assert random_covered(shares, 80, 80) == 1.0


def test_what_is_drawn_is_near_what_would_be_counted() -> None:
    weights = [9, 5, 5, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1]
    shares = [weight / sum(weights) for weight in weights]
    tiles = len(shares) + 5
    for chosen in (3, 5, 8, 12):
        choices = list(combinations([*shares, *([0.0] * 5)], chosen))
        wanted = sum(is_covered(sum(choice)) for choice in choices) / len(choices)
        # Four standard deviations of 2,000 draws, at most.
        assert random_covered(shares, tiles, chosen) == pytest.approx(wanted, abs=0.045)


def test_chance_on_a_huge_level_takes_no_time() -> None:
    assert random_covered([1 / 40] * 40, 1 << 24, 1 << 23) == pytest.approx(0.56, abs=0.06)


@settings(max_examples=30)
@given(data=st.data())
def test_mean_coverage_of_random_tiles_is_their_share(data: st.DataObject) -> None:
    level = Level(40, 50, 4, 5, 10)
    box = (3.0, 4.0, 33.0, 27.0)
    areas = tile_areas([box], level, (40, 50)).ravel()
    chosen = data.draw(st.integers(0, 20))
    tiles = [(tile.row, tile.col) for tile in level.tiles()]
    found = coverage([box], level, (40, 50), tiles[:chosen])
    assert found is not None
    # Every tile is chosen equally often, so the mean over all choices is chosen / tiles.
    assert found.random_share == pytest.approx(chosen / 20)
    assert found.share == pytest.approx(areas[:chosen].sum() / areas.sum())


def test_the_golden_geometry_is_the_answer_s(golden_bundles: dict[str, Path]) -> None:
    """Windows that the coverage assumes are those that answers report."""
    import lrs_edge
    from tests.test_engine import IMAGE

    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as engine:
        with engine.open(IMAGE) as scene:
            answer = scene.ask("Where?", max_tokens=1)
        tile = engine.manifest.vision.tile
    finest = answer.levels[-1]
    level = Level(finest.height, finest.width, finest.tile_rows, finest.tile_cols, tile)
    width, height = answer.image_size
    for region in answer.regions:
        if region.level == finest.level:
            x0, y0, x1, y1 = region.bounds
            areas = tile_areas([region.bounds], level, (height, width))
            assert areas[region.row, region.col] == pytest.approx((x1 - x0) * (y1 - y0))
            assert areas.sum() == pytest.approx(areas[region.row, region.col])
