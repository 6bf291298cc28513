"""Vision transformers of onnxruntime's own operators: the flavour `fused`, for its CUDA provider.

One operator for attention, one for a residual sum with the norm after it, one for an activation
with the bias before it. On one H100 a CLIP-L tower written so took 1.01 ms a tile in batches of 16,
where the one of standard operators took 1.99 (2026-11-26, a prototype of this graph; this file's
own graphs never ran on a card). Nothing here computes a shape that a kernel reads on the device, so
that onnxruntime copies nothing between host and device inside of a run.

Weights are those of the flavour `plain`, in the same file: what is written otherwise there (three
projections that become one, a scale of channels) is made of constants, once, when the engine loads
the graph.
"""

from __future__ import annotations

from functools import partial

from lrs_edge_export.checkpoints.tensors import Array, Scoped
from lrs_edge_export.graphs.onnx_writer import CONTRIB, GraphWriter
from lrs_edge_export.graphs.qwen_tower_graph import QwenTransformer
from lrs_edge_export.graphs.transformer_graph import Transformer


class FusedTransformer(Transformer):
    """CLIP's, SigLIP's and InternViT's towers; see `Transformer`."""

    def features(self, pixels: str) -> str:
        """Features [N, grid * grid, width]."""
        x, tower = self._embedded(pixels), self._tower
        if tower.first_norm:
            x = self._norm(x, tower.first_norm)
        normed, states = self._norm(x, "encoder.layers.0.layer_norm1"), [x]
        for layer in range(tower.layers):
            last = layer == tower.layers - 1
            after = tower.last_norm if last else f"encoder.layers.{layer + 1}.layer_norm1"
            x, normed = self._fused_layer(x, normed, f"encoder.layers.{layer}", after)
            states.append(x)
        x = normed or x
        if tower.states:
            x = self._graph.node("Concat", *(states[state] for state in tower.states), axis=-1)
        return self._patches(x) if tower.class_token else x

    def _embedded(self, pixels: str) -> str:
        """As `Transformer._embedded`, the class token being a row of the positions."""
        if not self._tower.class_token:
            return super()._embedded(pixels)
        graph = self._graph
        # The class token has no patch: its row is empty before its own embedding is added.
        rows = graph.node("Pad", self._rows(pixels), graph.constant([0, 1, 0, 0, 0, 0]))
        return graph.node("Add", rows, graph.weight("embeddings.places", self._places))

    def _places(self) -> Array:
        """Positions float32 [places, hidden], and with the first the class token."""
        places = self._tower.positions().copy()
        places[0] += self._tower.first_place()
        return places

    def _fused_layer(self, x: str, normed: str, name: str, after: str) -> tuple[str, str]:
        """A layer's output, and that after the norm `after`; empty where there is none.

        Args:
            x: States [N, places, hidden].
            normed: They after the layer's first norm.
            name: Of the layer.
            after: The norm that follows the layer; empty for none.
        """
        mixed, bias = self._narrowed(self._mixed(normed, name), name, "self_attn.out_proj", 1)
        x, normed = self._added_and_normed(x, mixed, bias, f"{name}.layer_norm2")
        wide = self._fused_wide(normed, f"{name}.mlp.fc1")
        narrow, bias = self._narrowed(wide, name, "mlp.fc2", 2)
        if after:
            return self._added_and_normed(x, narrow, bias, after)
        graph = self._graph
        return graph.node("Add", x, graph.node("Add", narrow, bias)), ""

    def _mixed(self, normed: str, name: str) -> str:
        """What the heads read [N, places, hidden]."""
        graph, tower = self._graph, self._tower
        parts = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        if tower.attention_norm:
            vectors = [self._projected(normed, part) for part in parts]
            return graph.node("MultiHeadAttention", *vectors, domain=CONTRIB, num_heads=tower.heads)
        weights = [_matrix(graph, tower.tensors, part) for part in parts]
        packed = [graph.node("Concat", *weights, axis=1)]
        if tower.attention_bias:
            biases = [self._weight(f"{part}.bias") for part in parts]
            packed.append(graph.node("Concat", *biases, axis=0))
        return graph.node("Attention", normed, *packed, domain=CONTRIB, num_heads=tower.heads)

    def _narrowed(self, x: str, name: str, linear: str, scale: int) -> tuple[str, str]:
        """What a linear layer of a block makes of x before its bias, and the bias, both scaled."""
        graph, name_of_linear = self._graph, f"{name}.{linear}"
        bias = self._weight(f"{name_of_linear}.bias")
        tensors = self._tower.tensors
        if not self._tower.layer_scale:
            weight = partial(tensors.read, f"{name_of_linear}.weight")
            return graph.linear(x, name_of_linear, weight), bias
        # In float32, in which the engine can multiply constants when it loads the graph.
        channels = graph.to_float32(self._weight(f"{name}.layer_scale{scale}"))
        weight_of_layer, bias = (
            graph.from_float32(graph.node("Mul", graph.to_float32(value), channels))
            for value in (_matrix(graph, tensors, name_of_linear), bias)
        )
        return graph.node("MatMul", x, weight_of_layer, label=name_of_linear), bias

    def _fused_wide(self, normed: str, name: str) -> str:
        tensors = self._tower.tensors
        x = self._graph.linear(normed, name, partial(tensors.read, f"{name}.weight"))
        return _activated(self._graph, x, self._weight(f"{name}.bias"), self._tower.activation)

    def _added_and_normed(self, x: str, more: str, bias: str, norm: str) -> tuple[str, str]:
        tower = self._tower
        rms = tower.rms_norms and norm != tower.last_norm
        parts = ("weight",) if rms else ("weight", "bias")
        weights = [self._weight(f"{norm}.{part}") for part in parts]
        return _added_and_normed(self._graph, (x, more), weights, bias, tower.eps, rms=rms)


