"""Both ways to resample, against torch, a box filter, and themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp

from lrs_edge.pyramid.levels import Level, LevelWindow, build_pyramid
from lrs_edge.raster import window as window_module
from lrs_edge.raster.raster import Raster
from lrs_edge.raster.resample import area_taps, combine, reference_taps
from tests.rasters import box_filter, noise, write


def whole(level_hw: tuple[int, int]) -> LevelWindow:
    return LevelWindow(row0=0, col0=0, rows=level_hw[0], cols=level_hw[1])


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips and chunks so small that every test crosses many of them."""
    monkeypatch.setattr(window_module, "STRIP_VALUES", 900)
    monkeypatch.setattr(window_module, "BLOCK_ROW_BYTES", 1)


@pytest.mark.parametrize("resampling", ["area", "reference"])
@pytest.mark.parametrize(
    "level_hw", [(97, 61), (300, 410), (1, 1), (1, 90), (600, 333), (299, 409)]
)
@pytest.mark.usefixtures("small_strips")
def test_tiles_join_without_a_seam(
    tmp_path: Path, level_hw: tuple[int, int], resampling: str
) -> None:
    path = write(tmp_path / "a.tif", noise(3, 300, 410), tiled=True, blockxsize=64, blockysize=64)
    with Raster.open(path) as raster:
        full = raster.read(level_hw, whole(level_hw), resampling)
        height, width = level_hw
        for row0 in range(0, height, 50):
            for col0 in range(0, width, 70):
                rows, cols = min(50, height - row0), min(70, width - col0)
                tile = raster.read(level_hw, LevelWindow(row0, col0, rows, cols), resampling)
                part = full[row0 : row0 + rows, col0 : col0 + cols]
                np.testing.assert_allclose(tile, part, atol=1e-6)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.usefixtures("small_strips")
def test_any_window_is_cut_from_its_level(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.tif"
    if not path.exists():
        write(path, noise(3, 160, 210), tiled=True, blockxsize=64, blockysize=64, overviews=(2, 4))
    height, width = data.draw(st.integers(1, 250)), data.draw(st.integers(1, 250))
    row0, col0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows, cols = data.draw(st.integers(1, height - row0)), data.draw(st.integers(1, width - col0))
    resampling = data.draw(st.sampled_from(["area", "reference"]))
    with Raster.open(path) as raster:
        full = raster.read((height, width), whole((height, width)), resampling)
        tile = raster.read((height, width), LevelWindow(row0, col0, rows, cols), resampling)
    np.testing.assert_allclose(tile, full[row0 : row0 + rows, col0 : col0 + cols], atol=1e-6)


@pytest.mark.parametrize(
    ("size", "level_hw"),
    [
        ((300, 410), (97, 61)),
        ((300, 410), (300, 410)),
        ((300, 410), (777, 1003)),
        ((100, 57), (336, 192)),
        ((5, 700), (1, 336)),
        ((700, 1), (336, 1)),
        ((1, 1), (336, 336)),
        ((1009, 2017), (503, 1008)),
    ],
)
@pytest.mark.parametrize("tiled", [True, False])
def test_reference_equals_torch(
    tmp_path: Path, size: tuple[int, int], level_hw: tuple[int, int], tiled: bool
) -> None:
    torch = pytest.importorskip("torch")
    data = noise(3, *size)
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64} if tiled else {}
    path = write(tmp_path / "a.tif", data, **options)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(data.astype(np.float32) / np.float32(255))[None],
        size=level_hw,
        mode="bilinear",
        align_corners=False,
        antialias=False,
    )[0].permute(1, 2, 0)
    with Raster.open(path) as raster:
        full = raster.read(level_hw, whole(level_hw), "reference")
        middle = LevelWindow(
            level_hw[0] // 3, level_hw[1] // 3, (level_hw[0] + 3) // 4, (level_hw[1] + 3) // 4
        )
        part = raster.read(level_hw, middle, "reference")
    np.testing.assert_allclose(full, expected.numpy(), atol=1e-6)
    rows = slice(middle.row0, middle.row0 + middle.rows)
    cols = slice(middle.col0, middle.col0 + middle.cols)
    np.testing.assert_allclose(part, expected.numpy()[rows, cols], atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [(27328, 1008), (27328, 13776), (100_001, 50_064)])
