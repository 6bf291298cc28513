"""The canonical three stages: what every checkpoint family becomes before graphs are written.

Weights stay on disk; a stage knows where they are and what shapes they must have.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lrs_edge.bundle.layout import PromptSpec
from lrs_edge.bundle.manifest import Limits
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.rows import Rows
from lrs_edge_export.checkpoints.tensors import Array, Scoped

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a LLaMA-like stack: RMSNorm, grouped-query attention, rotate-half RoPE, SwiGLU.

    Attributes:
        layers: Full layers n.
        hidden: Width D.
        heads: Query heads H.
        kv_heads: Key and value heads; H is a multiple.
        head_dim: Width of one head.
        intermediate: Width of the MLP.
        eps: Of the norms.
        theta: Base of RoPE's frequencies.
        qkv_bias: Whether query, key and value projections have a bias (Qwen2).
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
    """

    config: DecoderConfig
    tensors: Scoped
    scoring: bool = False

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
        _refuse_others(self.tensors, r"layers\.\d+\.", known, what)

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
    if scoring:
        return shapes
    return shapes | {
        "self_attn.o_proj.weight": (hidden, inner),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }


@dataclass(frozen=True)
class ClipTower:
    """A CLIP ViT, as far as its features are used.

    Attributes:
        tensors: Source scoped to `vision_model.`.
        layers: Encoder layers that are run (up to the selected hidden state).
        hidden: Width.
        heads: Attention heads.
        intermediate: Width of the MLP.
        patch: Side of a patch in pixels.
        grid: Patches along a tile's side.
        eps: Of the layer norms.
        activation: `quick_gelu`, `gelu` (erf) or `gelu_tanh`.
    """

    tensors: Scoped
    layers: int
    hidden: int
    heads: int
    intermediate: int
    patch: int
    grid: int
    eps: float
    activation: str

    def check(self) -> None:
        """Check all tensors against the config. Raises ExportError."""
        hidden, wide = self.hidden, self.intermediate
        shapes: Shapes = {
            "embeddings.class_embedding": (hidden,),
            "embeddings.patch_embedding.weight": (hidden, 3, self.patch, self.patch),
            "embeddings.position_embedding.weight": (self.grid**2 + 1, hidden),
        }
        # The misspelling is CLIP's own.
        shapes |= _affine("pre_layrnorm", (hidden,))
        for layer in range(self.layers):
            prefix = f"encoder.layers.{layer}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= _affine(f"{prefix}.self_attn.{part}", (hidden, hidden))
            shapes |= _affine(f"{prefix}.layer_norm1", (hidden,))
            shapes |= _affine(f"{prefix}.layer_norm2", (hidden,))
            shapes |= _affine(f"{prefix}.mlp.fc1", (wide, hidden))
            shapes |= _affine(f"{prefix}.mlp.fc2", (hidden, wide))
        self.tensors.require(shapes, "vision tower")
        first = "encoder.layers.0."
        known = {name.removeprefix(first) for name in shapes if name.startswith(first)}
        _refuse_others(self.tensors, r"encoder\.layers\.\d+\.", known, "vision tower")

    def check_next_layer(self) -> None:
        """Check what the attention of the layer after the last needs. Raises ExportError."""
        prefix = f"encoder.layers.{self.layers}"
        shapes = _affine(f"{prefix}.layer_norm1", (self.hidden,))
        for part in ("q_proj", "k_proj"):
            shapes |= _affine(f"{prefix}.self_attn.{part}", (self.hidden, self.hidden))
        self.tensors.require(shapes, "vision tower, whose next layer --vision-attention needs")


@dataclass(frozen=True)
class EfficientNetBlock:
    """One inverted-residual block: depthwise kernel and stride, input and output channels."""

    kernel: int
    stride: int
    expand: int
    inputs: int
    outputs: int

    @property
    def middle(self) -> int:
        """Channels of the depthwise convolution."""
        return self.inputs * self.expand


