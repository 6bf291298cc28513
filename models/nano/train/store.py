"""Read cached features back as views, and draw training sequences from them."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
from common import FEATURES, GRID, STRIDE, TOKENS, Paths, global_size, is_dev, labels
from questions import mosaic_questions, object_questions, scene_questions
from sequences import Sequence, View, Writer, choose_kept, single_tile

BATCHES = {"scene": 8, "small": 3, "large": 2, "photo": 4}
"""Sequences in one step, by kind of picture."""
FULL = {"small": 0.25, "large": 0.2, "photo": 0.35}
"""Share of the steps in which all local tokens are kept, as the RFM sees them."""
QUESTIONS = {"scene": 6, "small": 14, "large": 14, "photo": 8}


class Store:
    """The cached features and the labels that go with them."""

    def __init__(self, paths: Paths) -> None:
        self.scenes = labels(paths, "aid150_rsicd")
        self.variants = [
            np.memmap(file, np.uint8, "r", shape=(len(self.scenes), TOKENS, FEATURES))
            for file in sorted(paths.features.glob("scenes_?.u8"))
            if self._finished(file.with_suffix(".done"), file.name != "scenes_0.u8")
        ]
        described = (paths.features / "pictures.json").read_text(encoding="utf-8")
        self.pictures: list[dict[str, Any]] = json.loads(described)
        self.tiles = np.memmap(paths.features / "pictures.u8", np.uint8, "r")
        self.tiles = self.tiles.reshape(-1, TOKENS, FEATURES)
        self.train = [
            i for i, s in enumerate(self.scenes) if s["split"] == "train" and not is_dev(s["file"])
        ]
        self.dev = [
            i for i, s in enumerate(self.scenes) if s["split"] == "train" and is_dev(s["file"])
        ]
        self.test = [i for i, s in enumerate(self.scenes) if s["split"] == "test"]
        self.by_kind: dict[str, list[int]] = {"small": [], "large": [], "photo": []}
        for i, picture in enumerate(self.pictures):
            if picture["split"] == "train":
                self.by_kind[self.size_of(picture)].append(i)

    def _finished(self, done: Any, training_only: bool) -> bool:
        wanted = sum(s["split"] == "train" or not training_only for s in self.scenes)
        return done.exists() and int(done.read_text()) == wanted

    @staticmethod
    def size_of(picture: dict[str, Any]) -> str:
        """Which batches a picture goes into."""
        if picture["kind"] in ("simd", "open"):
            return "photo"
        level = picture["level"]
        return "small" if level["tile_rows"] * level["tile_columns"] <= 4 else "large"

    def scene_view(self, index: int, variant: int = 0) -> View:
        """One scene as a picture of one tile."""
        return single_tile(np.asarray(self.variants[variant][index]))

    def picture_view(self, picture: dict[str, Any]) -> View:
        """One larger picture at its base level."""
        level, first = picture["level"], picture["first_row"]
        tiles = [np.asarray(self.tiles[first])]
        if picture["cells"]:
            tiles += [np.asarray(self.variants[v][i]) for i, v in picture["cells"]]
        else:
            count = level["tile_rows"] * level["tile_columns"]
            tiles += list(self.tiles[first + 1 : first + 1 + count])
        row, column = np.mgrid[: level["rows"], : level["columns"]]
        tile = (row // GRID) * level["tile_columns"] + column // GRID
        local = (tile + 1) * TOKENS + (row % GRID) * GRID + column % GRID
        boxes = [r["box"] for r in picture["regions"]]
        width, height = global_size(picture["width"], picture["height"])
        return View(np.concatenate(tiles), local, boxes, (height / STRIDE, width / STRIDE))

    def draw_scene(
        self, index: int, writer: Writer, draw: random.Random, full: bool = False
    ) -> Sequence:
        """A training sequence on one scene."""
        scene = self.scenes[index]
        view = self.scene_view(index, draw.randrange(len(self.variants)))
        asked = scene_questions(scene["scene"], scene["captions"], draw, QUESTIONS["scene"])
        return writer.write(view, choose_kept(view, asked, draw, full), asked)

    def draw_picture(self, index: int, writer: Writer, draw: random.Random, full: bool) -> Sequence:
        """A training sequence on one larger picture."""
        picture = self.pictures[index]
        size = self.size_of(picture)
        view = self.picture_view(picture)
        ask = object_questions if size == "photo" else mosaic_questions
        asked = ask(picture, draw, QUESTIONS[size])
        kept = choose_kept(view, asked, draw, full)
        repeat = 1
        if kept is not None and not kept.all() and draw.random() < 0.2:
            repeat = draw.choice([2, 2, 3, 4])
        return writer.write(view, kept, asked, repeat)

    def draw_batch(self, kind: str, writer: Writer, draw: random.Random) -> list[Sequence]:
        """The sequences of one step."""
        if kind == "scene":
            return [
                self.draw_scene(draw.choice(self.train), writer, draw) for _ in range(BATCHES[kind])
            ]
        full = draw.random() < FULL[kind]
        found: list[Sequence] = []
        while len(found) < BATCHES[kind]:
            sequence = self.draw_picture(draw.choice(self.by_kind[kind]), writer, draw, full)
            if len(sequence.ids) < 2400 and (sequence.label >= 0).any():
                found.append(sequence)
        return found
