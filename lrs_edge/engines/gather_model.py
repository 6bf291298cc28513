"""The model that compacts key/value buffers on the device that holds them, without a host copy."""

from __future__ import annotations

from lrs_edge.engines.small_model import Node, Value, small_model


def gather_model(dtype: str, buffers: int = 1) -> bytes:
    """Serialized `y = Gather(x, indices, axis=2)`, of one buffer or of several at once.

    Inputs are x [1, heads, old, dim] and indices int64 [new], the output is y; of several buffers
    x0, x1, ... and y0, y1, ...

    Args:
        dtype: Of the buffers: `float32`, `float16` or `int8`.
        buffers: How many are moved alike.

    Raises:
        KeyError: Another type.
    """
    ends = [""] if buffers == 1 else [str(number) for number in range(buffers)]
    nodes = [Node("Gather", (f"x{end}", "indices"), f"y{end}", {"axis": 2}) for end in ends]
    old, new = (Value(dtype, ("one", "heads", places, "dim")) for places in ("old", "new"))
    inputs = {f"x{end}": old for end in ends} | {"indices": Value("int64", ("new",))}
    return small_model(nodes, inputs, {f"y{end}": new for end in ends})
