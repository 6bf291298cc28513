"""Rounding of weights, and what GPTQ gains on inputs that are correlated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="exporting needs the `export` extra")

from lrs_edge_export.quantization import Quantized, dequantize, gptq, round_to_nearest


def inputs(rng: np.random.Generator, count: int, width: int, *, correlated: bool) -> np.ndarray:
    """Inputs [count, width]; correlated ones lie near a subspace, some a lot larger than others."""
    if not correlated:
        return rng.standard_normal((count, width)).astype(np.float32)
    mixing = rng.standard_normal((width // 4, width)) * np.exp(rng.standard_normal(width))
    noise = 0.05 * rng.standard_normal((count, width))
    return (rng.standard_normal((count, width // 4)) @ mixing + noise).astype(np.float32)


def moments(x: np.ndarray, *ends: int) -> list[np.ndarray]:
    """Diagonal blocks of x^T x / n, cut at the ends."""
    parts = np.split(x, ends, axis=1)
    return [(part.T @ part / len(x)).astype(np.float32) for part in parts]


def output_error(weight: np.ndarray, found: Quantized, block: int, x: np.ndarray) -> float:
    return float(np.linalg.norm(x @ (dequantize(found, block) - weight).T))


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("ends", [(), (128,)])
def test_gptq_beats_rounding_on_correlated_inputs(block: int, ends: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 256)).astype(np.float32)
    x = inputs(rng, 2000, 256, correlated=True)
    seen, held_out = x[:1000], x[1000:]
    plain = output_error(weight, round_to_nearest(weight, 4, block), block, held_out)
    found = output_error(weight, gptq(weight, 4, block, moments(seen, *ends)), block, held_out)
    assert found < 0.6 * plain


def test_gptq_is_rounding_on_white_inputs() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((48, 256)).astype(np.float32)
    x = inputs(rng, 20000, 256, correlated=False)
    plain = output_error(weight, round_to_nearest(weight, 4, 32), 32, x)
    found = output_error(weight, gptq(weight, 4, 32, moments(x)), 32, x)
    assert found == pytest.approx(plain, rel=0.03)
    exact = gptq(weight, 4, 32, [np.eye(256, dtype=np.float32)])
    assert np.array_equal(exact.integers, round_to_nearest(weight, 4, 32).integers)


def test_gptq_leaves_weights_of_dead_inputs_alone() -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((16, 64)).astype(np.float32)
    x = inputs(rng, 500, 64, correlated=True)
    x[:, 5] = 0.0
    found = gptq(weight, 4, 32, moments(x))
    step = np.abs(found.scales[:, 0])
    assert (np.abs(dequantize(found, 32)[:, 5] - weight[:, 5]) <= 4 * step).all()
    # Nothing was seen at all: plain rounding.
    nothing = gptq(weight, 4, 32, [np.zeros((64, 64), np.float32)])
    assert np.array_equal(nothing.integers, round_to_nearest(weight, 4, 32).integers)


def test_gptq_takes_moments_of_fewer_inputs_than_there_are_columns() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((16, 128)).astype(np.float32)
    x = rng.standard_normal((3, 128)).astype(np.float32)
    found = gptq(weight, 4, 32, moments(x))
    assert output_error(weight, found, 32, x) < output_error(
        weight, round_to_nearest(weight, 4, 32), 32, x
    )


def test_gptq_refuses_what_does_not_fit() -> None:
    weight = np.ones((4, 64), np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        gptq(weight, 4, 32, [np.eye(32, dtype=np.float32)])
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, 4, 32, [np.full((64, 64), np.nan, np.float32)])


def test_rows_in_chunks_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((40, 64)).astype(np.float32)
    seen = moments(inputs(rng, 500, 64, correlated=True))
    whole = round_to_nearest(weight, 4, 32), gptq(weight, 4, 32, seen)
    for module in ("rounding", "error_feedback"):
        monkeypatch.setattr(f"lrs_edge_export.quantization.{module}.CHUNK", 7 * 64)
    for one, other in zip(
        whole, (round_to_nearest(weight, 4, 32), gptq(weight, 4, 32, seen)), strict=True
    ):
        assert np.array_equal(one.integers, other.integers)
        assert np.array_equal(one.scales, other.scales)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 1 << 20]),
    seed=st.integers(0, 1000),
)
def test_rounding_stays_within_a_step(
    rows: int, columns: int, bits: int, block: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
    found = round_to_nearest(weight, bits, block)
    assert found.integers.shape == weight.shape
    assert found.scales.shape == (rows, -(-columns // block))
    low = -8 if bits == 4 else -127
    assert found.integers.min() >= low
    assert found.integers.max() <= 2 ** (bits - 1) - 1
    error = np.abs(dequantize(found, block) - weight)
    # Clipping may cost the few largest weights more than half a step, never half of themselves.
    wide = np.repeat(np.abs(found.scales), block if block < columns else columns, axis=1)
    assert (error <= np.maximum(0.51 * wide[:, :columns], 0.5 * np.abs(weight))).all()


def test_few_bits_use_all_of_their_integers() -> None:
    weight = np.array([[1.0, -0.5, 0.25, 0.1], [-1.0, 0.5, -0.25, 0.1]], np.float32)
    found = round_to_nearest(weight, 4, 4)
    assert found.integers.min(axis=1).tolist() == [-8, -8]
    assert (np.sign(found.scales[:, 0]) == [-1, 1]).all()
    assert np.array_equal(round_to_nearest(np.zeros((2, 4), np.float32), 4, 4).integers[0], [0] * 4)


def test_searched_scales_are_better_than_the_largest_weight_s() -> None:
    weight = np.random.default_rng(6).standard_t(3, (64, 128)).astype(np.float32)
    largest = np.abs(weight).max(axis=1, keepdims=True) / 7
    naive = np.clip(np.rint(weight / largest), -8, 7) * largest
    found = dequantize(round_to_nearest(weight, 4, 128), 128)
    assert np.square(found - weight).sum() < 0.8 * np.square(naive - weight).sum()


# -- zero points ---------------------------------------------------------------------------------


def test_zero_points_bring_grids_to_where_weights_are() -> None:
    rng = np.random.default_rng(7)
    # Every block lies on one side of zero, more or less.
    offsets = np.repeat(rng.standard_normal((24, 8)), 32, axis=1)
    weight = (rng.standard_normal((24, 256)) + 2 * offsets).astype(np.float32)
    x = inputs(rng, 500, 256, correlated=False)
    plain = round_to_nearest(weight, 4, 32)
    found = round_to_nearest(weight, 4, 32, zero_points=True)
    assert plain.zeros is None
    assert found.zeros is not None
    assert found.zeros.shape == found.scales.shape == (24, 8)
    assert found.zeros.min() >= -8
    assert found.zeros.max() <= 7
    assert (found.scales > 0).all()
    assert output_error(weight, found, 32, x) < 0.8 * output_error(weight, plain, 32, x)


def test_gptq_with_zero_points_is_better_still() -> None:
    ratios = []
    for seed in range(8, 14):
        rng = np.random.default_rng(seed)
        weight = rng.standard_normal((48, 256)).astype(np.float32)
        x = inputs(rng, 2000, 256, correlated=True)
        seen, held_out = moments(x[:1000]), x[1000:]
        plain, zeros = (
            output_error(weight, gptq(weight, 4, 32, seen, zero_points=way), 32, held_out)
            for way in (False, True)
        )
        ratios.append(zeros / plain)
    assert np.mean(ratios) < 0.97
    exact = [np.eye(256, dtype=np.float32)]
    same = gptq(weight, 4, 32, exact, zero_points=True)
    rounded = round_to_nearest(weight, 4, 32, zero_points=True)
    assert np.array_equal(same.integers, rounded.integers)


def test_blocks_of_zeros_stay_zeros() -> None:
    weight = np.zeros((4, 40), np.float32)
    weight[1, :3] = 2.5
    found = round_to_nearest(weight, 4, 32, zero_points=True)
    assert np.isfinite(found.scales).all()
    assert dequantize(found, 32) == pytest.approx(weight, abs=1e-6)
