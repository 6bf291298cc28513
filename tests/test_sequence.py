"""Sequences: compact and dense forms of the same level, positions, scores."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.language.sequence import concatenate, pad_dense
from lrs_edge.pyramid.levels import TileIndex, build_pyramid, token_grid
from lrs_edge.search.rfm import dense_bias, token_scores
from tests.sequences import rows_builder

NEWLINE = np.full(3, -1, np.float32)
SEQUENCES = rows_builder(NEWLINE)


def level_and_grid(height: int, width: int):
    level = build_pyramid(height, width, tile=336, base_side=1008).levels[-1]
    return level, token_grid(level, 12, (level.height, level.width))


def features_of(tiles: list[TileIndex]) -> dict[TileIndex, np.ndarray]:
    """Tokens that tell where they come from."""
    within = np.arange(144, dtype=np.float32)
    return {
        tile: np.stack([np.full(144, tile.row), np.full(144, tile.col), within], 1).astype("f4")
        for tile in tiles
    }


@given(st.integers(200, 3000), st.integers(200, 3000), st.data())
def test_every_token_stands_where_the_padded_sequence_has_it(
    height: int, width: int, data: st.DataObject
) -> None:
    level, grid = level_and_grid(height, width)
    tiles = data.draw(st.lists(st.sampled_from(level.tiles()), unique=True, max_size=6))
    local = SEQUENCES.local(grid, features_of(tiles), 0)
    assert np.all(np.diff(local.indices) > 0)
    assert np.array_equal(local.offsets, local.indices)
    assert local.is_newline.sum() == grid.rows
    assert np.all(local.embeds[local.is_newline] == NEWLINE)
    rows, cols = local.indices // grid.width, local.indices % grid.width
    shown = ~local.is_newline
    assert np.array_equal(local.embeds[shown, 0], rows[shown] // 12)
    assert np.array_equal(local.embeds[shown, 1], cols[shown] // 12)
    assert np.array_equal(local.embeds[shown, 2], rows[shown] % 12 * 12 + cols[shown] % 12)


def test_closing_gaps_renumbers_and_drops_empty_rows() -> None:
    level, grid = level_and_grid(3000, 3000)
    tiles = [TileIndex(1, 2), TileIndex(1, 4)]
    local = SEQUENCES.local(grid, features_of(tiles), 0, close_gaps=True)
    assert np.array_equal(local.offsets, np.arange(len(local)))
    assert local.span == len(local) == 2 * 144 + 12
    assert local.is_newline.sum() == 12
    assert set(local.indices // grid.width) == set(range(12, 24))
    assert level.tile_rows > 2


def test_the_dense_canvas_holds_the_compact_tokens_and_zeros() -> None:
    _, grid = level_and_grid(1500, 900)
    compact = SEQUENCES.local(grid, features_of([TileIndex(0, 1)]), 0)
    dense = pad_dense(compact, grid)
    assert len(dense) == grid.count
    assert np.array_equal(dense.embeds[~dense.hidden], compact.embeds)
    assert np.array_equal(dense.tile_rows[~dense.hidden], compact.tile_rows)
    assert not dense.embeds[dense.hidden].any()


def test_prefix_and_suffix_number_positions_around_the_local_tokens() -> None:
    prefix = SEQUENCES.prefix(np.zeros((4, 3), np.float32))
    suffix = SEQUENCES.suffix(np.zeros((2, 3), np.float32), 20)
    whole = concatenate(prefix, suffix)
    assert whole.tokens["position"].tolist() == [0, 1, 2, 3, 4, 5, 6, 20, 21]
    assert whole.tokens["kind"].tolist() == [0, 0, 1, 1, 1, 1, 2, 5, 5]


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10_000))
def test_scores_are_a_distribution_and_masked_tokens_get_nothing(
    heads: int, count: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(scale=20, size=(heads, count)).astype(np.float32)
    hidden = random.random(count) < 0.4
    hidden[0] = False
    scores = token_scores(logits, hidden)
    assert abs(scores.sum() - 1) < 1e-5
    assert not scores[hidden].any()
    assert np.allclose(scores[~hidden], token_scores(logits[:, ~hidden]), atol=1e-6)
    quirk = token_scores(logits, hidden, reference_quirk=True)
    raised = logits + hidden.astype(np.float32)
    assert np.allclose(quirk, token_scores(raised), atol=1e-6)


def test_the_dense_bias_is_causal_and_hides_keys() -> None:
    hidden = np.array([False, True, False])
    visible = dense_bias(2, hidden) == 0
    assert visible.tolist() == [
        [True, True, True, False, False],
        [True, True, True, False, False],
        [True, True, True, False, True],
    ]
