"""The checkpoint with an untrained region focus module, for comparison.

    python untrained.py CHECKPOINT OUT

Its RFM is SmolLM2's first layers before any training of ours; all else is CHECKPOINT's.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from checkpoint import PRUNER
from common import Paths
from safetensors.torch import load_file, save_file


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    weights = load_file(options.checkpoint / "model.safetensors")
    start = load_file(Paths().base / "model.safetensors")
    for name in weights:
        if name.startswith(f"{PRUNER}.layers."):
            weights[name] = start[f"model.{name.removeprefix(PRUNER + '.')}"].float().clone()
    shutil.copytree(options.checkpoint, options.out, dirs_exist_ok=True)
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
