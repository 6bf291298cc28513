"""Embeddings on a GPU: put there, and put together there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import Feed, on_host
from lrs_edge.engines.tensorrt.device import Device, DeviceTensor

_ITEM = 4


def uploaded(device: Device, place: str, array: NDArray[Any]) -> DeviceTensor:
    """A copy of a host array on a GPU, which is called `place`."""
    block = device.allocate(array.nbytes)
    device.upload(array, block.address)
    return DeviceTensor(block, array.shape, array.dtype.name, place)


def gathered(
    device: Device, place: str, tables: Sequence[Feed], places: NDArray[np.int64]
) -> DeviceTensor:
    """Rows of tables laid end to end, by one copy for each stretch that lies together.

    Args:
        device: The GPU.
        place: What it is called.
        tables: float32 [m, D] each, of any m; those that lie elsewhere are copied there.
        places: int64 [n].

    Returns:
        float32 [1, n, D].
    """
    parts = [
        table if isinstance(table, DeviceTensor) else uploaded(device, place, on_host(table))
        for table in tables
    ]
    width = parts[0].shape[-1]
    row = width * _ITEM
    block = device.allocate(len(places) * row)
    starts = np.cumsum([0, *(part.shape[0] for part in parts)])
    for first, end in _runs(places, starts):
        table = int(np.searchsorted(starts[1:], places[first], side="right"))
        source = parts[table].address + int(places[first] - starts[table]) * row
        device.copy(source, block.address + first * row, (end - first) * row)
    return DeviceTensor(block, (1, len(places), width), "float32", place)


def _runs(places: NDArray[np.int64], starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Stretches of places that follow each other in one table."""
    if len(places) == 0:
        return
    cut = np.flatnonzero((np.diff(places) != 1) | np.isin(places[1:], starts)) + 1
    yield from zip([0, *cut.tolist()], [*cut.tolist(), len(places)], strict=True)
