"""Key and value buffers in onnxruntime's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import TensorSpec
from lrs_edge.engines.onnx_errors import translated_error
from lrs_edge.engines.runtime import ort


class Bound(NamedTuple):
    """A session's inputs and outputs bound to buffers.

    `results` is the memory of the other outputs where their shapes are fixed. Asking the binding
    for its outputs makes an object of each buffer too, a third of a millisecond at 30 layers.
    """

    session: ort.InferenceSession  # A binding does not keep it alive.
    binding: ort.IOBinding
    results: list[ort.OrtValue] | None


class OnnxKVBuffers:
    """Key and value buffers as OrtValues, compacted on their own device."""

    def __init__(
        self,
        names: tuple[str, ...],
        heads: int,
        head_dim: int,
        dtype: str,
        provider: str,
        mover: ort.InferenceSession,
    ) -> None:
        self._names = names
        self._heads = heads
        self._head_dim = head_dim
        self._dtype = dtype
        self._provider = provider
        self._capacity = 1
        self._mover = mover
        # Empty buffers are one until there is something to hold: making many small ones takes
        # milliseconds each on a GPU.
        self._shared = True
        self._values = dict.fromkeys(names, self._empty())
        self._bound: dict[tuple[int, bool, tuple[str, ...]], Bound] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the buffers."""
        return self._names

    @property
    def capacity(self) -> int:
        """Places of each buffer."""
        return self._capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers together."""
        item = np.dtype(self._dtype).itemsize
        return len(self._names) * self._heads * self._capacity * self._head_dim * item

    def value(self, name: str) -> ort.OrtValue:
        """The OrtValue [1, kv_heads, capacity, head_dim] of one buffer."""
        self._part()
        return self._values[name]

    def _part(self) -> None:
        """Give each buffer memory of its own."""
        if self._shared:
            self.gather(np.zeros(0, np.int64), self._capacity)

    def bound(
        self,
        session: ort.InferenceSession,
        outputs: Sequence[TensorSpec],
        *,
        kept: bool = False,
        again: bool = True,
    ) -> Bound:
        """The buffers bound as `past_*` and, in place, as `present_*` inputs and outputs.

        Kept until the buffers move: binding two values per buffer at every token costs more than
        all the rest that happens around the engine.

        Args:
            session: Runs over the buffers.
            outputs: The other outputs, which the caller binds where they are not all of fixed
                shape; each set has a binding of its own, since a name that was bound once is
                computed at every run.
            kept: What comes out is kept beyond the next run, so the caller binds it in any case.
            again: Whether the same binding serves the next run.
        """
        self._part()
        key = (id(session), kept, tuple(output.name for output in outputs))
        if not again:
            self._bound.pop(key, None)
        if key not in self._bound:
            binding = session.io_binding()
            for name, value in self._values.items():
                binding.bind_ortvalue_input(f"past_{name}", value)
                binding.bind_ortvalue_output(f"present_{name}", value)
            results = None if kept else _results_bound(binding, outputs)
            self._bound[key] = Bound(session, binding, results)
        return self._bound[key]

    @property
    def doubling(self) -> bool:
        """On devices other than the CPU."""
        return self._provider != "cpu"

    def gather(self, indices: NDArray[np.int64], capacity: int) -> None:
        """Move old places to new ones; see `lrs_edge.engines.base.KVBuffers.gather`."""
        places = np.zeros(capacity, np.int64)
        places[: len(indices)] = indices
        # A binding holds on to the buffers that it was made for.
        self._bound.clear()
        try:
            if self._moves_all:
                self._values = self._moved(places)
            else:
                self._move_in_turn(places)
        except BaseException as error:
            self._capacity, self._shared = 1, True
            self._values = dict.fromkeys(self._names, self._empty())
            if not isinstance(error, Exception):
                raise
            raise translated_error(error, "the KV cache cannot be compacted") from error
        self._capacity, self._shared = capacity, False

    @property
    def _moves_all(self) -> bool:
        """Whether one run of the mover moves all buffers."""
        return len(self._mover.get_inputs()) > 2

    def _move_in_turn(self, places: NDArray[np.int64]) -> None:
        """Move buffer after buffer.

        One spare buffer moves from layer to layer, so compaction never needs a second cache; it can
        be reused only while the capacity stays what it was, and no buffer is shared.
        """
        spare = None
        for name in self._names:
            old = self._values[name]
            new = spare if spare is not None else self._allocate(len(places))
            self._move([old], places, [new])
            self._values[name] = new
            spare = old if len(places) == self._capacity and not self._shared else None

    def _moved(self, places: NDArray[np.int64]) -> dict[str, ort.OrtValue]:
        """Other buffers that hold places int64 [new] of these."""
        new = [self._allocate(len(places)) for _ in self._names]
        old = [self._values[name] for name in self._names]
        size = len(old) if self._moves_all else 1
        for start in range(0, len(old), size):
            self._move(old[start : start + size], places, new[start : start + size])
        return dict(zip(self._names, new, strict=True))

    def copy(self, length: int, capacity: int) -> OnnxKVBuffers:
        """Buffers of their own; see `lrs_edge.engines.base.KVBuffers.copy`."""
        places = np.zeros(capacity, np.int64)
        places[:length] = np.arange(length)
        other = OnnxKVBuffers(
            self._names, self._heads, self._head_dim, self._dtype, self._provider, self._mover
        )
        try:
            other._values = self._moved(places)
        except Exception as error:
            raise translated_error(error, "the KV cache cannot be copied") from error
        other._capacity, other._shared = capacity, False
        return other

    def _move(
        self,
        old: Sequence[ort.OrtValue],
        places: NDArray[np.int64],
        new: Sequence[ort.OrtValue],
    ) -> None:
        """One run of the mover."""
        binding = self._mover.io_binding()
        binding.bind_cpu_input("indices", places)
        ends = [""] if len(old) == 1 else [str(number) for number in range(len(old))]
        for end, source, target in zip(ends, old, new, strict=True):
            binding.bind_ortvalue_input(f"x{end}", source)
            binding.bind_ortvalue_output(f"y{end}", target)
        self._mover.run_with_iobinding(binding)

    def read(self, name: str) -> NDArray[np.float32]:
        """A float32 copy of one buffer."""
        return np.array(self._values[name].numpy(), dtype=np.float32)

    def _empty(self) -> ort.OrtValue:
        """A buffer of one place that holds zeros: what is never written must not be NaN."""
        shape = (1, self._heads, 1, self._head_dim)
        try:
            return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._dtype), self._provider, 0)
        except Exception as error:
            raise translated_error(error, "the KV cache cannot be had") from error

    def _allocate(self, capacity: int) -> ort.OrtValue:
        """A buffer that holds anything."""
        shape = [1, self._heads, capacity, self._head_dim]
        try:
            return ort.OrtValue.ortvalue_from_shape_and_type(
                shape, np.dtype(self._dtype).type, self._provider, 0
            )
        except Exception as error:
            raise translated_error(error, f"a KV buffer of shape {shape} cannot be had") from error


def _results_bound(
    binding: ort.IOBinding, outputs: Sequence[TensorSpec]
) -> list[ort.OrtValue] | None:
    """Memory for the outputs, bound; None, and nothing bound, where a shape is not fixed."""
    if any(None in output.shape for output in outputs):
        return None
    results = []
    for output in outputs:
        shape = [size for size in output.shape if size is not None]
        value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, output.dtype), "cpu", 0)
        binding.bind_ortvalue_output(output.name, value)
        results.append(value)
    return results
