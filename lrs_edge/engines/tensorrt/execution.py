"""One engine, loaded: shapes, addresses, and one run of it."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lrs_edge.engines.base import TensorSpec
from lrs_edge.engines.tensorrt.device import Device
from lrs_edge.engines.tensorrt.library import Library, Log
from lrs_edge.errors import BackendError, out_of_memory

#: An engine, wherever its bytes lie.
Serialized = bytes | memoryview | mmap.mmap


class Execution:
    """An engine with one execution context, which runs once at a time.

    Args:
        library: TensorRT or TensorRT-RTX.
        data: The serialized engine.
        name: For messages.
        device: Where it runs.
        kernels: File in which TensorRT-RTX keeps the kernels that it compiled for this GPU; None
            for none.

    Raises:
        BackendError: It cannot be loaded here.
        OutOfMemoryError: It does not fit into the GPU's memory.
    """

    def __init__(
        self,
        library: Library,
        data: Serialized,
        name: str,
        device: Device,
        kernels: Path | None = None,
    ) -> None:
        self.library = library
        self._trt = library.module
        self._log: Log = library.logger()
        self._name = name
        self._device = device
        self._keep_kernels: Callable[[], object] | None = None
        # Blocks that nobody uses are kept for their sizes, and the library does not know of them.
        device.trim()
        self._runtime = library.start("Runtime")
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise self._failed("cannot be loaded")
        self._context = self._new_context(library, kernels)
        if self._context is None:
            raise self._failed("cannot be prepared")
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        #: Inputs that the engine reads on the host: of which it computes shapes.
        self.on_host: set[str] = set()
        for number in range(self._engine.num_io_tensors):
            tensor = self._engine.get_tensor_name(number)
            spec = TensorSpec(
                tensor,
                np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(tensor))).name,
                tuple(n if n >= 0 else None for n in self._engine.get_tensor_shape(tensor)),
            )
            mode = self._engine.get_tensor_mode(tensor)
            taken = mode == self._trt.TensorIOMode.INPUT
            (self.inputs if taken else self.outputs)[tensor] = spec
            if taken and self._engine.get_tensor_location(tensor) == self._trt.TensorLocation.HOST:
                self.on_host.add(tensor)

    def _new_context(self, library: Library, kernels: Path | None) -> Any:
        if not library.is_rtx or kernels is None:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        compiled = config.create_runtime_cache()
        if kernels.is_file():
            compiled.deserialize(kernels.read_bytes())
        config.set_runtime_cache(compiled)
        # Compiled while running, so known in the end.
        self._keep_kernels = weakref.finalize(self, _keep, compiled, kernels)
        return self._engine.create_execution_context(config)

    def __del__(self) -> None:
        # The kernels while their engine is there; the rest in this order, whatever holds on to what
        # in the library's own bindings.
        if keep := self.__dict__.pop("_keep_kernels", None):
            keep()
        for name in ("_context", "_engine", "_runtime"):
            self.__dict__.pop(name, None)

    @property
    def layers(self) -> int:
        """Layers of the engine, after the builder joined what it could."""
        return int(self._engine.num_layers)

    def largest(self, name: str) -> tuple[int, ...]:
        """Largest shape of an input in the engine's profile."""
        return tuple(self._engine.get_tensor_profile_shape(name, 0)[2])

    def run(self, addresses: Mapping[str, int]) -> None:
        """Begin one run on the device's stream, of the shapes that were set (`shape`).

        Args:
            addresses: Of all inputs and outputs.

        Raises:
            BackendError: The engine fails.
            OutOfMemoryError: It runs out of memory.
        """
        self._log.clear()
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._failed(f"refuses the memory of {name}")
        if not self._context.execute_async_v3(self._device.stream):
            raise self._failed("failed while running")

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the inputs' shapes. Raises BackendError where the engine was not built for one."""
        self._log.clear()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._failed(
                    f"was built for {name} up to {self.largest(name)}, and is given {shape}"
                )

    def output_shape(self, name: str) -> tuple[int, ...]:
        """Shape of an output for the inputs' shapes."""
        return tuple(self._context.get_tensor_shape(name))

    def _failed(self, what: str) -> BackendError:
        said = self._log.last_error()
        message = f"the engine {self._name} {what}"
        if self._log.says_no_memory():
            return out_of_memory(message, MemoryError(said))
        return BackendError(f"{message}: {said or 'TensorRT does not say why'}")


def _keep(compiled: Any, path: Path) -> None:
    """Write compiled kernels for the next process; without them it only starts more slowly."""
    try:
        data = bytes(memoryview(compiled.serialize()))
        if not path.is_file() or path.stat().st_size != len(data):
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(data)
            temporary.replace(path)
    except Exception:  # noqa: S110
        pass
