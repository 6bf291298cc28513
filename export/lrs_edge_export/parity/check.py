"""Parity check: every stage of an exported bundle against PyTorch on the same inputs.

Each stage is given the reference's output of the stage before, so that its error is its own. The
images must be none that the bundle was calibrated on: the synthetic ones have seeds of their own.

A decoder whose weights are larger than `LARGE` is compared layer by layer: no more than one layer,
or the output projection, is then in memory at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from lrs_edge.bundle.parity import Figure, Mode, ParityReport, StageParity
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.sequences import model_sequences
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.graphs.sessions import DecoderSession, open_session
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.parity import layers as parity_layers
from lrs_edge_export.parity.images import Sample, load_samples
from lrs_edge_export.parity.sequences import PromptSequence, token_scores, top_places
from lrs_edge_export.quantization.precision import Precision
from lrs_edge_export.torch_model.vision import vision_objects, vision_tokens

QUESTION = "How many ships are there in the image?"

#: Places compared per image: greedy tokens, or tokens of the text below.
STEPS = 16

#: What follows the prompt where the LLM is compared layer by layer.
FORCED_TEXT = (
    "There are four ships in the image: two of them lie at the pier, the others are on the river "
    "in front of the harbour, near the bridge."
)

#: Stages of more bytes are not loaded whole: engines need up to two copies of a stage's weights.
LARGE = 512 << 20


@dataclass(frozen=True)
class Limits:
    """What a stage may differ by.

    Attributes:
        error: Largest difference over the reference's largest magnitude, at most.
        cosine: Cosine to the reference over one image, at least.
        overlap: Share of the same top-scored quarter of tokens, at least.
        greedy: Share of the same next tokens on the same text, at least.
    """

    error: float
    cosine: float
    overlap: float
    greedy: float


#: Between what right and broken graphs of the embedded model and of a golden checkpoint have. At
#: `int8-dynamic` right ones have errors of up to 0.056 and cosines from 0.9984 on; those with
#: RoPE's base ten times as large or half, two heads exchanged, or one layer's output projection
#: scaled by 1.25 have errors of 0.16 to 0.48 in at least one stage
#: (`tests/test_parity_limits.py`). A stage beyond them is broken, one within them may still answer
#: worse: `--eval` measures answers.
LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(error=1e-3, cosine=0.99999, overlap=0.99, greedy=0.9),
    "fp16": Limits(error=0.03, cosine=0.9999, overlap=0.95, greedy=0.85),
    "int8-dynamic": Limits(error=0.12, cosine=0.99, overlap=0.9, greedy=0.7),
    "int8-static": Limits(error=0.3, cosine=0.98, overlap=0.85, greedy=0.6),
    "int8-weight": Limits(error=0.12, cosine=0.995, overlap=0.9, greedy=0.7),
    "int4-weight": Limits(error=0.4, cosine=0.95, overlap=0.8, greedy=0.35),
}

#: Mean difference of what an object head gives, at most: of probabilities, and of log2 of sizes in
#: cells. With random weights, whose probabilities are far from 0 and 1 and so move the most, a
#: right graph in `int8-weight` has 0.013 and 0.08; with the last layer's small biases negated it
#: has 0.046 and 0.20, with a kernel negated 0.17 and 1.2 at least (`tests/test_vision_objects.py`).
#: Where images show few objects, probabilities are close to 0 on both sides: sizes, which no
#: sigmoid flattens, then tell a broken head.
OBJECT_LIMITS: dict[Precision, tuple[float, float]] = {
    "fp32": (1e-4, 1e-3),
    "fp16": (4e-3, 0.03),
    "int8-dynamic": (0.03, 0.16),
    "int8-static": (0.1, 0.6),
    "int8-weight": (0.03, 0.16),
    "int4-weight": (0.1, 0.6),
}

#: Added to the LLM's limits where keys and values are rounded, too.
KV_LIMITS = Limits(error=0.1, cosine=-0.01, overlap=0.0, greedy=-0.1)


@dataclass(frozen=True)
class Graphs:
    """Graph files of a bundle.

    Attributes:
        vision: Vision encoder with projector.
        rfm: Region Focus Module; None where there is none.
        llm: Language model.
        llm_kv: The language model with int8 key and value buffers, where it was written.
        rfm_weights: External data of the RFM, still open, for a comparison layer by layer; None
            to load the stage whole however large it is.
        llm_weights: Of the language model.
    """

    vision: Path
    rfm: Path | None
    llm: Path
    llm_kv: Path | None = None
    rfm_weights: WeightFile | None = None
    llm_weights: WeightFile | None = None


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
    tokens = [vision_tokens(model.vision, torch.from_numpy(s.tiles)).numpy() for s in samples]
    vision, rfm, llm = precisions
    figures = _compare_vision(graphs.vision, model.vision, samples, tokens, vision)
    stages = [StageParity("vision", figures, vision, _size(graphs.vision), "whole")]
    builder = model_sequences(model)
    sequences = [PromptSequence(model, builder, part, question=QUESTION) for part in tokens]
    prompts = [sequence.embeds for sequence in sequences]
    if graphs.rfm is not None:
        scores, figures = _compare_rfm(model, graphs.rfm, graphs, sequences, LIMITS[rfm])
        mode = _mode(graphs.rfm_weights)
        stages.append(StageParity("rfm", figures, rfm, _size(graphs.rfm), mode))
        prompts = [s.pruned(score) for s, score in zip(sequences, scores, strict=True)]
    mode, limits = _mode(graphs.llm_weights), LIMITS[llm]
    if mode == "whole":
        figures = _compare_text(model, graphs.llm, prompts, limits)
    else:
        assert graphs.llm_weights is not None
        figures = _compare_layers(model, graphs.llm_weights, prompts, limits)
    stages.append(StageParity("llm", figures, llm, _size(graphs.llm), mode))
    if graphs.llm_kv is not None and mode == "whole":
        figures = _compare_text(model, graphs.llm_kv, prompts, _loosened(limits, KV_LIMITS))
        # Its weights are those of the other graph.
        size = graphs.llm_kv.stat().st_size + _size(graphs.llm) - graphs.llm.stat().st_size
        stages.append(StageParity("llm-kv", figures, llm, size, "whole"))
    elif graphs.llm_kv is not None:
        described += "; llm-kv not compared: it is too large to be run whole"
    return ParityReport(described, tuple(stages))


def raise_if_failed(report: ParityReport) -> None:
    """Raise ExportError that names the figures beyond their limits."""
    failed = [
        f"{stage.stage} {one.measure} {one.value:.3g} (must be {one.sign} {one.limit:g})"
        for stage in report.stages
        for one in stage.figures
        if not one.passed
    ]
    if failed:
        raise ExportError(
            f"the parity check failed: {'; '.join(failed)}; use --precision fp32, or "
            "--no-parity to export all the same"
        )


def _mode(weights: WeightFile | None) -> Mode:
    large = weights is not None and weights.path.stat().st_size > LARGE
    return "layer by layer" if large else "whole"


def _size(graph: Path) -> int:
    """Bytes of a graph and of its external data, if it has any of its own."""
    data = graph.with_name(f"{graph.name}.data")
    return sum(path.stat().st_size for path in (graph, data) if path.is_file())


def _loosened(limits: Limits, by: Limits) -> Limits:
    return Limits(
        error=limits.error + by.error,
        cosine=limits.cosine + by.cosine,
        overlap=limits.overlap + by.overlap,
        greedy=limits.greedy + by.greedy,
    )


def _compare_vision(
    path: Path,
    stage: VisionStage,
    samples: Sequence[Sample],
    wanted: Sequence[Array],
    precision: Precision,
) -> tuple[Figure, ...]:
    session = open_session(path, lean=_size(path) > LARGE)
    names = ["tokens"] if stage.objects is None else ["tokens", "objects"]
    # One tile at a time, as memory for a tile's attention is more than that for its features.
    runs = [
        [session.run(names, {"pixel_values": tile[None]}) for tile in sample.tiles]
        for sample in samples
    ]
    found = [np.concatenate([outputs[0] for outputs in run]) for run in runs]
    figures = _error_figures(found, wanted, LIMITS[precision])
    if stage.objects is None:
        return figures
    maps = np.concatenate([outputs[1] for run in runs for outputs in run])
    exact = [vision_objects(stage, torch.from_numpy(sample.tiles)) for sample in samples]
    objects = np.concatenate([one.numpy() for one in exact if one is not None])
    return (*figures, *_object_figures(len(stage.objects.labels), maps, objects, precision))


def _object_figures(
    labels: int, found: Array, wanted: Array, precision: Precision
) -> tuple[Figure, ...]:
    """Mean differences of maps [N, labels + 2, G, G], of probabilities and of log2 sizes."""
    apart = np.abs(found.astype(np.float64) - wanted)
    limits = OBJECT_LIMITS[precision]
    return (
        Figure("objects' probability error", float(apart[:, :labels].mean()), "<=", limits[0]),
        Figure("objects' size error", float(apart[:, labels:].mean()), "<=", limits[1]),
    )


def _compare_rfm(
    model: Model,
    rfm: Path,
    graphs: Graphs,
    sequences: Sequence[PromptSequence],
    limits: Limits,
) -> tuple[list[Array], tuple[Figure, ...]]:
    """Scores of the reference for every image, and the figures."""
    inputs = [sequence.embeds for sequence in sequences]
    weights = graphs.rfm_weights
    if weights is not None and _mode(weights) != "whole":
        raw = parity_layers.engine_scores(model.region_focus, weights, inputs)
    else:
        raw = parity_layers.run_decoder(rfm, inputs)
    exact = parity_layers.reference_scores(model.region_focus, inputs)
    found = [s.local(logits) for s, logits in zip(sequences, raw, strict=True)]
    wanted = [s.local(logits) for s, logits in zip(sequences, exact, strict=True)]
    scores = [token_scores(logits) for logits in wanted]
    shares = [_overlap(token_scores(a), b) for a, b in zip(found, scores, strict=True)]
    overlap = Figure("top-k overlap", float(np.mean(shares)), ">=", limits.overlap)
    return scores, (*_error_figures(found, wanted, limits), overlap)


def _overlap(found: Array, wanted: Array) -> float:
    """Share of the reference's kept places that are kept."""
    places = top_places(wanted)
    return len(np.intersect1d(top_places(found), places)) / max(len(places), 1)


