"""Key and value buffers of an engine: static places on the GPU, updated and compacted there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.tensorrt.device import Block, Device
from lrs_edge.errors import BackendError

#: Moves places of a buffer: from an address, by int64 [S] on the device, to an address.
Mover = Callable[[int, int, int], None]


class TensorRTBuffers:
    """Buffers [1, kv_heads, S, head_dim]; see `lrs_edge.engines.base.KVBuffers`.

    S is written into the engine, so that the capacity never changes: what asks for less gets S
    places, what asks for more is refused. Memory is taken when the engine first runs over them, and
    zeroed, since places that are masked must hold numbers.

    Args:
        names: Of the buffers, without `past_`.
        shape: [1, kv_heads, S, head_dim].
        dtype: Of their numbers.
        device: Where they lie.
        mover: Compacts them.
        in_place: The engine writes new places into the memory that it reads. If not, there is a
            second memory for each, and both change places after every run.
    """

    def __init__(
        self,
        names: Sequence[str],
        shape: tuple[int, ...],
        dtype: str,
        device: Device,
        mover: Mover,
        *,
        in_place: bool = True,
    ) -> None:
        self._names = tuple(names)
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._mover = mover
        self._blocks: dict[str, Block] = {}
        self._in_place = in_place
        #: Where engines write that do not write into what they read.
        self._targets: dict[str, Block] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the buffers."""
        return self._names

    @property
    def capacity(self) -> int:
        """Places S of each buffer."""
        return self._shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together, once an engine has run over them."""
        return len(self._names) * self._each * (1 if self._in_place else 2)

    @property
    def _each(self) -> int:
        return int(np.prod(self._shape)) * np.dtype(self._dtype).itemsize

    def address(self, name: str) -> int:
        """Where a buffer lies.

        Raises:
            OutOfMemoryError: There is no memory for the buffers.
        """
        if not self._blocks:
            self._blocks = self._new()
        return self._blocks[name].address

    def target(self, name: str) -> int:
        """Where the engine writes what a buffer holds afterwards.

        Raises:
            OutOfMemoryError: There is no memory for it.
        """
        if self._in_place:
            return self.address(name)
        if not self._targets:
            # All places are written by every run.
            self._targets = self._new(zeroed=False)
        return self._targets[name].address

    def written(self) -> None:
        """The engine has run: what it wrote is what the buffers hold."""
        if not self._in_place:
            self._blocks, self._targets = self._targets, self._blocks

    def _new(self, *, zeroed: bool = True) -> dict[str, Block]:
        blocks = {name: self._device.allocate(self._each) for name in self._names}
        if zeroed:
            for block in blocks.values():
                self._device.zero(block.address, self._each)
        return blocks

    @property
    def doubling(self) -> bool:
        """They have the places that the engine was built for."""
        return False

    def gather(self, indices: NDArray[np.int64], capacity: int) -> None:
        """Move old places to new ones; see `lrs_edge.engines.base.KVBuffers.gather`.

        Raises:
            BackendError: More places are asked for than the engine has.
        """
        self._check(capacity)
        count = len(indices)
        if count == 0:
            self._blocks, self._targets = {}, {}
            return
        if not self._blocks or np.array_equal(indices, np.arange(count)):
            return
        places = np.zeros(self.capacity, np.int64)
        places[:count] = indices
        table = self._device.allocate(places.nbytes)
        self._device.upload(places, table.address)
        # One spare buffer goes from layer to layer.
        spare = self._device.allocate(self._each)
        try:
            for name in self._names:
                old = self._blocks[name]
                self._mover(old.address, table.address, spare.address)
                self._blocks[name], spare = spare, old
        except BaseException:
            # Some have moved and others have not.
            self._blocks, self._targets = {}, {}
            raise

    def _check(self, capacity: int) -> None:
        if capacity > self.capacity:
            raise BackendError(
                f"a sequence needs {capacity} places in the KV cache, and this engine was built "
                f"for {self.capacity}; use a smaller --max-vision-tokens, or build it again: "
                f"lrs-edge build BUNDLE --context {capacity}"
            )

    def copy(self, length: int, capacity: int) -> TensorRTBuffers:
        """Buffers of their own; see `lrs_edge.engines.base.KVBuffers.copy`."""
        self._check(capacity)
        other = TensorRTBuffers(
            self._names,
            self._shape,
            self._dtype,
            self._device,
            self._mover,
            in_place=self._in_place,
        )
        if self._blocks and length:
            other._blocks = other._new()
            _, heads, places, width = self._shape
            row = width * np.dtype(self._dtype).itemsize
            for name, block in self._blocks.items():
                target = other._blocks[name].address
                pitch = places * row
                self._device.copy_rows(block.address, pitch, target, pitch, length * row, heads)
        return other

    def read(self, name: str) -> NDArray[np.float32]:
        """A float32 copy of one buffer."""
        if not self._blocks:
            return np.zeros(self._shape, np.float32)
        found: NDArray[Any] = self._device.download(
            self._blocks[name].address, self._shape, self._dtype
        )
        return found.astype(np.float32)
