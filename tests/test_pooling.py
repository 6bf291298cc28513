"""Pooling of local tiles, and everything that is counted in tokens along a tile's side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from lrs_edge.answer.evidence import regions, source_bounds
from lrs_edge.bundle.bundle import read_manifest
from lrs_edge.bundle.limits import check_limits
from lrs_edge.errors import BundleError
from lrs_edge.language.sequence import LocalTokens
from lrs_edge.pyramid.levels import build_pyramid, token_grid
from lrs_edge.pyramid.selection import grid_indices, newline_indices, tile_scores
from lrs_edge.search.result import LevelPass, SearchResult
from lrs_edge.vision.encoder import pooled
from tests.specs import vision_spec
from tests.test_bundle import write_bundle

torch = pytest.importorskip("torch", reason="pooling is compared with torch's")

sides = st.integers(1, 33)
pools = st.integers(1, 5)
#: Image sides, and shapes of tiles: pixels and tokens along a side.
images = st.tuples(st.integers(40, 5000), st.integers(40, 5000))
shapes = st.sampled_from([(384, 14), (384, 27), (336, 12), (448, 16), (512, 8), (364, 13)])


@settings(max_examples=40, deadline=None)
@given(sides, pools, st.integers(0, 2**32 - 1))
def test_bilinear_pooling_is_torchs(side: int, pool: int, seed: int) -> None:
    tokens = np.random.default_rng(seed).standard_normal((side * side, 3)).astype(np.float32)
    if side % pool == 0 and pool > 2:
        return  # Interpolation would take the middle of a block, not its mean.
    found = pooled(tokens, pool, "bilinear")
    short = -(-side // pool)
    planes = torch.from_numpy(tokens).double().reshape(1, side, side, 3).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(planes, (short, short), mode="bilinear")
    assert found.shape == (short * short, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, wanted.permute(0, 2, 3, 1).reshape(-1, 3).numpy(), rtol=0, atol=2e-6
    )


@settings(max_examples=40, deadline=None)
@given(sides, pools)
def test_pooling_keeps_what_is_the_same_everywhere(side: int, pool: int) -> None:
    tokens = np.full((side * side, 2), 3.5, np.float32)
    np.testing.assert_allclose(pooled(tokens, pool, "bilinear"), 3.5, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "bilinear"])
def test_pooling_by_one_changes_nothing(pooling: str) -> None:
    tokens = np.random.default_rng(0).standard_normal((49, 4)).astype(np.float32)
    assert np.array_equal(pooled(tokens, 1, pooling), tokens)  # type: ignore[arg-type]


def test_pooling_by_two_of_an_even_side_is_the_mean_of_four() -> None:
    tokens = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    assert np.array_equal(pooled(tokens, 2, "bilinear"), pooled(tokens, 2, "mean"))


def test_odd_sides_are_rounded_up_like_onevisions() -> None:
    assert vision_spec("vision.onnx", 384, 27, 2).per_tile == 14
    assert vision_spec("vision.onnx", 384, 27, 1).per_tile == 27
    assert vision_spec("vision.onnx", 336, 24, 2).per_tile == 12


def test_means_of_an_odd_side_are_refused(tmp_path: Path) -> None:
    manifest = read_manifest(write_bundle(tmp_path / "bundle"))
    odd = structs.replace(manifest.vision, grid=3, local_pool=2)
    limits = structs.replace(manifest.limits, max_length=4096)
    with pytest.raises(BundleError, match=r"local_pool must divide .* is mean"):
        check_limits(tmp_path, structs.replace(manifest, vision=odd, limits=limits))
    bilinear = structs.replace(odd, pooling="bilinear")
    check_limits(tmp_path, structs.replace(manifest, vision=bilinear, limits=limits))


@settings(max_examples=40, deadline=None)
@given(images, shapes)
def test_tiles_of_any_side_share_out_the_sequence(
    size_hw: tuple[int, int], shape: tuple[int, int]
) -> None:
    tile, per_tile = shape
    for level in build_pyramid(*size_hw, tile=tile, base_side=3 * tile).levels:
        grid = token_grid(level, per_tile, (level.height, level.width))
        parts = [newline_indices(grid), *(grid_indices(grid, place)[0] for place in level.tiles())]
        assert sorted(np.concatenate(parts).tolist()) == list(range(grid.count))


@settings(max_examples=40, deadline=None)
@given(images, shapes, st.data())
def test_scores_and_peaks_lie_where_their_tokens_show_the_image(
    size_hw: tuple[int, int], shape: tuple[int, int], data: st.DataObject
) -> None:
    tile, per_tile = shape
    pyramid = build_pyramid(*size_hw, tile=tile, base_side=3 * tile)
    level, finer = pyramid.levels[0], pyramid.levels[-1]
    grid = token_grid(level, per_tile, (level.height, level.width))
    place = data.draw(st.sampled_from(level.tiles()))
    indices, within = grid_indices(grid, place)
    if not len(indices):
        return
    chosen = data.draw(st.integers(0, len(indices) - 1))
    scores = np.zeros(len(indices), np.float32)
    scores[chosen] = 1.0
    count = len(indices)
    local = LocalTokens(
        embeds=np.zeros((count, 1), np.float32),
        indices=indices,
        cells=indices,
        offsets=indices,
        span=grid.count,
        tile_rows=np.full(count, place.row, np.int64),
        tile_cols=np.full(count, place.col, np.int64),
        hidden=np.zeros(count, bool),
        level=0,
    )
    top = np.array([chosen])
    none = np.zeros((1, 0), np.float32)
    scored = LevelPass(0, level, grid, (place,), 0, local, none, scores, top, top, none)
    result = SearchResult([scored], local, scores)
    (region,) = regions(result, pyramid, lambda _: None)
    x0, y0, x1, y1 = region.peak
    bounds = source_bounds(pyramid, level, level.tile_window(place))
    # Of a tile's side the token shows one part in per_tile, cut at the image's edge.
    row, col = divmod(int(within[chosen]), per_tile)
    across, down = size_hw[1] / level.width, size_hw[0] / level.height
    cell = tile / per_tile
    left, top_edge = (
        (place.col * tile + col * cell) * across,
        (place.row * tile + row * cell) * down,
    )
    assert x0 == pytest.approx(min(left, size_hw[1]))
    assert y0 == pytest.approx(min(top_edge, size_hw[0]))
    assert x0 <= x1 <= x0 + cell * across + 1e-6
    assert y0 <= y1 <= y0 + cell * down + 1e-6
    assert bounds[0] - 1e-6 <= x0
    assert x1 <= bounds[2] + 1e-6
    assert bounds[1] - 1e-6 <= y0
    assert y1 <= bounds[3] + 1e-6
    if x1 > x0 and y1 > y0:
        totals = tile_scores(indices[top], scores[top], grid, level, finer)
        assert totals.sum() == pytest.approx(1.0)
        best = np.unravel_index(int(totals.argmax()), totals.shape)
        under = finer.tile_window(type(place)(int(best[0]), int(best[1])))
        fx0, fy0, fx1, fy1 = source_bounds(pyramid, finer, under)
        assert min(x1, fx1) >= max(x0, fx0) - 1e-6
        assert min(y1, fy1) >= max(y0, fy0) - 1e-6
