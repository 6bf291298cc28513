"""What the student learns from: groups of questions, and the teacher's attention for each.

Level by level, as inference goes: the teacher's scores at its scoring layer choose the tiles of
the next level. Groups and targets lie on disk; an image is done once, whatever happens later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lrs_edge.errors import UsageError
from lrs_edge.files import replacing
from lrs_edge.pyramid.levels import TileIndex
from lrs_edge_export.checkpoints.model import DecoderStage
from lrs_edge_export.distill.chance import seeded
from lrs_edge_export.distill.evidence import evidence_tiles
from lrs_edge_export.distill.guidance import choose_tiles, next_tile_scores
from lrs_edge_export.distill.questions import TrainingQuestion
from lrs_edge_export.distill.sequences import Assembler, GroupInput, QuestionGroup, image_key
from lrs_edge_export.distill.teacher import attention_by_layer

#: Questions that share one sequence: at the base level, which they all see, and on finer ones,
#: where each wants tiles of its own.
BASE_QUESTIONS, FINER_QUESTIONS = 8, 4

#: Tokens whose hidden states are in memory at once while the teacher's layers pass by.
MAX_TOKENS = 1 << 15

#: Images whose questions go through the teacher together.
IMAGES_AT_ONCE = 16

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How groups are made.

    Attributes:
        tiles: Most tiles of a group on levels finer than the base.
        seed: Of chance.
    """

    tiles: int = 16
    seed: int = 0


class Collector:
    """Makes groups of questions level by level.

    Args:
        assembler: Makes their sequences.
        questions: All questions.
        sampling: How.
    """

    def __init__(
        self, assembler: Assembler, questions: Sequence[TrainingQuestion], sampling: Sampling
    ) -> None:
        self.assembler = assembler
        self._questions = questions
        self._sampling = sampling

    def levels(self, image: str) -> int:
        """Search levels of an image. Raises ImageError when it cannot be opened."""
        with self.assembler.open(image) as tokens:
            return len(tokens.pyramid.levels)

    def groups(
        self,
        image: str,
        numbers: Sequence[int],
        level: int,
        wanted: Mapping[int, NDArray[np.float64]] | None = None,
    ) -> list[QuestionGroup]:
        """Groups of one image on one level.

        Args:
            image: The image.
            numbers: Its questions.
            level: Index among its search levels.
            wanted: Scores float64 [tile_rows, tile_cols] of the level's tiles by question.

        Raises:
            ImageError: The image cannot be opened.
        """
        with self.assembler.open(image) as tokens:
            pyramid, size_hw = tokens.pyramid, tokens.size_hw
        shape = pyramid.levels[level]
        size = BASE_QUESTIONS if level == 0 else FINER_QUESTIONS
        found = []
        for place, start in enumerate(range(0, len(numbers), size)):
            chunk = tuple(numbers[start : start + size])
            name = f"{image_key(image)}-{level}-{place}"
            tiles = tuple(shape.tiles())
            if level > 0:
                boxes = [box for number in chunk for box in self._questions[number].boxes]
                totals = [wanted[number] for number in chunk] if wanted is not None else []
                tiles = choose_tiles(
                    shape,
                    evidence_tiles(shape, size_hw, boxes),
                    np.sum(totals, axis=0) if totals else None,
                    self._sampling.tiles,
                    seeded(self._sampling.seed, name),
                )
            found.append(QuestionGroup(name, image, level, tiles, chunk))
        return found

    def wanted(
        self, scored: GroupInput, scores: NDArray[np.float32]
    ) -> dict[int, NDArray[np.float64]]:
        """Scores of the next level's tiles by question; empty at the finest level."""
        with self.assembler.open(scored.group.image) as tokens:
            levels = tokens.pyramid.levels
        if scored.group.level + 1 >= len(levels):
            return {}
        finer = levels[scored.group.level + 1]
        return {
            number: next_tile_scores(scored, row[None], finer)
            for number, row in zip(scored.group.questions, scores, strict=True)
        }


def in_batches(
    assembler: Assembler, groups: Sequence[QuestionGroup], limit: int = MAX_TOKENS
) -> Iterator[list[GroupInput]]:
    """Inputs of groups, as many at once as have at most `limit` tokens. Raises ImageError."""
    batch: list[GroupInput] = []
    tokens = 0
    for group in groups:
        made = assembler.build(group)
        length = len(made.packed.embeds)
        if batch and tokens + length > limit:
            yield batch
            batch, tokens = [], 0
        batch.append(made)
        tokens += length
    if batch:
        yield batch


