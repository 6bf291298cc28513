"""Parity check: every stage of an exported bundle against PyTorch on the same inputs.

Each stage is given the reference's output of the stage before, so that its error is its own; then
the bundle goes the whole way from pixels to logits by itself (`pipeline.py`). The
images must be none that the bundle was calibrated on: the synthetic ones have seeds of their own.

A decoder whose weights are larger than `LARGE` is compared layer by layer: no more than one layer,
or the output projection, is then in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from lrs_edge.bundle.parity import Figure, Mode, ParityReport, StageParity
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.sequences import model_sequences, table_of
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.graphs.sessions import open_session
from lrs_edge_export.parity import graphs as parity_graphs
from lrs_edge_export.parity import layers as parity_layers
from lrs_edge_export.parity import pipeline
from lrs_edge_export.parity.graphs import Graphs, Text, chosen_texts, reference_logits, size_of
from lrs_edge_export.parity.images import Sample, load_samples
from lrs_edge_export.parity.limits import (
    KV_LIMITS,
    LIMITS,
    OBJECT_LIMITS,
    PIPELINE_LIMITS,
    Limits,
    error_figures,
)
from lrs_edge_export.parity.pipeline import overlap
from lrs_edge_export.parity.sequences import PromptSequence, token_scores
from lrs_edge_export.quantization.precision import Precision
from lrs_edge_export.torch_model.vision import vision_objects, vision_tokens

#: Asked of the images in turn.
QUESTIONS = (
    "How many ships are there in the image?",
    "Is there a road at the left of the image?",
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
    tokens = [vision_tokens(model.vision, torch.from_numpy(s.tiles)).numpy() for s in samples]
    vision, rfm, llm = precisions
    shown, figures = _compare_vision(graphs.vision, model.vision, samples, tokens, vision)
    stages = [StageParity("vision", figures, vision, size_of(graphs.vision), "whole")]
    builder = model_sequences(model)
    embed = table_of(model).lookup
    asked = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(samples))]
    sequences = [
        PromptSequence(model, builder, part, question=question)
        for part, question in zip(tokens, asked, strict=True)
    ]
    prompts = [sequence.whole for sequence in sequences]
    scores: list[Array] = []
    if graphs.rfm is not None:
        scores, figures = _compare_rfm(model, graphs, sequences, LIMITS[rfm])
        stages.append(StageParity("rfm", figures, rfm, size_of(graphs.rfm), graphs.rfm_mode))
        prompts = [s.pruned(score) for s, score in zip(sequences, scores, strict=True)]
    mode, limits = graphs.llm_mode, LIMITS[llm]
    texts = graphs.texts(model, prompts, embed)
    wanted = reference_logits(model, prompts, texts)
    figures = _text_figures(texts, wanted, mode, limits)
    stages.append(StageParity("llm", figures, llm, size_of(graphs.llm), mode))
    if graphs.llm_kv is not None and mode == "whole":
        texts = chosen_texts(graphs.llm_kv, prompts, embed)
        exact = reference_logits(model, prompts, texts)
        figures = _text_figures(texts, exact, mode, limits.loosened(KV_LIMITS))
        # Its weights are those of the other graph.
        size = graphs.llm_kv.stat().st_size + size_of(graphs.llm) - graphs.llm.stat().st_size
        stages.append(StageParity("llm-kv", figures, llm, size, "whole"))
    elif graphs.llm_kv is not None:
        described += "; llm-kv not compared: it is too large to be run whole"
    run = pipeline.run(model, graphs, shown, asked)
    if mode == "whole":
        # Layer by layer, the text after the prompts is the one that was compared already.
        wanted = reference_logits(model, prompts, run.texts)
    of = pipeline.loosest(precisions)
    figures = pipeline.figures(run, wanted, scores, PIPELINE_LIMITS[of])
    stages.append(StageParity("pipeline", figures, of, sum(s.bytes or 0 for s in stages), mode))
    return ParityReport(described, tuple(stages))


def raise_if_failed(report: ParityReport) -> None:
    """Raise ExportError that names the figures beyond their limits, and what helps against it."""
    failed = {
        stage: [one for one in stage.figures if not one.passed]
        for stage in report.stages
        if not all(one.passed for one in stage.figures)
    }
    if not failed:
        return
    listed = [
        f"{stage.stage} {one.measure} {one.value:.3g} (must be {one.sign} {one.limit:g})"
        for stage, figures in failed.items()
        for one in figures
    ]
    raise ExportError(
        f"the parity check failed: {'; '.join(listed)}; {_advice(failed)}, or --no-parity to "
        "export all the same"
    )


def _advice(failed: Iterable[StageParity]) -> str:
    """What may bring stages that failed within their limits."""
    names = {stage.stage for stage in failed}
    if names == {"llm-kv"}:
        return "leave --int8-kv out"
    if all(stage.precision == "fp32" for stage in failed):
        return (
            "nothing is rounded at fp32, so config.json does not describe these weights, or the "
            "exporter does them wrong: report it; use another checkpoint"
        )
    single = names & {"vision", "rfm", "llm"}
    if len(single) == 1:
        (name,) = single
        return f"use a higher precision of this stage, such as --{name} fp32"
    return "use a higher precision, such as --precision fp32"


def _compare_vision(
    path: Path,
    stage: VisionStage,
    samples: Sequence[Sample],
    wanted: Sequence[Array],
    precision: Precision,
) -> tuple[list[Array], tuple[Figure, ...]]:
    """The bundle's tokens [n, T, D] of every image, and the figures."""
    session = open_session(path, lean=size_of(path) > parity_graphs.LARGE)
    names = ["tokens"] if stage.objects is None else ["tokens", "objects"]
    # One tile at a time, as memory for a tile's attention is more than that for its features.
    runs = [
        [session.run(names, {"pixel_values": tile[None]}) for tile in sample.tiles]
        for sample in samples
    ]
    found = [np.concatenate([outputs[0] for outputs in run]) for run in runs]
    figures = error_figures(found, wanted, LIMITS[precision])
    if stage.objects is None:
        return found, figures
    maps = np.concatenate([outputs[1] for run in runs for outputs in run])
    exact = [vision_objects(stage, torch.from_numpy(sample.tiles)) for sample in samples]
    objects = np.concatenate([one.numpy() for one in exact if one is not None])
    return found, (*figures, *_object_figures(len(stage.objects.labels), maps, objects, precision))


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
    model: Model, graphs: Graphs, sequences: Sequence[PromptSequence], limits: Limits
) -> tuple[list[Array], tuple[Figure, ...]]:
    """Scores of the reference for every image, and the figures."""
    inputs = [sequence.whole for sequence in sequences]
    raw = graphs.rfm_logits(model, inputs)
    exact = parity_layers.reference_scores(model.region_focus, inputs)
    found = [s.local(logits) for s, logits in zip(sequences, raw, strict=True)]
    wanted = [s.local(logits) for s, logits in zip(sequences, exact, strict=True)]
    scores = [token_scores(logits) for logits in wanted]
    shares = [overlap(token_scores(a), b) for a, b in zip(found, scores, strict=True)]
    kept = Figure("top-k overlap", float(np.mean(shares)), ">=", limits.overlap)
    return scores, (*error_figures(found, wanted, limits), kept)


def _text_figures(
    found: Sequence[Text], wanted: Sequence[Array], mode: Mode, limits: Limits
) -> tuple[Figure, ...]:
    """Errors of logits after the prompt or, layer by layer, at all places; choices at all."""
    agreed = [
        (a.logits.argmax(1) == b.argmax(1)).mean() for a, b in zip(found, wanted, strict=True)
    ]
    greedy = Figure("greedy agreement", float(np.mean(agreed)), ">=", limits.greedy)
    places = slice(1) if mode == "whole" else slice(None)
    errors = error_figures([a.logits[places] for a in found], [b[places] for b in wanted], limits)
    return (*errors, greedy)
