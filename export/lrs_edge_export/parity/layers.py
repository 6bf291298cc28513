"""A decoder compared with PyTorch layer by layer: for stages that do not fit into memory.

Each layer is loaded alone, on both sides, and run over all sequences; between layers there are
only hidden states. Each side goes on from its own states, so that errors add up as they do when the
whole stage runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export.checkpoints.model import DecoderStage, Model
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs import layer_graphs
from lrs_edge_export.graphs.decoder_graph import LanguageHead
from lrs_edge_export.graphs.sessions import DecoderSession, open_session
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.torch_model import stages

#: Rows of the output projection that the reference has in memory at once.
_HEAD_ROWS = 1 << 14


def engine_states(
    stage: DecoderStage, weights: WeightFile, inputs: Sequence[TokenSequence]
) -> list[TokenSequence]:
    """Output of the last full layer for each input, by the engine, as the embeddings of the tokens.

    Args:
        stage: The stack.
        weights: Its external data, still open, in which all layers are.
        inputs: Sequences.

    Raises:
        ExportError: The engine does not take a layer's graph.
    """
    embeds = [torch.from_numpy(x.values) for x in inputs]
    states = [
        TokenSequence(stages.first_states(stage, x).numpy(), given.tokens)
        for x, given in zip(embeds, inputs, strict=True)
    ]
    for layer in range(stage.config.layers):
        with _graph_beside(weights) as path:
            layer_graphs.write_layer(stage, layer, path, weights)
            found = [torch.from_numpy(out[0]) for out in run_decoder(path, states)]
        states = [
            TokenSequence(stages.add_later(stage, layer, out, x).numpy(), given.tokens)
            for out, x, given in zip(found, embeds, inputs, strict=True)
        ]
    return states


def engine_scores(
    stage: DecoderStage, weights: WeightFile, inputs: Sequence[TokenSequence]
) -> list[Array]:
    """Logits [H, T] of the RFM for each input, by the engine; see `engine_states`."""
    states = engine_states(stage, weights, inputs)
    with _graph_beside(weights) as path:
        layer_graphs.write_scoring_layer(stage, path, weights)
        return run_decoder(path, states)


def engine_logits(
    model: Model, weights: WeightFile, inputs: Sequence[TokenSequence], last: int
) -> list[Array]:
    """Logits [last, V] after the last places of each input, by the engine.

    Args:
        model: The checkpoint.
        weights: External data of its language model; see `engine_states`.
        inputs: Sequences.
        last: Number of places.

    Raises:
        ExportError: The engine does not take a graph.
    """
    states = engine_states(model.llm, weights, inputs)
    head = LanguageHead(model.vocabulary, model.lm_head)
    with _graph_beside(weights) as path:
        layer_graphs.write_head(model.llm, head, path, weights)
        # Integers are small, and engines multiply them slowly as they are in the file.
        session = open_session(path, lean=weights.plan.of("lm_head") in ("fp32", "fp16"))
        return [session.run(["logits"], {"states": x.values[-last:]})[0] for x in states]


def reference_states(stage: DecoderStage, inputs: Sequence[TokenSequence]) -> list[Tensor]:
    """Output [T, D] of the last full layer for each input, by PyTorch."""
    with torch.inference_mode():
        embeds = [torch.from_numpy(x.values) for x in inputs]
        states = [stages.first_states(stage, x) for x in embeds]
        turns = [stages.turns_of(stage, x) for x in inputs]
        for layer in range(stage.config.layers):
            states = [
                stages.add_later(stage, layer, stages.run_layer(stage, layer, x, turn), given)
                for x, turn, given in zip(states, turns, embeds, strict=True)
            ]
        return states


def reference_logits(model: Model, states: Tensor) -> Array:
    """Logits [n, V] of outputs [n, D] of the language model's last layer, in chunks of rows."""
    with torch.inference_mode():
        x = stages.final_norm(model.llm, states)
        parts = [
            torch.nn.functional.linear(x, torch.from_numpy(rows)).numpy()
            for rows in model.lm_head.chunks(_HEAD_ROWS)
        ]
    logits: Array = np.concatenate(parts, axis=1)
    return logits


def reference_scores(stage: DecoderStage, inputs: Sequence[TokenSequence]) -> list[Array]:
    """Logits [H, T] of the RFM for each input, by PyTorch."""
    found = []
    with torch.inference_mode():
        for x, given in zip(reference_states(stage, inputs), inputs, strict=True):
            found.append(stages.scoring_logits(stage, x, stages.turns_of(stage, given)).numpy())
    return found


def run_decoder(path: Path, inputs: Sequence[TokenSequence]) -> list[Array]:
    """First output of a decoder graph for each input, by one session."""
    session, found = DecoderSession(path, capacity=max(map(len, inputs))), []
    for x in inputs:
        session.length = 0
        found.append(session.run(np.ascontiguousarray(x.values), x.positions))
    return found


@contextlib.contextmanager
def _graph_beside(weights: WeightFile) -> Iterator[Path]:
    """Path of a graph beside its external data; the graph is deleted at the end."""
    path = weights.path.with_name(f"{weights.path.name}.parity.onnx")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
