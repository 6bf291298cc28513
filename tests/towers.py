"""Vision stages of every kind of tower, small and at random."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.checkpoints.towers import (
    ClipTower,
    InternVitTower,
    SiglipTower,
    TransformerTower,
)
from lrs_edge_export.checkpoints.vision import VisionStage

ONES = (1.0, 1.0, 1.0)
WIDTH, HEADS, WIDE, PATCH, GRID = 48, 3, 80, 4, 6


class Made:
    """Tensors of whatever shapes a part of a model asks for, at random."""

    def __init__(self) -> None:
        self._tensors: dict[str, np.ndarray] = {}

    def require(self, shapes: Mapping[str, tuple[int, ...]], _what: str) -> None:
        draw = np.random.default_rng(len(self._tensors))
        for name, shape in shapes.items():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            size = 0.3 if len(shape) == 1 else 1.5 / np.sqrt(np.prod(shape[1:]))
            value = around + size * draw.standard_normal(shape)
            self._tensors[name] = value.astype(np.float32)

    def refuse_others(self, _pattern: str, _known: Collection[str], _what: str) -> None:
        """There are no others."""

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


def clip() -> TransformerTower:
    return ClipTower(*common(), 1e-5, "quick_gelu")


def common() -> tuple[Any, ...]:
    return Made(), 3, WIDTH, HEADS, WIDE, PATCH, GRID


def siglip(activation: str = "gelu_tanh", *, final: bool = True) -> TransformerTower:
    return SiglipTower(*common(), 1e-6, activation, final_norm=final)


def intern(**given: bool) -> TransformerTower:
    return InternVitTower(*common(), 1e-6, "gelu", **given)


def qwen(**given: Any) -> TransformerTower:
    return QwenTower(*common(), 1e-6, given.pop("activation", "quick_gelu"), **given)


def qwen2_5() -> TransformerTower:
    return qwen(activation="silu", rms_norm=True, gated=True, window=2, full_layers=(1,))


TOWERS: dict[str, Callable[[], TransformerTower]] = {
    "clip": clip,
    "clip, several hidden states": lambda: replace(clip(), states=(3, 0, 2)),
    "siglip": siglip,
    "siglip, a hidden state": lambda: siglip(final=False),
    "a tower of erf": lambda: siglip("gelu"),
    "internvit": intern,
    "internvit of 6B": lambda: intern(qkv_bias=False, qk_norm=True, rms=True, final_norm=True),
    "qwen2": qwen,
    "qwen2.5": qwen2_5,
    "qwen3": lambda: qwen(activation="gelu_tanh", stem_bias=True, table_grid=4, taps=(0, 1)),
}


def stage_of(name: str) -> VisionStage:
    """The stage of one of TOWERS."""
    tower = TOWERS[name]()
    projectors = [
        Projector(Made(), name=f"projector{number or ''}")  # type: ignore[arg-type]
        for number in range(1 + len(getattr(tower, "taps", ())))
    ]
    first, *deep = projectors
    width, side = tower.width, PATCH * GRID
    found = VisionStage(tower, first, width, 32, side, 1, ONES, ONES, deepstack=tuple(deep))
    found.check()
    return found
