"""The vision transformers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, at one tile size.

They differ from others in that rows and columns of patches turn queries and keys (RoPE over two
axes), and among each other in norms, in the MLP, in windows of attention (2.5), and in what they
give besides their last output (3). Images of any size are what they were trained on; here every
tile is one image of `grid` x `grid` patches. A still image is a video of equal frames, so that the
convolution over `temporal` frames is one over the sum of its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lrs_edge_export.checkpoints.tensors import Array, Shapes
from lrs_edge_export.checkpoints.towers import TransformerTower, affine

_PATCHES = "embeddings.patch_embedding"
_POSITIONS = "embeddings.position_embedding.weight"


@dataclass(frozen=True)
class QwenTower(TransformerTower):
    """One of Qwen's vision transformers.

    States between layers are [N, grid * grid, width]: patches of one window after the other where
    there are windows, else row after row. Behind the `hidden` values of the last layer stand, once
    they are reached, those of the layers in `taps`.

    Attributes:
        theta: Base of RoPE's frequencies.
        temporal: Frames that one patch was made for.
        window: Patches along the side of a window of attention; 0 where all patches see each other.
            It divides `grid`, so that windows are equal.
        full_layers: Layers in which all patches see each other all the same.
        rms_norm: Norms are RMS norms, without a mean and without a bias.
        gated: The MLP is gated (SwiGLU).
        stem_bias: The convolution that makes patches has a bias.
        table_grid: Side of the learned table of positions, which is resized bilinearly; 0 for none.
        taps: Layers whose output is given too, ascending (deepstack).
    """

    theta: float = 10000.0
    temporal: int = 2
    window: int = 0
    full_layers: tuple[int, ...] = ()
    rms_norm: bool = False
    gated: bool = False
    stem_bias: bool = False
    table_grid: int = 0
    taps: tuple[int, ...] = ()

    class_token: ClassVar[bool] = False

    @property
    def last_norm(self) -> str:
        """Norm after the last layer, the merger's: it comes before patches are joined."""
        return "post_layernorm"

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Weights of all layers' matrices."""
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * (4 * self.hidden**2 + mlp)

    def places_of(self, layer: int) -> int:
        """Patches that see each other in a layer."""
        whole = not self.window or layer in self.full_layers
        return self.grid**2 if whole else self.window**2

    def order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and column int64 [grid * grid] of each patch, in the order of the states."""
        side = self.window or self.grid
        rows, cols = np.divmod(np.arange(self.grid**2, dtype=np.int64), self.grid)
        blocks = (self.grid // side, side, self.grid // side, side)
        rows, cols = (x.reshape(blocks).transpose(0, 2, 1, 3).ravel() for x in (rows, cols))
        return rows, cols

    def patch_kernel(self) -> Array:
        """Kernel float32 [hidden, 3, patch, patch] for an image that does not move."""
        kernel: Array = self.tensors.read(f"{_PATCHES}.weight").sum(axis=2)
        return kernel

    def positions(self) -> Array:
        """Learned positions float32 [grid * grid, hidden], row after row, as they are added."""
        side = self.table_grid
        # Only here: what families take can be told without it.
        import torch
        from torch.nn import functional as F  # noqa: N812 (torch's own convention)

        plane = torch.from_numpy(self.tensors.read(_POSITIONS)).view(1, side, side, -1)
        resized = F.interpolate(
            plane.permute(0, 3, 1, 2), (self.grid, self.grid), mode="bilinear", align_corners=True
        )
        rows: Array = resized[0].flatten(1).T.contiguous().numpy()
        return rows

    def check(self) -> None:
        """Check all tensors against the config. Raises ExportError."""
        hidden = self.hidden
        kernel = (hidden, 3, self.temporal, self.patch, self.patch)
        shapes: Shapes = {f"{_PATCHES}.weight": kernel} | self._norm(self.last_norm)
        if self.stem_bias:
            shapes[f"{_PATCHES}.bias"] = (hidden,)
        if self.table_grid:
            shapes[_POSITIONS] = (self.table_grid**2, hidden)
        for layer in range(self.layers):
            for name, shape in self.layer_shapes().items():
                shapes[f"encoder.layers.{layer}.{name}"] = shape
        self.tensors.require(shapes, "vision tower")
        self.tensors.refuse_others("", set(shapes), "vision tower")

    def layer_shapes(self) -> Shapes:
        """Shapes of one layer's tensors, by names such as `self_attn.qkv_proj.weight`."""
        hidden, wide = self.hidden, self.intermediate
        shapes = self._norm("layer_norm1") | self._norm("layer_norm2")
        shapes |= affine("self_attn.qkv_proj", (3 * hidden, hidden))
        shapes |= affine("self_attn.out_proj", (hidden, hidden))
        if not self.gated:
            return shapes | affine("mlp.fc1", (wide, hidden)) | affine("mlp.fc2", (hidden, wide))
        for part in ("gate_proj", "up_proj"):
            shapes |= affine(f"mlp.{part}", (wide, hidden))
        return shapes | affine("mlp.down_proj", (hidden, wide))

    def _norm(self, name: str) -> Shapes:
        shapes = affine(name, (self.hidden,))
        return {f"{name}.weight": (self.hidden,)} if self.rms_norm else shapes