def _compare_text(
    model: Model, path: Path, prompts: Sequence[Array], limits: Limits
) -> tuple[Figure, ...]:
    """The LLM whole, on the text that it chooses greedily."""
    session = DecoderSession(path, capacity=max(map(len, prompts)) + STEPS)
    found, chosen = [], []
    for prompt in prompts:
        session.length = 0
        ids, logits = [], session.run(prompt)
        found.append(logits[0])
        for _ in range(STEPS):
            ids.append(int(logits[0].argmax()))
            logits = session.run(model.embed_tokens[ids[-1:]])
        chosen.append(ids)
    # Not two models in memory at once.
    del session
    # One pass of the reference over the engine's text gives its choice at every step.
    texts = [
        np.concatenate([prompt, model.embed_tokens[ids[:-1]]])
        for prompt, ids in zip(prompts, chosen, strict=True)
    ]
    states = parity_layers.reference_states(model.llm, texts)
    steps = [parity_layers.reference_logits(model, x[-STEPS:]) for x in states]
    agreed = [(s.argmax(axis=1) == ids).mean() for s, ids in zip(steps, chosen, strict=True)]
    greedy = Figure("greedy agreement", float(np.mean(agreed)), ">=", limits.greedy)
    return (*_error_figures(found, [s[0] for s in steps], limits), greedy)


