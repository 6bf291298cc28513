"""Precisions of a stage: how its weights are stored, and in what its matrix products are computed.

| precision      | weights                                   | products computed in               |
|----------------|-------------------------------------------|------------------------------------|
| `fp32`         | float32                                   | float32                            |
| `fp16`         | float16                                   | float16 (float32 inside norms)     |
| `int8-dynamic` | int8, one scale per output channel        | int8; inputs scaled as they come   |
| `int8-static`  | int8, one scale per output channel        | int8; inputs' ranges calibrated    |
| `int8-weight`  | int8, one scale per 128 inputs            | float, or int8 inside the engine   |
| `int4-weight`  | int4, scale and zero per 32 inputs, GPTQ  | float, or int8 inside the engine   |

Which is best differs by stage and engine, and is found by measuring (`choice.py`); `int8` in
`lrs-edge export` stands for the better of the first two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from lrs_edge_export.quantization import Calibrator, Rounded

Precision = Literal["fp32", "fp16", "int8-dynamic", "int8-static", "int8-weight", "int4-weight"]

#: What can be asked for: a precision, or `int8` for whichever way of computing in int8 is better.
Requested = Literal[Precision, "int8"]

#: Engine that a bundle is made for: ONNX Runtime on a CPU or with CUDA, or TensorRT. On CUDA,
#: attention with a KV cache exists in float16 only, and TensorRT is fast in nothing else.
Target = Literal["cpu", "cuda", "tensorrt"]

TARGETS: tuple[Target, ...] = get_args(Target)

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
REQUESTS: tuple[str, ...] = (*PRECISIONS, "int8")

#: Targets whose products of weights in 4 bits take zero points of blocks.
ZERO_POINTS: dict[Target, bool] = {"cpu": True, "cuda": True, "tensorrt": False}

#: Targets whose decoders multiply weights in blocks by MatMulNBits, ONNX Runtime's own operator.
#: TensorRT takes DequantizeLinear and MatMul alone, and what it would save on CUDA is not measured.
N_BITS: dict[Target, bool] = {"cpu": True, "cuda": False, "tensorrt": False}

_WEIGHTS = "fp16, int8-weight or int4-weight"

#: What a target does not run, or no faster than float16, by precision: why, and what to use.
REFUSED: dict[Target, dict[Precision, str]] = {
    "cpu": {},
    "cuda": {
        "int8-dynamic": "has no kernels in ONNX Runtime's CUDA provider, its products would run on "
        f"the CPU; use {_WEIGHTS} with --target cuda, or --target cpu",
        "int8-static": "has no integer kernels in ONNX Runtime's CUDA provider, which would turn "
        f"everything back to floats and be slower than fp16; use {_WEIGHTS} with --target cuda, "
        "or --target tensorrt, which computes vision in int8",
    },
    "tensorrt": {
        "int8-dynamic": "is not parsed by TensorRT, which takes no DynamicQuantizeLinear; use "
        f"{_WEIGHTS} with --target tensorrt, or int8-static for vision, or --target cpu",
    },
}

#: Inputs that share a scale.
INT8_BLOCK, INT4_BLOCK = 128, 32

#: What a weight that is too sensitive for a precision is kept at instead.
HIGHER: dict[Precision, Precision] = {
    "int4-weight": "int8-weight",
    "int8-dynamic": "int8-weight",
    "int8-static": "int8-weight",
}


@dataclass(frozen=True)
class Plan:
    """Precision of every weight of a stage.

    Attributes:
        precision: Of all weights but those below.
        higher: Names of weights kept at the next higher precision.
        only: Names of the only weights quantized, all others being float; None for all.
        target: Engine the graph is for.
        symmetric: A static graph is one that TensorRT's parser takes (`static_vision`): int8
            without zero points.
        calibrator: Loads what is known of the inputs of matrix products; None where nothing is.
        rounded: Asked for matrices that are rounded to 4 bits, which it may know already; None
            rounds them anew.
    """

    precision: Precision = "fp32"
    higher: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    target: Target = "cpu"
    symmetric: bool = False
    calibrator: Callable[[], Calibrator] | None = None
    rounded: Rounded | None = None

    @property
    def floats(self) -> type[np.floating]:
        """Type of everything that is not quantized."""
        half = self.precision == "fp16" or self.target != "cpu"
        return np.float16 if half else np.float32

    def of(self, name: str) -> Precision:
        """Precision of one weight, by the name of its layer (without `.weight`)."""
        if self.precision in ("fp32", "fp16"):
            return self.precision
        plain: Precision = "fp16" if self.floats is np.float16 else "fp32"
        if self.only is not None and name not in self.only:
            return plain
        return HIGHER.get(self.precision, plain) if name in self.higher else self.precision

    def alone(self, *names: str) -> Plan:
        """The plan that quantizes these weights only."""
        return replace(self, only=frozenset(names))

    @property
    def zero_points(self) -> bool:
        """Whether blocks of 4 bits have zero points: where the target takes them."""
        return ZERO_POINTS[self.target]

    @property
    def n_bits(self) -> bool:
        """Whether decoders' products with weights in blocks are MatMulNBits, for the target."""
        return N_BITS[self.target]

    @property
    def needs_calibration(self) -> bool:
        """Whether inputs have to be known before weights can be written."""
        return self.precision in ("int8-static", "int4-weight")
