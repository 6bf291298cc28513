"""How many tiles are encoded at once, by what the device's memory holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.engines.base import TensorSpec
from lrs_edge.errors import OutOfMemoryError
from lrs_edge.vision.encoder import MOST_BATCH, VisionEncoder
from tests.specs import vision_spec

SIDE, HIDDEN = 4, 3


class SmallDevice:
    """A graph on a device whose memory holds so many tiles; tokens are sums of pixels."""

    name = "vision.onnx"

    def __init__(self, provider: str, room: int) -> None:
        self.device = provider
        self.room = room
        self.runs: list[int] = []
        self.inputs = {"pixel_values": TensorSpec("pixel_values", "float32", (None, 3, SIDE, SIDE))}
        self.outputs = {"tokens": TensorSpec("tokens", "float32", (None, 1, HIDDEN))}

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], buffers: object = None
    ) -> list[np.ndarray]:
        assert (list(outputs), buffers) == (["tokens"], None)
        pixels = feeds["pixel_values"]
        self.runs.append(len(pixels))
        if len(pixels) > self.room:
            raise OutOfMemoryError("full")
        sums = pixels.sum(axis=(1, 2, 3), dtype=np.float32)
        return [np.repeat(sums, HIDDEN).reshape(-1, 1, HIDDEN)]

    def new_buffers(self, names: Sequence[str]) -> None:
        raise NotImplementedError(names)


def encoder(device: SmallDevice) -> VisionEncoder:
    spec = vision_spec("vision.onnx", SIDE, 1, 1, mean=0.0, std=1.0)
    return VisionEncoder(device, spec, HIDDEN)


def tiles(count: int) -> list[np.ndarray]:
    return [np.full((3, SIDE, SIDE), number, np.float32) for number in range(count)]


@given(room=st.integers(1, 20), count=st.integers(1, MOST_BATCH))
def test_batches_shrink_until_they_fit(room: int, count: int) -> None:
    device = SmallDevice("cuda", room)
    vision = encoder(device)
    found = vision.encode(tiles(count))
    np.testing.assert_array_equal(found[:, 0, 0], np.arange(count) * 3 * SIDE * SIDE)
    if count > room:
        assert vision.batch_size <= room
        device.runs.clear()
        vision.encode(tiles(vision.batch_size))
        assert device.runs == [vision.batch_size]
    else:
        assert vision.batch_size == MOST_BATCH


def test_one_tile_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(OutOfMemoryError):
        encoder(SmallDevice("cuda", 0)).encode(tiles(3))


def test_a_cpu_takes_tiles_one_by_one() -> None:
    assert encoder(SmallDevice("cpu", 100)).batch_size == 1
