"""What the training loops share: learning rates that end in time, averages, files in one step."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def slope(step: int, warm: int, share: float, least: float) -> float:
    """The part of the peak learning rate at a step.

    Args:
        step: From 0.
        warm: Steps in which it rises.
        share: Of the training time that is spent, 0..1: along it the rate falls as a cosine does.
        least: Where it ends.
    """
    fallen = least + (1 - least) / 2 * (1 + math.cos(math.pi * share))
    return min(1.0, (step + 1) / warm) * fallen


def average_in(average: dict[str, Tensor], module: nn.Module, step: int) -> None:
    """Let a running average of a module's weights follow it, quickly at first."""
    decay = min(0.99, step / (step + 10))
    for key, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            average[key].lerp_(value, 1 - decay)


def save_atomically(path: Path, value: Any) -> None:
    """`torch.save` that replaces the file in one step."""
    part = path.with_name(path.name + ".part")
    torch.save(value, part)
    os.replace(part, path)
