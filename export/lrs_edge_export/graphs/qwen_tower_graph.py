"""Qwen's vision transformers as a part of an ONNX graph."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs.onnx_writer import GraphWriter
from lrs_edge_export.graphs.transformer_graph import activated, affine


class QwenTransformer:
    """Patches, layers and the merger's norm; the projector joins patches."""

    def __init__(self, graph: GraphWriter, tower: QwenTower) -> None:
        self._graph = graph
        self._tower = tower

    def features(self, pixels: str) -> str:
        """Features [N, grid * grid, hidden * (1 + taps)], row after row."""
        graph, tower = self._graph, self._tower
        x = self._patches(pixels)
        turns = self._turns(pixels)
        taps = []
        for layer in range(tower.layers):
            x = self._layer(x, layer, turns)
            if layer in tower.taps:
                taps.append(x)
        x = self._norm(x, tower.last_norm)
        if taps:
            x = graph.node("Concat", x, *taps, axis=-1)
        return self._in_rows(x)

    def _patches(self, pixels: str) -> str:
        """Patches [N, grid * grid, hidden] in the order of the states."""
        graph, tower = self._graph, self._tower
        name = "embeddings.patch_embedding"
        inputs = [pixels, graph.kernel(name, tower.patch_kernel)]
        if tower.stem_bias:
            inputs.append(self._weight(f"{name}.bias"))
        sides = [tower.patch] * 2
        planes = graph.node("Conv", *inputs, label=name, kernel_shape=sides, strides=sides)
        side = tower.window or tower.grid
        blocks = graph.constant([0, tower.hidden, *([tower.grid // side, side] * 2)])
        windows = graph.node(
            "Transpose", graph.node("Reshape", planes, blocks), perm=[0, 2, 4, 3, 5, 1]
        )
        x = graph.node("Reshape", windows, graph.constant([0, tower.grid**2, tower.hidden]))
        if not tower.table_grid:
            return x
        return graph.node("Add", x, graph.weight(f"{name}.positions", self._ordered_positions))

    def _ordered_positions(self) -> Array:
        rows, cols = self._tower.order()
        ordered: Array = self._tower.positions()[rows * self._tower.grid + cols]
        return ordered

    def _in_rows(self, x: str) -> str:
        """States as rows of patches."""
        graph, tower = self._graph, self._tower
        if not tower.window:
            return x
        count = tower.grid // tower.window
        width = tower.hidden * (1 + len(tower.taps))
        blocks = graph.constant([0, count, count, tower.window, tower.window, width])
        rows = graph.node("Transpose", graph.node("Reshape", x, blocks), perm=[0, 1, 3, 2, 4, 5])
        return graph.node("Reshape", rows, graph.constant([0, tower.grid**2, width]))

    def _turns(self, pixels: str) -> list[str]:
        """Cosine and sine [N, grid * grid, head_dim / 2] of rows and columns."""
        graph, tower = self._graph, self._tower
        batch = graph.node("Shape", pixels, start=0, end=1)
        half = tower.head_dim // 2
        shape = graph.node("Concat", batch, graph.constant([tower.grid**2, half]), axis=0)
        tables = zip(("cos", "sin"), _tables(tower), strict=True)
        return [
            graph.node("Expand", graph.weight(f"rope.{name}", partial(np.asarray, table)), shape)
            for name, table in tables
        ]

    def _layer(self, x: str, layer: int, turns: list[str]) -> str:
        graph, name = self._graph, f"encoder.layers.{layer}"
        normed = self._norm(x, f"{name}.layer_norm1")
        mixed = self._attention(normed, layer, name, turns)
        x = graph.node("Add", x, self._linear(mixed, f"{name}.self_attn.out_proj"))
        return graph.node("Add", x, self._mlp(self._norm(x, f"{name}.layer_norm2"), name))

    def _mlp(self, x: str, name: str) -> str:
        graph, tower = self._graph, self._tower
        if not tower.gated:
            wide = activated(graph, self._linear(x, f"{name}.mlp.fc1"), tower.activation)
            return self._linear(wide, f"{name}.mlp.fc2")
        gate = activated(graph, self._linear(x, f"{name}.mlp.gate_proj"), tower.activation)
        wide = graph.node("Mul", gate, self._linear(x, f"{name}.mlp.up_proj"))
        return self._linear(wide, f"{name}.mlp.down_proj")

    def _attention(self, x: str, layer: int, name: str, turns: list[str]) -> str:
        graph, tower = self._graph, self._tower
        query, key, value = self._turned(x, name, turns)
        # A window is a batch of its own.
        places = tower.places_of(layer)
        scaled = graph.node("Mul", query, graph.real(tower.head_dim**-0.5))
        products = graph.node(
            "MatMul",
            self._heads(scaled, places, [0, 2, 1, 3]),
            self._heads(key, places, [0, 2, 3, 1]),
        )
        weights = graph.node("Softmax", products, axis=-1)
        mixed = graph.node("MatMul", weights, self._heads(value, places, [0, 2, 1, 3]))
        rows = graph.node("Transpose", mixed, perm=[0, 2, 1, 3])
        return graph.node("Reshape", rows, graph.constant([-1, tower.grid**2, tower.hidden]))

    def _turned(self, x: str, name: str, turns: list[str]) -> tuple[str, str, str]:
        """Queries and keys after RoPE, and values, [N, grid * grid, hidden] each."""
        graph, tower = self._graph, self._tower
        packed = self._linear(x, f"{name}.self_attn.qkv_proj")
        widths = graph.constant([tower.hidden] * 3)
        query, key, value = graph.nodes("Split", packed, widths, outs=("", "", ""), axis=-1)
        query, key = (
            graph.node("RotaryEmbedding", part, *turns, num_heads=tower.heads)
            for part in (query, key)
        )
        return query, key, value

    def _heads(self, x: str, places: int, order: list[int]) -> str:
        graph, tower = self._graph, self._tower
        shape = graph.constant([-1, places, tower.heads, tower.head_dim])
        return graph.node("Transpose", graph.node("Reshape", x, shape), perm=order)

    def _norm(self, x: str, name: str) -> str:
        tower, weights = self._tower, self._norm_weights(name)
        op = "RMSNormalization" if tower.rms_norm else "LayerNormalization"
        return self._graph.node(op, x, *weights, axis=-1, epsilon=tower.eps)

    def _norm_weights(self, name: str) -> list[str]:
        parts = ("weight",) if self._tower.rms_norm else ("weight", "bias")
        return [self._weight(f"{name}.{part}") for part in parts]

    def _weight(self, name: str) -> str:
        return self._graph.weight(name, partial(self._tower.tensors.read, name))

    def _linear(self, x: str, name: str) -> str:
        return affine(self._graph, x, self._tower.tensors, name, name)


def _tables(tower: QwenTower) -> tuple[Array, Array]:
    """Cosine and sine float32 [grid * grid, head_dim / 2], by torch as in transformers.

    The first half of the frequencies turns by the row, the second by the column.
    """
    width = tower.head_dim // 2
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / (tower.theta**exponents)
    angles = [torch.from_numpy(axis)[:, None].float() * frequencies for axis in tower.order()]
    turned = torch.cat(angles, dim=1)
    return np.asarray(turned.cos()), np.asarray(turned.sin())
