"""A checkpoint's weights as tensors in memory, read once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import DecoderConfig, DecoderStage, Model
from lrs_edge_export.checkpoints.tensors import Array, Scoped
from lrs_edge_export.checkpoints.vision import EfficientNetTower, VisionStage
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.torch_model.decoder import LayerWeights
from lrs_edge_export.torch_model.stages import read_layer


@dataclass(frozen=True)
class DecoderWeights:
    """A stack of decoder layers.

    Attributes:
        config: Sizes.
        layers: Weights of each layer; an RFM's scoring layer comes last.
        norm: Of the last layer's output, float32 [D]; None for an RFM.
    """

    config: DecoderConfig
    layers: tuple[LayerWeights, ...]
    norm: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All of a checkpoint.

    Attributes:
        model: Its description (prompt, limits, normalisation).
        vision: Tower and projector, as `lrs_edge_export.torch_model.vision` takes them.
        rfm: Region Focus Module.
        llm: Language model.
        embed_tokens: float32 [V, D].
        lm_head: float32 [V, D].
        newline: float32 [D].
        tables: Position embeddings of image rows and columns, float32 [G, D] each, or None.
    """

    model: Model
    vision: VisionStage
    rfm: DecoderWeights
    llm: DecoderWeights
    embed_tokens: Tensor
    lm_head: Tensor
    newline: Tensor
    tables: tuple[Tensor, Tensor] | None


class _InMemory:
    """A `TensorSource` whose tensors have been read."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        """All names."""
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        return self._tensors[name].shape

    def read(self, name: str) -> Array:
        """One tensor, not copied. Raises KeyError when it is not there."""
        return self._tensors[name]


def load_weights(folder: Path, device: str = "cpu") -> Weights:
    """Read a checkpoint folder of any family that `lrs-edge export` reads.

    Args:
        folder: The checkpoint.
        device: Where weights lie: float32 on `cpu`, float16 on `cuda`.

    Raises:
        ExportError: The checkpoint is not usable.
    """
    model = read_model(find_checkpoint(str(folder)))
    kind = torch.float16 if device == "cuda" else torch.float32

    def placed(array: Array) -> Tensor:
        return torch.from_numpy(array).to(device, kind)

    tower = replace(model.vision.tower, tensors=_in_memory(model.vision.tower.tensors))
    if isinstance(tower, EfficientNetTower) and (neck := tower.neck) is not None:
        parts = _in_memory(neck.tensors), _in_memory(neck.projection)
        tower = replace(tower, neck=replace(neck, tensors=parts[0], projection=parts[1]))
    tables = model.positions
    return Weights(
        model=model,
        vision=replace(
            model.vision,
            tower=tower,
            projector=replace(
                model.vision.projector, tensors=_in_memory(model.vision.projector.tensors)
            ),
        ),
        rfm=_decoder(model.region_focus, device, kind),
        llm=_decoder(model.llm, device, kind),
        embed_tokens=placed(model.embed_tokens()),
        lm_head=placed(model.lm_head()),
        newline=placed(model.image_newline()),
        tables=None if tables is None else (placed(tables.rows()), placed(tables.cols())),
    )


def _in_memory(tensors: Scoped) -> Scoped:
    return Scoped(_InMemory({name: tensors.read(name) for name in tensors.names()}), "")


def _decoder(stage: DecoderStage, device: str, kind: torch.dtype) -> DecoderWeights:
    cpu, count = torch.device("cpu"), stage.config.layers

    def placed(layer: int, *, scoring: bool = False) -> LayerWeights:
        read = read_layer(stage, layer, cpu, scoring=scoring)
        return {name: weight.to(device, kind) for name, weight in read.items()}

    layers = [placed(layer) for layer in range(count)]
    if stage.scoring:
        layers.append(placed(count, scoring=True))
        return DecoderWeights(stage.config, tuple(layers), None)
    norm = torch.from_numpy(stage.tensors.read("norm.weight")).to(device, kind)
    return DecoderWeights(stage.config, tuple(layers), norm)
