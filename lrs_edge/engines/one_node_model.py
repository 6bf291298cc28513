"""Small models of one node (`small_model.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.small_model import Node, Value, small_model


def one_node_model(
    operator: str,
    inputs: Sequence[str],
    types: Mapping[str, str],
    constants: Mapping[str, NDArray[np.generic]] | None = None,
    *,
    attributes: Mapping[str, int] | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
) -> bytes:
    """Serialized ModelProto of `y = operator(inputs)`.

    Args:
        operator: An operator of the standard domain.
        inputs: Names of the operator's inputs.
        types: Element type of `y` and of every input that is not a constant.
        constants: Inputs whose values are stored in the model.
        attributes: Of the operator, integers.
        axes: Names of the axes of `y` and of inputs, whose sizes are free; axes of one name have
            one size. What is left out is a matrix of any size.

    Raises:
        KeyError: A type that is not listed here.
    """
    constants, axes = constants or {}, axes or {}
    values = {
        name: Value(types[name], axes.get(name, (f"{name}_0", f"{name}_1")))
        for name in [*(name for name in inputs if name not in constants), "y"]
    }
    result = {"y": values.pop("y")}
    node = Node(operator, inputs, "y", attributes or {})
    return small_model([node], values, result, constants)
