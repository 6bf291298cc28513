"""Read cached features back as views, and draw training sequences from them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from boxed_questions import boxed_questions
from boxed_things import Balance
from common import (
    FEATURES,
    SCENES,
    TILE,
    TOKENS,
    Paths,
    has_variant,
    is_dev,
    labels,
    pyramid,
    tile_rows,
)
from detect import Detected, level_of, noted, read_spec
from pictures import scene_plan
from questions import (
    PictureQuestion,
    hidden_objects,
    large_questions,
    presence,
    scene_questions,
)
from sequences import PackedSequence, Writer
from tokens import CHANNELS
from tower import WIDTH
from views import View, choose_kept, level_view, single_tile
from words import NATURAL, WORDS, also

from lrs_edge.pyramid.levels import TileIndex
from lrs_edge_export.scenes.plan import ScenePlan

BATCHES = {"scene": 8, "boxed": 4, "canvas": 3, "large": 4, "search": 2}
"""Sequences in one step, by kind: boxed shows pictures of one level, canvas and large kept tokens
of the finest level, search all tokens of some tiles of one level, as the RFM sees them."""
QUESTIONS = {"scene": 6, "boxed": 16, "canvas": 20, "large": 20, "search": 16}
FULL = 0.3
"""Share of the boxed pictures of which all local tokens are kept."""
SILENT = 0.25
"""Share of the sequences on larger pictures whose prompt says nothing of detected objects."""
SEEN = 0.5
"""Probability of a word below which nothing is seen."""
SOME = {"presence", "thing", "half"}
"""Kinds that one of the boxes of their evidence answers; the others need all."""
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
        shape = (len(self.scenes), TOKENS, CHANNELS)
        self.variants = [
            np.memmap(paths.features / f"scenes_{v}.u8", np.uint8, "r", shape=shape)
            for v in range(2)
        ]
        described = (paths.work / "low" / "pictures.json").read_text(encoding="utf-8")
        self.pictures: list[dict[str, Any]] = json.loads(described)
        self.tiles = np.memmap(paths.features / "pictures.u8", np.uint8, "r")
        self.tiles = self.tiles.reshape(-1, TOKENS, CHANNELS)
        self.train = [
            i
            for i, s in enumerate(self.scenes)
            if s["split"] == "train" and not is_dev(s["file"]) and has_variant(i, 0, paths.every)
        ]
        self._without_vehicles()
        self.flat = [p for p in self.pictures if p["kind"] != "large" and len(p["levels"]) == 1]
        self.deep = [p for p in self.pictures if p["kind"] != "large" and len(p["levels"]) > 1]
        self.large = [p for p in self.pictures if p["kind"] == "large"]
        self.real = [p for p in self.pictures if p["kind"] == "cover"]
        self.spec, _ = read_spec(paths.objects)
        self.detected = Detected(paths.features / "objects_pictures.npz")
        self.detected_scenes = [
            Detected(paths.features / f"objects_scenes_{variant}.npz") for variant in range(2)
        ]
        self.plan = lru_cache(maxsize=1024)(self._plan)
        self.balance = Balance()

    def _without_vehicles(self) -> None:
        """Take vehicles for absent where none is boxed and the neck sees none anywhere.

        Hardly any source boxes them densely; a model that was never told of their absence always
        says that there are some.
        """
        word = FEATURES + WIDTH + WORDS.index("vehicle")
        for picture in self.pictures:
            labels_ = {r["label"] for r in picture["regions"]}
            if picture["kind"] == "large" or any("vehicle" in also(label) for label in labels_):
                continue
            most = float(self.tiles[tile_rows(picture), :, word].max()) / 255
            if most**2 < SEEN and "vehicle" not in picture["complete"]:
                picture["complete"] = [*picture["complete"], "vehicle"]

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

    def note(
        self, picture: dict[str, Any], shown: list[Shown], draw: random.Random
    ) -> Callable[[str], str] | None:
        """What the prompt says of the objects in the global view and some tiles of some levels.

        None now and then: the model shall read the tokens too.
        """
        if draw.random() < SILENT:
            return None
        view = pyramid(picture["width"], picture["height"]).global_view
        levels = [(view, {TileIndex(0, 0): self.detected[picture["first_row"]]})]
        for part in shown:
            level = picture["levels"][part.level]
            tiles = {
                TileIndex(*level["tiles"][i]): self.detected[level["first_row"] + i]
                for i in part.tiles
            }
            levels.append((level_of(level["height"], level["width"]), tiles))
        return noted(self.spec, levels)

    def scene_note(self, index: int, variant: int) -> Callable[[str], str]:
        """The same of one scene as a picture of one tile: global view and base level are alike."""
        tiles = {TileIndex(0, 0): self.detected_scenes[variant][index]}
        return noted(self.spec, [(level_of(TILE, TILE), tiles)] * 2)

    def draw_scene(self, index: int, writer: Writer, draw: random.Random) -> PackedSequence:
        """A training sequence on one scene."""
        scene = self.scenes[index]
        has_other = has_variant(index, 1, self.paths.every)
        variant = draw.randrange(2) if has_other else 0
        view, note = self.scene_view(index, variant), self.scene_note(index, variant)
        asked = scene_questions(scene["scene"], scene["captions"], draw, QUESTIONS["scene"])
        if scene["scene"] in NATURAL and draw.random() < 0.5:
            name = draw.choice(["vehicle", "car", "vehicles", "cars"])
            text = presence(name, draw) if name[-1] != "s" else f"Are there any {name}?"
            asked.append(PictureQuestion(text, "no", "presence", focus=name))
        kept = None if draw.random() < 0.06 else choose_kept(view, [], draw)
        return writer.write(view, kept, asked, note)

    def asked(
        self, picture: dict[str, Any], draw: random.Random, count: int
    ) -> list[PictureQuestion]:
        """Questions on one picture; evidence as boxes in shares."""
        if picture["kind"] == "large":
            return self.large_asked(picture, draw, count)
        found = boxed_questions(picture, draw, count, self.balance)
        boxes = [tuple(region["box"]) for region in picture["regions"]]
        found = [
            replace(q, evidence=(), boxes=tuple(boxes[i] for i in q.evidence)) if q.evidence else q
            for q in found
        ]
        for name, answer in ((picture["places"], "yes"), (picture["absent_places"], "no")):
            for word in draw.sample(name, min(len(name), 2)):
                spoken = SCENES[word]
                found.append(
                    PictureQuestion(presence(spoken, draw), answer, "presence", focus=spoken)
                )
        return found

    def draw_boxed(
        self, picture: dict[str, Any], writer: Writer, draw: random.Random
    ) -> PackedSequence:
        """A training sequence on a picture of one level."""
        view = self.view(picture)
        asked = self.asked(picture, draw, QUESTIONS["boxed"])
        note = self.note(picture, [self._tiles(picture, 0, [], draw)], draw)
        if draw.random() < FULL:
            return writer.write(view, view.shown, asked, note)
        kept, seen = self._kept(view, asked, self._main(asked, draw), draw)
        return writer.write(view, kept, seen[: QUESTIONS["boxed"]], note)

    @staticmethod
    def _main(asked: list[PictureQuestion], draw: random.Random) -> list[PictureQuestion]:
        """Some questions whose evidence shall be among the kept tokens."""
        with_boxes = [q for q in asked if q.boxes]
        return draw.sample(with_boxes, min(len(with_boxes), draw.choice([1, 1, 2, 3])))

    def _kept(
        self,
        view: View,
        asked: list[PictureQuestion],
        main: list[PictureQuestion],
        draw: random.Random,
    ) -> tuple[np.ndarray, list[PictureQuestion]]:
        """Kept tokens, mostly near the main questions' evidence, and what these answer."""
        kept = choose_kept(view, [view.evidence(list(q.boxes)) for q in main], draw)
        return kept, [q for q in asked if self._answerable(q, view, kept)]

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
        asked = self.asked(picture, draw, 30)
        main = self._main(asked, draw)
        boxes = [box for q in main for box in q.boxes]
        last = len(picture["levels"]) - 1
        # Small scenes may stop early in a search with a tight budget: any level may be the last.
        level = last if last == 0 or draw.random() < 0.85 else draw.randrange(last)
        shown = [self._tiles(picture, each, boxes, draw) for each in range(level + 1)]
        view = self.view(picture, shown[-1])
        kept, seen = self._kept(view, asked, main, draw)
        draw.shuffle(seen)
        return writer.write(view, kept, seen[: QUESTIONS["large"]], self.note(picture, shown, draw))

    @staticmethod
    def _answerable(question: PictureQuestion, view: View, kept: np.ndarray) -> bool:
        """Whether enough of the evidence is among the kept tokens: of every box, or of one."""
        enough = any if question.kind in SOME and question.answer != "no" else all
        if not question.boxes:
            return True
        found = []
        for box in question.boxes:
            mask = view.evidence([box])
            shown = view.coverage(box) >= 0.5
            found.append(bool(shown and (kept & mask).sum() >= min(6, 0.3 * mask.sum())))
        return enough(found)

    def draw_search(
        self, picture: dict[str, Any], writer: Writer, draw: random.Random
    ) -> PackedSequence:
        """All tokens of some tiles of one level, as the RFM sees them."""
        asked = self.asked(picture, draw, 24)
        level = draw.choice([0, *range(len(picture["levels"]))])
        main = draw.sample(asked, min(3, len(asked)))
        shown = self._tiles(picture, level, [box for q in main for box in q.boxes], draw)
        view = self.view(picture, shown)
        seen = [q for q in asked if self._answerable(q, view, view.shown)]
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
        pools = {"boxed": self.flat, "canvas": self.deep, "large": self.large}
        write = {"boxed": self.draw_boxed, "search": self.draw_search}.get(kind, self.draw_large)
        found: list[PackedSequence] = []
        while len(found) < BATCHES[kind]:
            # Searches are learned on canvases and on composed scenes.
            pool = pools.get(kind) or pools[draw.choice(["canvas", "canvas", "large"])]
            if pool is self.deep and draw.random() < 0.25:
                # Few, but the only real large scenes there are.
                pool = self.real
            sequence = write(draw.choice(pool), writer, draw)
            if len(sequence.ids) < LONGEST and (sequence.label >= 0).any():
                found.append(sequence)
        return found
