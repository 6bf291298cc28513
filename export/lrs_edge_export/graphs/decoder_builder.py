"""The parts of decoder graphs: norms, attention over static key/value buffers, MLPs, scores.

RoPE needs no table: cosine and sine of the given positions are computed in float32, as transformers
does, so that no table limits positions (as far out as positions go, `tests/test_export_graphs.py`).
GroupQueryAttention wants tables all the same, and gets them of these (`decoder_places.py`).
A token may have several positions (`DecoderConfig.rope_axes`): each frequency then turns by the
position of its axis, and nothing after the angles differs.
Query, key and value come out of one matrix product, which with RoPE inside makes decoding 5 to 7 %
faster (`docs/benchmarks.md`); where queries and keys have norms, these stand between both.
GroupQueryAttention takes heads of a multiple of 8 and turns those of a multiple of 16: others are
turned before it, and filled up with zeros, which change no product.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lrs_edge_export.checkpoints.model import DecoderStage
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs.decoder_places import DevicePlaces, Places
from lrs_edge_export.graphs.heads import cut, filled, rotations
from lrs_edge_export.graphs.onnx_writer import CONTRIB, GraphWriter
from lrs_edge_export.graphs.weight_file import WeightFile

Flavour = Literal["gqa", "masked"]

_END = np.iinfo(np.int64).max


class DecoderBuilder:
    """Shared parts of both graphs; values are names in `graph`.

    Args:
        stage: The stack.
        flavour: Kind of attention.
        weights: The graph's external data.
        name: Of the graph.
        kv_scales: See `decoder_graph.write_llm`.
        inner: The graph begins between layers: it takes their hidden states, and nothing that is
            added later (`DecoderConfig.deepstack`).
        on_device: Nothing that a kernel of CUDA reads on the host is made of what another made on
            the device, nor the other way round (`DevicePlaces`); for stacks without `scores`.
    """

    def __init__(
        self,
        stage: DecoderStage,
        flavour: Flavour,
        weights: WeightFile,
        name: str,
        kv_scales: Mapping[str, Array] | None = None,
        *,
        inner: bool = False,
        on_device: bool = False,
    ) -> None:
        config = stage.config
        self._kv_scales = kv_scales
        self._stage = stage
        self._config = config
        self._buffers: list[str] = []
        self._queries: dict[int, str] = {}
        self.graph = graph = GraphWriter(f"{name}_{flavour}", weights, n_bits=True)
        width = config.hidden if inner else config.width
        self._embeds = graph.from_float32(graph.input("inputs_embeds", (1, "L", width)))
        self._added: list[str] = []
        if width > config.hidden:
            widths = graph.constant([config.hidden] * (1 + config.deepstack))
            outs = ("",) * (1 + config.deepstack)
            parts = graph.nodes("Split", self._embeds, widths, outs=outs, axis=-1)
            self._embeds, *self._added = parts
        positions = graph.input("position_ids", (config.position_axes, "L"), np.int64)
        self._past = graph.input("past_length", (1,), np.int64)
        self._bias = ""
        if flavour == "masked":
            bias = graph.input("attention_bias", (1, 1, "L", "T"))
            self._bias = graph.from_float32(graph.node("Unsqueeze", bias, graph.constant([1])))
        kind = DevicePlaces if on_device else Places
        self._places = kind(graph, positions, self._past)
        self._cos, self._sin = rotations(graph, config, positions)
        self._tables: tuple[str, str, str] | None = None

    def save(self, path: Path) -> None:
        """Declare the buffers as outputs, in the order of the inputs, and write the graph."""
        for name in self._buffers:
            self.graph.output(f"present_{name}", self._buffer_shape, self._buffer_kind)
        self.graph.save(path)

    @property
    def _buffer_shape(self) -> tuple[int | str, ...]:
        return (1, self._config.kv_heads, "S", self._config.buffer_dim)

    @property
    def _buffer_kind(self) -> type:
        return self.graph.floats if self._kv_scales is None else np.int8

    def _buffer(self, name: str) -> str:
        self._buffers.append(name)
        return self.graph.input(f"past_{name}", self._buffer_shape, self._buffer_kind)

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self._config.heads

    @property
    def hidden(self) -> int:
        """Width D."""
        return self._config.hidden

    @property
    def attended_width(self) -> int:
        """Width H * d of what a layer's heads read."""
        return self._config.heads * self._config.head_dim

    @property
    def width(self) -> int:
        """Width of `inputs_embeds`."""
        return self._config.width

    @property
    def embeds(self) -> str:
        """`inputs_embeds` in the graph's floats, [1, L, D] of them."""
        return self._embeds

    def layers(self, first: int, end: int, *, keep_query: bool = False) -> str:
        """Run `inputs_embeds` through layers first .. end - 1.

        Args:
            first: First layer.
            end: Layer after the last.
            keep_query: `last_attention` is wanted of the last layer.

        Returns:
            The output [1, L, D].
        """
        return self.layers_after(self._embeds, first, end, keep_query=keep_query)

    def layers_after(self, x: str, first: int, end: int, *, keep_query: bool = False) -> str:
        """As `layers`, of states x [1, L, D]."""
        for layer in range(first, end):
            if self._turns_outside or (keep_query and layer == end - 1):
                mixed = self.attended(x, layer)
            else:
                normed = self.norm(x, f"layers.{layer}.input_layernorm.weight")
                mixed = self._attend_packed(normed, layer)
            x = self.completed(x, mixed, layer)
        return x

    @property
    def _turns_outside(self) -> bool:
        """Whether queries and keys are turned before the operator that attends."""
        return bool(self._bias) or self._config.head_dim % 16 != 0

    def attended(self, x: str, layer: int) -> str:
        """What a layer's heads read [1, L, H * d] for states x; `last_attention` can follow."""
        normed = self.norm(x, f"layers.{layer}.input_layernorm.weight")
        return self._attend_turned(normed, layer)

    def completed(self, x: str, mixed: str, layer: int) -> str:
        """A layer's output [1, L, D] for its input x and what its heads read."""
        bias = self._config.out_bias
        x = self.graph.node("Add", x, self._linear(mixed, layer, "self_attn.o_proj", bias=bias))
        x = self._mlp(x, layer)
        return self.graph.node("Add", x, self._added[layer]) if layer < len(self._added) else x

    def with_added(self, x: str) -> str:
        """States [1, L, D] with what later layers add beside them, as `inputs_embeds` has it."""
        return self.graph.node("Concat", x, *self._added, axis=-1) if self._added else x

    def last_token(self, x: str) -> str:
        """The last token [1, 1, ...] of [1, L, ...]."""
        return self.graph.node("Gather", x, self.graph.constant([-1]), axis=1)

    def norm(self, x: str, name: str) -> str:
        """RMS norm with a weight of the stage."""
        scale = self.graph.weight(name, lambda: self._stage.tensors.read(name))
        return self.graph.node("RMSNormalization", x, scale, axis=-1, epsilon=self._config.eps)

    def last_attention(self, layer: int) -> str:
        """Scaled query-key products [H, T] of the last token at a layer that was run."""
        graph = self.graph
        present = graph.node(
            "Slice",
            f"present_key_{layer}",
            graph.constant([0]),
            self._end,
            graph.constant([2]),
        )
        keys = graph.node("Transpose", present, perm=[0, 1, 3, 2])
        return self._products(self.last_token(self._queries[layer]), keys)

    def scores(self, x: str, layer: int) -> str:
        """Scaled query-key products [H, T] of the last token at a layer that is not run itself."""
        graph, config = self.graph, self._config
        normed = self.norm(x, f"layers.{layer}.input_layernorm.weight")
        if self._stage.scoring and not self._stage.of_llm:
            # Of the RFM's scoring layer there are no values, and one query is enough.
            key = self._normed_heads(self._projected(normed, layer, "k"), layer, "k")
            query = self._projected(self.last_token(normed), layer, "q")
            query = self._normed_heads(query, layer, "q")
        else:
            query, key, _ = self._vectors(normed, layer)
            query = self.last_token(query)
        keys = graph.node(
            "Transpose",
            self._extended(
                f"key_{layer}", filled(graph, config, self._rotated(key, config.kv_heads))
            ),
            perm=[0, 1, 3, 2],
        )  # [1, kv, d, T]
        query = graph.node(
            "RotaryEmbedding",
            query,
            self.last_token(self._cos),
            self.last_token(self._sin),
            num_heads=config.heads,
        )
        return self._products(filled(graph, config, query), keys)

    @property
    def _end(self) -> str:
        """The place after the last filled one, int64 [1] on the host."""
        if not isinstance(self._places, Places):
            raise ValueError("graphs that give scores are not written for the device alone")
        return self._places.end

    def _products(self, query: str, keys: str) -> str:
        """Products [H, T] of one token's query [1, 1, H * d] with keys [1, kv, d, T]."""
        graph, config = self.graph, self._config
        grouped = graph.node(
            "Reshape", query, graph.constant([1, config.kv_heads, -1, config.buffer_dim])
        )
        # In float32 whatever the graph's type: keys of Qwen2 are large, and this is one row.
        scaled = graph.to_float32(self._scaled(grouped))
        products = graph.node("MatMul", scaled, graph.to_float32(keys))
        return graph.node("Reshape", products, graph.constant([config.heads, -1]))

    def _mlp(self, x: str, layer: int) -> str:
        graph = self.graph
        normed = self.norm(x, f"layers.{layer}.post_attention_layernorm.weight")
        gate = self._linear(normed, layer, "mlp.gate_proj")
        silu = graph.node("Mul", gate, graph.node("Sigmoid", gate))
        wide = graph.node("Mul", silu, self._linear(normed, layer, "mlp.up_proj"))
        return graph.node("Add", x, self._linear(wide, layer, "mlp.down_proj", outliers=True))

    def _attend_packed(self, normed: str, layer: int) -> str:
        """Attention in one operator, RoPE included."""
        if self._tables is None:
            buffer = f"past_key_{layer}"
            self._tables = self._places.tables(self._cos, self._sin, buffer)
        if self._config.qk_norm:
            return self._gqa(self._vectors(normed, layer), layer, self._tables)
        return self._gqa([self._packed(normed, layer), "", ""], layer, self._tables)

    def _attend_turned(self, normed: str, layer: int) -> str:
        """Attention over queries and keys that are turned outside of it."""
        graph, config = self.graph, self._config
        query, key, value = self._vectors(normed, layer)
        query = filled(graph, config, self._rotated(query, self._config.heads))
        key = filled(graph, config, self._rotated(key, self._config.kv_heads))
        value = filled(graph, config, value)
        self._queries[layer] = query
        if self._bias:
            return cut(graph, config, self._attend_masked(query, key, value, layer))
        return cut(graph, config, self._gqa([query, key, value], layer, None))

    def _gqa(self, vectors: list[str], layer: int, tables: tuple[str, str, str] | None) -> str:
        names = f"key_{layer}", f"value_{layer}"
        buffers = [self._buffer(name) for name in names]
        inputs = [*vectors, *buffers, self._places.last, self._places.total]
        attributes: dict[str, Any] = {
            "num_heads": self._config.heads,
            "kv_num_heads": self._config.kv_heads,
        }
        if self._config.buffer_dim != self._config.head_dim:
            attributes["scale"] = self._config.head_dim**-0.5
        if tables is not None:
            inputs += tables
            attributes["do_rotary"] = 1
        if self._kv_scales is not None:
            # Up to input 11 there could be tables, a bias and sinks.
            inputs += [""] * (12 - len(inputs)) + [self._kv_scale(name) for name in names]
            attributes |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL"}
            attributes["v_quant_type"] = "PER_CHANNEL"
        outputs = ("", *(f"present_{name}" for name in names))
        return self.graph.nodes(
            "GroupQueryAttention", *inputs, outs=outputs, domain=CONTRIB, **attributes
        )[0]

    def _kv_scale(self, name: str) -> str:
        assert self._kv_scales is not None
        scales = self._kv_scales[name]
        return self.graph.weight(f"{name}.scale", lambda: scales, np.float32)

    def _attend_masked(self, query: str, key: str, value: str, layer: int) -> str:
        """Attention as [1, kv, group, L, d] against [1, kv, 1, T, d]."""
        graph, config = self.graph, self._config
        keys = self._extended(f"key_{layer}", key)
        values = self._extended(f"value_{layer}", value)
        one_group = graph.constant([2])
        keys = graph.node("Unsqueeze", graph.node("Transpose", keys, perm=[0, 1, 3, 2]), one_group)
        values = graph.node("Unsqueeze", values, one_group)
        group = config.heads // config.kv_heads
        split = graph.constant([1, -1, config.kv_heads, group, config.buffer_dim])
        queries = graph.node("Transpose", graph.node("Reshape", query, split), perm=[0, 2, 3, 1, 4])
        products = graph.node("MatMul", self._scaled(queries), keys)
        weights = graph.node("Softmax", graph.node("Add", products, self._bias), axis=-1)
        mixed = graph.node("Transpose", graph.node("MatMul", weights, values), perm=[0, 3, 1, 2, 4])
        return graph.node(
            "Reshape", mixed, graph.constant([1, -1, config.heads * config.buffer_dim])
        )

    def _extended(self, name: str, new: str) -> str:
        """Write new keys or values [1, L, kv * d] after the past ones in a buffer.

        `present_*` may be the memory of `past_*`: both slices are copies made before it is written.

        Returns:
            The filled part [1, kv, T, d].
        """
        graph, config = self.graph, self._config
        past = self._buffer(name)
        shape = graph.constant([1, -1, config.kv_heads, config.buffer_dim])
        heads = graph.node("Transpose", graph.node("Reshape", new, shape), perm=[0, 2, 1, 3])
        axis = graph.constant([2])
        before = graph.node("Slice", past, graph.constant([0]), self._past, axis)
        after = graph.node("Slice", past, self._end, graph.constant([_END]), axis)
        whole = graph.node("Concat", before, heads, axis=2)
        graph.node("Concat", whole, after, axis=2, out=f"present_{name}")
        return whole

    def _packed(self, x: str, layer: int) -> str:
        """Query, key and value [1, L, (heads + 2 kv_heads) * d] of one product, before RoPE."""
        stage, name = self._stage, f"layers.{layer}.self_attn"

        def joined(kind: str) -> Array:
            parts = [stage.read(layer, f"self_attn.{part}_proj.{kind}") for part in "qkv"]
            return np.concatenate(parts)

        bias = (lambda: joined("bias")) if self._config.qkv_bias else None
        return self.graph.linear(x, f"{name}.qkv_proj", lambda: joined("weight"), bias)

    def _vectors(self, x: str, layer: int) -> list[str]:
        """Query, key and value [1, L, heads * d] of one product, after their norms, before RoPE."""
        config, packed = self._config, self._packed(x, layer)
        sizes = [config.heads, config.kv_heads, config.kv_heads]
        lengths = self.graph.constant([size * config.head_dim for size in sizes])
        query, key, value = self.graph.nodes("Split", packed, lengths, outs=("", "", ""), axis=-1)
        return [
            self._normed_heads(query, layer, "q"),
            self._normed_heads(key, layer, "k"),
            value,
        ]

    def _normed_heads(self, x: str, layer: int, part: str) -> str:
        """Queries or keys [1, L, heads * d] after the norm of each head, where there is one."""
        if not self._config.qk_norm:
            return x
        graph, width = self.graph, self._config.head_dim
        heads = graph.node("Reshape", x, graph.constant([0, 0, -1, width]))
        normed = self.norm(heads, f"layers.{layer}.self_attn.{part}_norm.weight")
        return graph.node("Reshape", normed, graph.constant([0, 0, -1]))

    def _projected(self, x: str, layer: int, part: str) -> str:
        """Query, key or value [1, L, heads * d], before RoPE."""
        return self._linear(x, layer, f"self_attn.{part}_proj", bias=self._config.qkv_bias)

    def _linear(
        self, x: str, layer: int, name: str, *, bias: bool = False, outliers: bool = False
    ) -> str:
        stage = self._stage
        return self.graph.linear(
            x,
            f"layers.{layer}.{name}",
            lambda: stage.read(layer, f"{name}.weight"),
            (lambda: stage.read(layer, f"{name}.bias")) if bias else None,
            outliers=outliers,
        )

    def _rotated(self, x: str, heads: int) -> str:
        return self.graph.node("RotaryEmbedding", x, self._cos, self._sin, num_heads=heads)

    def _scaled(self, x: str) -> str:
        return self.graph.node("Mul", x, self.graph.real(self._config.head_dim**-0.5))
