"""The region focus module while it learns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lrs_edge_export.checkpoints.model import DecoderConfig, DecoderStage, layer_shapes
from lrs_edge_export.distill.packing import PackedInput, layer_scores, pack, run_layer
from lrs_edge_export.torch_model.stages import read_layer


class Student:
    """N full decoder layers and the scoring part of one more.

    Args:
        config: Sizes; `layers` is N.
        weights: By name such as `layers.0.mlp.up_proj.weight`, float32.
        device: Where it runs.
        half: Multiply in bfloat16 (weights and sums stay float32).
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        device: torch.device,
        *,
        half: bool = False,
    ) -> None:
        self.config = config
        self.device = device
        self._half = half
        # A copy: what is read from a file may be a read-only view of it.
        self._layers = [
            {
                name: weights[f"layers.{layer}.{name}"].detach().clone().to(device)
                for name in layer_shapes(config, scoring=layer == config.layers)
            }
            for layer in range(config.layers + 1)
        ]

    @classmethod
    def read(cls, stage: DecoderStage, device: torch.device, *, half: bool = False) -> Student:
        """A student that starts from an RFM stage. Raises ExportError when it is damaged."""
        weights: dict[str, Tensor] = {}
        for layer in range(stage.config.layers + 1):
            last = layer == stage.config.layers
            found = read_layer(stage, layer, torch.device("cpu"), scoring=last)
            weights |= {f"layers.{layer}.{name}": value for name, value in found.items()}
        return cls(stage.config, weights, device, half=half)

    def parameters(self) -> list[Tensor]:
        """All weights, in a fixed order."""
        return [value for layer in self._layers for value in layer.values()]

    def state(self) -> dict[str, Tensor]:
        """All weights by name."""
        return {
            f"layers.{place}.{name}": value
            for place, layer in enumerate(self._layers)
            for name, value in layer.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights. Raises KeyError or RuntimeError when they do not fit."""
        with torch.no_grad():
            for name, value in self.state().items():
                value.copy_(state[name])

    def scores(self, packed: PackedInput) -> list[Tensor]:
        """Scores float32 [Q, n] of the local tokens at layers 1 .. N; the last one's are the RFM's.

        Gradients flow where the weights ask for them.
        """
        found = []
        packing = pack(self.config, packed, self.device)
        with self._autocast():
            x = torch.from_numpy(packed.embeds).to(self.device)
            for place, weights in enumerate(self._layers):
                if place > 0:
                    found.append(layer_scores(self.config, weights, x, packing))
                if place < self.config.layers:
                    x = run_layer(self.config, weights, x, packing)
        return found

    def _autocast(self) -> AbstractContextManager[object]:
        if self._half:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()
