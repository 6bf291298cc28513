"""Detect objects on all cached tiles, once, as the runtime would.

What lands in `<work>/features`: for every store of tiles `objects_<name>.npz`, the detections of
all tiles one after the other: labels, scores, boxes and cells as `lrs_edge.objects` has them, and
the first detection of each tile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import TILE, Paths, has_variant, labels
from low import Stores
from objects import ALIASES, ObjectHead, Tiles, frozen, read_maps
from token_labels import write_labels

from lrs_edge.bundle.manifest import ObjectSpec
from lrs_edge.objects.detections import Detections, decode
from lrs_edge.objects.merge import merge
from lrs_edge.objects.note import describe
from lrs_edge.pyramid.levels import Level, TileIndex

FIELDS = ("labels", "scores", "boxes", "cells")


def level_of(height: int, width: int) -> Level:
    """A level of so many pixels."""
    return Level(height, width, -(-height // TILE), -(-width // TILE), TILE)


def read_spec(path: Path) -> tuple[ObjectSpec, dict[str, Any]]:
    """What `objects.py` wrote: how detections are read, and the weights."""
    kept = torch.load(path, weights_only=True)
    thresholds = tuple((low, high) for low, high in kept["thresholds"])
    return ObjectSpec(tuple(kept["labels"]), 24, thresholds, ALIASES), kept["weights"]


class Detected:
    """Detections of all tiles of one store."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as found:
            self._first = found["first"]
            self._fields = [found[name] for name in FIELDS]

    def __getitem__(self, tile: int) -> Detections:
        part = slice(self._first[tile], self._first[tile + 1])
        return Detections(*(field[part] for field in self._fields))


def noted(
    spec: ObjectSpec, levels: Sequence[tuple[Level, dict[TileIndex, Detections]]]
) -> Callable[[str], str]:
    """What the prompt of a question says of the detections, levels coarse to fine."""
    return partial(describe, merge(levels), spec)


def detect(
    paths: Paths, low: np.ndarray, places: dict[int, tuple[tuple[int, int], int, int]], target: Path
) -> None:
    """One store; places says of every tile its level (height, width), row and column."""
    if target.exists():
        return
    spec, weights = read_spec(paths.objects)
    tower, neck = frozen(paths.work / "vision")
    head = ObjectHead()
    head.load_state_dict(weights)
    scale = torch.from_numpy(np.load(paths.work / "low" / "scale.npy"))
    rows = sorted(places)
    parts: list[list[np.ndarray]] = [[] for _ in FIELDS]
    counts = np.zeros(len(low) + 1, np.int64)
    for start in range(0, len(rows), 40):
        chosen = rows[start : start + 40]
        with torch.no_grad():
            out = head(*read_maps(tower, neck, low[chosen], scale))
            out[:, : len(spec.labels)] = out[:, : len(spec.labels)].sigmoid()
        for tile, maps in zip(chosen, out.numpy(), strict=True):
            (height, width), row, col = places[tile]
            found = decode(maps, level_of(height, width), TileIndex(row, col), spec)
            for part, name in zip(parts, FIELDS, strict=True):
                # A copy: a view would keep all that it was cut out of.
                part.append(np.array(getattr(found, name)))
            counts[tile + 1] = len(found.labels)
        if start % 4000 == 0:
            print(f"{target.stem}: {start}/{len(rows)}", flush=True)
    fields = {name: np.concatenate(part) for name, part in zip(FIELDS, parts, strict=True)}
    part_file = target.with_suffix(".part.npz")
    np.savez(part_file, first=np.cumsum(counts), **fields)
    os.replace(part_file, target)


def main() -> None:
    """Everything that is not there yet."""
    torch.set_num_threads(2)
    paths = Paths()
    rows = labels(paths, "aid150_rsicd")
    stores = Stores.filled(paths, len(rows))
    _, pictures = write_labels(paths.work / "low", paths.work / "vision", stores.cover)
    places = {tile: place[1:] for tile, place in Tiles(pictures).of.items()}
    detect(paths, stores.pictures, places, paths.features / "objects_pictures.npz")
    for variant, low in enumerate(stores.scenes):
        made = {
            index: ((TILE, TILE), 0, 0)
            for index, row in enumerate(rows)
            if row["split"] == "train" and has_variant(index, variant, paths.every)
        }
        detect(paths, low, made, paths.features / f"objects_scenes_{variant}.npz")


if __name__ == "__main__":
    main()
