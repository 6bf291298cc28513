"""An engine as a graph: the contract of `lrs_edge.engines.base` over TensorRT.

New tokens run 256 at a time at most, and as many tiles as the engine was built for: what is more
goes through in pieces.

Key and value buffers are bound as `past_*` and as `present_*`: the same memory, but for versions of
TensorRT that do not update in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import Feed, Graph, KVBuffers, Tensor, TensorSpec, on_host
from lrs_edge.engines.tensorrt.buffers import TensorRTBuffers
from lrs_edge.engines.tensorrt.device import Block, Device, DeviceTensor
from lrs_edge.engines.tensorrt.execution import Execution
from lrs_edge.engines.tensorrt.rows import gathered, uploaded
from lrs_edge.errors import BackendError

_PAST, _PRESENT = "past_", "present_"
#: Axis of new tokens in the inputs that have one.
_TOKEN_AXES = {"inputs_embeds": 1, "position_ids": 1, "attended": 1, "attention_bias": 2}
#: Hides places of a buffer that hold nothing; far below any score, and float16 holds it.
_HIDDEN = np.float32(-3e4)
_BIAS = "attention_bias"
_TILES = "pixel_values"


class TensorRTGraph:
    """One stage's engine.

    Args:
        execution: The engine.
        name: File of the bundle's graph that it was built of.
        device: Its GPU.
        place: What the device is called, such as `tensorrt`.
        mover: The engine that compacts its buffers; None for vision.
        scoring: Its `logits` [H, S] have one column for each place of a buffer, of which the
            filled ones are given out.
        in_place: `present_*` is the memory of `past_*`; if not, each has its own, and they change
            places after every run.
    """

    def __init__(
        self,
        execution: Execution,
        name: str,
        device: Device,
        place: str,
        *,
        mover: Execution | None = None,
        scoring: bool = False,
        in_place: bool = True,
    ) -> None:
        self._execution = execution
        self._name = name
        self._device = device
        self._place = place
        self._mover = mover
        self._scoring = scoring
        self._in_place = in_place
        self._taken: dict[str, Block] = {}
        self._read_on_host: dict[str, NDArray[Any]] = {}
        # Buffers have as many places as a sequence needs, as far as callers are concerned.
        self._inputs = {
            spec.name: _open_places(spec) if _is_buffer(spec.name) else spec
            for spec in execution.inputs.values()
        }

    @property
    def name(self) -> str:
        """Its file in the bundle."""
        return self._name

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        return self._execution.outputs

    @property
    def device(self) -> str:
        """`tensorrt` or `tensorrt-rtx`."""
        return self._place

    @property
    def nodes(self) -> Mapping[str, int]:
        """Layers of the engine, all of which run on the GPU."""
        return {self._place: self._execution.layers}

    def run(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[NDArray[np.float32]]:
        """Run once; see `lrs_edge.engines.base.Graph.run`."""
        found = self.run_on_device(feeds, outputs, buffers)
        return [np.asarray(tensor.numpy(), np.float32) for tensor in found]

    def run_on_device(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[Tensor]:
        """Run once; see `lrs_edge.engines.base.Graph.run_on_device`."""
        if buffers is not None and not isinstance(buffers, TensorRTBuffers):
            raise TypeError(f"{type(buffers).__name__} does not belong to TensorRT")
        if buffers is None:
            return self._run_tiles(feeds, outputs)
        new = feeds["position_ids"].shape[1]
        longest = self._execution.largest("position_ids")[1]
        self._check_room(feeds, new, buffers)
        whole: dict[str, DeviceTensor] = {}
        found: list[Tensor] = []
        for start in range(0, new, longest):
            part = slice(start, min(start + longest, new))
            found = self._run(self._part(feeds, part, buffers), outputs, buffers, whole, part, new)
        return found

    def _run_tiles(self, feeds: Mapping[str, Feed], outputs: Sequence[str]) -> list[Tensor]:
        """Tiles, as many at a time as the engine was built for."""
        if _TILES not in feeds:
            return self._run(feeds, outputs, None, {})
        tiles, most = feeds[_TILES], self._execution.largest(_TILES)[0]
        count = tiles.shape[0]
        if count <= most:
            return self._run(feeds, outputs, None, {})
        tiles = on_host(tiles)
        whole: list[DeviceTensor] = []
        for start in range(0, count, most):
            part = {_TILES: tiles[start : start + most]}
            for number, found in enumerate(self._run(part, outputs, None, {})):
                assert isinstance(found, DeviceTensor)
                if start == 0:
                    whole.append(self._tensor((count, *found.shape[1:]), found.dtype))
                target = whole[number]
                place = target.address + start * (target.nbytes // count)
                self._device.copy(found.address, place, found.nbytes)
        return list(whole)

    def _check_room(self, feeds: Mapping[str, Feed], new: int, buffers: TensorRTBuffers) -> None:
        """TensorRT writes beyond a buffer's end without a word."""
        past = int(on_host(feeds["past_length"]).item())
        if past + new > buffers.capacity:
            raise BackendError(
                f"{new} tokens after {past} do not fit into {buffers.capacity} places; build the "
                f"engine again: lrs-edge build BUNDLE --context {past + new}"
            )

    def _part(
        self, feeds: Mapping[str, Feed], part: slice, buffers: TensorRTBuffers
    ) -> dict[str, Feed]:
        """Inputs of some of the new tokens."""
        past = int(on_host(feeds["past_length"]).item()) + part.start
        cut: dict[str, Feed] = {"past_length": np.array([past], np.int64)}
        for name, feed in feeds.items():
            if name in _TOKEN_AXES:
                cut[name] = _cut(feed, _TOKEN_AXES[name], part)
        if _BIAS in cut:
            given = on_host(cut[_BIAS])
            bias = np.full((*given.shape[:3], buffers.capacity), _HIDDEN, np.float32)
            bias[..., : given.shape[3]] = given
            cut[_BIAS] = np.maximum(bias, _HIDDEN)
        return cut

    def _run(
        self,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str],
        buffers: TensorRTBuffers | None,
        whole: dict[str, DeviceTensor],
        part: slice | None = None,
        new: int = 0,
    ) -> list[Tensor]:
        shapes = {name: tuple(feed.shape) for name, feed in feeds.items()}
        addresses = {name: self._address(name, feed) for name, feed in feeds.items()}
        for name in () if buffers is None else buffers.names:
            assert buffers is not None
            addresses[_PAST + name] = buffers.address(name)
            addresses[_PRESENT + name] = buffers.target(name)
        self._execution.shape(shapes)
        found: dict[str, DeviceTensor] = {}
        for name, spec in self.outputs.items():
            if name not in addresses:
                found[name] = self._result(name, spec, whole, part, new)
                addresses[name] = found[name].address
        self._execution.run(addresses)
        if buffers is not None:
            buffers.written()
        if self._scoring and "logits" in found:
            filled = int(on_host(feeds["past_length"]).item()) + shapes["position_ids"][1]
            found["logits"] = self._filled(found["logits"], filled)
        return [whole.get(name, found[name]) for name in outputs]

    def _result(
        self,
        name: str,
        spec: TensorSpec,
        whole: dict[str, DeviceTensor],
        part: slice | None,
        new: int,
    ) -> DeviceTensor:
        """Memory for an output: its own, or of the new tokens' part in the whole of it."""
        shape = self._execution.output_shape(name)
        if part is None or len(spec.shape) != 3 or spec.shape[1] is not None:
            return self._tensor(shape, spec.dtype)
        if name not in whole:
            whole[name] = self._tensor((1, new, shape[2]), spec.dtype)
        offset = part.start * shape[2] * np.dtype(spec.dtype).itemsize
        return DeviceTensor(whole[name].block, shape, spec.dtype, self._place, offset)

    def _filled(self, scores: DeviceTensor, filled: int) -> DeviceTensor:
        """Scores [H, filled] of scores [H, S]."""
        heads, places = scores.shape
        item = np.dtype(scores.dtype).itemsize
        cut = self._tensor((heads, filled), scores.dtype)
        width = filled * item
        self._device.copy_rows(scores.address, places * item, cut.address, width, width, heads)
        return cut

    def _tensor(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return DeviceTensor(self._device.allocate(size), shape, dtype, self._place)

    def _address(self, name: str, feed: Feed) -> int:
        """Where an input lies: a tensor of this GPU as it is, anything else copied there."""
        spec = self._inputs.get(name)
        if spec is None:
            raise BackendError(f"the engine of {self._name} has no input {name}; build it again")
        read_on_host = name in self._execution.on_host
        if isinstance(feed, DeviceTensor) and feed.dtype == spec.dtype and not read_on_host:
            return feed.address
        array = np.ascontiguousarray(on_host(feed), spec.dtype)
        if read_on_host:
            # Kept until the next run, which may begin before this one has read it.
            self._device.wait()
            self._read_on_host[name] = array
            return array.ctypes.data
        # Kept for the next run; everything on the device happens in order.
        block = self._taken.get(name)
        if block is None or block.size < array.nbytes:
            self._taken[name] = block = self._device.allocate(array.nbytes)
        self._device.upload(array, block.address)
        return block.address

    def new_buffers(self, names: Sequence[str]) -> TensorRTBuffers:
        """Empty buffers for the inputs `past_<name>`."""
        spec = self._execution.inputs[_PAST + names[0]]
        if self._mover is None or None in spec.shape:
            raise BackendError(f"the engine of {self._name} has no buffers; build it again")
        shape = tuple(size for size in spec.shape if size is not None)
        return TensorRTBuffers(
            names, shape, spec.dtype, self._device, self._move, in_place=self._in_place
        )

    def _move(self, source: int, places: int, target: int) -> None:
        assert self._mover is not None
        spec = next(s for s in self._execution.inputs.values() if _is_buffer(s.name))
        shape = tuple(size for size in spec.shape if size is not None)
        self._mover.shape({"x": shape, "indices": shape[2:3]})
        self._mover.run({"x": source, "indices": places, "y": target})

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A copy of a host array on the GPU."""
        return uploaded(self._device, self._place, array)

    def gather_rows(self, tables: Sequence[Feed], places: NDArray[np.int64]) -> Tensor:
        """See `lrs_edge.engines.base.Graph.gather_rows`."""
        return gathered(self._device, self._place, tables, places)

    def beside(self, model: bytes) -> Graph:
        """A small graph on the same GPU, of which an engine is built when it first runs."""
        from lrs_edge.engines.tensorrt.small import SmallGraph

        library = self._execution.library
        return SmallGraph(model, self._name, library, self._device, self._place)


def _is_buffer(name: str) -> bool:
    return name.startswith(_PAST) and name != "past_length"


def _open_places(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, (*spec.shape[:2], None, *spec.shape[3:]))


def _cut(feed: Feed, axis: int, part: slice) -> Feed:
    """Some of the new tokens of an input."""
    if part.start == 0 and part.stop >= feed.shape[axis]:
        return feed
    if isinstance(feed, DeviceTensor) and axis == 1 and feed.shape[0] == 1:
        shape = (1, part.stop - part.start, *feed.shape[2:])
        row = int(np.prod(feed.shape[2:])) * np.dtype(feed.dtype).itemsize
        offset = feed.offset + part.start * row
        return DeviceTensor(feed.block, shape, feed.dtype, feed.device, offset)
    index = (slice(None),) * axis + (part,)
    return on_host(feed)[index]
