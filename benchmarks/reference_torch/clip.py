"""CLIP's tower and the projector with weights that lie on a GPU, in float16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.towers import ClipTower
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.torch_model.layers import activation, read


class ClipOnDevice:
    """Tokens of tiles, as `lrs_edge_export.torch_model.vision.vision_tokens` makes them.

    That one reads each weight when it is used, which a GPU would wait for.

    Args:
        stage: Tower and projector.
        device: Where weights lie.
        kind: Type of the weights.

    Raises:
        ValueError: The tower is not CLIP's, or the projector does more than two linear layers.
    """

    def __init__(self, stage: VisionStage, device: str, kind: torch.dtype) -> None:
        tower, projector = stage.tower, stage.projector
        usual = projector.shuffle == 1 and not projector.norm
        if not isinstance(tower, ClipTower) or tower.states or not usual:
            raise ValueError("on a GPU the reference runs CLIP's tower and a plain projector only")
        self._tower, self._projector = tower, projector
        names = [name for name in tower.tensors.names() if "position" not in name]
        self._weights = {name: read(tower.tensors, name).to(device, kind) for name in names}
        self._weights |= {
            f"projector.{name}": read(projector.tensors, name).to(device, kind)
            for name in projector.tensors.names()
        }
        self._places = torch.from_numpy(tower.positions()).to(device, kind)
        self._first = torch.from_numpy(tower.first_place()).to(device, kind)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Tokens [N, T, D] of normalised tiles [N, 3, S, S]."""
        tower, count = self._tower, len(pixels)
        kernel = self._weights["embeddings.patch_embedding.weight"]
        x = F.conv2d(pixels.to(kernel.dtype), kernel, stride=tower.patch)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat((self._first.expand(count, 1, -1), x), dim=1) + self._places
        x = self._norm(tower.first_norm, x)
        for layer in range(tower.layers):
            x = self._layer(f"encoder.layers.{layer}", x)
        x = x[:, 1:]
        for number, name in enumerate(self._projector.linears):
            x = activation(self._projector.activation, x) if number else x
            x = self._linear(f"projector.{name}", x)
        return x

    def _layer(self, name: str, x: Tensor) -> Tensor:
        tower, normed = self._tower, self._norm(f"{name}.layer_norm1", x)
        query, key, value = (
            self._linear(f"{name}.self_attn.{part}_proj", normed)
            .view(len(x), -1, tower.heads, tower.hidden // tower.heads)
            .transpose(1, 2)
            for part in "qkv"
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self._linear(f"{name}.self_attn.out_proj", mixed)
        wide = self._linear(f"{name}.mlp.fc1", self._norm(f"{name}.layer_norm2", x))
        return x + self._linear(f"{name}.mlp.fc2", activation(tower.activation, wide))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weights = (self._weights[f"{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, (self._tower.hidden,), *weights, self._tower.eps)
