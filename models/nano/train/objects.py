"""Train the head that detects objects on frozen maps of the vision encoder.

Every cell of a tile's 24 x 24 map (16 pixels) says how likely an object of each label has its
centre there, and how large its box is; trained as CenterNet is (penalty-reduced focal loss on
heatmaps, Zhou et al. 2019). Boxes come from `pictures.json`, what is known to be absent from the
words' labels (`token_labels.py`). Tower and neck stay as they are, so tokens do not change.

What lands in `<work>/vision`: `objects.pt` (weights, labels, thresholds) and `objects_state.pt`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SCENES, Paths, labels, pyramid, tile_rows
from loop import average_in, save_atomically, slope
from low import Stores
from token_labels import Labels, write_labels
from torch import Tensor, nn
from torch.nn import functional
from tower import LOW_CHANNELS, WIDTH, Neck, load_tower, upper
from words import BOXED, NATURAL, OBJECTS, PLACES, WORDS, also

CELLS, CELL = 24, 16
"""Cells along a tile's side, and pixels along a cell's."""
THIN = 48
"""Channels of each of the two maps that the head reads."""
PLACE_LABELS = tuple(
    SCENES[name] for name in PLACES if name not in NATURAL and SCENES[name] not in BOXED
)
LABELS = (*BOXED, *PLACE_LABELS)
"""What is detected: things, and kinds of places as they are spelled in answers. Natural land has
no edges, so nothing can be its centre."""
_SPOKEN = {
    "airplane": ("plane", "aircraft", "aeroplane"),
    "ship": ("boat", "vessel"),
    "storage tank": ("oil tank", "tank"),
    "baseball diamond": ("baseball field",),
    "ground track field": (
        *("running track", "athletics track", "track field", "football field", "soccer field"),
        "sports field",
    ),
    "harbor": ("harbour", "dock", "pier"),
    "vehicle": ("car", "automobile", "van", "truck", "lorry", "lorries", "bus", "minibus"),
}
ALIASES = tuple(_SPOKEN.get(name, ()) for name in LABELS)
"""Other words by which a question may name a label."""
_WORD = np.array([
    WORDS.index(name) if name in OBJECTS else
    WORDS.index(next(place for place in PLACES if SCENES[place] == name)) for name in LABELS
])  # fmt: skip
SMALLEST, LARGEST = 0.4, 24.0
"""Sides of a box in cells between which its centre can be told."""
BATCH = 30
_BARS = np.linspace(0.1, 0.9, 33)


class ObjectHead(nn.Module):
    """Centres and sizes of objects; names and shapes are the checkpoint's."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(2 * WIDTH, 4 * THIN, 1)
        self.fine = nn.Conv2d(LOW_CHANNELS, THIN, 1)
        self.mix = nn.ModuleList([nn.Conv2d(2 * THIN, 2 * THIN, 3, padding=1) for _ in range(2)])
        self.out = nn.Conv2d(2 * THIN, len(LABELS) + 2, 1)
        nn.init.constant_(self.out.bias[: len(LABELS)], -4.0)

    def forward(self, low: Tensor, both: Tensor) -> Tensor:
        """Logits and log2 of sizes in cells, [N, C + 2, 24, 24].

        Args:
            low: [N, 112, 24, 24].
            both: The neck's two contexts, [N, 384, 12, 12].
        """
        coarse = functional.pixel_shuffle(functional.relu6(self.coarse(both)), 2)
        x = torch.cat((coarse, functional.relu6(self.fine(low))), 1)
        for conv in self.mix:
            x = functional.relu6(conv(x))
        return self.out(x)


def detected(label: str) -> tuple[str, ...]:
    """What a region of this label is detected as."""
    return tuple(name for name in also(label) if name in LABELS)