class Targets:
    """Groups and the teacher's attention, on disk.

    Args:
        folder: Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, image: str) -> bool:
        """Whether an image is done."""
        return self._index(image).is_file()

    def put(self, group: QuestionGroup, scores: NDArray[np.float32]) -> None:
        """Store the listed layers' scores float32 [N, Q, n] of a group."""
        with replacing(self._folder / f"{group.name}.npy") as stream:
            np.save(stream, scores, allow_pickle=False)

    def get(self, group: QuestionGroup) -> NDArray[np.float32]:
        """Scores float32 [N, Q, n] of a group."""
        found: NDArray[np.float32] = np.load(self._folder / f"{group.name}.npy", allow_pickle=False)
        return found

    def finish(self, image: str, size_hw: tuple[int, int], groups: Sequence[QuestionGroup]) -> None:
        """Mark an image as done."""
        listed = [
            {
                "name": group.name,
                "level": group.level,
                "tiles": [[tile.row, tile.col] for tile in group.tiles],
                "questions": list(group.questions),
            }
            for group in groups
        ]
        with replacing(self._index(image)) as stream:
            stream.write(json.dumps({"size_hw": size_hw, "groups": listed}).encode())

    def groups(self, image: str) -> tuple[tuple[int, int], list[QuestionGroup]]:
        """Height and width of a finished image, and its groups.

        Raises:
            UsageError: The file is damaged.
        """
        path = self._index(image)
        try:
            found = json.loads(path.read_bytes())
            height, width = found["size_hw"]
            groups = [
                QuestionGroup(
                    name=entry["name"],
                    image=image,
                    level=entry["level"],
                    tiles=tuple(TileIndex(row, col) for row, col in entry["tiles"]),
                    questions=tuple(entry["questions"]),
                )
                for entry in found["groups"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error}); remove it and start again") from error
        return (height, width), groups

    def _index(self, image: str) -> Path:
        return self._folder / f"{image_key(image)}.json"


def collect(
    collector: Collector,
    images: Mapping[str, Sequence[int]],
    teacher: DecoderStage,
    layer_list: tuple[int, ...],
    device: torch.device,
    targets: Targets,
    progress: OnProgress,
) -> list[QuestionGroup]:
    """Groups of all images with their targets; what is on disk already is not made again.

    Args:
        collector: Makes groups.
        images: Questions of each image.
        teacher: The language model.
        layer_list: Layers to learn from; the last one's scores choose tiles.
        device: Where the teacher's layers run.
        targets: Where everything is kept.
        progress: Told what is done.

    Raises:
        ImageError: An image cannot be read.
        ExportError: Weights are damaged.
    """
    missing = [image for image in images if not targets.has(image)]
    for start in range(0, len(missing), IMAGES_AT_ONCE):
        part = missing[start : start + IMAGES_AT_ONCE]
        share = {image: images[image] for image in part}
        where = f"teacher: images {start + 1} to {start + len(part)} of {len(missing)}"

        def tell(text: str, where: str = where) -> None:
            progress(f"{where}, {text}")

        _collect_part(collector, share, teacher, layer_list, device, targets, tell)
    found = []
    for image in images:
        size_hw, groups = targets.groups(image)
        collector.assembler.remember(image, size_hw)
        found += groups
    return found


def _collect_part(
    collector: Collector,
    images: Mapping[str, Sequence[int]],
    teacher: DecoderStage,
    layer_list: tuple[int, ...],
    device: torch.device,
    targets: Targets,
    progress: OnProgress,
) -> None:
    depth = {image: collector.levels(image) for image in images}
    made: dict[str, list[QuestionGroup]] = {image: [] for image in images}
    wanted: dict[str, dict[int, NDArray[np.float64]]] = {image: {} for image in images}
    for level in range(max(depth.values())):
        groups = []
        for image, numbers in images.items():
            if level < depth[image]:
                # Questions on empty finer levels cannot happen: every question has scores.
                guide = wanted[image] if level > 0 else None
                groups += collector.groups(image, numbers, level, guide)
        wanted = {image: {} for image in images}
        progress(f"level {level}: {len(groups)} sequences")
        for batch in in_batches(collector.assembler, groups):
            scores = _listed_scores(teacher, batch, layer_list, device)
            for scored, found in zip(batch, scores, strict=True):
                targets.put(scored.group, found)
                made[scored.group.image].append(scored.group)
                wanted[scored.group.image] |= collector.wanted(scored, found[-1])
    for image, groups in made.items():
        with collector.assembler.open(image) as tokens:
            targets.finish(image, tokens.size_hw, groups)


def _listed_scores(
    teacher: DecoderStage,
    batch: Sequence[GroupInput],
    layer_list: tuple[int, ...],
    device: torch.device,
) -> list[NDArray[np.float32]]:
    """Scores float32 [N, Q, n] of each input at the listed layers."""
    inputs = [made.packed for made in batch]
    by_layer = [found for _, found in attention_by_layer(teacher, inputs, layer_list, device)]
    return [torch.stack(layers).numpy() for layers in zip(*by_layer, strict=True)]
