"""Parity report: every stage of an exported bundle against PyTorch on the same inputs.

Each stage is given the reference's output of the stage before, so that its error is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lrs_edge.errors import ExportError
from lrs_edge.export import reference
from lrs_edge.export.onnx_writer import Precision
from lrs_edge.export.parity_images import Sample, load_samples
from lrs_edge.export.sessions import DecoderSession, open_session
from lrs_edge.export.stages import Model
from lrs_edge.export.tensors import Array
from lrs_edge.position import ImagePositions
from lrs_edge.pyramid import Level, TileIndex

QUESTION = "How many ships are there in the image?"

#: Greedy tokens compared per image.
STEPS = 16

KEEP_RATIO = 0.25


@dataclass(frozen=True)
class Limits:
    """What a stage may differ by.

    Attributes:
        error: Largest difference over the reference's largest magnitude, at most.
        cosine: Cosine to the reference, at least.
        overlap: Share of the same top-scored quarter of tokens, at least.
        greedy: Share of the same next tokens on the same text, at least.
    """

    error: float
    cosine: float
    overlap: float
    greedy: float


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(error=1e-3, cosine=0.99999, overlap=0.99, greedy=0.9),
    "int8": Limits(error=0.15, cosine=0.99, overlap=0.85, greedy=0.6),
}


@dataclass(frozen=True)
class Graphs:
    """Graph files of a bundle."""

    vision: Path
    rfm: Path
    llm: Path


@dataclass(frozen=True)
class ParityRow:
    """One figure: `value` must be on the right side of `limit`, where `sign` is `<=` or `>=`."""

    stage: str
    measure: str
    value: float
    sign: str
    limit: float

    @property
    def shown(self) -> str:
        """The value as text; of a cosine or a share, the digits that tell it from 1."""
        return f"{self.value:.6g}" if self.sign == ">=" else f"{self.value:.3g}"

    @property
    def passed(self) -> bool:
        """False above the limit, and for a value that is no number."""
        return self.value <= self.limit if self.sign == "<=" else self.value >= self.limit


@dataclass(frozen=True)
class ParityReport:
    """All figures, and what they were measured on."""

    images: str
    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """True if every figure is within its limit."""
        return all(row.passed for row in self.rows)

    def values(self) -> dict[str, float | int | str | bool]:
        """For the manifest."""
        figures = {f"{row.stage}_{row.measure}".replace(" ", "_"): row.value for row in self.rows}
        return {"images": self.images, "passed": self.passed, **figures}

    def raise_if_failed(self) -> None:
        """Raise ExportError that names the figures beyond their limits."""
        failed = [
            f"{row.stage} {row.measure} {row.value:.3g} (must be {row.sign} {row.limit:g})"
            for row in self.rows
            if not row.passed
        ]
        if failed:
            raise ExportError(
                f"the parity check failed: {'; '.join(failed)}; use --precision fp32, or "
                "--no-parity to export all the same"
            )


def compare(
    model: Model,
    graphs: Graphs,
    precisions: tuple[Precision, Precision, Precision],
    folder: Path | None = None,
) -> ParityReport:
    """Compare a bundle's graphs with PyTorch.

    Args:
        model: The checkpoint.
        graphs: What was exported from it.
        precisions: Of vision, RFM and LLM; they choose the limits.
        folder: Images to compare on; None takes synthetic ones.

    Raises:
        ExportError: A graph cannot be run, or the images cannot be read.
    """
    samples, described = load_samples(model.vision, folder)
    vision, rfm, llm = (LIMITS[precision] for precision in precisions)
    tokens = [reference.vision_tokens(model.vision, torch.from_numpy(s.tiles)) for s in samples]
    rows = _compare_vision(graphs.vision, samples, tokens, vision)
    table = model.embed_tokens()
    sequences = [_Sequence(model, table, part.numpy()) for part in tokens]
    scores, more = _compare_rfm(model, graphs.rfm, sequences, rfm)
    rows += more
    prompts = [s.pruned(score) for s, score in zip(sequences, scores, strict=True)]
    rows += _compare_llm(model, graphs.llm, table, prompts, llm)
    return ParityReport(described, tuple(rows))


class _Sequence:
    """One image's sequence of embeddings: text, global view, separator, local tokens, text.

    Args:
        model: The checkpoint.
        table: Its embeddings, float32 [V, D].
        tokens: float32 [1 + side * side, T, D], the global view's first, then the tiles' row-major.
    """

    def __init__(self, model: Model, table: Array, tokens: Array) -> None:
        before, after = _prompt_ids(model)
        tokens = _positioned(model, tokens)
        separator = [model.prompt.separator_id]
        self._head = np.concatenate([table[before], tokens[0], table[separator]])
        self._tail = table[after]
        self._local, self.newline = _local_grid(model, tokens[1:])

    @property
    def embeds(self) -> Array:
        """float32 [T, D] with all local tokens."""
        return np.concatenate([self._head, self._local, self._tail])

    def local(self, logits: Array) -> Array:
        """The local tokens' columns of logits [H, T]."""
        start = len(self._head)
        return logits[:, start : start + len(self._local)]

    def pruned(self, scores: Array) -> Array:
        """float32 [T', D] with the top-scored local tokens and all newlines."""
        kept = self.newline.copy()
        kept[_top(scores)] = True
        return np.concatenate([self._head, self._local[kept], self._tail])