def targets(
    picture: dict[str, Any], size: tuple[int, int], row: int, col: int
) -> tuple[np.ndarray, list[tuple[int, int, int, float, float]], np.ndarray]:
    """What a tile's map shall say.

    Returns:
        Heatmaps [C, 24, 24], centres (label, row, column, width, height in cells), and where boxes
        lie that cannot be told [C, 24, 24].
    """
    heat = np.zeros((len(LABELS), CELLS, CELLS), np.float32)
    unclear = np.zeros(heat.shape, bool)
    centres = []
    grid = np.arange(CELLS) + 0.5
    scale_x, scale_y = size[1] / CELL, size[0] / CELL
    for region in picture["regions"]:
        x0, x1 = (region["box"][i] * scale_x - col * CELLS for i in (0, 2))
        y0, y1 = (region["box"][i] * scale_y - row * CELLS for i in (1, 3))
        if x1 <= 0 or y1 <= 0 or x0 >= CELLS or y0 >= CELLS:
            continue
        wide, high = x1 - x0, y1 - y0
        # Rounded once for all tiles: a centre on the line between two of them lies in one.
        across = (region["box"][0] + region["box"][2]) / 2 * scale_x - col * CELLS
        down = (region["box"][1] + region["box"][3]) / 2 * scale_y - row * CELLS
        for name in detected(region["label"]):
            place = LABELS.index(name)
            inside = 0 <= across < CELLS and 0 <= down < CELLS
            if not min(wide, high) >= SMALLEST or max(wide, high) > LARGEST or not inside:
                rows = slice(max(int(y0), 0), max(math.ceil(y1), 0))
                unclear[place, rows, max(int(x0), 0) : max(math.ceil(x1), 0)] = True
                continue
            spread_x, spread_y = max(wide / 5, 0.4), max(high / 5, 0.4)
            r, c = int(down), int(across)
            bump = np.exp(
                -(((grid - r - 0.5) / spread_y) ** 2)[:, None] / 2
                - (((grid - c - 0.5) / spread_x) ** 2)[None, :] / 2
            )
            heat[place] = np.maximum(heat[place], bump)
            heat[place, r, c] = 1
            centres.append((place, r, c, wide, high))
    return heat, centres, unclear


