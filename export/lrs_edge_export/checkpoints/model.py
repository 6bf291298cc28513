"""The canonical three stages: what every checkpoint family becomes before graphs are written.

Weights stay on disk; a stage knows where they are and what shapes they must have.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lrs_edge.bundle.layout import PromptSpec
from lrs_edge.bundle.manifest import Limits
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.rope import RopeScaling
from lrs_edge_export.checkpoints.rows import Rows
from lrs_edge_export.checkpoints.tensors import Array, Scoped, Shapes
from lrs_edge_export.checkpoints.vision import VisionStage


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a LLaMA-like stack: RMSNorm, grouped-query attention, rotate-half RoPE, SwiGLU.

    Attributes:
        layers: Full layers n.
        hidden: Width D.
        heads: Query heads H.
        kv_heads: Key and value heads; H is a multiple.
        head_dim: Width of one head, even.
        intermediate: Width of the MLP.
        eps: Of the norms.
        theta: Base of RoPE's frequencies.
        qkv_bias: Whether query, key and value projections have a bias (Qwen2).
        rope_axes: Which of a token's k positions each of RoPE's head_dim / 2 frequencies turns by,
            0 .. k - 1 (Qwen's multimodal RoPE); empty where a token has one position.
        qk_norm: Whether queries and keys pass an RMS norm each before RoPE, head by head (Qwen3).
        deepstack: Vectors that a token brings besides its embedding: the first is added to what
            layer 0 gives, the next to what layer 1 gives, ... (Qwen3-VL). Those of text are zero.
        scaling: What changes RoPE's frequencies; None for nothing.
        out_bias: Whether the projection of what attention gives has a bias.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    theta: float
    qkv_bias: bool
    rope_axes: tuple[int, ...] = ()
    qk_norm: bool = False
    deepstack: int = 0
    scaling: RopeScaling | None = None
    out_bias: bool = False

    @property
    def position_axes(self) -> int:
        """Positions k of a token."""
        return max(self.rope_axes, default=0) + 1

    @property
    def buffer_dim(self) -> int:
        """Width of one head in key/value buffers: zeros fill it up to a multiple of 8."""
        return -(-self.head_dim // 8) * 8

    @property
    def width(self) -> int:
        """Width of a token as graphs take it: its embedding, then what is added later."""
        return self.hidden * (1 + self.deepstack)

    @property
    def weights(self) -> int:
        """Weights of all layers' matrices."""
        attention = 2 * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * self.hidden * (attention + 3 * self.intermediate)


@dataclass(frozen=True)
class DecoderStage:
    """Decoder layers `layers.{i}.*` of one source.

    Attributes:
        config: Sizes.
        tensors: Source scoped to the stack.
        scoring: True for the RFM: layer n holds an input norm, query and key projections only.
        of_llm: True for an RFM that is the first layers of the language model: its graphs read the
            language model's weights, in which layer n is whole.
    """

    config: DecoderConfig
    tensors: Scoped
    scoring: bool = False
    of_llm: bool = False

    def check(self, what: str) -> None:
        """Check all tensors against the config. Raises ExportError."""
        shapes: Shapes = {}
        for layer in range(self.config.layers + self.scoring):
            scoring = layer == self.config.layers
            for name, shape in layer_shapes(self.config, scoring=scoring).items():
                shapes[f"layers.{layer}.{name}"] = shape
        self.tensors.require(shapes, what)
        self._refuse_more_layers(what)
        known = set(layer_shapes(self.config))
        self.tensors.refuse_others(r"layers\.\d+\.", known, what)

    def _refuse_more_layers(self, what: str) -> None:
        """A config that names fewer layers than there are would export a model that is cut off."""
        count = self.config.layers + self.scoring
        found = {
            int(name.split(".")[1])
            for name in self.tensors.names()
            if re.match(r"layers\.\d+\.", name)
        }
        if max(found) >= count:
            raise ExportError(
                f"{what}: the checkpoint has {self.tensors.prefix}layers.{max(found)}, config.json "
                f"asks for {count} layers; weights and config do not belong together"
            )

    def read(self, layer: int, name: str) -> Array:
        """One weight of a layer, such as `self_attn.q_proj.weight`, float32."""
        return self.tensors.read(f"layers.{layer}.{name}")


