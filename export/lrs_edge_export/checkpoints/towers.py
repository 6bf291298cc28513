"""Vision transformers: what each kind is made of, and what tensors it must have.

A tower is a description that graph writers and the PyTorch model follow: patches, positions, a
class token or none, norms before and after the layers. Tensors have CLIP's names; a family whose
checkpoints have others gives them a view that renames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.tensors import Array, Scoped, Shapes


@dataclass(frozen=True)
class TransformerTower:
    """What all vision transformers have: patches, positions, layers of attention and an MLP.

    Attributes:
        tensors: Source of tensors with CLIP's names, without `vision_model.`.
        layers: Encoder layers that are run (up to the selected hidden state).
        hidden: Width.
        heads: Attention heads.
        intermediate: Width of the MLP.
        patch: Side of a patch in pixels.
        grid: Whole patches along a tile's side; pixels beyond them are not looked at.
        eps: Of the norms.
        activation: `quick_gelu`, `gelu` (erf) or `gelu_tanh`.
        states: Hidden states that lie side by side in the features, in this order, 0 for what
            enters the first layer; empty for the last that is run alone.
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
    states: tuple[int, ...] = field(default=(), kw_only=True)

    #: A learned vector stands before the patches; no token is made of it.
    class_token: ClassVar[bool] = False
    #: The convolution that makes patches has a bias.
    patch_bias: ClassVar[bool] = True
    #: Norm before the first layer; empty for none.
    first_norm: ClassVar[str] = ""

    @property
    def last_norm(self) -> str:
        """Norm after the last layer; empty for none."""
        return ""

    @property
    def attention_bias(self) -> bool:
        """Query, key and value projections have a bias."""
        return True

    @property
    def attention_norm(self) -> bool:
        """Queries and keys pass an RMS norm each, over all heads together."""
        return False

    @property
    def rms_norms(self) -> bool:
        """Norms of the layers are RMS norms."""
        return False

    #: Of the norms of queries and keys.
    attention_eps: ClassVar[float] = 1e-6
    #: What attention and MLP give is multiplied by `layer_scale1` and `layer_scale2`.
    layer_scale: ClassVar[bool] = False

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.hidden * max(1, len(self.states))

    @property
    def kept_states(self) -> tuple[int, ...]:
        """Those of `states` that come before the last one, ascending, each once."""
        return tuple(sorted({state for state in self.states if state < self.layers}))

    @property
    def places(self) -> int:
        """Length of a tile's sequence in the tower."""
        return self.grid**2 + self.class_token

    @property
    def weights(self) -> int:
        """Weights of all layers' matrices."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)

    def positions(self) -> Array:
        """Position embeddings float32 [places, hidden], as they are added."""
        return self.tensors.read("embeddings.position_embedding.weight")

    def first_place(self) -> Array:
        """The class token's embedding, float32 [hidden]."""
        return self.tensors.read("embeddings.class_embedding").reshape(self.hidden)

    @property
    def position_rows(self) -> int:
        """Rows of the checkpoint's table of positions."""
        return self.places

    @property
    def table_axes(self) -> tuple[int, ...]:
        """Axes that class embedding and table of positions have before their own."""
        return ()

    def check(self) -> None:
        """Check all tensors against the config. Raises ExportError."""
        hidden = self.hidden
        shapes: Shapes = {
            "embeddings.patch_embedding.weight": (hidden, 3, self.patch, self.patch),
            "embeddings.position_embedding.weight": (
                *self.table_axes[:1],
                self.position_rows,
                hidden,
            ),
        }
        if self.class_token:
            shapes["embeddings.class_embedding"] = (*self.table_axes, hidden)
        if self.patch_bias:
            shapes["embeddings.patch_embedding.bias"] = (hidden,)
        for norm in filter(None, (self.first_norm, self.last_norm)):
            shapes |= affine(norm, (hidden,))
        for layer in range(self.layers):
            for name, shape in self.layer_shapes().items():
                shapes[f"encoder.layers.{layer}.{name}"] = shape
        self.tensors.require(shapes, "vision tower")
        known = set(self.layer_shapes())
        self.tensors.refuse_others(r"encoder\.layers\.\d+\.", known, "vision tower")

    def layer_shapes(self) -> Shapes:
        """Shapes of one layer's tensors, by names such as `self_attn.q_proj.weight`."""
        hidden, wide = self.hidden, self.intermediate
        shapes: Shapes = {}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= affine(norm, (hidden,), bias=not self.rms_norms)
        for part in ("q_proj", "k_proj", "v_proj"):
            shapes |= affine(f"self_attn.{part}", (hidden, hidden), bias=self.attention_bias)
        shapes |= affine("self_attn.out_proj", (hidden, hidden))
        if self.attention_norm:
            shapes |= {f"self_attn.{part}_norm.weight": (hidden,) for part in ("q", "k")}
        if self.layer_scale:
            shapes |= {f"layer_scale{number}": (hidden,) for number in (1, 2)}
        shapes |= affine("mlp.fc1", (wide, hidden)) | affine("mlp.fc2", (hidden, wide))
        return shapes