class FusedQwenTransformer(QwenTransformer):
    """Qwen's towers; see `QwenTransformer`."""

    def features(self, pixels: str) -> str:
        """Features [N, grid * grid, hidden * (1 + taps)], row after row."""
        graph, tower = self._graph, self._tower
        x = self._patches(pixels)
        turns = self._turns(pixels)
        normed = self._norm(x, "encoder.layers.0.layer_norm1")
        taps = []
        for layer in range(tower.layers):
            name = f"encoder.layers.{layer}"
            last = layer == tower.layers - 1
            after = tower.last_norm if last else f"encoder.layers.{layer + 1}.layer_norm1"
            mixed = self._attention(normed, layer, name, turns)
            x, normed = self._joined(x, mixed, f"{name}.self_attn.out_proj", f"{name}.layer_norm2")
            wide, linear = self._wide(normed, name)
            x, normed = self._joined(x, wide, linear, after)
            if layer in tower.taps:
                taps.append(x)
        joined = graph.node("Concat", normed, *taps, axis=-1) if taps else normed
        return self._in_rows(joined)

    def _wide(self, x: str, name: str) -> tuple[str, str]:
        """The inner states of a layer's MLP, and the name of the linear layer that narrows them."""
        graph, tower = self._graph, self._tower
        first = f"{name}.mlp.gate_proj" if tower.gated else f"{name}.mlp.fc1"
        wide = graph.linear(x, first, partial(tower.tensors.read, f"{first}.weight"))
        wide = _activated(graph, wide, self._weight(f"{first}.bias"), tower.activation)
        if not tower.gated:
            return wide, f"{name}.mlp.fc2"
        up = self._linear(x, f"{name}.mlp.up_proj")
        return graph.node("Mul", wide, up), f"{name}.mlp.down_proj"

    def _joined(self, x: str, more: str, linear: str, norm: str) -> tuple[str, str]:
        """States x with what a linear layer makes of `more`, and they after a norm."""
        graph, tower = self._graph, self._tower
        added = graph.linear(more, linear, partial(tower.tensors.read, f"{linear}.weight"))
        weights, bias = self._norm_weights(norm), self._weight(f"{linear}.bias")
        return _added_and_normed(graph, (x, added), weights, bias, tower.eps, rms=tower.rms_norm)

    def _attention(self, x: str, layer: int, name: str, turns: list[str]) -> str:
        graph, tower = self._graph, self._tower
        query, key, value = self._turned(x, name, turns)
        # A window is a batch of its own.
        places = tower.places_of(layer)
        whole = places == tower.grid**2
        window, back = (graph.constant([-1, n, tower.hidden]) for n in (places, tower.grid**2))
        parts = [
            part if whole else graph.node("Reshape", part, window) for part in (query, key, value)
        ]
        mixed = graph.node("MultiHeadAttention", *parts, domain=CONTRIB, num_heads=tower.heads)
        return mixed if whole else graph.node("Reshape", mixed, back)


def _matrix(graph: GraphWriter, tensors: Scoped, name: str) -> str:
    return graph.matrix(name, partial(tensors.read, f"{name}.weight"))


def _activated(graph: GraphWriter, x: str, bias: str, activation: str) -> str:
    """An activation function of x + bias, by the names that towers have for them."""
    if activation in ("gelu", "gelu_tanh"):
        op = "BiasGelu" if activation == "gelu" else "FastGelu"
        return graph.node(op, x, bias, domain=CONTRIB)
    added = graph.node("Add", x, bias)
    if activation == "relu":
        return graph.node("Relu", added)
    # SiLU is the sigmoid approximation of GELU without its factor.
    alpha = 1.702 if activation == "quick_gelu" else 1.0
    return graph.node("QuickGelu", added, domain=CONTRIB, alpha=alpha)


def _added_and_normed(
    graph: GraphWriter,
    states: tuple[str, str],
    weights: list[str],
    bias: str,
    eps: float,
    *,
    rms: bool,
) -> tuple[str, str]:
    """The sum of two states and a bias, and it after a norm, of one operator."""
    op = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
    normed, _, _, added = graph.nodes(
        op, *states, *weights, bias, outs=("", None, None, ""), domain=CONTRIB, epsilon=eps
    )
    return added, normed
