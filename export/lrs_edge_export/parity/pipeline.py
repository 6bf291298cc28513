"""The whole way: what a bundle says of an image, from pixels to logits, against PyTorch's.

Parity of each stage on exact inputs does not bound the end: errors of the vision encoder change
what the RFM keeps, and both change every token that the language model reads. So here each side
goes on from its own tokens, scores and prompts, the bundle's made with the embeddings and the
tokenizer that lie in it. Only the text after the prompt is the same, so that logits can be compared
place by place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.bundle import Embeddings
from lrs_edge.bundle.parity import Figure
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.prompt import Prompt
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.sequences import model_sequences, table_of
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.parity.graphs import Embed, Graphs, Text
from lrs_edge_export.parity.limits import PIPELINE_LIMITS, PipelineLimits, cosine
from lrs_edge_export.parity.sequences import PromptSequence, token_scores, top_places
from lrs_edge_export.quantization.precision import Precision


@dataclass(frozen=True)
class Run:
    """What a bundle made of some images and questions.

    Attributes:
        texts: What its language model says.
        scores: Of the local tokens, float32 [n] for each image; empty without an RFM.
    """

    texts: list[Text]
    scores: list[Array]


def run(model: Model, graphs: Graphs, tokens: Sequence[Array], questions: Sequence[str]) -> Run:
    """Go on from the bundle's own vision tokens.

    Args:
        model: The checkpoint, for what is no weight.
        graphs: The bundle.
        tokens: float32 [1 + side * side, T, D] of each image, by the bundle's vision encoder.
        questions: One for each image.

    Raises:
        BundleError: The bundle's tokenizer or embeddings cannot be used.
        ExportError: The engine does not take a graph.
    """
    builder, embed = _words(model, graphs)
    sequences = [
        PromptSequence(model, builder, part, question=question)
        for part, question in zip(tokens, questions, strict=True)
    ]
    prompts, scores = [sequence.whole for sequence in sequences], []
    if graphs.rfm is not None:
        raw = graphs.rfm_logits(model, prompts)
        scores = [token_scores(s.local(x)) for s, x in zip(sequences, raw, strict=True)]
        prompts = [s.pruned(score) for s, score in zip(sequences, scores, strict=True)]
    return Run(graphs.texts(model, prompts, embed), scores)


def figures(
    found: Run, wanted: Sequence[Array], scores: Sequence[Array], limits: PipelineLimits
) -> tuple[Figure, ...]:
    """Figures of the whole way.

    Args:
        found: By the bundle.
        wanted: PyTorch's logits [STEPS, V] on the same text after its own prompts.
        scores: PyTorch's scores of the local tokens, as `Run.scores`.
        limits: What they may differ by.
    """
    logits = [text.logits for text in found.texts]
    cosines = [cosine(a, b) for a, b in zip(logits, wanted, strict=True)]
    apart = [divergence(a, b) for a, b in zip(logits, wanted, strict=True)]
    agreed = [(a.argmax(1) == b.argmax(1)).mean() for a, b in zip(logits, wanted, strict=True)]
    given = [
        Figure("cosine", float(np.min(cosines)), ">=", limits.cosine),
        Figure("divergence", float(np.mean(apart)), "<=", limits.divergence),
        Figure("greedy agreement", float(np.mean(agreed)), ">=", limits.greedy),
    ]
    if scores:
        kept = [overlap(a, b) for a, b in zip(found.scores, scores, strict=True)]
        given.append(Figure("top-k overlap", float(np.mean(kept)), ">=", limits.overlap))
    return tuple(given)


def loosest(precisions: Sequence[Precision]) -> Precision:
    """The one of a bundle's precisions whose limits hold for the whole way."""
    return min(precisions, key=lambda one: PIPELINE_LIMITS[one].cosine)


def divergence(found: Array, wanted: Array) -> float:
    """Mean Kullback-Leibler divergence of found logits [n, V] from wanted ones, in nats."""
    a, b = _log_shares(found), _log_shares(wanted)
    return float((np.exp(b) * (b - a)).sum(axis=1).mean())


def overlap(found: Array, wanted: Array) -> float:
    """Share of the places kept by the wanted scores [n] that the found ones keep."""
    places = top_places(wanted)
    return len(np.intersect1d(top_places(found), places)) / max(len(places), 1)


def _log_shares(logits: Array) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shares: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shares


def _words(model: Model, graphs: Graphs) -> tuple[SequenceBuilder, Embed]:
    """Builder of sequences and embeddings, the bundle's where it has any."""
    text: str = model.tokenizer_json
    if graphs.tokenizer is not None:
        text = graphs.tokenizer.read_text(encoding="utf-8")
    if graphs.embeddings is None:
        return model_sequences(model), table_of(model).lookup
    count = 0 if model.positions is None else model.positions.entries
    config = model.llm.config
    table = Embeddings(graphs.embeddings, config.hidden, model.vocabulary, count, config.width)
    prompt = Prompt(text, model.prompt, model.vocabulary)
    views = model.vision.grid**2
    return SequenceBuilder(prompt, table.lookup, table.newline, views), table.lookup
