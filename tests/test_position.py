"""Position embeddings of vision tokens: where in the image a token lies, whatever the level."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lrs_edge.bundle.bundle import Embeddings
from lrs_edge.errors import BundleError
from lrs_edge.pyramid.levels import Level, TileIndex, build_pyramid
from lrs_edge.vision.positions import ImagePositions

ENTRIES, WIDTH = 5, 3


def ramp() -> ImagePositions:
    """Tables whose first column is the row's share of the image, whose second the column's."""
    shares = np.linspace(0, 1, ENTRIES, dtype=np.float32)
    rows, cols = np.zeros((ENTRIES, WIDTH), np.float32), np.zeros((ENTRIES, WIDTH), np.float32)
    rows[:, 0], cols[:, 1] = shares, shares
    return ImagePositions(rows, cols)


@given(st.integers(40, 4000), st.integers(40, 4000), st.integers(1, 6))
def test_tokens_know_their_share_of_the_image_at_every_level(
    height: int, width: int, side: int
) -> None:
    pyramid = build_pyramid(height, width, tile=64, base_side=192)
    for level in (pyramid.global_view, *pyramid.levels):
        tile = TileIndex(level.tile_rows - 1, level.tile_cols - 1)
        found = ramp().of_tile(level, tile, side).reshape(side, side, WIDTH)
        for index in range(side):
            centre = (index + 0.5) * level.tile / side
            down = min((tile.row * level.tile + centre) / level.height, 1.0)
            right = min((tile.col * level.tile + centre) / level.width, 1.0)
            assert found[index, 0, 0] == pytest.approx(down, abs=1e-5)
            assert found[0, index, 1] == pytest.approx(right, abs=1e-5)


def test_rows_run_down_and_columns_to_the_right() -> None:
    tables = np.random.default_rng(0).normal(size=(2, ENTRIES, WIDTH)).astype(np.float32)
    positions = ImagePositions(tables[0], tables[1])
    found = positions.of_tile(Level(8, 8, 1, 1, 8), TileIndex(0, 0), 2)
    # Centres lie at a quarter and three quarters: on entries 1 and 3 of 5.
    expected = [tables[0][r] + tables[1][c] for r in (1, 3) for c in (1, 3)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_entry_is_the_same_everywhere() -> None:
    one = np.ones((1, WIDTH), np.float32)
    found = ImagePositions(one, 2 * one).of_tile(Level(8, 8, 1, 1, 8), TileIndex(0, 0), 4)
    np.testing.assert_array_equal(found, np.full((16, WIDTH), 3, np.float32))


def test_embeddings_hold_the_tables_that_the_manifest_names(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.safetensors"
    tensors = {
        "embed_tokens": np.zeros((4, WIDTH), np.float16),
        "image_newline": np.zeros(WIDTH, np.float16),
        "position_rows": ramp().rows.astype(np.float16),
        "position_cols": ramp().cols.astype(np.float16),
    }
    save_file(tensors, path)
    found = Embeddings(path, WIDTH, 4, ENTRIES).positions
    assert found is not None
    np.testing.assert_array_equal(found.rows, ramp().rows)
    assert Embeddings(path, WIDTH, 4).positions is None
    with pytest.raises(BundleError, match="position embeddings"):
        Embeddings(path, WIDTH, 4, ENTRIES + 1)
    del tensors["position_cols"]
    save_file(tensors, path)
    with pytest.raises(BundleError, match="cannot be read"):
        Embeddings(path, WIDTH, 4, ENTRIES)
