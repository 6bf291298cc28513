"""The canonical vision stage: towers and projector, and what tensors they must have."""

from __future__ import annotations

from dataclasses import dataclass

from lrs_edge_export.checkpoints.tensors import Scoped, Shapes


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
        self.tensors.refuse_others(r"encoder\.layers\.\d+\.", known, "vision tower")

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
        self.projector.refuse_others("", set(shapes), "projector")
