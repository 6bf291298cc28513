"""A known answer of an integer product, computed by the engine on this processor.

x86 processors with AVX2 and without VNNI add two products of uint8 and int8 in 16 bits, where
onnxruntime's kernels cut the sum off. Bundles are written so that no such sum can be cut off
(`docs/quantization.md`); those of an older lrs-edge were not, and compute wrong numbers there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np

from lrs_edge.bundle.manifest import Manifest
from lrs_edge.engines.one_node_model import one_node_model
from lrs_edge.engines.onnx_kind import INTEGER_PRECISIONS
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import BackendError

#: Rows, inputs and outputs: as many inputs as make every way of a kernel through its loops run.
_ROWS, _INPUTS, _OUTPUTS = 4, 580, 16

#: Neighbouring weights: the last are such as only bundles of before have.
_PAIRS = ((64, 64), (127, 1), (127, 127))

#: What kernels make of products: right for all weights, right for those of bundles, or wrong.
Products = Literal["exact", "narrow", "wrong"]


def integer_products() -> Products:
    """Compute two products whose results are known.

    Returns:
        `exact` where int8 weights of any value are multiplied rightly; `narrow` where two
        neighbouring weights may not sum up to more than 128, which all bundles that say
        `exact_integers` keep to; `wrong` where even those come out wrong.
    """
    *narrow, wide = _right_pairs()
    if not all(narrow):
        return "wrong"
    return "exact" if wide else "narrow"


def integer_warnings(manifest: Manifest, on_cpu: Collection[str]) -> tuple[str, ...]:
    """What an answer of a bundle has to say about integers on this processor, one line each.

    Args:
        manifest: Of the bundle.
        on_cpu: Stages that run on the processor.

    Raises:
        BackendError: Integer products are wrong here, whatever the weights.
    """
    stages = {"vision": manifest.vision, "rfm": manifest.rfm, "llm": manifest.llm}
    precisions = {name: spec.precision for name, spec in stages.items() if spec is not None}
    concerned = [
        name for name in precisions if name in on_cpu and precisions[name] in INTEGER_PRECISIONS
    ]
    if not concerned:
        return ()
    found = integer_products()
    if found == "wrong":
        raise BackendError(
            f"onnxruntime {ort.__version__} multiplies integers wrongly on this processor, and "
            "this bundle needs them; install another version of onnxruntime, or export the bundle "
            "with --precision int8-weight"
        )
    if found == "exact" or manifest.exact_integers:
        return ()
    return (
        f"this bundle ({', '.join(concerned)}) was exported by an older lrs-edge, and its numbers "
        "are wrong on this processor, which has no VNNI: sums of products are cut off at 16 bits; "
        "export it again",
    )


def _right_pairs() -> list[bool]:
    """Whether the largest inputs times weights of each of `_PAIRS` give what they must."""
    columns = [np.resize(np.array(pair, np.int8), _INPUTS) for pair in _PAIRS]
    weight = np.repeat(np.stack(columns, axis=1), _OUTPUTS, axis=1)
    # Both signs, so that sums are cut off at both ends.
    weight[:, 1::2] *= -1
    x = np.full((_ROWS, _INPUTS), 255, np.uint8)
    constants = {"weight": weight, "zero": np.array(0, np.uint8)}
    model = one_node_model(
        "MatMulInteger", ["x", "weight", "zero"], {"x": "uint8", "y": "int32"}, constants
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    wanted = x.astype(np.int32) @ weight.astype(np.int32)
    # A single row has a kernel of its own.
    right = np.ones(weight.shape[1], bool)
    for rows in (x, x[:1]):
        (found,) = session.run(["y"], {"x": rows})
        right &= (found == wanted[: len(rows)]).all(axis=0)
    return [bool(part.all()) for part in np.split(right, len(_PAIRS))]