def _compare_layers(
    model: Model, weights: WeightFile, prompts: Sequence[Array], limits: Limits
) -> tuple[Figure, ...]:
    """The LLM layer by layer, on a given text: the choices at each of its tokens are compared."""
    forced = model.embed_tokens[_forced_ids(model)]
    texts = [np.concatenate([prompt, forced]) for prompt in prompts]
    found = parity_layers.engine_logits(model, weights, texts, STEPS)
    states = parity_layers.reference_states(model.llm, texts)
    wanted = [parity_layers.reference_logits(model, x[-STEPS:]) for x in states]
    agreed = [(a.argmax(1) == b.argmax(1)).mean() for a, b in zip(found, wanted, strict=True)]
    greedy = Figure("greedy agreement", float(np.mean(agreed)), ">=", limits.greedy)
    return (*_error_figures(found, wanted, limits), greedy)


def _forced_ids(model: Model) -> list[int]:
    """STEPS - 1 tokens: with the prompt's last place, the logits at STEPS places are compared."""
    tokenizer = Tokenizer.from_str(model.tokenizer_json)
    ids: list[int] = tokenizer.encode(FORCED_TEXT, add_special_tokens=False).ids
    # A tokenizer that knows long words only may make fewer tokens of the text.
    return (ids * STEPS)[: STEPS - 1]


def _error_figures(
    found: Sequence[Array], wanted: Sequence[Array], limits: Limits
) -> tuple[Figure, ...]:
    """Largest relative error and smallest cosine over all images."""
    errors, cosines = [], []
    for a, b in zip(found, wanted, strict=True):
        x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        errors.append(np.abs(x - y).max() / np.abs(y).max())
        cosines.append(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    return (
        Figure("relative error", float(np.max(errors)), "<=", limits.error),
        Figure("cosine", float(np.min(cosines)), ">=", limits.cosine),
    )