def _positioned(model: Model, tokens: Array) -> Array:
    """The tokens with their places in the image added, where the model has them."""
    if model.positions is None:
        return tokens
    positions = ImagePositions(model.positions.rows(), model.positions.cols())
    tile, side = model.vision.tile, int((len(tokens) - 1) ** 0.5)
    view = Level(tile, tile, 1, 1, tile)
    level = Level(side * tile, side * tile, side, side, tile)
    shown = [(view, TileIndex(0, 0)), *((level, index) for index in level.tiles())]
    added = [positions.of_tile(*place, model.vision.tower.grid) for place in shown]
    return tokens + np.stack(added)


def _prompt_ids(model: Model) -> tuple[list[int], list[int]]:
    tokenizer = Tokenizer.from_str(model.tokenizer_json)
    spec = model.prompt
    question = QUESTION + "\n" * spec.question_newline
    before = tokenizer.encode(spec.prefix, add_special_tokens=False).ids
    suffix = spec.suffix.replace("{question}", question)
    after = tokenizer.encode(suffix, add_special_tokens=False).ids
    return ([] if spec.bos_id is None else [spec.bos_id]) + before, after


def _local_grid(model: Model, tokens: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Local tokens in row-major order over all tiles, a newline behind each row."""
    pool, grid = model.vision.local_pool, model.vision.tower.grid
    side, short = int(len(tokens) ** 0.5), grid // pool
    split = tokens.reshape(side, side, short, pool, short, pool, -1).mean((3, 5))
    rows = split.transpose(0, 2, 1, 3, 4).reshape(side * short, side * short, -1)
    newline = np.broadcast_to(model.image_newline(), (len(rows), 1, rows.shape[2]))
    places = np.zeros((len(rows), side * short + 1), np.bool_)
    places[:, -1] = True
    return np.concatenate([rows, newline], axis=1).reshape(places.size, -1), places.ravel()


def _compare_vision(
    path: Path, samples: Sequence[Sample], tokens: Sequence[torch.Tensor], limits: Limits
) -> list[ParityRow]:
    session = open_session(path)
    found = [session.run(["tokens"], {"pixel_values": sample.tiles})[0] for sample in samples]
    return _error_rows("vision", found, [part.numpy() for part in tokens], limits)


def _compare_rfm(
    model: Model, path: Path, sequences: Sequence[_Sequence], limits: Limits
) -> tuple[list[Array], list[ParityRow]]:
    """Scores of the reference for every image, and the figures."""
    found, wanted = [], []
    for sequence in sequences:
        embeds = sequence.embeds
        session = DecoderSession(path, model.rfm.config, scoring=True, capacity=len(embeds))
        found.append(sequence.local(session.run(embeds)))
        logits = reference.rfm_logits(model.rfm, torch.from_numpy(embeds))
        wanted.append(sequence.local(logits.numpy()))
    scores = [_scores(logits) for logits in wanted]
    shares = [
        len(np.intersect1d(_top(_scores(a)), _top(b))) / max(len(_top(b)), 1)
        for a, b in zip(found, scores, strict=True)
    ]
    overlap = ParityRow("rfm", "top-k overlap", float(np.mean(shares)), ">=", limits.overlap)
    return scores, [*_error_rows("rfm", found, wanted, limits), overlap]


def _compare_llm(
    model: Model, path: Path, table: Array, prompts: Sequence[Array], limits: Limits
) -> list[ParityRow]:
    head = model.lm_head()
    found, wanted, agreed = [], [], []
    for prompt in prompts:
        capacity = len(prompt) + STEPS
        session = DecoderSession(path, model.llm.config, scoring=False, capacity=capacity)
        ids, logits = [], session.run(prompt)
        found.append(logits[0])
        for _ in range(STEPS):
            ids.append(int(logits[0].argmax()))
            logits = session.run(table[ids[-1:]])
        # One pass of the reference over the engine's text gives its choice at every step.
        text = torch.from_numpy(np.concatenate([prompt, table[ids[:-1]]]))
        steps = reference.llm_logits(model.llm, head, text, STEPS).numpy()
        wanted.append(steps[0])
        agreed.append(float((steps.argmax(axis=1) == ids).mean()))
    greedy = ParityRow("llm", "greedy agreement", float(np.mean(agreed)), ">=", limits.greedy)
    return [*_error_rows("llm", found, wanted, limits), greedy]


def _error_rows(
    stage: str, found: Sequence[Array], wanted: Sequence[Array], limits: Limits
) -> list[ParityRow]:
    """Largest relative error and smallest cosine over all images."""
    errors, cosines = [], []
    for a, b in zip(found, wanted, strict=True):
        x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        errors.append(np.abs(x - y).max() / np.abs(y).max())
        cosines.append(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    return [
        ParityRow(stage, "relative error", float(np.max(errors)), "<=", limits.error),
        ParityRow(stage, "cosine", float(np.min(cosines)), ">=", limits.cosine),
    ]


def _scores(logits: Array) -> Array:
    """Softmax per head, mean over heads, [n] of [H, n]."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores: Array = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    return scores


def _top(scores: Array) -> NDArray[np.int64]:
    """Places of the top-scored quarter."""
    count = int(KEEP_RATIO * len(scores))
    return np.argsort(-scores, kind="stable")[:count]
