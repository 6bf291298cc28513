"""ONNX graphs of decoder stacks (LLM and RFM) over static key/value buffers.

Contract: `lrs_edge.bundle.manifest`. Two flavours of attention:

- `gqa`: com.microsoft GroupQueryAttention, which writes new keys and values into the buffers in
  place when past and present are bound to the same memory, and turns queries and keys by the angles
  it is given: positions are data, so a compacted cache keeps each token's own.
  The language model is also written cut into segments of layers, in this flavour; the last layer of
  a segment has RoPE outside, because the turned query is wanted.
- `masked`: plain MatMul and Softmax with an attention bias, for the RFM's dense reference pass.
  The bias is the whole mask, causality included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrs_edge_export.checkpoints.model import DecoderStage
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs.decoder_builder import DecoderBuilder, Flavour
from lrs_edge_export.graphs.row_source import Load
from lrs_edge_export.graphs.weight_file import WeightFile


@dataclass(frozen=True)
class LanguageHead:
    """What follows the LLM's layers and final norm: the output projection.

    Attributes:
        vocabulary: Tokens V.
        load: Reads the projection, float32 [V, D], whole or row by row.
    """

    vocabulary: int
    load: Load


def write_llm(
    stage: DecoderStage,
    head: LanguageHead,
    path: Path,
    weights: WeightFile,
    kv_scales: Mapping[str, Array] | None = None,
    *,
    on_device: bool = False,
) -> None:
    """Write the language model's graph: logits of the last position only.

    Args:
        stage: Layers and `norm.weight`.
        head: Output projection.
        path: The graph file.
        weights: Its external data.
        kv_scales: Per buffer (`key_0`, `value_0`, ...) one scale per channel, float32
            [kv_heads * buffer_dim]: the buffers are int8; None for buffers of the graph's floats.
        on_device: Nothing is copied between host and device within a run on CUDA; the graph has
            the input total_length for that (`decoder_places.DevicePlaces`).
    """
    builder = DecoderBuilder(stage, "gqa", weights, "llm", kv_scales, on_device=on_device)
    _write_logits(builder, builder.layers(0, stage.config.layers), head, path)


def _write_logits(builder: DecoderBuilder, states: str, head: LanguageHead, path: Path) -> None:
    """Final norm and output projection of the last of the states [1, L, D]."""
    graph = builder.graph
    last = builder.last_token(states)
    flat = graph.node("Squeeze", builder.norm(last, "norm.weight"), graph.constant([1]))
    logits = graph.to_float32(graph.linear(flat, "lm_head", head.load))
    graph.node("Identity", logits, out="logits")
    graph.output("logits", (1, head.vocabulary))
    builder.save(path)


def write_llm_segments(
    stage: DecoderStage,
    head: LanguageHead,
    cuts: Sequence[int],
    paths: Sequence[Path],
    weights: WeightFile,
) -> None:
    """Write the language model cut into segments of layers (`lrs_edge.bundle.manifest`).

    Args:
        stage: Layers and `norm.weight`.
        head: Output projection.
        cuts: Layers after which tokens may be dropped, ascending, between 1 and the last but one,
            the first not before all of `DecoderConfig.deepstack` was added.
        paths: The graph files, one more than cuts.
        weights: External data, shared with the whole model's graph.
    """
    edges = [0, *cuts, stage.config.layers]
    for first, end, path in zip(edges[:-1], edges[1:], paths, strict=True):
        name = f"llm_layers_{first}_{end - 1}"
        builder = DecoderBuilder(stage, "gqa", weights, name, inner=first > 0)
        if end == stage.config.layers:
            _write_logits(builder, builder.layers(first, end), head, path)
        else:
            _write_states(builder, first, end, path)


def _write_states(builder: DecoderBuilder, first: int, end: int, path: Path) -> None:
    """Hidden states after layer end - 1, and the last token's attention there and in layer end."""
    graph, heads = builder.graph, builder.heads
    states = builder.layers(first, end, keep_query=True)
    outputs = {
        "attention": builder.last_attention(end - 1),
        "next_attention": builder.scores(states, end),
    }
    graph.node("Identity", graph.to_float32(states), out="hidden_states")
    graph.output("hidden_states", (1, "L", builder.hidden))
    for name, value in outputs.items():
        graph.node("Identity", value, out=name)
        graph.output(name, (heads, "T"))
    builder.save(path)


def write_rfm(stage: DecoderStage, flavour: Flavour, path: Path, weights: WeightFile) -> None:
    """Write the Region Focus Module's graph: logits [H, T] of the last token against all keys.

    One that is layers of the language model runs the scoring layer's attention as well, and in
    flavour `gqa` gives what `write_llm_rest` goes on from.

    Args:
        stage: n layers, and of layer n the input norm, query and key projections.
        flavour: Kind of attention.
        path: The graph file.
        weights: Its external data, shared by both flavours.
    """
    builder = DecoderBuilder(stage, flavour, weights, "rfm")
    graph, end = builder.graph, stage.config.layers
    states = builder.layers(0, end)
    mixed = builder.attended(states, end) if stage.of_llm else ""
    logits = builder.last_attention(end) if stage.of_llm else builder.scores(states, end)
    graph.node("Identity", logits, out="logits")
    graph.output("logits", (stage.config.heads, "T"))
    if stage.of_llm and flavour == "gqa":
        states = builder.with_added(states)
        widths = {"hidden_states": builder.width, "attended": builder.attended_width}
        for name, value in (("hidden_states", states), ("attended", mixed)):
            graph.node("Identity", graph.to_float32(value), out=name)
            graph.output(name, (1, "L", widths[name]))
    builder.save(path)


def write_llm_rest(
    stage: DecoderStage,
    head: LanguageHead,
    scoring: int,
    path: Path,
    weights: WeightFile,
    *,
    on_device: bool = False,
) -> None:
    """Write what of the language model comes after an RFM that is its first layers.

    Args:
        stage: The language model.
        head: Output projection.
        scoring: The RFM's scoring layer n, whose attention it has run: what follows is that
            layer's output projection and MLP, the layers after it, and the head.
        path: The graph file.
        weights: Its external data, shared with the whole language model.
        on_device: See `write_llm`.
    """
    builder = DecoderBuilder(stage, "gqa", weights, f"llm_after_{scoring}", on_device=on_device)
    graph = builder.graph
    mixed = graph.from_float32(graph.input("attended", (1, "L", builder.attended_width)))
    states = builder.completed(builder.embeds, mixed, scoring)
    states = builder.layers_after(states, scoring + 1, stage.config.layers)
    _write_logits(builder, states, head, path)
