"""Token and tile selection: bookkeeping that must hold for every grid."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.pyramid.levels import TileIndex, build_pyramid, token_grid
from lrs_edge.pyramid.selection import (
    best_tiles,
    grid_indices,
    kept_indices,
    newline_indices,
    reference_tiles,
    tile_scores,
    top_indices,
    trim_to_budget,
)

sides = st.integers(40, 6000)
seeds = st.integers(0, 2**32 - 1)


def pyramid_of(height: int, width: int):
    return build_pyramid(height, width, tile=336, base_side=1008)


@given(sides, sides)
def test_tiles_and_newlines_share_out_the_sequence(height: int, width: int) -> None:
    level = pyramid_of(height, width).levels[-1]
    grid = token_grid(level, 12, (level.height, level.width))
    parts = [newline_indices(grid), *(grid_indices(grid, tile)[0] for tile in level.tiles())]
    assert sorted(np.concatenate(parts).tolist()) == list(range(grid.count))


def test_tokens_within_a_tile_keep_their_place() -> None:
    level = pyramid_of(700, 900).levels[0]
    grid = token_grid(level, 12, (level.height, level.width))
    places, within = grid_indices(grid, TileIndex(1, 1))
    assert np.array_equal(places // grid.width - 12, within // 12)
    assert np.array_equal(places % grid.width - 12, within % 12)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 70))
def test_top_indices_are_the_largest_and_ties_keep_their_order(
    values: list[int], count: int
) -> None:
    scores = np.array(values, np.float32)
    top = top_indices(scores, count)
    wanted = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert top.tolist() == wanted


@given(sides, sides, seeds)
def test_scores_are_shared_out_whole_over_tiles_that_lie_under_them(
    height: int, width: int, seed: int
) -> None:
    levels = pyramid_of(height, width).levels
    if len(levels) < 2:
        return
    level, finer = levels[0], levels[1]
    grid = token_grid(level, 12, (height, width))
    random = np.random.default_rng(seed)
    top = random.choice(grid.count, size=min(9, grid.count), replace=False)
    scores = random.random(len(top), np.float32)
    totals = tile_scores(top, scores, grid, level, finer)
    on_image = scores[top % grid.width != grid.cols]
    # Grids are cut by whole tokens, so a last partial token can lie just outside of the image.
    assert totals.sum() <= on_image.sum() + 1e-4
    assert totals.sum() >= 0.9 * on_image.sum() - 1e-4 or grid.rows == 1 or grid.cols == 1


def test_a_token_selects_the_tile_below_it() -> None:
    levels = pyramid_of(4032, 4032).levels
    level, finer = levels[0], levels[1]
    grid = token_grid(level, 12, (4032, 4032))
    zoom = finer.width / level.width
    for row, col in ((0, 0), (5, 30), (35, 35)):
        top = np.array([row * grid.width + col])
        tiles = best_tiles(tile_scores(top, np.ones(1, np.float32), grid, level, finer), 1)
        centre = (col + 0.5) * 28 * zoom, (row + 0.5) * 28 * zoom
        assert tiles == [TileIndex(int(centre[1] // 336), int(centre[0] // 336))]


def test_newlines_choose_no_tile_in_full_and_the_right_most_in_reference() -> None:
    levels = pyramid_of(2600, 2600).levels
    grid = token_grid(levels[0], 12, (2600, 2600))
    lines = newline_indices(grid)
    totals = tile_scores(lines, np.ones(len(lines), np.float32), grid, levels[0], levels[1])
    assert best_tiles(totals, 99) == []
    finer = levels[1]
    chosen = reference_tiles(lines, grid, finer)
    assert chosen == [TileIndex(r, finer.tile_cols - 1) for r in range(finer.tile_rows)]


@given(st.integers(1, 80), st.integers(0, 90), seeds)
def test_trimming_keeps_the_best_tokens_with_their_newlines(
    count: int, budget: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    rows = np.sort(random.integers(0, 6, count))
    newline = np.append(np.diff(rows) > 0, True)
    scores = random.random(count).astype(np.float32)
    stays = trim_to_budget(rows, scores, newline, budget)
    assert stays.sum() <= budget or count <= budget
    tiles = np.flatnonzero(~newline)
    kept = tiles[stays[tiles]]
    # A row without its newline would run into the next.
    assert set(rows[kept]) <= set(rows[stays & newline])
    if len(tiles) and budget >= 2:
        assert stays[tiles[np.argmax(scores[tiles])]]
    if len(kept) < len(tiles):
        # Only what a row's newline costs may be left over for newlines of other rows.
        assert (stays & newline).sum() - len(set(rows[kept])) <= 1


def test_a_tight_budget_sends_tokens_of_tiles_not_newlines() -> None:
    rows = np.repeat(np.arange(20), 3)
    newline = np.tile([False, False, True], 20)
    scores = np.linspace(0, 1, 60).astype(np.float32)
    stays = trim_to_budget(rows, scores, newline, 6)
    assert np.flatnonzero(stays).tolist() == [54, 55, 56, 57, 58, 59]


def test_kept_tokens_are_ascending_and_hold_every_newline() -> None:
    kept = kept_indices(np.array([7, 2, 9]), np.array([4, 9]))
    assert kept.tolist() == [2, 4, 7, 9]
