"""Fine-tune the upper part of the vision encoder and train its neck, so that tokens carry words.

Blocks 0..10 of EfficientNet-Lite0 stay as they are (`low.py` caches what they make of every tile).
Blocks 11..15, the head and the neck learn two things at once: the mean over a tile's tokens names
its scene (30 classes), and every token says which words it shows (`words.py`), where that is known.

What lands in `<work>/vision`: the labels, the training state, `tower.pt` and `neck.pt`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import FEATURES, Paths, has_variant, is_dev, labels, tile_rows
from loop import average_in, save_atomically, slope
from low import Stores
from token_labels import scene_labels, write_labels
from torch import Tensor, nn
from torch.nn import functional
from tower import Neck, fold_norms, is_upper, start_tower, unfolded, upper
from words import OBJECTS, PLACES, WORDS

BATCH = {"scenes": 24, "words": 20, "tiles": 20}
"""Tiles in one step: scenes of AID, tiles that show a drawn word, any tiles of pictures."""
SEARCHED = OBJECTS[:17]
"""Words that tiles are drawn for."""


class VisionTrainer:
    """One fine-tuning run and its state on disk."""

    def __init__(self, paths: Paths, start: Path | None, seconds: float, rate: float) -> None:
        self.folder, self.seconds = paths.work / "vision", seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        low = paths.work / "low"
        self.scale = torch.from_numpy(np.load(low / "scale.npy"))
        rows = labels(paths, "aid150_rsicd")
        self.stores = Stores.filled(paths, len(rows))
        self.labels, pictures = write_labels(low, self.folder, self.stores.cover)
        self._choose(pictures, rows, paths.every)
        self.tower, self.neck = start_tower(start), Neck()
        self.scene = nn.Linear(FEATURES, len(PLACES))
        fold_norms(self.tower)
        for name, parameter in self.tower.named_parameters():
            parameter.requires_grad_(is_upper(name))
        self.tower.to(memory_format=torch.channels_last)
        self.neck.to(memory_format=torch.channels_last)
        self.trained = [p for p in self.tower.parameters() if p.requires_grad]
        self.new = [*self.neck.parameters(), *self.scene.parameters()]
        deep = [p for p in self.trained if p.dim() > 1]
        flat = [p for p in self.trained if p.dim() < 2]
        groups = [
            {"params": deep, "base": rate, "weight_decay": 0.05},
            {"params": flat, "base": rate, "weight_decay": 0.0},
            {"params": self.new, "base": 6 * rate, "weight_decay": 0.02},
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW([{**g, "lr": g["base"]} for g in groups])
        self.modules = nn.ModuleDict({"tower": self.tower, "neck": self.neck, "scene": self.scene})
        self.average = {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.step, self.spent, self.state = 0, 0.0, self.folder / "state.pt"
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            self.modules.load_state_dict(saved["modules"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step, self.spent = saved["average"], saved["step"], saved["spent"]

    def _choose(self, pictures: list[dict], rows: list[dict], every: int) -> None:
        """Which tiles are trained on, and which are kept to look at (every 17th source image)."""
        held, used = [], []
        for picture in pictures:
            kept = picture["kind"] == "boxed" and picture["seed"] % 17 == 3
            (held if kept else used).extend(tile_rows(picture))
        self.used, self.held = np.array(used), np.array(held)
        train = [(v, i) for v in range(2) for i, row in enumerate(rows)
                 if row["split"] == "train" and has_variant(i, v, every)]  # fmt: skip
        self.scene_train = [(v, i) for v, i in train if not is_dev(rows[i]["file"])]
        self.scene_dev = [i for v, i in train if v == 0 and is_dev(rows[i]["file"])]
        self.scene_of = np.array([PLACES.index(row["scene"]) for row in rows])
        self.scene_words = {name: scene_labels(name) for name in PLACES}
        shows = np.zeros((len(self.used), len(WORDS)), bool)
        for start in range(0, len(self.used), 2000):
            chosen = self.used[start : start + 2000]
            both = self.labels.shown[chosen] & (self.labels.known[chosen] > 0)
            shows[start : start + 2000] = both.any((1, 2))
        self.showing = {w: self.used[shows[:, WORDS.index(w)]] for w in SEARCHED}
        self.showing = {w: rows_ for w, rows_ in self.showing.items() if len(rows_)}
        print(
            {w: len(v) for w, v in self.showing.items()}, len(self.used), len(self.held), flush=True
        )

    def maps(self, low: np.ndarray) -> Tensor:
        """Cached maps as float [N, 112, 24, 24], channels last."""
        return (torch.from_numpy(low).float() * self.scale).permute(0, 3, 1, 2)

    def draw(self, step: int) -> tuple[np.ndarray, Tensor, np.ndarray, np.ndarray]:
        """Maps, scenes, words and how far they are known, of one step."""
        draw = np.random.default_rng([1, step])
        scenes = [
            self.scene_train[i] for i in draw.integers(len(self.scene_train), size=BATCH["scenes"])
        ]
        names = list(self.showing)
        tiles = [int(draw.choice(self.showing[names[draw.integers(len(names))]]))
                 for _ in range(BATCH["words"])]  # fmt: skip
        tiles += [int(t) for t in draw.choice(self.used, BATCH["tiles"])]
        low = np.stack([self.stores.scenes[v][i] for v, i in scenes]
                       + [self.stores.pictures[t] for t in tiles])  # fmt: skip
        named = torch.from_numpy(self.scene_of[[i for _, i in scenes]])
        whole = [self.scene_words[PLACES[int(s)]] for s in named]
        shape = (len(scenes), 12, 12, len(WORDS))
        shown = np.broadcast_to(np.stack([s for s, _ in whole])[:, None, None], shape)
        # On a whole scene not every token can tell.
        known = np.broadcast_to(np.stack([k for _, k in whole])[:, None, None] * 0.5, shape)
        rows = np.array(tiles)
        shown = np.concatenate([shown, self.labels.shown[rows]]).astype(np.float32)
        trust = np.array([0.0, 0.15, 1.0], np.float32)[self.labels.known[rows]]
        known = np.concatenate([known * 0.5, trust]).astype(np.float32)
        return low, named, shown, known

    def loss(self, step: int) -> Tensor:
        """Scene and word losses."""
        low, named, shown, known = self.draw(step)
        x = self.maps(low)
        high = upper(self.tower, x, drop=0.1)
        pooled = functional.dropout(high[: len(named)].mean((2, 3)), 0.2)
        scene = functional.cross_entropy(self.scene(pooled), named, label_smoothing=0.1)
        _, logits = self.neck(x, functional.dropout2d(high, 0.05))
        wanted = torch.from_numpy(shown).permute(0, 3, 1, 2)
        weight = torch.from_numpy(known).permute(0, 3, 1, 2)
        each = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        each = each * weight * (1 + 3 * wanted)
        # Half over all cells, half over words: rare words count too.
        words = each.sum((0, 2, 3)) / (weight * wanted).sum((0, 2, 3)).clamp(min=30)
        return torch.stack([scene, 15 * each.sum() / weight.sum(), 0.5 * words.mean()])

    @torch.no_grad()
    def evaluate(self) -> dict[str, object]:
        """Scenes named right, and the area under the curve of words over held-out tiles."""
        kept = {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.average)
        right = 0
        dev = self.scene_dev[:300]
        for start in range(0, len(dev), 50):
            chosen = dev[start : start + 50]
            high = upper(self.tower, self.maps(self.stores.scenes[0][chosen]))
            found = self.scene(high.mean((2, 3))).argmax(1).numpy()
            right += int((found == self.scene_of[chosen]).sum())
        scores, truth, sure = [], [], []
        held = self.held[:: max(len(self.held) // 600, 1)]
        for start in range(0, len(held), 50):
            rows = held[start : start + 50]
            x = self.maps(self.stores.pictures[rows])
            logits = self.neck(x, upper(self.tower, x))[1].numpy()
            known = self.labels.known[rows].transpose(0, 3, 1, 2)
            shown = self.labels.shown[rows].transpose(0, 3, 1, 2)
            scores.append(np.where(known > 0, logits, -99).max((2, 3)))
            truth.append((shown & (known > 0)).any((2, 3)))
            sure.append((known == 2).any((2, 3)))
        self.modules.load_state_dict(kept)
        score, true, seen = (np.concatenate(part) for part in (scores, truth, sure))
        curves = {w: area(score[seen[:, i], i], true[seen[:, i], i])
                  for i, w in enumerate(SEARCHED)}  # fmt: skip
        return {"scenes": round(right / max(len(dev), 1), 3), **curves}

    def save(self) -> None:
        """State, averaged tower and neck."""
        saved = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "average": self.average, "step": self.step, "spent": self.spent}  # fmt: skip
        save_atomically(self.state, saved)
        tower = {k[6:]: v for k, v in self.average.items() if k.startswith("tower.")}
        neck = {k[5:]: v.contiguous() for k, v in self.average.items() if k.startswith("neck.")}
        state = {k: v.contiguous() for k, v in unfolded(tower, self.tower).items()}
        for name, value in (("tower.pt", state), ("neck.pt", neck)):
            save_atomically(self.folder / name, value)

    def run(self, steps: int | None = None) -> None:
        """Train until the time is spent."""
        mean: np.ndarray | None = None
        saved, first = self.spent, self.step
        while self.spent < self.seconds and (steps is None or self.step < first + steps):
            begun = time.time()
            part = slope(self.step, 50, self.spent / self.seconds, 0.02)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base"] * part
            parts = self.loss(self.step)
            self.optimizer.zero_grad()
            parts.sum().backward()
            torch.nn.utils.clip_grad_norm_(self.trained + self.new, 3.0)
            self.optimizer.step()
            self.step += 1
            average_in(self.average, self.modules, self.step)
            self.spent += time.time() - begun
            now = parts.detach().numpy()
            mean = now if mean is None else 0.95 * mean + 0.05 * now
            if self.step % 25 == 0:
                line = {
                    "step": self.step,
                    "spent": round(self.spent),
                    "loss": mean.round(3).tolist(),
                }
                print(
                    json.dumps(line | (self.evaluate() if self.step % 150 == 0 else {})), flush=True
                )
            if self.spent - saved > 240:
                self.save()
                saved = self.spent
        print(json.dumps({"step": self.step, **self.evaluate()}), flush=True)
        self.save()


def area(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Area under the receiver operating characteristic; None without both kinds."""
    yes, no = scores[truth], scores[~truth]
    if not len(yes) or not len(no):
        return None
    return round(
        float((yes[:, None] > no[None]).mean() + 0.5 * (yes[:, None] == no[None]).mean()), 3
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=18.0)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--start", type=Path, help="checkpoint whose tower is trained on")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    VisionTrainer(Paths(), options.start, options.minutes * 60, options.rate).run(options.steps)


if __name__ == "__main__":
    main()