def test_reference_indices_equal_torch_on_long_axes(source: int, target: int) -> None:
    """On a long axis float32 rounding moves source coordinates; the taps must move with them."""
    torch = pytest.importorskip("torch")
    ramp = np.random.default_rng(0).random(source, dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(ramp)[None, None, None], size=(1, target), mode="bilinear"
    )[0, 0, 0].numpy()
    taps = reference_taps(source, target, 0, target)
    _, values = combine(ramp[taps.positions][:, None], taps)
    np.testing.assert_allclose(values[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("level_hw", [(97, 61), (300, 410), (150, 205), (13, 400), (1, 1)])
def test_area_equals_a_box_filter(tmp_path: Path, level_hw: tuple[int, int]) -> None:
    data = np.random.default_rng(0).integers(0, 256, (3, 300, 410), dtype=np.uint8)
    path = write(tmp_path / "a.tif", data)
    with Raster.open(path) as raster:
        read = raster.read(level_hw, whole(level_hw))
    expected = box_filter(np.moveaxis(data, 0, -1) / 255, level_hw)
    np.testing.assert_allclose(read, expected, atol=1e-5)


@pytest.mark.parametrize(("white", "error"), [(True, 0.03), (False, 0.01)])
def test_area_reads_overviews_and_stays_close_to_the_box_filter(
    tmp_path: Path, white: bool, error: float
) -> None:
    """White noise is the worst case: pixels cut by two outputs were averaged before."""
    random = np.random.default_rng(0).integers(0, 256, (3, 1024, 1536), dtype=np.uint8)
    data = random if white else noise(3, 1024, 1536)
    options = {"tiled": True, "blockxsize": 128, "blockysize": 128}
    with_overviews = write(tmp_path / "a.tif", data, overviews=(2, 4, 8), **options)
    level_hw = (190, 285)
    with Raster.open(with_overviews) as raster:
        before = raster.bytes_read
        read = raster.read(level_hw, whole(level_hw))
        assert raster.info.overviews == (2, 4, 8)
        # 1024 / 190 = 5.4: the overview of 4, a sixteenth of the pixels.
        assert raster.bytes_read - before < data.nbytes / 10
    expected = box_filter(np.moveaxis(data, 0, -1) / 255, level_hw)
    assert np.abs(read - expected).mean() < error
    assert abs(read.mean() - expected.mean()) < 1e-3


def test_area_is_bilinear_when_enlarging(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    data = noise(3, 40, 30)
    path = write(tmp_path / "a.tif", data)
    with Raster.open(path) as raster:
        read = raster.read((100, 75), whole((100, 75)))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(data.astype(np.float32) / 255)[None], size=(100, 75), mode="bilinear"
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(read, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["nodata", "alpha", "mask", "nan"])
def test_what_is_hidden_does_not_bleed(tmp_path: Path, kind: str) -> None:
    """The visible half is white, the hidden half black: no grey may appear between them."""
    data = np.full((3, 90, 90), 200, dtype=np.uint8)
    data[:, :, 41:] = 0
    hidden = np.where(np.arange(90) < 41, 255, 0).astype(np.uint8)
    hidden = np.tile(hidden, (90, 1))
    path = tmp_path / "a.tif"
    if kind == "nodata":
        write(path, data, nodata=0)
    elif kind == "mask":
        write(path, data, mask=hidden)
    elif kind == "alpha":
        colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
        write(path, np.concatenate([data, hidden[None]]), colours=colours)
    else:
        floats = np.where(data == 0, np.nan, data).astype(np.float32)
        write(path, floats)
    with Raster.open(path, value_range=(0, 255)) as raster:
        read = raster.read((30, 30), whole((30, 30)))
    np.testing.assert_allclose(np.unique(read), [0, 200 / 255], atol=1e-6)
    assert (read[:, :13] > 0.7).all()
    assert (read[:, 14:] == 0).all()


def test_taps_weigh_one() -> None:
    for make in (area_taps, reference_taps):
        for source, target in [(27328, 1008), (1000, 999), (7, 20), (1, 5), (5, 1)]:
            taps = make(source, target, 0, target)
            np.testing.assert_allclose(taps.weights.sum(axis=1), 1, atol=1e-5)
            assert taps.positions[0] >= 0
            assert taps.positions[-1] < source


@pytest.mark.parametrize("size", [(336, 336), (50, 2000), (2000, 50), (1, 1), (3, 700)])
def test_every_tile_of_a_pyramid_can_be_read(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write(tmp_path / "a.tif", noise(3, *size))
    pyramid = build_pyramid(*size, tile=336, base_side=1008)
    levels: list[Level] = [pyramid.global_view, *pyramid.levels]
    with Raster.open(path) as raster:
        for level in levels:
            for index in level.tiles():
                window = level.tile_window(index)
                tile = raster.read((level.height, level.width), window)
                assert tile.shape == (window.rows, window.cols, 3)
                assert tile.dtype == np.float32
