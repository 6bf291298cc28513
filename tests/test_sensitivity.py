"""Sensitivity: kinds of layers first, single layers of the most sensitive kinds then."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

from lrs_edge_export.quantization.sensitivity import (
    LayerError,
    kept_higher,
    kind_of,
    layer_errors,
    sensitivity_table,
)

PARTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj")
NAMES = [f"layers.{layer}.{part}" for layer in range(24) for part in PARTS] + ["lm_head"]


def error_of(name: str) -> float:
    layer = 0 if name == "lm_head" else int(name.split(".")[1])
    return {"down_proj": 0.02 * (1 + layer % 3), "lm_head": 0.03}.get(
        name.rsplit(".", 1)[-1], 0.001
    )


class Measured:
    """Errors that add up in squares, and what was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, names: Collection[str]) -> float:
        self.asked.append(len(names))
        return math.sqrt(sum(error_of(name) ** 2 for name in names))


def test_kinds_are_measured_before_single_layers() -> None:
    measure = Measured()
    found = layer_errors(NAMES, measure, most_single=10)
    # Four kinds, and ten of the down projections, from the first to the last.
    assert sorted(measure.asked) == [1] * 11 + [24] * 3
    assert set(found) == set(NAMES)
    alone = {name for name, (_, measured) in found.items() if measured}
    assert {kind_of(name) for name in alone} == {"layers.*.mlp.down_proj", "lm_head"}
    assert {"layers.0.mlp.down_proj", "layers.23.mlp.down_proj", "lm_head"} <= alone
    assert all(found[name][0] == error_of(name) for name in alone)
    # What was not measured alone has its share, so that all together have the kind's.
    for kind in ("layers.*.mlp.down_proj", "layers.*.self_attn.o_proj"):
        of = [name for name in NAMES if kind_of(name) == kind]
        assert math.hypot(*(found[name][0] for name in of)) == pytest.approx(
            math.hypot(*map(error_of, of))
        )


def test_few_layers_are_all_measured_alone() -> None:
    measure = Measured()
    found = layer_errors(NAMES[:12], measure)
    assert measure.asked == [1] * 12
    assert all(found[name] == (error_of(name), True) for name in NAMES[:12])


def test_a_share_is_marked_and_may_be_kept_higher() -> None:
    errors = [LayerError("llm", "a.1", 10, 0.2, measured=False), LayerError("llm", "b", 90, 0.1)]
    kept = kept_higher(errors, 10)
    assert kept == {"a.1"}
    table = sensitivity_table(errors, kept)
    assert "| llm | a.1 | 10 | ~2.00e-01 | yes |" in table
    assert "| llm | b | 90 | 1.00e-01 |  |" in table