@dataclass(frozen=True)
class ClipTower(TransformerTower):
    """A CLIP ViT, as far as its features are used.

    Attributes:
        table_grid: Patches along a side that the table of positions was made for; 0 where that is
            `grid`. A table for another grid is resized bicubically.
        align_corners: How it is resized: True moves the outermost entries nowhere (torchvision's
            `interpolate_embeddings`), False is what transformers does.
    """

    table_grid: int = 0
    align_corners: bool = False

    class_token: ClassVar[bool] = True
    patch_bias: ClassVar[bool] = False
    # The misspelling is CLIP's own.
    first_norm: ClassVar[str] = "pre_layrnorm"

    @property
    def position_rows(self) -> int:
        """Rows of the checkpoint's table of positions."""
        return (self.table_grid or self.grid) ** 2 + 1

    def positions(self) -> Array:
        """Position embeddings float32 [places, hidden], resized where the grid is another."""
        table = super().positions()
        if self.position_rows == self.places:
            return table
        # Only here: what families take can be told without it.
        import torch
        from torch.nn import functional as F  # noqa: N812 (torch's own convention)

        side = self.table_grid
        plane = torch.from_numpy(table[1:]).reshape(1, side, side, self.hidden).permute(0, 3, 1, 2)
        resized = F.interpolate(
            plane, (self.grid, self.grid), mode="bicubic", align_corners=self.align_corners
        )
        rows = resized.permute(0, 2, 3, 1).reshape(self.grid**2, self.hidden)
        whole: Array = torch.cat((torch.from_numpy(table[:1]), rows)).numpy()
        return whole

    def check_next_layer(self) -> None:
        """Check what the attention of the layer after the last needs. Raises ExportError."""
        if self.states:
            raise ExportError("--vision-attention takes a tower of whose hidden states one is used")
        prefix = f"encoder.layers.{self.layers}"
        shapes = affine(f"{prefix}.layer_norm1", (self.hidden,))
        for part in ("q_proj", "k_proj"):
            shapes |= affine(f"{prefix}.self_attn.{part}", (self.hidden, self.hidden))
        self.tensors.require(shapes, "vision tower, whose next layer --vision-attention needs")


@dataclass(frozen=True)
class SiglipTower(TransformerTower):
    """A SigLIP ViT without its pooling head: no class token, and no norm before the layers.

    Attributes:
        final_norm: `post_layernorm` comes after the last layer. Families that take the model's
            last output have it, those that take a hidden state do not.
        rounded: A patch's row and column are found from shares of the side in float32, as Idefics3
            does, whose rounding gives some patches of some grids their neighbour's position.
    """

    final_norm: bool = False
    rounded: bool = False

    @property
    def last_norm(self) -> str:
        """Norm after the last layer; empty for none."""
        return "post_layernorm" if self.final_norm else ""

    def positions(self) -> Array:
        """Position embeddings float32 [places, hidden], as they are added."""
        table = super().positions()
        if not self.rounded:
            return table
        import torch

        side = self.grid
        shares = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
        edges = torch.arange(1 / side, 1.0, 1 / side)
        found = torch.bucketize(shares.clamp(max=1.0 - 1e-6), edges, right=True).numpy()
        places: Array = table[(found[:, None] * side + found[None, :]).ravel()]
        return places


@dataclass(frozen=True)
class InternVitTower(TransformerTower):
    """InternViT: what attention and MLP give is scaled channel by channel.

    Attributes:
        qkv_bias: Query, key and value projections have a bias.
        qk_norm: Queries and keys pass an RMS norm each, over all heads together.
        rms: Norms of the layers are RMS norms.
        final_norm: A layer norm comes after the last layer.
    """

    qkv_bias: bool = True
    qk_norm: bool = False
    rms: bool = False
    final_norm: bool = False

    class_token: ClassVar[bool] = True
    layer_scale: ClassVar[bool] = True

    @property
    def attention_bias(self) -> bool:
        """Query, key and value projections have a bias."""
        return self.qkv_bias

    @property
    def attention_norm(self) -> bool:
        """Queries and keys pass an RMS norm each, over all heads together."""
        return self.qk_norm

    @property
    def rms_norms(self) -> bool:
        """Norms of the layers are RMS norms."""
        return self.rms

    @property
    def last_norm(self) -> str:
        """Norm after the last layer; empty for none."""
        return "post_layernorm" if self.final_norm else ""

    @property
    def table_axes(self) -> tuple[int, ...]:
        """Axes that class embedding and table of positions have before their own."""
        return (1, 1)

    def positions(self) -> Array:
        """Position embeddings float32 [places, hidden], as they are added."""
        return super().positions().reshape(self.places, self.hidden)


def affine(name: str, shape: tuple[int, ...], *, bias: bool = True) -> Shapes:
    """Shapes of a weight, and of a bias as long as its first axis."""
    weight: Shapes = {f"{name}.weight": shape}
    return weight | {f"{name}.bias": shape[:1]} if bias else weight
