"""The language model's own text-to-image attention, layer by layer.

Layers are read from disk one at a time for many sequences, so that a model far larger than memory
can teach: at no time is more than one layer's weights held.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from lrs_edge_export.checkpoints.model import DecoderStage
from lrs_edge_export.distill.packing import PackedInput, layer_scores, pack, run_layer
from lrs_edge_export.torch_model.stages import add_later, first_states, read_layer


def attention_by_layer(
    stage: DecoderStage,
    inputs: Sequence[PackedInput],
    wanted: Collection[int],
    device: torch.device,
) -> Iterator[tuple[int, list[Tensor]]]:
    """Scores of the local tokens at some layers, from the first to the last; no layer beyond.

    Args:
        stage: The language model.
        inputs: Sequences; their hidden states stay in memory together.
        wanted: Layers, counted from 0.
        device: Where layers run.

    Yields:
        A layer and, for each input, its scores float32 [Q, n] on the CPU.

    Raises:
        ExportError: Weights are damaged.
    """
    config, last = stage.config, max(wanted)
    with torch.inference_mode():
        packings = [pack(config, packed, device) for packed in inputs]
        embeds = [torch.from_numpy(packed.embeds) for packed in inputs]
        states = [first_states(stage, x).to(device) for x in embeds]
    for layer in range(last + 1):
        # Generators must not hold inference mode open between their steps.
        with torch.inference_mode():
            weights = read_layer(stage, layer, device, scoring=layer == last)
            found = []
            if layer in wanted:
                for state, packing in zip(states, packings, strict=True):
                    found.append(layer_scores(config, weights, state, packing).cpu())
            if layer < last:
                for place, packing in enumerate(packings):
                    x = run_layer(config, weights, states[place], packing)
                    if layer < config.deepstack:
                        x = add_later(stage, layer, x, embeds[place].to(device))
                    states[place] = x
            # The next layer is read only when this one is gone.
            del weights
        if layer in wanted:
            yield layer, found
