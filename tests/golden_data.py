"""Where the golden data lies: the whole set beside a checkout, else the part that is committed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
COMMITTED = HERE / "golden"
SHARED = HERE.parent.parent / "shared" / "golden"
ROOT = SHARED if SHARED.is_dir() else COMMITTED

#: The golden runs' `variant` and the checkpoint each was made with.
CHECKPOINTS = {"qwen": "llava_largeimg_Qwen2_tiny", "llama": "llava_largeimg_Vicuna_tiny"}


@dataclass(frozen=True)
class GoldenRun:
    """One run of the reference: its description, its arrays, its image."""

    name: str
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]
    image: Path


def checkpoint(variant: str) -> Path | None:
    """The checkpoint of a variant, None where only a part of the golden data is there."""
    path = ROOT / "models" / CHECKPOINTS[variant]
    return path if path.is_dir() else None


def run_names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "runs").glob("*.npz"))


def load_run(name: str) -> GoldenRun:
    info = json.loads((ROOT / "runs" / f"{name}.json").read_text())
    with np.load(ROOT / "runs" / f"{name}.npz") as data:
        arrays = {key: data[key] for key in data}
    return GoldenRun(name, info, arrays, ROOT / "images" / f"{info['image']}.png")
