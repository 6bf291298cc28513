"""Region focus module and language model of a checkpoint in PyTorch, weights read as they are used.

A model larger than memory can be run: what is held is one weight at a time, if its source keeps
none. Everything is float32 on the CPU.

Observers are told the names that graphs have: `layers.0.mlp.down_proj`, `lm_head`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export.checkpoints.model import DecoderStage, layer_shapes
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.torch_model import decoder
from lrs_edge_export.torch_model.decoder import Observer, Rope


class StoredLayer(Mapping[str, Tensor]):
    """Weights of one layer, each read whenever it is asked for.

    Args:
        stage: The stack.
        layer: Which layer.
    """

    def __init__(self, stage: DecoderStage, layer: int) -> None:
        self._stage = stage
        self._layer = layer
        self._names = layer_shapes(stage.config, scoring=layer == stage.config.layers).keys()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return torch.from_numpy(self._stage.read(self._layer, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_layer(
    stage: DecoderStage, layer: int, device: torch.device, *, scoring: bool = False
) -> dict[str, Tensor]:
    """One layer's weights in memory, float32.

    Args:
        stage: The stack.
        layer: Which layer.
        device: Where they are put.
        scoring: Only those that a scoring layer's scores depend on.

    Raises:
        ExportError: A weight is damaged.
    """
    stored = StoredLayer(stage, layer)
    return {name: stored[name].to(device) for name in layer_shapes(stage.config, scoring=scoring)}


def rope(stage: DecoderStage, length: int, positions: Tensor | None = None) -> Rope:
    """Rotations of a sequence's positions [T] or [k, T], 0 .. T-1 as of text for None."""
    if positions is None:
        axes, positions = stage.config.position_axes, torch.arange(length)
        positions = positions if axes == 1 else positions.expand(axes, -1)
    elif stage.config.position_axes == 1:
        positions = positions.reshape(-1)
    return decoder.rope(stage.config, positions)


def turns_of(stage: DecoderStage, sequence: TokenSequence) -> Rope:
    """Rotations of a sequence's positions."""
    return rope(stage, len(sequence), torch.from_numpy(sequence.positions))


def first_states(stage: DecoderStage, embeds: Tensor) -> Tensor:
    """What layer 0 is given, [T, D], of tokens [T, width]."""
    return embeds[:, : stage.config.hidden]


def add_later(stage: DecoderStage, layer: int, x: Tensor, embeds: Tensor) -> Tensor:
    """A layer's output [T, D] with what tokens [T, width] bring for it (`deepstack`)."""
    if layer >= stage.config.deepstack:
        return x
    start = (1 + layer) * stage.config.hidden
    return x + embeds[:, start : start + stage.config.hidden]


def run_layer(
    stage: DecoderStage, layer: int, x: Tensor, turns: Rope, observe: Observer | None = None
) -> Tensor:
    """Output [T, D] of one full layer for x [T, D], under a causal mask."""
    weights, observe = StoredLayer(stage, layer), _of_layer(layer, observe)
    return decoder.decoder_layer(stage.config, weights, x, turns, observe=observe)


def run_layers(
    stage: DecoderStage, embeds: Tensor, turns: Rope, observe: Observer | None = None
) -> Tensor:
    """Output [T, D] of the last full layer for tokens [T, width], under a causal mask."""
    x = first_states(stage, embeds)
    for layer in range(stage.config.layers):
        x = add_later(stage, layer, run_layer(stage, layer, x, turns, observe), embeds)
    return x


def scoring_logits(
    stage: DecoderStage, x: Tensor, turns: Rope, observe: Observer | None = None
) -> Tensor:
    """Scaled query-key products [H, T] of the last place, for x [T, D] of the last full layer."""
    config, layer = stage.config, stage.config.layers
    weights, last = StoredLayer(stage, layer), slice(len(x) - 1, None)
    observe = _of_layer(layer, observe)
    return decoder.attention_logits(config, weights, x, turns, last, observe=observe)[:, 0]


def final_norm(stage: DecoderStage, x: Tensor) -> Tensor:
    """What `lm_head` is given, [T, D], of the last layer's output [T, D]."""
    weight = torch.from_numpy(stage.tensors.read("norm.weight"))
    return decoder.rms_norm(x, weight, stage.config.eps)


def rfm_logits(
    stage: DecoderStage,
    embeds: Tensor,
    positions: Tensor | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Scaled query-key products [H, T] of the last token at the scoring layer.

    Args:
        stage: The RFM.
        embeds: [T, width].
        positions: [T] or [k, T] for RoPE; None for 0 .. T-1.
        observe: Observer of linears.
    """
    with torch.inference_mode():
        turns = rope(stage, len(embeds), positions)
        return scoring_logits(stage, run_layers(stage, embeds, turns, observe), turns, observe)


def llm_logits(
    stage: DecoderStage,
    lm_head: Array,
    embeds: Tensor,
    last: int,
    positions: Tensor | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Logits [last, V] after each of the last places.

    Args:
        stage: The language model.
        lm_head: float32 [V, D].
        embeds: [T, width].
        last: Number of places.
        positions: [T] or [k, T] for RoPE; None for 0 .. T-1.
        observe: Observer of linears.
    """
    with torch.inference_mode():
        turns = rope(stage, len(embeds), positions)
        x = final_norm(stage, run_layers(stage, embeds, turns, observe)[-last:])
        if observe is not None:
            observe("lm_head", x)
        return F.linear(x, torch.from_numpy(lm_head))


def _of_layer(layer: int, observe: Observer | None) -> Observer | None:
    """An observer of one layer's linears that tells their names in the stack."""
    if observe is None:
        return None
    told = observe
    return lambda name, x: told(f"layers.{layer}.{name}", x)
