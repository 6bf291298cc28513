"""Calibration data: images and questions as a model's tiles and sequences.

A folder holds images (anything that `lrs_edge.raster` reads) and, if it likes, questions: a
`questions.txt` with one per line, which go around the images in the order of their names, or a
`questions.jsonl` in LRS-VQA's layout, which names the image of each. Both are untrusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrs_edge.errors import ExportError, ImageError, UsageError
from lrs_edge.evaluation.questions import read_questions
from lrs_edge.language.sequence import TokenSequence
from lrs_edge.pyramid.levels import LevelWindow
from lrs_edge.raster.raster import Raster
from lrs_edge_export.checkpoints.model import DecoderStage, Model
from lrs_edge_export.checkpoints.sequences import (
    TextEmbeddings,
    followed_by,
    model_sequences,
    table_of,
)
from lrs_edge_export.checkpoints.tensors import Array, Scoped
from lrs_edge_export.checkpoints.towers import TransformerTower
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.parity.sequences import PromptSequence, token_scores
from lrs_edge_export.quantization.calibrators import TILE_BATCH
from lrs_edge_export.quantization.kept_tensors import KeptTensors
from lrs_edge_export.torch_model import stages, vision
from lrs_edge_export.torch_model.tower import tower_embeddings, tower_features, tower_layer

MOST_IMAGES = 16
MOST_TILES = 128

#: Local tiles along a side, at most.
MOST_SIDE = 3

#: Features of all tiles together, before pooling: 12 images in 5 views each for a tower of 24 x 24.
#: Second moments of 4,096 inputs then come from 8 times as many, and what is held of a large
#: checkpoint stays well below a gigabyte.
MOST_FEATURES = 36_000

#: Entries of a folder that are looked through.
MOST_ENTRIES = 10_000

#: Of `questions.txt`, in bytes, and of one question, in characters.
MAX_FILE_BYTES = 1 << 20
MAX_QUESTION = 1000

#: A language model of up to this many weights answers by itself, in so many tokens.
CHEAP_WEIGHTS = 200_000_000
ANSWER_TOKENS = 6

#: Asked where a folder brings no questions.
QUESTIONS = (
    "What kind of scene is this?",
    "How many buildings are there in the image?",
    "Is there a road?",
    "What is the main land cover in this image?",
)

_SUFFIXES = {".bmp", ".jp2", ".jpeg", ".jpg", ".ntf", ".png", ".tif", ".tiff", ".vrt", ".webp"}


@dataclass(frozen=True)
class CalibrationData:
    """What a model is calibrated on.

    Attributes:
        tiles: float32 [N, 3, S, S], normalised: of each image its global view, then local tiles.
        sequences: For the RFM: one per image, with all local tokens.
        pruned: For the language model: one per image, with the tokens that the RFM keeps, and the
            model's own answer where that is cheap.
        described: Words for where the images are from.
    """

    tiles: Array
    sequences: list[TokenSequence]
    pruned: list[TokenSequence]
    described: str


def load_calibration(
    folder: Path | None, model: Model, *, most_images: int = MOST_IMAGES
) -> CalibrationData:
    """Read images and questions, and run the reference's vision encoder and RFM over them.

    Args:
        folder: Images and questions; None for those that come with the package.
        model: Gives tile size, prompt and weights.
        most_images: Images taken at most, in the order of their names; never more than 16.

    Raises:
        ExportError: The folder holds no images, or something in it cannot be used.
    """
    with ExitStack() as stack:
        described = "the package's calibration images" if folder is None else folder.name
        if folder is None:
            shipped = resources.files("lrs_edge_models").joinpath("calibration")
            folder = stack.enter_context(resources.as_file(shipped))
        paths = _images(folder)[: max(min(most_images, MOST_IMAGES), 1)]
        side = tiles_along_side(model, len(paths))
        views = 1 + side * side
        paths = paths[: MOST_TILES // views]
        questions = _questions(folder, paths)
        tiles = np.concatenate([_tiles(path, model.vision, side) for path in paths])
    tokens = _vision_tokens(model.vision, tiles).reshape(len(paths), views, -1, model.vision.hidden)
    builder = model_sequences(model)
    prompts = [
        PromptSequence(model, builder, part, question=question)
        for part, question in zip(tokens, questions, strict=True)
    ]
    sequences = [prompt.whole for prompt in prompts]
    pruned = sequences
    if model.rfm is not None:
        logits = _rfm_logits(model.rfm, sequences)
        pruned = [
            prompt.pruned(token_scores(prompt.local(found)))
            for prompt, found in zip(prompts, logits, strict=True)
        ]
    if model.llm_weights <= CHEAP_WEIGHTS:
        pruned = _answered(model, table_of(model), pruned)
    return CalibrationData(tiles, sequences, pruned, f"{len(paths)} images of {described}")


def written_data(data: CalibrationData) -> dict[str, NDArray[Any]]:
    """Calibration data as arrays by name."""
    arrays: dict[str, NDArray[Any]] = {"tiles": data.tiles, "described": np.array(data.described)}
    for name, sequences in (("sequence", data.sequences), ("pruned", data.pruned)):
        for number, sequence in enumerate(sequences):
            arrays[f"{name}{number}"] = sequence.values
            arrays[f"{name}{number}.tokens"] = sequence.tokens
    return arrays


def read_data(arrays: Mapping[str, NDArray[Any]]) -> CalibrationData:
    """What `written_data` was given."""
    count = sum(name.startswith("pruned") for name in arrays) // 2
    sequences, pruned = (
        [
            TokenSequence(arrays[f"{name}{number}"], arrays[f"{name}{number}.tokens"])
            for number in range(count)
        ]
        for name in ("sequence", "pruned")
    )
    return CalibrationData(arrays["tiles"], sequences, pruned, str(arrays["described"]))


def tiles_along_side(model: Model, images: int) -> int:
    """Local tiles along a side of an image.

    As many as at the base level, as far as the features of all images go.
    """
    most = MOST_FEATURES // (images * model.vision.tower.grid**2)
    side = min(max(model.base_side // model.vision.tile, 1), MOST_SIDE)
    return max(min(side, math.isqrt(max(most - 1, 0))), 1)


def _images(folder: Path) -> list[Path]:
    """Image files right in the folder, by name."""
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; name one that holds calibration images")
    try:
        entries = list(islice(folder.iterdir(), MOST_ENTRIES + 1))
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be read ({error.strerror}); check its permissions"
        ) from error
    if len(entries) > MOST_ENTRIES:
        raise ExportError(
            f"{folder} holds more than {MOST_ENTRIES} entries; put up to {MOST_IMAGES} images into "
            "a folder of their own"
        )
    found = sorted(entry for entry in entries if entry.suffix.lower() in _SUFFIXES)
    if not found:
        raise ExportError(
            f"{folder} holds no images ({', '.join(sorted(_SUFFIXES))}); "
            "put some there, or name another"
        )
    return found


def _questions(folder: Path, images: Sequence[Path]) -> list[str]:
    """One question per image."""
    listed: dict[str, str] = {}
    texts: Sequence[str] = QUESTIONS
    if (folder / "questions.jsonl").is_file():
        try:
            rows = read_questions(folder / "questions.jsonl").questions
        except UsageError as error:
            raise ExportError(str(error)) from error
        for row in rows:
            listed.setdefault(PurePosixPath(row.image).name, row.text)
        texts = [row.text for row in rows[:MOST_IMAGES]]
    elif (folder / "questions.txt").is_file():
        texts = _lines(folder / "questions.txt")
    chosen = [listed.get(path.name, texts[i % len(texts)]) for i, path in enumerate(images)]
    for text in chosen:
        if len(text) > MAX_QUESTION:
            raise ExportError(
                f"{folder}: the question {text[:40]!r}... has {len(text)} characters; at most "
                f"{MAX_QUESTION} are taken for calibration"
            )
    return chosen


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(
            f"{path} cannot be read as text in UTF-8 ({error}); save it as UTF-8"
        ) from error
    if len(data) > MAX_FILE_BYTES:
        raise ExportError(
            f"{path} is larger than {MAX_FILE_BYTES} bytes; write one question a line"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ExportError(f"{path} holds no question; write one per line, or remove it")
    return lines


def _tiles(path: Path, stage: VisionStage, side: int) -> Array:
    """The image squeezed into one tile, and into side x side tiles: [1 + side * side, 3, S, S]."""
    tile = stage.tile
    whole = LevelWindow(0, 0, tile, tile)
    try:
        with Raster.open(path) as raster:
            views = [raster.read((tile, tile), whole)]
            for row in range(side):
                for column in range(side):
                    window = LevelWindow(row * tile, column * tile, tile, tile)
                    views.append(raster.read((side * tile, side * tile), window))
    except ImageError as error:
        raise ExportError(f"calibration image: {error}") from error
    mean, std = np.array(stage.mean, np.float32), np.array(stage.std, np.float32)
    return np.ascontiguousarray(((np.stack(views) - mean) / std).transpose(0, 3, 1, 2))


def _vision_tokens(stage: VisionStage, tiles: Array) -> Array:
    """Tokens [N, T, D] of tiles [N, 3, S, S], every layer's weights being read once."""
    weights = KeptTensors(stage.tower.tensors)
    tower = replace(stage.tower, tensors=Scoped(weights, ""))
    states = torch.split(torch.from_numpy(tiles), TILE_BATCH)
    with torch.inference_mode():
        if isinstance(tower, TransformerTower):
            states = tuple(tower_embeddings(tower, x) for x in states)
            for layer in range(tower.layers):
                weights.forget()
                states = tuple(tower_layer(tower, layer, x) for x in states)
            states = tuple(tower_features(tower, x) for x in states)
        else:
            kept = replace(stage, tower=tower)
            states = tuple(vision.vision_features(kept, x) for x in states)
        count, features = len(tiles), stage.grid**2
        tokens = np.empty((count, features, stage.hidden), np.float32)
        for i, x in enumerate(states):
            tokens[i * TILE_BATCH : (i + 1) * TILE_BATCH] = vision.project(stage, x).numpy()
        return tokens


