"""What is known of every token of the cached tiles: which words it shows, and which it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from common import GRID, SCENES, STRIDE, TILE, pyramid
from views import covered
from words import COVERS, OBJECTS, PLACES, WORDS, absent_in, words_of

Array = np.ndarray
UNKNOWN, DOUBTFUL, KNOWN = 0, 1, 2
"""How far a token's word is known; doubtful: absence where boxes are incomplete."""
_SCENE = {spoken: name for name, spoken in SCENES.items()}


class Labels:
    """Words [tiles, 12, 12, K] (bool) and how far they are known [tiles, 12, 12, K] (uint8)."""

    def __init__(self, folder: Path, tiles: int, mode: str) -> None:
        shape = (tiles, GRID, GRID, len(WORDS))
        self.shown = np.memmap(folder / "shown.u8", np.uint8, mode, shape=shape)
        self.known = np.memmap(folder / "known.u8", np.uint8, mode, shape=shape)


def spans(level: tuple[int, int], row: int, col: int) -> tuple[Array, Array]:
    """Spans of a tile's token rows and columns in shares of a level (height, width)."""
    starts = np.arange(GRID) * STRIDE
    rows = (row * TILE + np.stack([starts, starts + STRIDE], 1)) / level[0]
    cols = (col * TILE + np.stack([starts, starts + STRIDE], 1)) / level[1]
    return rows, cols


def touched(box: list[float], rows: Array, cols: Array) -> Array:
    """Tokens that share any ground with a box."""
    down = (rows[:, 0] < box[3]) & (rows[:, 1] > box[1])
    across = (cols[:, 0] < box[2]) & (cols[:, 1] > box[0])
    return down[:, None] & across[None, :]


def tile_labels(picture: dict[str, Any], rows: Array, cols: Array) -> tuple[Array, Array]:
    """Words that a tile's tokens show, and how far each is known, both [12, 12, K]."""
    shown = np.zeros((GRID, GRID, len(WORDS)), np.uint8)
    known = np.zeros_like(shown)
    for label in picture["complete"]:
        known[:, :, words_of(label)] = KNOWN
    if picture["source"] == "simd552_640":
        held = {w for r in picture["regions"] for w in words_of(r["label"])}
        known[:, :, sorted(held)] = DOUBTFUL
    for name in picture["places"]:
        shown[:, :, WORDS.index(name)] = 1
        known[:, :, WORDS.index(name)] = DOUBTFUL
    for name in picture["absent_places"]:
        known[:, :, WORDS.index(name)] = KNOWN
    for region in picture["regions"]:
        near = touched(region["box"], rows, cols)
        inside = covered([region["box"]], rows, cols)
        scene = _SCENE.get(region["label"]) if picture["kind"] == "large" else None
        words = [WORDS.index(scene)] if scene else words_of(region["label"])
        if scene:
            known[inside, len(OBJECTS) :] = KNOWN
            for name in absent_in(scene):
                known[inside, WORDS.index(name)] = KNOWN
        for word in words:
            # At a box's edge a token is neither.
            edge = near & ~inside & (shown[:, :, word] == 0)
            known[edge, word] = UNKNOWN
            shown[inside, word], known[inside, word] = 1, KNOWN
    known[rows[:, 0] >= 1 - 1e-9] = UNKNOWN
    known[:, cols[:, 0] >= 1 - 1e-9] = UNKNOWN
    return shown, known


def add_cover(bits: Array, shown: Array, known: Array) -> None:
    """Land cover of a tile's tokens, bits [12, 12] as `low.token_cover` gives them."""
    sure = (bits & 128) > 0
    for place, name in enumerate(COVERS):
        (word,) = words_of(name)
        shown[:, :, word] = (bits >> place) & 1
        known[sure, word] = KNOWN


def scene_labels(scene: str) -> tuple[Array, Array]:
    """The words [K] of every token of a whole scene, and how far they are known."""
    shown, known = np.zeros(len(WORDS), np.uint8), np.zeros(len(WORDS), np.uint8)
    known[len(OBJECTS) :] = KNOWN
    shown[len(OBJECTS) + PLACES.index(scene)] = 1
    for name in absent_in(scene):
        known[WORDS.index(name)] = KNOWN
    return shown, known


def write_labels(low: Path, folder: Path, cover: Array) -> tuple[Labels, list[dict[str, Any]]]:
    """The labels of all tiles of `pictures.json`, made once."""
    pictures = json.loads((low / "pictures.json").read_text(encoding="utf-8"))
    tiles, done = len(cover), folder / "labels.done"
    folder.mkdir(parents=True, exist_ok=True)
    if done.exists():
        return Labels(folder, tiles, "r+"), pictures
    found = Labels(folder, tiles, "w+")
    for picture in pictures:
        view = pyramid(picture["width"], picture["height"]).global_view
        places = [(picture["first_row"], (view.height, view.width), 0, 0)]
        for level in picture["levels"]:
            size = (level["height"], level["width"])
            places += [(level["first_row"] + i, size, r, c)
                       for i, (r, c) in enumerate(level["tiles"])]  # fmt: skip
        for number, size, row, col in places:
            shown, known = tile_labels(picture, *spans(size, row, col))
            if picture["kind"] == "cover":
                add_cover(cover[number], shown, known)
            found.shown[number], found.known[number] = shown, known
    done.touch()
    return found, pictures
