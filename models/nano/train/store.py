"""Read cached features back as views, and draw training sequences from them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from common import FEATURES, TOKENS, Paths, is_dev, labels
from pictures import scene_plan
from questions import (
    PictureQuestion,
    hidden_objects,
    large_questions,
    object_questions,
    scene_questions,
)
from sequences import PackedSequence, Writer
from views import View, choose_kept, level_view, single_tile

from lrs_edge_export.scenes.plan import ScenePlan

BATCHES = {"scene": 8, "photo": 4, "large": 4, "search": 2}
"""Sequences in one step, by kind: large shows kept tokens of the finest level, search all tokens of
some tiles of one level, as the RFM sees them."""
QUESTIONS = {"scene": 6, "photo": 8, "large": 20, "search": 16}
PHOTO_FULL = 0.45
"""Share of the photographs of which all local tokens are kept."""
TILES = (6, 14)
"""Tiles of a finer level in one sequence."""
LONGEST = 2600


@dataclass(frozen=True)
class Shown:
    """Some tiles of one level of a picture."""

    level: int
    tiles: list[int]
    """Places in the level's list of extracted tiles."""


class Store:
    """The cached features and the labels that go with them."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.scenes = labels(paths, "aid150_rsicd")
        self.captions = {Path(s["file"]).name: s["captions"] for s in self.scenes}
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
        self.photos = self._of("train", {"simd", "open"})
        self.large = self._of("train", {"large"})
        self.plan = lru_cache(maxsize=1024)(self._plan)

    def _of(self, split: str, kinds: set[str]) -> list[dict[str, Any]]:
        return [p for p in self.pictures if p["split"] == split and p["kind"] in kinds]

    def _finished(self, done: Any, training_only: bool) -> bool:
        wanted = sum(s["split"] == "train" or not training_only for s in self.scenes)
        return done.exists() and int(done.read_text()) == wanted

    def _plan(self, split: str, seed: int) -> ScenePlan:
        return scene_plan(self.paths, split, seed)

    def scene_view(self, index: int, variant: int = 0) -> View:
        """One scene as a picture of one tile."""
        return single_tile(np.asarray(self.variants[variant][index]))

    def view(self, picture: dict[str, Any], shown: Shown | None = None) -> View:
        """One larger picture at one level; None: the base level, all tiles."""
        level = picture["levels"][shown.level if shown else 0]
        chosen = shown.tiles if shown else list(range(len(level["tiles"])))
        rows = [picture["first_row"], *(level["first_row"] + i for i in chosen)]
        return level_view(
            picture["width"],
            picture["height"],
            (level["height"], level["width"]),
            [tuple(level["tiles"][i]) for i in chosen],
            np.asarray(self.tiles[rows]),
            [r["box"] for r in picture["regions"]],
        )

    def draw_scene(self, index: int, writer: Writer, draw: random.Random) -> PackedSequence:
        """A training sequence on one scene."""
        scene = self.scenes[index]
        view = self.scene_view(index, draw.randrange(len(self.variants)))
        asked = scene_questions(scene["scene"], scene["captions"], draw, QUESTIONS["scene"])
        kept = None if draw.random() < 0.06 else choose_kept(view, [], draw)
        return writer.write(view, kept, asked)

    def draw_photo(
        self, picture: dict[str, Any], writer: Writer, draw: random.Random
    ) -> PackedSequence:
        """A training sequence on one photograph."""
        view = self.view(picture)
        asked = object_questions(picture, draw, QUESTIONS["photo"])
        if draw.random() < PHOTO_FULL:
            return writer.write(view, view.shown, asked)
        focus = [q.evidence for q in asked if q.evidence]
        near = [view.evidence([view.boxes[i] for i in draw.choice(focus)])] if focus else []
        return writer.write(view, choose_kept(view, near, draw), asked)

    def large_asked(
        self, picture: dict[str, Any], draw: random.Random, count: int
    ) -> list[PictureQuestion]:
        """Questions on one large scene, some on what its places' captions mention."""
        plan = self.plan(picture["split"], picture["seed"])
        asked = large_questions(plan, draw, count)
        return asked + hidden_objects(plan, self.captions, draw, 4)

    def draw_large(
        self, picture: dict[str, Any], writer: Writer, draw: random.Random
    ) -> PackedSequence:
        """Kept tokens of some tiles of the finest level, and questions that these can answer."""
        asked = self.large_asked(picture, draw, 40)
        with_boxes = [q for q in asked if q.boxes]
        main = draw.sample(with_boxes, min(len(with_boxes), draw.choice([1, 1, 2, 3])))
        boxes = [box for q in main for box in q.boxes]
        last = len(picture["levels"]) - 1
        # Small scenes may stop early in a search with a tight budget: any level may be the last.
        level = last if last == 0 or draw.random() < 0.85 else draw.randrange(last)
        view = self.view(picture, self._tiles(picture, level, boxes, draw))
        kept = choose_kept(view, [view.evidence(list(q.boxes)) for q in main], draw)
        seen = [q for q in asked if self._answerable(q, view, kept)]
        draw.shuffle(seen)
        return writer.write(view, kept, seen[: QUESTIONS["large"]])

    @staticmethod
    def _answerable(question: PictureQuestion, view: View, kept: np.ndarray) -> bool:
        """Whether enough of every box of the evidence is among the kept tokens."""
        for box in question.boxes:
            mask = view.evidence([box])
            if view.coverage(box) < 0.5 or (kept & mask).sum() < min(6, 0.3 * mask.sum()):
                return False
        return True

    def draw_search(
        self, picture: dict[str, Any], writer: Writer, draw: random.Random
    ) -> PackedSequence:
        """All tokens of some tiles of one level, as the RFM sees them."""
        asked = self.large_asked(picture, draw, 40)
        level = draw.choice([0, *range(len(picture["levels"]))])
        main = draw.sample(asked, min(3, len(asked)))
        shown = self._tiles(picture, level, [box for q in main for box in q.boxes], draw)
        view = self.view(picture, shown)
        seen = [q for q in asked if all(view.coverage(box) > 0.3 for box in q.boxes)]
        return writer.write(view, view.shown, seen[: QUESTIONS["search"]])

    def _tiles(
        self, picture: dict[str, Any], level: int, boxes: list[Any], draw: random.Random
    ) -> Shown:
        """The base level whole; of a finer one the tiles under some boxes, and others."""
        tiles = picture["levels"][level]["tiles"]
        if level == 0:
            return Shown(0, list(range(len(tiles))))
        size = picture["levels"][level]
        under = []
        for number, (row, col) in enumerate(tiles):
            y0, x0 = row * 384 / size["height"], col * 384 / size["width"]
            y1, x1 = y0 + 384 / size["height"], x0 + 384 / size["width"]
            if any(b[0] < x1 and x0 < b[2] and b[1] < y1 and y0 < b[3] for b in boxes):
                under.append(number)
        draw.shuffle(under)
        most = draw.randint(*TILES)
        others = [n for n in range(len(tiles)) if n not in under]
        draw.shuffle(others)
        chosen = under[:most]
        chosen += others[: max(most - len(chosen), 1)]
        return Shown(level, sorted(chosen))

    def draw_batch(self, kind: str, writer: Writer, draw: random.Random) -> list[PackedSequence]:
        """The sequences of one step."""
        if kind == "scene":
            return [
                self.draw_scene(draw.choice(self.train), writer, draw) for _ in range(BATCHES[kind])
            ]
        pool = self.photos if kind == "photo" else self.large
        write = {"photo": self.draw_photo, "large": self.draw_large, "search": self.draw_search}
        found: list[PackedSequence] = []
        while len(found) < BATCHES[kind]:
            sequence = write[kind](draw.choice(pool), writer, draw)
            if len(sequence.ids) < LONGEST and (sequence.label >= 0).any():
                found.append(sequence)
        return found
