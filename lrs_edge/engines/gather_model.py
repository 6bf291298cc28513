"""The model that compacts key/value buffers on the device that holds them, without a host copy."""

from __future__ import annotations

from lrs_edge.engines.one_node_model import one_node_model


def gather_model(dtype: str) -> bytes:
    """Serialized `y = Gather(x, indices, axis=2)`: x [1, heads, old, dim], indices int64 [new].

    Args:
        dtype: Of x and y: `float32`, `float16` or `int8`.

    Raises:
        KeyError: Another type.
    """
    return one_node_model(
        "Gather",
        ["x", "indices"],
        {"x": dtype, "indices": "int64", "y": dtype},
        attributes={"axis": 2},
        axes={
            "x": ("one", "heads", "old", "dim"),
            "indices": ("new",),
            "y": ("one", "heads", "new", "dim"),
        },
    )
