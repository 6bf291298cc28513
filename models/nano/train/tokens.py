"""Run the trained part of the vision encoder over all cached maps, once, and keep the tokens.

What lands in `<work>/features`: `pictures.u8` and `scenes_{0,1}.u8`, [tiles, 144, 1280 + 192 + K]:
features, context and words (probabilities times 6) as `common.compress` stores them. Needed before
the language model is trained; finished blocks are counted in `.done` files.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from common import FEATURES, TOKENS, Paths, compress, has_variant, labels
from low import Stores
from torch import Tensor
from tower import WIDTH, Neck, fold_norms, load_tower, upper
from words import WORDS

CHANNELS = FEATURES + WIDTH + len(WORDS)
BLOCK = 250


class Encoder:
    """Cached maps int8 [N, 24, 24, 112] to tokens uint8 [N, 144, CHANNELS]."""

    def __init__(self, paths: Paths) -> None:
        self.scale = torch.from_numpy(np.load(paths.work / "low" / "scale.npy"))
        self.tower, self.neck = load_tower(paths.tower), Neck()
        self.neck.load_state_dict(torch.load(paths.neck, weights_only=True))
        fold_norms(self.tower)
        self.tower.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, low: np.ndarray) -> np.ndarray:
        """Tokens of some maps."""
        x: Tensor = (torch.from_numpy(low).float() * self.scale).permute(0, 3, 1, 2)
        high = upper(self.tower, x)
        context, logits = self.neck(x, high)
        tokens = torch.cat((high, context, 6 * logits.sigmoid()), 1)
        return compress(tokens.flatten(2).transpose(1, 2).numpy())


def fill(name: str, folder: Path, low: np.ndarray, wanted: np.ndarray, encode: Encoder) -> None:
    """One store; wanted marks the rows that hold something."""
    path, done = folder / f"{name}.u8", folder / f"{name}.done"
    shape = (len(low), TOKENS, CHANNELS)
    fits = path.exists() and path.stat().st_size == np.prod(shape)
    store = np.memmap(path, np.uint8, "r+" if fits else "w+", shape=shape)
    first = int(done.read_text()) if done.exists() and fits else 0
    rows = np.flatnonzero(wanted)
    begun = time.time()
    for start in range(first, len(rows), BLOCK):
        for part in range(start, min(start + BLOCK, len(rows)), 25):
            chosen = rows[part : min(part + 25, start + BLOCK)]
            store[chosen] = encode(np.asarray(low[chosen]))
        done.write_text(str(min(start + BLOCK, len(rows))))
        if start // BLOCK % 8 == 0:
            rate = (start + BLOCK - first) / (time.time() - begun)
            print(f"tokens {name}: {start + BLOCK}/{len(rows)}, {rate:.0f} tiles/s", flush=True)


def main() -> None:
    """Everything that is not there yet."""
    torch.set_num_threads(2)
    paths = Paths()
    paths.features.mkdir(parents=True, exist_ok=True)
    rows = labels(paths, "aid150_rsicd")
    stores, encode = Stores.filled(paths, len(rows)), Encoder(paths)
    everything = np.ones(len(stores.pictures), bool)
    fill("pictures", paths.features, stores.pictures, everything, encode)
    for variant, low in enumerate(stores.scenes):
        made = [row["split"] == "train" and has_variant(index, variant, paths.every)
                for index, row in enumerate(rows)]  # fmt: skip
        fill(f"scenes_{variant}", paths.features, low, np.array(made), encode)


if __name__ == "__main__":
    main()