def _lite0_blocks() -> tuple[EfficientNetBlock, ...]:
    stages = (
        (1, 3, 1, 1, 32, 16),
        (2, 3, 2, 6, 16, 24),
        (2, 5, 2, 6, 24, 40),
        (3, 3, 2, 6, 40, 80),
        (3, 5, 1, 6, 80, 112),
        (4, 5, 2, 6, 112, 192),
        (1, 3, 1, 6, 192, 320),
    )
    blocks = []
    for repeats, kernel, stride, expand, inputs, outputs in stages:
        blocks.append(EfficientNetBlock(kernel, stride, expand, inputs, outputs))
        again = EfficientNetBlock(kernel, 1, expand, outputs, outputs)
        blocks += [again] * (repeats - 1)
    return tuple(blocks)


@dataclass(frozen=True)
class EfficientNetTower:
    """efficientnet-lite0 without its classifier: ReLU6 features at a 32nd of the tile's side.

    Attributes:
        tensors: Source scoped to the tower's state dict.
        grid: Features along a tile's side.
    """

    tensors: Scoped
    grid: int

    stem = 32
    features = 1280
    eps = 1e-3
    blocks = _lite0_blocks()

    def check(self) -> None:
        """Check all tensors against the architecture. Raises ExportError."""
        shapes: Shapes = {"_conv_stem.weight": (self.stem, 3, 3, 3)}
        shapes |= _batch_norm("_bn0", self.stem)
        for i, block in enumerate(self.blocks):
            prefix, middle = f"_blocks.{i}", block.middle
            if block.expand != 1:
                shapes[f"{prefix}._expand_conv.weight"] = (middle, block.inputs, 1, 1)
                shapes |= _batch_norm(f"{prefix}._bn0", middle)
            depthwise = (middle, 1, block.kernel, block.kernel)
            shapes[f"{prefix}._depthwise_conv.weight"] = depthwise
            shapes |= _batch_norm(f"{prefix}._bn1", middle)
            shapes[f"{prefix}._project_conv.weight"] = (block.outputs, middle, 1, 1)
            shapes |= _batch_norm(f"{prefix}._bn2", block.outputs)
        shapes["_conv_head.weight"] = (self.features, self.blocks[-1].outputs, 1, 1)
        shapes |= _batch_norm("_bn1", self.features)
        self.tensors.require(shapes, "vision tower")


def same_padding(kernel: int, stride: int) -> tuple[int, int]:
    """Padding before and after that TensorFlow's SAME gives sizes divisible by the stride."""
    total = max(kernel - stride, 0)
    return total // 2, total - total // 2


def _refuse_others(tensors: Scoped, prefix: str, known: set[str], what: str) -> None:
    """Refuse tensors that the graph would leave out, such as biases that no config names.

    Args:
        tensors: Of the part.
        prefix: Expression for what stands before the names.
        known: Names that are read.
        what: Names the part in the message.

    Raises:
        ExportError: There are others. Tables that are computed anew are none.
    """
    for name in tensors.names():
        found = re.match(prefix, name)
        rest = name[found.end() :] if found else ""
        if found and rest not in known and not rest.endswith("rotary_emb.inv_freq"):
            raise ExportError(
                f"{what}: the checkpoint has {tensors.prefix}{name}, which the exported model "
                "would leave out; its architecture, or a field of config.json, is not supported"
            )


def _affine(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _batch_norm(name: str, channels: int) -> Shapes:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts}


@dataclass(frozen=True)
class VisionStage:
    """Tower and projector.

    Attributes:
        tower: The encoder.
        projector: Source scoped to `mlp_projector.`: Linear `0`, GELU (erf), Linear `2`.
        width: Width of the tower's features.
        hidden: Width D of the tokens.
        tile: Tile side S in pixels.
        local_pool: Local tiles are pooled by this factor at run time.
        mean: Per channel, on pixels of 0..1.
        std: Per channel, on pixels of 0..1.
    """

    tower: ClipTower | EfficientNetTower
    projector: Scoped
    width: int
    hidden: int
    tile: int
    local_pool: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def check(self) -> None:
        """Check all tensors against the config. Raises ExportError."""
        self.tower.check()
        shapes = _affine("0", (self.hidden, self.width)) | _affine("2", (self.hidden, self.hidden))
        self.projector.require(shapes, "projector")
        _refuse_others(self.projector, "", set(shapes), "projector")


@dataclass(frozen=True)
class Repetition:
    """Repetition penalty, and the tokens that count as generated from the start."""

    penalty: float
    penalised_ids: tuple[int, ...]


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
        rfm: Region Focus Module.
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
    """

    family: str
    vision: VisionStage
    rfm: DecoderStage
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
