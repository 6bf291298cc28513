"""Vision transformers: what each kind is made of, and what tensors it must have.

A tower is a description that graph writers and the PyTorch model follow: patches, positions, a
class token or none, norms before and after the layers. Tensors have CLIP's names; a family whose
checkpoints have others gives them a view that renames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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

    @property
    def position_rows(self) -> int:
        """Rows of the checkpoint's table of positions."""
        return self.places

    def check(self) -> None:
        """Check all tensors against the config. Raises ExportError."""
        hidden = self.hidden
        shapes: Shapes = {
            "embeddings.patch_embedding.weight": (hidden, 3, self.patch, self.patch),
            "embeddings.position_embedding.weight": (self.position_rows, hidden),
        }
        if self.class_token:
            shapes["embeddings.class_embedding"] = (hidden,)
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
        shapes = affine("layer_norm1", (hidden,)) | affine("layer_norm2", (hidden,))
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= affine(f"self_attn.{part}", (hidden, hidden))
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
    """

    final_norm: bool = False

    @property
    def last_norm(self) -> str:
        """Norm after the last layer; empty for none."""
        return "post_layernorm" if self.final_norm else ""


def affine(name: str, shape: tuple[int, ...]) -> Shapes:
    """Shapes of a weight and of a bias as long as its first axis."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