def layer_shapes(config: DecoderConfig, *, scoring: bool = False) -> Shapes:
    """Shapes of one layer's weights, by names such as `self_attn.q_proj.weight`.

    Args:
        config: Sizes.
        scoring: Only those that a scoring layer's scores depend on.
    """
    hidden, wide = config.hidden, config.intermediate
    inner, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: Shapes = {"input_layernorm.weight": (hidden,)}
    widths = {"q": inner, "k": narrow}
    if not scoring:
        shapes["post_attention_layernorm.weight"] = (hidden,)
        widths["v"] = narrow
    shapes |= {f"self_attn.{part}_proj.weight": (width, hidden) for part, width in widths.items()}
    if config.qkv_bias:
        shapes |= {f"self_attn.{part}_proj.bias": (width,) for part, width in widths.items()}
    if config.qk_norm:
        shapes |= {f"self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
    if scoring:
        return shapes
    if config.out_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    return shapes | {
        "self_attn.o_proj.weight": (hidden, inner),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }


@dataclass(frozen=True)
class Repetition:
    """Repetition penalty, and what counts as generated from the start: tokens, and the prompt's."""

    penalty: float
    penalised_ids: tuple[int, ...]
    prompt: bool = False


@dataclass(frozen=True)
class PositionTables:
    """Learned embeddings of image rows and columns, added to vision tokens by the runtime.

    Attributes:
        entries: G, rows of each table.
        rows: Reads float32 [G, D], top to bottom.
        cols: Reads float32 [G, D], left to right.
    """

    entries: int
    rows: Callable[[], Array]
    cols: Callable[[], Array]


@dataclass(frozen=True)
class Model:
    """A checkpoint in canonical form.

    Attributes:
        family: Name of the reader.
        vision: Vision encoder with projector.
        rfm: Region Focus Module; None where the checkpoint has none.
        llm: Language model's layers and `norm.weight`.
        embed_tokens: The embedding table, [V, D].
        lm_head: The output projection, [V, D].
        image_newline: Reads the newline vector, float32 [D].
        vocabulary: V, the tokenizer's length: rows beyond it can never be chosen.
        tokenizer_json: The tokenizer in the format of the `tokenizers` library.
        prompt: Layout and special tokens.
        base_side: Long side of the base level in pixels.
        limits: Lengths in tokens.
        repetition: Applies to greedy decoding too.
        folders: Where everything was read from.
        positions: Position embeddings of vision tokens, where the model has them.
        notes: What the user should know, such as values that the checkpoint does not state.
    """

    family: str
    vision: VisionStage
    rfm: DecoderStage | None
    llm: DecoderStage
    embed_tokens: Rows
    lm_head: Rows
    image_newline: Callable[[], Array]
    vocabulary: int
    tokenizer_json: str
    prompt: PromptSpec
    base_side: int
    limits: Limits
    repetition: Repetition
    folders: tuple[Path, ...]
    positions: PositionTables | None = None
    notes: tuple[str, ...] = ()

    @property
    def region_focus(self) -> DecoderStage:
        """The Region Focus Module.

        Raises:
            ExportError: There is none.
        """
        if self.rfm is None:
            raise ExportError(
                f"{self.folders[0]} holds no region focus module; export it with --rfm "
                "from-llm, which scores by the language model's own first layers, or train "
                "one with `lrs-edge distill` and export its result"
            )
        return self.rfm

    def with_rfm_of_llm(self, layers: int) -> Model:
        """The model whose RFM is the language model's first layers; the next one scores.

        Args:
            layers: Full layers n of the RFM.

        Raises:
            ExportError: The language model has not so many.
        """
        most = self.llm.config.layers - 1
        if not 1 <= layers <= most:
            raise ExportError(
                f"--rfm from-llm:{layers}: the language model has {most + 1} layers, of which the "
                f"one after the RFM's scores; name 1 to {most}"
            )
        config = replace(self.llm.config, layers=layers)
        return replace(self, rfm=DecoderStage(config, self.llm.tensors, scoring=True, of_llm=True))

    @property
    def llm_weights(self) -> int:
        """Weights of the language model's matrices, the output projection's among them."""
        return self.llm.config.weights + self.vocabulary * self.llm.config.hidden

    def check(self) -> None:
        """Check every tensor of every stage before anything is written.

        Raises:
            ExportError: Tensors are missing or do not fit the config.
        """
        self.vision.check()
        if self.rfm is not None and not self.rfm.of_llm:
            self.rfm.check("region focus module")
        self.llm.check("language model")
        self.llm.tensors.require({"norm.weight": (self.llm.config.hidden,)}, "language model")


def check_vocabulary(tensors: Scoped, rows: int) -> None:
    """Check that the embedding table has as many rows as config.json says. Raises ExportError."""
    if tensors.has("embed_tokens.weight"):
        found = tensors.shape("embed_tokens.weight")
        if found and found[0] != rows:
            raise ExportError(
                f"{tensors.prefix}embed_tokens.weight has {found[0]} rows, config.json says "
                f"vocab_size {rows}; weights and config do not belong together"
            )
