"""Groups of questions about the same tiles, and the sequences they make, by the runtime's code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from lrs_edge.language.sequence import LocalTokens, concatenate
from lrs_edge.pyramid.levels import Level, TileIndex, TokenGrid
from lrs_edge.requests.budget import Budget
from lrs_edge.requests.clock import Clock
from lrs_edge.requests.options import AskOptions
from lrs_edge.search.context import SearchContext, SearchModel
from lrs_edge.search.rfm import RegionFocus
from lrs_edge.vision.encoder import VisionEncoder
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.sequences import model_sequences
from lrs_edge_export.distill.evidence import KEEP_RATIO, Mask, evidence_tokens
from lrs_edge_export.distill.features import ImageTokens
from lrs_edge_export.distill.packing import PackedInput
from lrs_edge_export.distill.questions import TrainingQuestion


@dataclass(frozen=True)
class QuestionGroup:
    """Questions about the same tiles of one level of one image.

    Attributes:
        name: Unlike any other's, the same in every run.
        image: The image file, relative to the folder of images.
        level: Index among the pyramid's search levels.
        tiles: Tiles of the level, row-major.
        questions: Places in the list of all questions.
    """

    name: str
    image: str
    level: int
    tiles: tuple[TileIndex, ...]
    questions: tuple[int, ...]


@dataclass(frozen=True)
class GroupInput:
    """A group as the decoder takes it.

    Attributes:
        group: The group.
        packed: Embeddings and geometry.
        level: The level.
        grid: Its token grid.
        cells: int64 [n], places of the local tokens on the level's token grid (`LocalTokens`).
        shown: bool [n], False for newlines and marks.
        evidence: bool [Q, n], tokens that show each question's evidence.
    """

    group: QuestionGroup
    packed: PackedInput
    level: Level
    grid: TokenGrid
    cells: NDArray[np.int64]
    shown: Mask
    evidence: Mask


class Assembler:
    """Makes sequences of groups.

    Args:
        model: The checkpoint.
        encoder: Its vision stage.
        questions: All questions.
        images: Folder of the images.
        work: Features are kept there.
        generic: An instruction that every sequence ends with, after its questions; empty for none.

    Raises:
        QuestionError: A question cannot be asked (too long, a control token in it).
    """

    def __init__(
        self,
        model: Model,
        encoder: VisionEncoder,
        questions: Sequence[TrainingQuestion],
        images: Path,
        work: Path,
        generic: str = "",
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._questions = questions
        self._images = images
        self._features = work / "features"
        self._sequences = model_sequences(model)
        prompt = self._sequences.prompt
        self._after = [prompt.tokens(question.text).after for question in questions]
        #: Whether scores of a sequence end with those under a generic instruction.
        self.is_relative = bool(generic)
        self._generic = [prompt.tokens(generic).after] if generic else []
        self._search_model = SearchModel(
            # Training never runs the RFM's graph.
            focus=cast(RegionFocus, None),
            sequences=self._sequences,
            per_tile=encoder.per_tile,
            tile=encoder.spec.tile,
            base_side=model.base_side,
            keep_ratio=KEEP_RATIO,
            max_length=model.limits.max_length,
            max_positions=model.limits.max_positions,
            gapless=model.positions is not None,
        )
        self._sizes: dict[str, tuple[int, int]] = {}

    def open(self, image: str) -> ImageTokens:
        """The tokens of an image. Raises ImageError."""
        folder = self._features / image_key(image)
        path = self._images / image
        tokens = ImageTokens(
            path, self._sizes.get(image), self._encoder, folder, self._model.base_side
        )
        self._sizes[image] = tokens.size_hw
        return tokens

    def remember(self, image: str, size_hw: tuple[int, int]) -> None:
        """Height and width of an image that was opened in an earlier run."""
        self._sizes[image] = size_hw

    def build(self, group: QuestionGroup, tokens: ImageTokens | None = None) -> GroupInput:
        """The sequence of a group.

        Args:
            group: The group.
            tokens: Of its image, if open already.

        Raises:
            ImageError: A tile cannot be read.
        """
        if tokens is None:
            with self.open(group.image) as opened:
                return self._build(group, opened)
        return self._build(group, tokens)

    def _build(self, group: QuestionGroup, tokens: ImageTokens) -> GroupInput:
        level = tokens.pyramid.levels[group.level]
        view = tokens.global_tokens()
        prefix = self._sequences.prefix(view)
        asked = [*(self._after[number] for number in group.questions), *self._generic]
        texts = [self._sequences.after(ids, view) for ids in asked]
        search = SearchContext(
            model=self._search_model,
            pyramid=tokens.pyramid,
            tiles=tokens.session,
            prefix=prefix,
            after=max(texts, key=len),
            options=AskOptions(),
            budget=Budget(AskOptions(), Clock(None)),
            on_level=lambda *_: None,
        )
        grid = search.grid(group.level, level)
        local = search.place(grid, tokens.local_tokens(level, group.tiles), group.level)
        start = len(prefix)
        whole = concatenate(prefix, *self._sequences.behind(prefix, local, *texts))
        packed = PackedInput(
            embeds=np.ascontiguousarray(whole.values),
            positions=np.ascontiguousarray(whole.tokens["position"].T),
            image=start + len(local),
            local=(start, start + len(local)),
            lengths=tuple(len(text) for text in texts),
        )
        return GroupInput(
            group=group,
            packed=packed,
            level=level,
            grid=grid,
            cells=local.cells,
            shown=~local.is_structure,
            evidence=self._evidence(group, local, grid, level, tokens.size_hw),
        )

    def _evidence(
        self,
        group: QuestionGroup,
        local: LocalTokens,
        grid: TokenGrid,
        level: Level,
        size_hw: tuple[int, int],
    ) -> Mask:
        places = replace(local, embeds=np.zeros((len(local), 0), np.float32))
        masks = [
            evidence_tokens(places, grid, level, size_hw, self._questions[number].boxes)
            for number in group.questions
        ]
        return np.stack(masks)


def image_key(image: str) -> str:
    """A file name that stands for an image."""
    return hashlib.sha256(image.encode()).hexdigest()[:16]


def by_image(
    questions: Sequence[TrainingQuestion], numbers: Iterable[int]
) -> Mapping[str, list[int]]:
    """Places of questions under their image, in order."""
    found: dict[str, list[int]] = {}
    for number in numbers:
        found.setdefault(questions[number].image, []).append(number)
    return found