def _rfm_logits(stage: DecoderStage, sequences: Sequence[TokenSequence]) -> list[Array]:
    """Logits [H, T] of each sequence, every layer's weights being read once."""
    weights = KeptTensors(stage.tensors)
    stage = replace(stage, tensors=Scoped(weights, ""))
    embeds = [torch.from_numpy(sequence.values) for sequence in sequences]
    states = [stages.first_states(stage, x) for x in embeds]
    ropes = [stages.turns_of(stage, sequence) for sequence in sequences]
    with torch.inference_mode():
        for layer in range(stage.config.layers):
            weights.forget()
            states = [
                stages.add_later(stage, layer, stages.run_layer(stage, layer, x, rope), given)
                for x, rope, given in zip(states, ropes, embeds, strict=True)
            ]
        return [
            stages.scoring_logits(stage, x, rope).numpy()
            for x, rope in zip(states, ropes, strict=True)
        ]


def _answered(
    model: Model, table: TextEmbeddings, prompts: Sequence[TokenSequence]
) -> list[TokenSequence]:
    """Prompts, each with the reference's own greedy answer after it."""
    stage = replace(model.llm, tensors=Scoped(KeptTensors(model.llm.tensors), ""))
    head, stops = model.lm_head(), set(model.prompt.stop_ids)
    found = []
    for prompt in prompts:
        text = prompt
        for _ in range(ANSWER_TOKENS):
            embeds, places = torch.from_numpy(text.values), torch.from_numpy(text.positions)
            token = int(stages.llm_logits(stage, head, embeds, 1, places)[0].argmax())
            if token in stops:
                break
            text = followed_by(text, table.lookup(np.array([token], np.int64)))
        found.append(text)
    return found