class Tiles:
    """Tiles of the pictures: which picture, level and place each row is."""

    def __init__(self, pictures: list[dict[str, Any]]) -> None:
        self.pictures = pictures
        self.of: dict[int, tuple[int, tuple[int, int], int, int]] = {}
        for number, picture in enumerate(pictures):
            view = pyramid(picture["width"], picture["height"]).global_view
            self.of[picture["first_row"]] = (number, (view.height, view.width), 0, 0)
            for level in picture["levels"]:
                size = (level["height"], level["width"])
                for i, (row, col) in enumerate(level["tiles"]):
                    self.of[level["first_row"] + i] = (number, size, row, col)

    def known(self, tile: int, labels_: Labels) -> np.ndarray:
        """How far absence is known in each cell, float32 [C, 24, 24]."""
        shown, known = labels_.shown[tile][..., _WORD], labels_.known[tile][..., _WORD]
        trust = np.array([0.0, 0.1, 1.0], np.float32)[known]
        picture = self.pictures[self.of[tile][0]]
        if picture["kind"] == "large":
            trust[..., len(BOXED) :] = 1
        trust = np.where((shown > 0) & (picture["kind"] != "large"), trust * 0.5, trust)
        whole = np.repeat(np.repeat(trust.transpose(2, 0, 1), 2, 1), 2, 2)
        _, size, row, col = self.of[tile]
        whole[:, max(-(-size[0] // CELL) - row * CELLS, 0) :] = 0
        whole[:, :, max(-(-size[1] // CELL) - col * CELLS, 0) :] = 0
        return whole


def is_held(number: int, picture: dict[str, Any]) -> bool:
    """Pictures that thresholds are chosen by."""
    if picture["kind"] == "boxed":
        return bool(picture["seed"] % 17 == 3)
    return number % 12 == 3


class ObjectTrainer:
    """One training run and its state on disk."""

    def __init__(self, paths: Paths, seconds: float, rate: float) -> None:
        self.folder, self.seconds, self.rate = paths.work / "vision", seconds, rate
        low = paths.work / "low"
        self.scale = torch.from_numpy(np.load(low / "scale.npy"))
        self.stores = Stores.filled(paths, len(labels(paths, "aid150_rsicd")))
        self.labels, pictures = write_labels(low, self.folder, self.stores.cover)
        self.tiles = Tiles(pictures)
        self.tower, self.neck = frozen(self.folder)
        self.head = ObjectHead()
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=rate, weight_decay=0.02)
        self.average = {k: v.clone() for k, v in self.head.state_dict().items()}
        self.step, self.spent, self.state = 0, 0.0, self.folder / "objects_state.pt"
        self._choose()
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            self.head.load_state_dict(saved["head"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step, self.spent = saved["average"], saved["step"], saved["spent"]

    def _choose(self) -> None:
        """Tiles by what they show: rare labels are drawn as often as common ones."""
        self.used: list[int] = []
        self.held: list[int] = []
        self.showing: dict[int, list[int]] = {}
        for number, picture in enumerate(self.tiles.pictures):
            rows = tile_rows(picture)
            if is_held(number, picture):
                self.held += rows
                continue
            self.used += rows
            for tile in rows:
                for place in {c[0] for c in targets(picture, *self.tiles.of[tile][1:])[1]}:
                    self.showing.setdefault(place, []).append(tile)
        print({LABELS[k]: len(v) for k, v in self.showing.items()}, len(self.used), flush=True)

    def maps(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the head reads of some tiles."""
        return read_maps(self.tower, self.neck, self.stores.pictures[rows], self.scale)

    def loss(self, step: int) -> Tensor:
        """Focal loss of centres, and L1 of sizes at them."""
        draw = np.random.default_rng([2, step])
        names = list(self.showing)
        # Things are drawn more often than places.
        share = np.array([2.0 if name < len(BOXED) else 1.0 for name in names])
        picked = draw.choice(len(names), size=BATCH * 2 // 3, p=share / share.sum())
        rows = [int(draw.choice(self.showing[names[i]])) for i in picked]
        rows += [int(tile) for tile in draw.choice(self.used, BATCH - len(rows))]
        heats, trusts, places = [], [], []
        for i, tile in enumerate(rows):
            number, size, row, col = self.tiles.of[tile]
            heat, centres, unclear = targets(self.tiles.pictures[number], size, row, col)
            heats.append(heat)
            trusts.append(np.where(unclear & (heat < 1), 0, self.tiles.known(tile, self.labels)))
            places += [(i, *centre) for centre in centres]
        out = self.head(*self.maps(np.array(rows)))
        return object_loss(out, np.stack(heats), np.stack(trusts), places)

    def save(self) -> None:
        """Training state."""
        saved = {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "average": self.average, "step": self.step, "spent": self.spent}  # fmt: skip
        save_atomically(self.state, saved)

    def run(self, steps: int | None = None) -> None:
        """Train until the time is spent, then choose thresholds."""
        mean, saved, first = None, self.spent, self.step
        while self.spent < self.seconds and (steps is None or self.step < first + steps):
            begun = time.time()
            part = slope(self.step, 30, self.spent / self.seconds, 0.01)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * part
            parts = self.loss(self.step)
            self.optimizer.zero_grad()
            parts.sum().backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), 3.0)
            self.optimizer.step()
            self.step += 1
            average_in(self.average, self.head, self.step)
            self.spent += time.time() - begun
            now = parts.detach().numpy()
            mean = now if mean is None else 0.95 * mean + 0.05 * now
            if self.step % 25 == 0:
                line = {
                    "step": self.step,
                    "spent": round(self.spent),
                    "loss": mean.round(3).tolist(),
                }
                print(json.dumps(line), flush=True)
            if self.spent - saved > 120:
                self.save()
                saved = self.spent
        self.save()
        self.head.load_state_dict(self.average)
        bars = self.thresholds()
        weights = {k: v.contiguous() for k, v in self.average.items()}
        kept = {"weights": weights, "labels": list(LABELS), "thresholds": bars}
        save_atomically(self.folder / "objects.pt", kept)

    @torch.no_grad()
    def thresholds(self) -> list[list[float]]:
        """For every label a low and a high threshold of its peaks, best on held-out tiles."""
        hits: list[list[float]] = [[] for _ in LABELS]
        false: list[list[float]] = [[] for _ in LABELS]
        for start in range(0, len(self.held), 50):
            rows = self.held[start : start + 50]
            scores = self.head(*self.maps(np.array(rows)))[:, : len(LABELS)].sigmoid()
            peaks = scores * (scores == functional.max_pool2d(scores, 3, 1, 1))
            for tile, peak in zip(rows, peaks.numpy(), strict=True):
                number, size, row, col = self.tiles.of[tile]
                _, centres, unclear = targets(self.tiles.pictures[number], size, row, col)
                trust = np.where(unclear, 0, self.tiles.known(tile, self.labels))
                for label, r, c, wide, high in centres:
                    down, across = max(int(high / 4), 1), max(int(wide / 4), 1)
                    part = (label, slice(max(r - down, 0), r + down + 1),
                            slice(max(c - across, 0), c + across + 1))  # fmt: skip
                    hits[label].append(float(peak[part].max()))
                    peak[part] = 0
                for label, r, c in zip(*np.nonzero((peak > 0.05) & (trust == 1)), strict=True):
                    false[label].append(float(peak[label, r, c]))
        found = []
        for place, name in enumerate(LABELS):
            yes, no = np.array(hits[place]), np.array(false[place])
            curve = {}
            for beta in (1.0, 2.0):
                true = (yes[:, None] >= _BARS).sum(0) if len(yes) else np.zeros(len(_BARS))
                wrong = (no[:, None] >= _BARS).sum(0) if len(no) else np.zeros(len(_BARS))
                both = (1 + beta**2) * true
                curve[beta] = both / np.maximum(both + beta**2 * (len(yes) - true) + wrong, 1e-9)
            enough = len(yes) >= 20
            high = float(_BARS[curve[1.0].argmax()]) if enough else 0.4
            low = min(float(_BARS[curve[2.0].argmax()]) if enough else 0.25, high)
            best = f"F1 {curve[1.0].max():.2f} at {high:.2f}, low {low:.2f}"
            print(f"{name}: {len(yes)} boxes, {best}", flush=True)
            found.append([round(low, 3), round(high, 3)])
        return found


def object_loss(
    out: Tensor,
    heat: np.ndarray,
    trust: np.ndarray,
    places: list[tuple[int, int, int, int, float, float]],
) -> Tensor:
    """Penalty-reduced focal loss of centres, and L1 of log2 of sizes at them (CenterNet)."""
    logits, sizes = out[:, : heat.shape[1]].float(), out[:, heat.shape[1] :]
    wanted, known = torch.from_numpy(heat), torch.from_numpy(trust)
    p = logits.sigmoid()
    centre = wanted == 1
    yes = -functional.logsigmoid(logits) * (1 - p) ** 2 * centre
    no = -functional.logsigmoid(-logits) * p**2 * (1 - wanted) ** 4 * known * ~centre
    count = max(len(places), 1)
    focal = (yes + no).sum() / count
    if not places:
        return torch.stack([focal, focal * 0])
    i, _, r, c = (torch.tensor([place[k] for place in places]) for k in range(4))
    sides = torch.tensor([[place[4], place[5]] for place in places], dtype=torch.float32)
    return torch.stack([focal, 0.2 * (sizes[i, :, r, c] - sides.log2()).abs().mean()])


@torch.no_grad()
def read_maps(
    tower: nn.Module, neck: Neck, low: np.ndarray, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """What the head reads of cached maps int8 [N, 24, 24, 112]; see `ObjectHead.forward`."""
    x = (torch.from_numpy(low).float() * scale).permute(0, 3, 1, 2)
    return x, torch.cat(neck.contexts(x, upper(tower, x)), 1)


def frozen(folder: Path) -> tuple[nn.Module, Neck]:
    """The trained tower and neck that `vision.py` left in a folder."""
    tower, neck = load_tower(folder / "tower.pt"), Neck()
    neck.load_state_dict(torch.load(folder / "neck.pt", weights_only=True))
    return tower.eval().to(memory_format=torch.channels_last), neck.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="training time")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="stop after so many steps (for trying out)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ObjectTrainer(Paths(), options.minutes * 60, options.rate).run(options.steps)


if __name__ == "__main__":
    main()
