"""Decoders whose inputs of linears have channels of like size, so that one scale serves them all.

Where products are computed in int8 with one scale for all inputs of a linear, a few channels that
are far larger than the others leave the others few steps. Channels of weights differ less, and what
an input channel is divided by its weights can be multiplied by: the same model in floats, more
faithful in integers. The divisor costs nothing where a layer before it can take it: of query, key
and value, and of gate and up, the norm; of the down projection, the up projection's outputs. The
output projection's inputs stay as they are: values are shared by groups of heads.

Source: Xiao et al., SmoothQuant (arXiv:2211.10438), with its usual exponent of a half.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export.checkpoints.model import DecoderStage
from lrs_edge_export.checkpoints.tensors import Array, Scoped
from lrs_edge_export.quantization.calibrators import DecoderCalibrator
from lrs_edge_export.quantization.statistics import Calibrator

#: How much of the inputs' differences goes to the weights; the rest stays.
_SHARE = 0.5

#: Linears that share an input, by the norm that can take its divisor.
_AFTER_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def smoothed(stage: DecoderStage, sequences: Sequence[TokenSequence]) -> DecoderStage:
    """The same decoder with its inputs' differences shared with the weights.

    Args:
        stage: The decoder.
        sequences: What it is run on, to see what its inputs are.

    Raises:
        ExportError: Activations are not finite.
    """
    calibrator = DecoderCalibrator(stage, sequences, second_moments=False)
    source = _Rescaled(stage.tensors)
    for layer in range(stage.config.layers + (stage.scoring and not stage.of_llm)):
        _smooth_layer(stage, f"layers.{layer}", calibrator, source)
    return replace(stage, tensors=Scoped(source, ""))


def _smooth_layer(
    stage: DecoderStage, name: str, calibrator: Calibrator, source: _Rescaled
) -> None:
    for norm, linears in _AFTER_NORMS.items():
        there = [f"{name}.{part}" for part in linears if stage.tensors.has(f"{name}.{part}.weight")]
        if name.endswith(f".{stage.config.layers}"):
            # Of a scoring layer there are queries and keys, and no MLP.
            there = [part for part in there if part.endswith(("q_proj", "k_proj"))]
        if not there:
            continue
        # Queries of a scoring layer are seen at the last token only, keys at all.
        divisor = _divisor(stage, calibrator.inputs(there[1]).peaks, there)
        source.multiply(f"{name}.{norm}.weight", 0, np.float32(1) / divisor)
        for part in there:
            source.multiply(f"{part}.weight", 1, divisor)
    down = f"{name}.mlp.down_proj"
    if stage.tensors.has(f"{down}.weight") and not name.endswith(f".{stage.config.layers}"):
        divisor = _divisor(stage, calibrator.inputs(down).peaks, [down])
        source.multiply(f"{name}.mlp.up_proj.weight", 0, np.float32(1) / divisor)
        source.multiply(f"{down}.weight", 1, divisor)


def _divisor(stage: DecoderStage, peaks: Array, linears: Iterable[str]) -> Array:
    """What inputs [.., K] are divided by, float32 [K]; 1 where a channel has no weight."""
    reach = np.zeros_like(peaks)
    for name in linears:
        weight = stage.tensors.read(f"{name}.weight")
        reach = np.maximum(reach, np.abs(weight).max(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = peaks**_SHARE / reach ** (1 - _SHARE)
    usable = np.isfinite(found) & (found > 0)
    # Of norms only quotients count: around one they stay what float16 holds.
    middle = np.exp(np.log(found[usable]).mean()) if usable.any() else 1.0
    return np.where(usable, found / middle, 1.0).astype(np.float32)


class _Rescaled:
    """A `TensorSource` whose rows and columns are multiplied by what is noted for them."""

    def __init__(self, tensors: Scoped) -> None:
        self._tensors = tensors
        self._factors: dict[str, dict[int, Array]] = {}

    def multiply(self, name: str, axis: int, factors: Array) -> None:
        """Note factors along an axis of a tensor, which has none yet."""
        self._factors.setdefault(name, {})[axis] = factors

    def names(self) -> Iterable[str]:
        """All names."""
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor. Raises KeyError when it is not there."""
        return self._tensors.shape(name)

    def read(self, name: str) -> Array:
        """One tensor as float32. Raises KeyError when it is not there."""
        return self._scaled(name, self._tensors.read(name), slice(None))

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a tensor; see `TensorSource.rows`."""
        return self._scaled(name, self._tensors.rows(name, start, stop), slice(start, stop))

    def stored(self, name: str) -> str:
        """The name that a tensor has in the checkpoint's files; see `TensorSource.stored`."""
        return self._tensors.stored(name)

    def _scaled(self, name: str, value: Array, rows: slice) -> Array:
        for axis, factors in self._factors.get(name, {}).items():
            if axis == 0:
                value = value * factors[rows].reshape(-1, *(1,) * (value.ndim - 1))
            else:
                value = value * factors
        return value
