"""Objects of tiles: reading the maps, merging levels, and the note in words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_edge.bundle.manifest import ObjectSpec
from lrs_edge.objects import Detections, decode, describe, merge
from lrs_edge.objects.detections import no_detections
from lrs_edge.pyramid.levels import Level, TileIndex, build_pyramid

SPEC = ObjectSpec(("airplane", "bridge", "ship"), 24, ((0.3, 0.5), (0.2, 0.6), (0.3, 0.5)))
WHOLE = Level(336, 336, 1, 1, 336)
FINE = Level(672, 672, 2, 2, 336)
ORIGIN = TileIndex(0, 0)


def maps(*cells: tuple[int, int, int, float], size: float = 0.0) -> np.ndarray:
    """Maps of SPEC with scores at (label, row, col); all boxes 2 ** size cells wide and high."""
    found = np.zeros((5, 24, 24), np.float32)
    found[3:] = size
    for label, row, col, score in cells:
        found[label, row, col] = score
    return found


def objects(*found: tuple[int, float, float, float, float], cells: float = 4.0) -> Detections:
    """Objects from (label, score, x, y, side), x and y the centre."""
    table = np.array(found, np.float64).reshape(-1, 5)
    middle, half = table[:, 2:4], table[:, 4:] / 2
    return Detections(
        table[:, 0].astype(np.int64),
        table[:, 1].astype(np.float32),
        np.concatenate([middle - half, middle + half], axis=1).astype(np.float32),
        np.full(len(table), cells, np.float32),
    )


def as_rows(found: Detections) -> list[tuple[float, ...]]:
    columns = (found.labels, found.scores, *found.boxes.T, found.cells)
    return [tuple(float(value) for value in row) for row in zip(*columns, strict=True)]


def test_a_peak_becomes_an_object_with_its_box() -> None:
    found = decode(maps((1, 5, 11, 0.7), size=1.0), WHOLE, ORIGIN, SPEC)
    assert found.labels.tolist() == [1]
    assert found.scores.tolist() == [np.float32(0.7)]
    np.testing.assert_allclose(found.boxes * 24, [[10.5, 4.5, 12.5, 6.5]], rtol=1e-6)
    assert found.cells.tolist() == [2.0]
    assert [a.dtype for a in (found.labels, found.scores, found.boxes, found.cells)] == [
        np.int64,
        np.float32,
        np.float32,
        np.float32,
    ]


def test_a_tile_of_a_finer_level_gives_shares_of_the_whole_image() -> None:
    found = decode(maps((0, 0, 0, 0.9)), FINE, TileIndex(0, 1), SPEC)
    np.testing.assert_allclose(found.centres, [[0.5 + 0.5 / 48, 0.5 / 48]], rtol=1e-6)


def test_width_and_height_have_maps_of_their_own() -> None:
    given_maps = maps((0, 12, 12, 0.9))
    given_maps[3], given_maps[4] = 2.0, 1.0
    (box,) = decode(given_maps, WHOLE, ORIGIN, SPEC).boxes
    np.testing.assert_allclose([box[2] - box[0], box[3] - box[1]], [4 / 24, 2 / 24], rtol=1e-5)


def test_of_equal_neighbours_the_first_counts_and_of_unequal_the_better() -> None:
    equal = decode(maps((0, 3, 3, 0.5), (0, 3, 4, 0.5), (0, 4, 2, 0.5)), WHOLE, ORIGIN, SPEC)
    np.testing.assert_allclose(equal.centres * 24, [[3.5, 3.5]], rtol=1e-6)
    unequal = decode(maps((0, 3, 3, 0.5), (0, 4, 4, 0.6)), WHOLE, ORIGIN, SPEC)
    np.testing.assert_allclose(unequal.centres * 24, [[4.5, 4.5]], rtol=1e-6)


def test_the_low_threshold_is_each_labels_own_and_counts_itself() -> None:
    found = decode(maps((0, 3, 3, 0.25), (1, 3, 3, 0.2), (2, 3, 3, 0.3)), WHOLE, ORIGIN, SPEC)
    assert found.labels.tolist() == [1, 2]


def test_padding_shows_nothing_and_hides_nothing() -> None:
    flat = Level(100, 336, 1, 1, 336)
    # Cells are 14 pixels: the centre of row 6 lies at 91, that of row 7 at 105.
    found = decode(maps((0, 6, 3, 0.5), (0, 7, 3, 0.9), (0, 20, 3, 0.9)), flat, ORIGIN, SPEC)
    np.testing.assert_allclose(found.centres[:, 1] * 100, [(84 + 98) / 2], rtol=1e-5)


def test_a_tile_gives_the_best_of_too_many_objects() -> None:
    spec = ObjectSpec(("a", "b"), 128, ((0.0, 1.0),) * 2)
    crowd = np.zeros((4, 128, 128), np.float32)
    # Every second cell of every second row is a peak: 4096 of either label.
    crowd[0, ::2, ::2], crowd[1, ::2, ::2] = 0.4, 0.3
    crowd[1, 6, 10] = 0.9
    found = decode(crowd, WHOLE, ORIGIN, spec)
    assert found.labels.tolist() == [0] * 4095 + [1]
    assert found.scores.tolist() == np.float32([0.4] * 4095 + [0.9]).tolist()


@given(st.integers(0, 2**32 - 1), st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=60, deadline=None)
def test_any_maps_give_sound_objects(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    wild = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.5], np.float32)
    given_maps = rng.standard_normal((5, 24, 24)).astype(np.float32)
    at = rng.random(given_maps.shape) < 0.3
    given_maps[at] = rng.choice(wild, at.sum())
    pyramid = build_pyramid(height, width, tile=336, base_side=1008)
    levels = []
    for level in (pyramid.global_view, *pyramid.levels[:2]):
        tiles = [tile for tile in level.tiles() if rng.random() < 0.5][:6]
        levels.append((level, {tile: decode(given_maps, level, tile, SPEC) for tile in tiles}))
    for found in (*(f for _, tiles in levels for f in tiles.values()), merge(levels)):
        assert np.isfinite(found.boxes).all()
        assert ((found.boxes >= 0) & (found.boxes <= 1)).all()
        assert (found.boxes[:, :2] <= found.boxes[:, 2:]).all()
        assert ((found.scores >= 0) & (found.scores <= 1)).all()
        assert (found.cells >= 0.25).all()
        assert (found.cells <= 64).all()
        describe(found, SPEC)
    assert set(as_rows(merge(levels))) <= {
        row for _, tiles in levels for found in tiles.values() for row in as_rows(found)
    }


def test_a_small_object_is_left_to_a_finer_tile_that_was_looked_at() -> None:
    small = objects((0, 0.9, 0.2, 0.2, 0.05), (0, 0.9, 0.8, 0.8, 0.05), cells=1.9)
    fine = {ORIGIN: objects((0, 0.6, 0.2, 0.2, 0.05))}
    found = merge([(WHOLE, {ORIGIN: small}), (FINE, fine)])
    assert found.scores.tolist() == [np.float32(0.9), np.float32(0.6)]
    np.testing.assert_allclose(found.centres, [[0.8, 0.8], [0.2, 0.2]], rtol=1e-5)
    # It is dropped also where the finer tile shows nothing.
    assert len(merge([(WHOLE, {ORIGIN: small}), (FINE, {ORIGIN: no_detections()})])) == 1


def test_a_large_object_is_left_to_a_coarser_tile_that_was_looked_at() -> None:
    large = objects((0, 0.9, 0.2, 0.2, 0.3), cells=11)
    assert len(merge([(WHOLE, {ORIGIN: no_detections()}), (FINE, {ORIGIN: large})])) == 0
    assert len(merge([(WHOLE, {}), (FINE, {ORIGIN: large})])) == 1


def test_levels_of_one_size_leave_nothing_to_each_other() -> None:
    small = objects((0, 0.9, 0.2, 0.2, 0.05), cells=1)
    assert len(merge([(WHOLE, {ORIGIN: small}), (WHOLE, {ORIGIN: no_detections()})])) == 1
    assert len(merge([(WHOLE, {ORIGIN: small}), (WHOLE, {ORIGIN: small})])) == 1


def test_one_object_seen_twice_is_one_and_labels_do_not_compete() -> None:
    found = merge(
        [
            (WHOLE, {ORIGIN: objects((0, 0.5, 0.5, 0.5, 0.2), (1, 0.4, 0.5, 0.5, 0.2))}),
            (FINE, {ORIGIN: objects((0, 0.8, 0.49, 0.5, 0.2), (0, 0.7, 0.7, 0.5, 0.2))}),
        ]
    )
    assert found.labels.tolist() == [0, 0, 1]
    assert found.scores.tolist() == [np.float32(0.8), np.float32(0.7), np.float32(0.4)]


def test_a_part_in_the_inner_half_of_a_better_box_is_dropped() -> None:
    inside, beside = (0, 0.5, 0.54, 0.5, 0.02), (0, 0.5, 0.56, 0.5, 0.02)
    found = merge([(WHOLE, {ORIGIN: objects((0, 0.9, 0.5, 0.5, 0.2), inside, beside)})])
    np.testing.assert_allclose(found.centres[:, 0], [0.5, 0.56], rtol=1e-5)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_merging_is_the_same_in_any_order_and_leaves_no_two_of_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 40))
    # Coarse values, so that there are ties.
    table = np.stack(
        [
            rng.integers(0, 3, n),
            rng.integers(3, 6, n) / 8,
            *(rng.integers(1, 8, n) / 8 for _ in range(2)),
            rng.integers(1, 3, n) / 8,
        ],
        axis=1,
    )
    tiles = FINE.tiles()
    owner = rng.integers(0, 4, n)
    parts = {tile: objects(*table[owner == i]) for i, tile in enumerate(tiles)}
    found = merge([(WHOLE, {}), (FINE, parts)])
    turned = {tile: parts[tile].take(np.arange(len(parts[tile]))[::-1]) for tile in tiles[::-1]}
    assert as_rows(merge([(WHOLE, {}), (FINE, turned)])) == as_rows(found)
    assert as_rows(merge([(WHOLE, {}), (FINE, {ORIGIN: found})])) == as_rows(found)
    assert (np.diff(found.scores) <= 0).all()


def test_thousands_of_objects_are_cut_to_the_best() -> None:
    side = np.linspace(0.005, 0.995, 100)
    crowd = [(0, 0.3 + 0.5 * x, x, y, 1e-4) for x in side for y in side]
    found = merge([(WHOLE, {ORIGIN: objects(*crowd)})])
    assert len(found) == 4096
    assert found.centres[:, 0].min() > 0.5


def test_the_note_is_that_of_the_specification() -> None:
    found = objects(
        (0, 0.9, 0.1, 0.1, 0.02),
        (0, 0.8, 0.2, 0.2, 0.02),
        (0, 0.7, 0.5, 0.5, 0.02),
        (0, 0.4, 0.9, 0.9, 0.02),
        (1, 0.5, 0.6, 0.9, 0.02),
    )
    assert describe(found, SPEC) == (
        "airplane 3 left top: top left, center; perhaps bridge 1 right bottom: bottom"
    )
    assert describe(found, SPEC, most=1) == "airplane 3 left top: top left, center"


def test_a_question_is_told_of_the_labels_that_it_names() -> None:
    spec = ObjectSpec(SPEC.labels, 24, SPEC.thresholds, (("plane", "aircraft"), (), ("boat",)))
    found = objects((0, 0.9, 0.1, 0.1, 0.02), (1, 0.5, 0.6, 0.9, 0.02))
    plane, bridge = "airplane 1 left top: top left", "perhaps bridge 1 right bottom: bottom"
    for question, told in (
        ("How many Planes are there?", plane),
        ("Is the bridge above the aircraft?", f"{bridge}; {plane}"),
        ("Are there any boats near the bridges?", f"no ship; {bridge}"),
        ("Is there a ship?", "no ship"),
        ("Describe the planet, the shipyard and the airplanes2.", f"{plane}; {bridge}"),
        ("", f"{plane}; {bridge}"),
    ):
        assert describe(found, spec, question) == told, question


def test_doubtful_labels_come_last_and_what_is_below_both_thresholds_is_not_said() -> None:
    found = objects((1, 0.59, 0.5, 0.5, 0.1), (0, 0.5, 0.5, 0.5, 0.1), (2, 0.29, 0.5, 0.5, 0.1))
    assert describe(found, SPEC) == (
        "airplane 1 right bottom: center; perhaps bridge 1 right bottom: center"
    )
    assert describe(no_detections(), SPEC) == "nothing"


def test_many_objects_and_at_most_three_places_the_most_frequent_first() -> None:
    crowd = [(0, 0.9, x, 0.1, 0.01) for x in np.linspace(0.7, 0.9, 98)]
    crowd += [(0, 0.9, 0.1, y, 0.01) for y in (0.1, 0.5, 0.6, 0.9)]
    assert describe(objects(*crowd), SPEC) == "airplane many right top: top right, left, top left"


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (0.0, 0.0, "left top: top left"),
        (1.0, 1.0, "right bottom: bottom right"),
        (0.5, 0.4999, "right top: center"),
        (0.3, 0.5, "left bottom: left"),
    ],
)
def test_the_images_edges_and_middle_have_a_place(x: float, y: float, place: str) -> None:
    assert describe(objects((0, 0.9, x, y, 0.0)), SPEC) == f"airplane 1 {place}"
