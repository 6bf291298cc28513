"""Vision transformers and projectors as parts of ONNX graphs."""

from __future__ import annotations

from functools import partial

from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.towers import TransformerTower
from lrs_edge_export.graphs.onnx_writer import GraphWriter


class Transformer:
    """A vision transformer up to the selected hidden state, without the class token."""

    def __init__(self, graph: GraphWriter, tower: TransformerTower) -> None:
        self._graph = graph
        self._tower = tower
        self._head_dim = tower.hidden // tower.heads
        self._last: tuple[str, str] | None = None
        self._states = ""

    def features(self, pixels: str) -> str:
        """Features [N, grid * grid, width]."""
        x, tower = self._embedded(pixels), self._tower
        if tower.first_norm:
            x = self._norm(x, tower.first_norm)
        states = [x]
        for layer in range(tower.layers):
            x = self._layer(x, f"encoder.layers.{layer}")
            states.append(x)
        self._states = x
        if tower.last_norm:
            x = self._norm(x, tower.last_norm)
        if tower.states:
            x = self._graph.node("Concat", *(states[state] for state in tower.states), axis=-1)
        return self._patches(x) if tower.class_token else x

    def last_attention(self) -> tuple[str, str]:
        """Attention of the class token [N, T] and keys [N, T, d] of the last layer, head means."""
        assert self._last is not None
        graph, (weights, keys) = self._graph, self._last
        heads = graph.constant([1])
        rows = graph.node("ReduceMean", weights, heads, keepdims=0)
        row = graph.node("Gather", rows, graph.constant(0), axis=1)
        columns = graph.node("ReduceMean", keys, heads, keepdims=0)
        return self._patches(row), self._patches(graph.node("Transpose", columns, perm=[0, 2, 1]))

    def next_attention(self) -> tuple[str, str]:
        """Attention of the class token [N, T] and keys [N, T, W] of the layer after the last run.

        All heads are taken as one, as LLaVA-PruMerge does.
        """
        graph, name = self._graph, f"encoder.layers.{self._tower.layers}"
        normed = self._norm(self._states, f"{name}.layer_norm1")
        first = graph.node("Gather", normed, graph.constant([0]), axis=1)
        query = self._linear(first, f"{name}.self_attn.q_proj")
        keys = self._linear(normed, f"{name}.self_attn.k_proj")
        scale = graph.real(self._tower.hidden**-0.5)
        products = graph.node(
            "MatMul",
            graph.node("Mul", query, scale),
            graph.node("Transpose", keys, perm=[0, 2, 1]),
        )
        row = graph.node("Squeeze", graph.node("Softmax", products, axis=-1), graph.constant([1]))
        return self._patches(row), self._patches(keys)

    def _patches(self, x: str) -> str:
        """All but the class token, along axis 1."""
        bounds = (self._graph.constant([place]) for place in (1, self._tower.places, 1))
        return self._graph.node("Slice", x, *bounds)

    def _weight(self, name: str) -> str:
        return self._graph.weight(name, lambda: self._tower.tensors.read(name))

    def _embedded(self, pixels: str) -> str:
        """Patches, after the class token if there is one, with positions: [N, places, hidden]."""
        graph, tower, rows = self._graph, self._tower, self._rows(pixels)
        if tower.class_token:
            batch = graph.node("Shape", pixels, start=0, end=1)
            shape = graph.node("Concat", batch, graph.constant([1, tower.hidden]), axis=0)
            row = graph.weight("embeddings.class_embedding", tower.first_place)
            first = graph.node("Expand", row, shape)
            rows = graph.node("Concat", first, rows, axis=1)
        positions = graph.weight("embeddings.position_embedding.weight", tower.positions)
        return graph.node("Add", rows, positions)

    def _rows(self, pixels: str) -> str:
        """Patches [N, grid * grid, hidden], row after row, without positions."""
        graph, tower = self._graph, self._tower
        name = "embeddings.patch_embedding"
        kernel = graph.kernel(name, lambda: tower.tensors.read(f"{name}.weight"))
        patches = graph.node(
            "Conv",
            *(pixels, kernel, *([self._weight(f"{name}.bias")] if tower.patch_bias else ())),
            label=name,
            kernel_shape=[tower.patch] * 2,
            strides=[tower.patch] * 2,
        )
        flat = graph.node("Reshape", patches, graph.constant([0, tower.hidden, tower.grid**2]))
        return graph.node("Transpose", flat, perm=[0, 2, 1])

    def _norm(self, x: str, name: str) -> str:
        if self._tower.rms_norms and name != self._tower.last_norm:
            return self._rms(x, name, self._tower.eps)
        scale, shift = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self._graph.node(
            "LayerNormalization", x, scale, shift, axis=-1, epsilon=self._tower.eps
        )

    def _rms(self, x: str, name: str, eps: float) -> str:
        scale = self._weight(f"{name}.weight")
        return self._graph.node("RMSNormalization", x, scale, axis=-1, epsilon=eps)

    def _projected(self, x: str, name: str) -> str:
        """A query, key or value projection; its norm, if it has one."""
        tower, tensors = self._tower, self._tower.tensors
        bias = partial(tensors.read, f"{name}.bias") if tower.attention_bias else None
        y = self._graph.linear(x, name, partial(tensors.read, f"{name}.weight"), bias)
        if tower.attention_norm and not name.endswith("v_proj"):
            return self._rms(y, name.replace("_proj", "_norm"), tower.attention_eps)
        return y

    def _scaled(self, x: str, name: str) -> str:
        return self._graph.node("Mul", x, self._weight(name)) if self._tower.layer_scale else x

    def _linear(self, x: str, name: str) -> str:
        return affine(self._graph, x, self._tower.tensors, name, name)

    def _layer(self, x: str, name: str) -> str:
        graph = self._graph
        normed = self._norm(x, f"{name}.layer_norm1")
        mixed = self._linear(self._attention(normed, name), f"{name}.self_attn.out_proj")
        x = graph.node("Add", x, self._scaled(mixed, f"{name}.layer_scale1"))
        wide = self._linear(self._norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")
        narrow = self._linear(self._activated(wide), f"{name}.mlp.fc2")
        return graph.node("Add", x, self._scaled(narrow, f"{name}.layer_scale2"))

    def _attention(self, x: str, name: str) -> str:
        graph, tower = self._graph, self._tower
        scale = graph.real(self._head_dim**-0.5)
        query = self._heads(self._projected(x, f"{name}.self_attn.q_proj"), [0, 2, 1, 3])
        key = self._heads(self._projected(x, f"{name}.self_attn.k_proj"), [0, 2, 3, 1])
        value = self._heads(self._projected(x, f"{name}.self_attn.v_proj"), [0, 2, 1, 3])
        products = graph.node("MatMul", graph.node("Mul", query, scale), key)
        weights = graph.node("Softmax", products, axis=-1)
        self._last = weights, key
        mixed = graph.node("MatMul", weights, value)
        rows = graph.node("Transpose", mixed, perm=[0, 2, 1, 3])
        return graph.node("Reshape", rows, graph.constant([0, self._tower.places, tower.hidden]))

    def _heads(self, x: str, order: list[int]) -> str:
        shape = self._graph.constant([0, self._tower.places, self._tower.heads, self._head_dim])
        return self._graph.node("Transpose", self._graph.node("Reshape", x, shape), perm=order)

    def _activated(self, x: str) -> str:
        return activated(self._graph, x, self._tower.activation)


def affine(graph: GraphWriter, x: str, tensors: Scoped, name: str, label: str) -> str:
    """Linear with bias, of tensors `{name}.weight` and `{name}.bias`."""
    return graph.linear(
        x, label, lambda: tensors.read(f"{name}.weight"), lambda: tensors.read(f"{name}.bias")
    )


def activated(graph: GraphWriter, x: str, activation: str) -> str:
    """An activation function, by the names that towers and projectors have for them."""
    if activation == "quick_gelu":
        return graph.node("Mul", x, graph.node("Sigmoid", graph.node("Mul", x, graph.real(1.702))))
    if activation == "silu":
        return graph.node("Mul", x, graph.node("Sigmoid", x))
    if activation == "relu":
        return graph.node("Relu", x)
    return graph.node("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")


def projected(
    graph: GraphWriter, features: str, projector: Projector, grid: int, width: int
) -> str:
    """Tokens [N, T, D] of features [N, grid * grid, width]; any number of them without a shuffle.

    Args:
        graph: The graph.
        features: Value.
        projector: The projector.
        grid: Features along a tile's side.
        width: Of the features.
    """
    x, tensors, factor = features, projector.tensors, projector.shuffle
    if factor > 1:
        side, joined = grid // factor, width * factor**2
        squares = graph.constant([0, side, factor, side, factor, width])
        x = graph.node("Transpose", graph.node("Reshape", x, squares), perm=[0, 1, 3, 2, 4, 5])
        x = graph.node("Reshape", x, graph.constant([0, side**2, joined]))
    if projector.norm:
        scale, shift = (
            graph.weight(
                f"{projector.name}.norm.{part}", partial(tensors.read, f"{projector.norm}.{part}")
            )
            for part in ("weight", "bias")
        )
        x = graph.node("LayerNormalization", x, scale, shift, axis=-1, epsilon=projector.eps)
    for number, name in enumerate(projector.linears):
        if number:
            x = activated(graph, x, projector.activation)
        bias = partial(tensors.read, f"{name}.bias") if projector.bias else None
        label = projector.label(number)
        x = graph.linear(x, label, partial(tensors.read, f"{name}.weight"), bias)
    return x
