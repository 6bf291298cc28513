"""The canonical vision stage, and the convolutional tower with its neck and heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.tensors import Scoped, Shapes
from lrs_edge_export.checkpoints.towers import TransformerTower, affine


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
class ObjectHead:
    """What finds objects in a neck's maps: centres and sizes on cells half as wide as tokens.

    What both 3 x 3 convolutions of the neck give, spread to twice the resolution, and its finer map
    before the stride are each made narrow, joined, and pass two 3 x 3 convolutions; all end in
    ReLU6. A last convolution gives a logit per label, and log2 of the width and the height of the
    object's box in cells.

    Attributes:
        tensors: Source scoped to the head: `coarse`, `fine`, `mix.0`, `mix.1`, `out`.
        width: Channels W of either part; the 3 x 3 convolutions have 2 * W.
        labels: Names of the C labels.
        thresholds: Two scores per label: from the first an object counts as doubtful, from the
            second as sure.
        aliases: Other words for each label by which a question may name it; empty for none at all.
    """

    tensors: Scoped
    width: int
    labels: tuple[str, ...]
    thresholds: tuple[tuple[float, float], ...]
    aliases: tuple[tuple[str, ...], ...] = ()

    #: Cells along a token's side, and maps behind those of the labels.
    scale = 2
    sizes = 2

    @property
    def outputs(self) -> int:
        """Maps that are given out."""
        return len(self.labels) + self.sizes

    def check(self, neck: int, low: int) -> None:
        """Check all tensors against the config.

        Args:
            neck: Channels of both 3 x 3 convolutions of the neck together.
            low: Channels of the finer map.

        Raises:
            ExportError: Tensors are missing or of other shapes, or there are more.
        """
        both = 2 * self.width
        shapes = affine("coarse", (self.scale**2 * self.width, neck, 1, 1))
        shapes |= affine("fine", (self.width, low, 1, 1))
        shapes |= affine("mix.0", (both, both, 3, 3))
        shapes |= affine("mix.1", (both, both, 3, 3))
        shapes |= affine("out", (self.outputs, both, 1, 1))
        self.tensors.require(shapes, "object head")
        self.tensors.refuse_others("", set(shapes), "object head")


@dataclass(frozen=True)
class VisionNeck:
    """What is made of two of a tower's maps beside its features, for every token.

    The features and the finer map, halved by its convolution's stride, are joined and pass two
    3 x 3 convolutions, the second dilated; from what both give, a last one names words. All but the
    words end in ReLU6; words are probabilities. A token is given the second convolution's channels
    and six times the words, so that both lie in 0..6, through a linear layer whose result is added
    to the projector's.

    Attributes:
        tensors: Source scoped to the neck: `high`, `low`, `context.0`, `context.1`, `words`.
        projection: Source scoped to the linear layer, which has no bias.
        width: Channels of the features' part and of both 3 x 3 convolutions.
        low: Channels of the finer map's part.
        words: Words K.
        objects: What finds objects in the neck's maps; None for none.
    """

    tensors: Scoped
    projection: Scoped
    width: int
    low: int
    words: int
    objects: ObjectHead | None = None

    #: Words are multiplied by this, the most that ReLU6 gives.
    gain = 6.0

    @property
    def outputs(self) -> int:
        """Channels that a token is given."""
        return self.width + self.words

    def check(self, high: int, low: int, hidden: int) -> None:
        """Check all tensors against the config.

        Args:
            high: Channels of the features.
            low: Channels of the finer map.
            hidden: Width of the tokens.

        Raises:
            ExportError: Tensors are missing or of other shapes, or there are more.
        """
        shapes = affine("high", (self.width, high, 1, 1))
        shapes |= affine("low", (self.low, low, 2, 2))
        shapes |= affine("context.0", (self.width, self.width + self.low, 3, 3))
        shapes |= affine("context.1", (self.width, self.width, 3, 3))
        shapes |= affine("words", (self.words, 2 * self.width, 1, 1))
        self.tensors.require(shapes, "vision neck")
        self.tensors.refuse_others("", set(shapes), "vision neck")
        linear: Shapes = {"weight": (hidden, self.outputs)}
        self.projection.require(linear, "vision neck's projection")
        self.projection.refuse_others("", set(linear), "vision neck's projection")
        if self.objects is not None:
            self.objects.check(2 * self.width, low)


@dataclass(frozen=True)
class EfficientNetTower:
    """efficientnet-lite0 without its classifier: ReLU6 features at a 32nd of the tile's side.

    Attributes:
        tensors: Source scoped to the tower's state dict.
        grid: Features along a tile's side.
        neck: What is made of the features and of the last map at a 16th of the side; None for
            features alone.
    """

    tensors: Scoped
    grid: int
    neck: VisionNeck | None = None

    stem = 32
    features = 1280
    eps = 1e-3
    blocks = _lite0_blocks()
    #: The last block at a 16th of the tile's side: the next one strides.
    low_block = max(i for i, block in enumerate(blocks) if block.stride == 2) - 1
    low_features = blocks[low_block].outputs

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


def _batch_norm(name: str, channels: int) -> Shapes:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts}


@dataclass(frozen=True)
class VisionStage:
    """Tower and projector.

    Attributes:
        tower: The encoder.
        projector: Makes tokens of the tower's features.
        width: Width of the tower's features.
        hidden: Width D of the tokens.
        tile: Tile side S in pixels.
        local_pool: Local tiles are pooled by this factor at run time.
        mean: Per channel, on pixels of 0..1.
        std: Per channel, on pixels of 0..1.
        stretched: The global view is the image stretched to a square.
        filter: By which the family's image processor resizes.
        pooling: How they are pooled (`lrs_edge.bundle.manifest.VisionSpec`).
        deepstack: Projectors of the features that stand behind the tower's last ones, as wide as
            they are; what they make stands behind the tokens' own part in all D.
    """

    tower: TransformerTower | EfficientNetTower
    projector: Projector
    width: int
    hidden: int
    tile: int
    local_pool: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stretched: bool = False
    filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    pooling: Literal["mean", "bilinear"] = "mean"
    deepstack: tuple[Projector, ...] = ()

    @property
    def grid(self) -> int:
        """Tokens along a tile's side, before pooling."""
        return self.tower.grid // self.projector.shuffle

    def with_local_pool(self, pool: int) -> VisionStage:
        """The stage whose local tokens are pooled by another factor.

        Raises:
            ExportError: A tile has fewer tokens along its side.
        """
        if not 1 <= pool <= self.grid:
            raise ExportError(f"--local-pool {pool}: a tile has {self.grid} tokens along its side")
        pooling: Literal["mean", "bilinear"] = "bilinear" if self.grid % pool else self.pooling
        return replace(self, local_pool=pool, pooling=pooling)

    @property
    def neck(self) -> VisionNeck | None:
        """The tower's neck, if it has one."""
        return self.tower.neck if isinstance(self.tower, EfficientNetTower) else None

    @property
    def objects(self) -> ObjectHead | None:
        """What finds objects, if there is one."""
        return None if self.neck is None else self.neck.objects

    def check(self) -> None:
        """Check all tensors against the config. Raises ExportError."""
        self.tower.check()
        if (neck := self.neck) is not None:
            neck.check(self.width, EfficientNetTower.low_features, self.hidden)
        if self.tower.grid % self.projector.shuffle:
            raise ExportError(
                f"{self.tower.grid} patches along a tile's side cannot be joined by "
                f"{self.projector.shuffle}; image size, patch size and factor do not fit together"
            )
        for projector in (self.projector, *self.deepstack):
            projector.check(self.width, self.hidden // (1 + len(self.deepstack)))
