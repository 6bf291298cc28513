"""Graphs of single layers over a stage's external data: what checks run where a stage is large.

Bundles do not hold them.
"""

from __future__ import annotations

from pathlib import Path

from lrs_edge_export.checkpoints.model import DecoderStage
from lrs_edge_export.graphs.decoder_builder import DecoderBuilder
from lrs_edge_export.graphs.decoder_graph import LanguageHead
from lrs_edge_export.graphs.onnx_writer import GraphWriter
from lrs_edge_export.graphs.weight_file import WeightFile


def write_layer(stage: DecoderStage, layer: int, path: Path, weights: WeightFile) -> None:
    """Write one full layer alone: `inputs_embeds` [1, L, D] -> `hidden_states` [1, L, D].

    What `DecoderConfig.deepstack` adds after the layer is left out.

    Args:
        stage: The stack.
        layer: Which layer.
        path: The graph file.
        weights: External data of the stage, in which the layer may be already.
    """
    builder = DecoderBuilder(stage, "gqa", weights, f"layer_{layer}", inner=True)
    states = builder.graph.to_float32(builder.layers(layer, layer + 1))
    builder.graph.node("Identity", states, out="hidden_states")
    builder.graph.output("hidden_states", (1, "L", builder.hidden))
    builder.save(path)


def write_head(stage: DecoderStage, head: LanguageHead, path: Path, weights: WeightFile) -> None:
    """Write final norm and output projection alone: `states` [L, D] -> `logits` [L, V].

    Args:
        stage: Holds `norm.weight`.
        head: Output projection.
        path: The graph file.
        weights: External data of the stage.
    """
    graph = GraphWriter("head", weights, n_bits=True)
    states = graph.from_float32(graph.input("states", ("L", stage.config.hidden)))
    scale = graph.weight("norm.weight", lambda: stage.tensors.read("norm.weight"))
    normed = graph.node("RMSNormalization", states, scale, axis=-1, epsilon=stage.config.eps)
    logits = graph.to_float32(graph.linear(normed, "lm_head", head.load))
    graph.node("Identity", logits, out="logits")
    graph.output("logits", ("L", head.vocabulary))
    graph.save(path)


def write_scoring_layer(stage: DecoderStage, path: Path, weights: WeightFile) -> None:
    """Write the RFM's scoring layer alone: `inputs_embeds` -> `logits` [H, T].

    Args:
        stage: The RFM.
        path: The graph file.
        weights: External data of the stage.
    """
    builder = DecoderBuilder(stage, "gqa", weights, "scoring_layer", inner=True)
    logits = builder.scores(builder.layers(0, 0), stage.config.layers)
    builder.graph.node("Identity", logits, out="logits")
    builder.graph.output("logits", (builder.heads, "T"))
    builder.save(path)
