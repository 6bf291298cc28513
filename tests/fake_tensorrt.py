"""TensorRT and CUDA without a GPU: the same calls, over host memory and ONNX Runtime's CPU.

An "engine" is the ONNX file that it was built of. Memory of the "GPU" is filled with NaN, what lies
outside of an allocation cannot be touched, and copies are counted by direction. What TensorRT
demands is checked: shapes within the profile, every input and output bound, key/value buffers
updated in place. Nothing here says that a real engine computes right.
"""

from __future__ import annotations

import ctypes
import pickle
from collections import Counter
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from lrs_edge.engines.runtime import ort

_KINDS = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.INT64: np.int64,
    onnx.TensorProto.BOOL: np.bool_,
}


class MemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class FakeCuda:
    """`cuda.bindings.runtime`.

    Args:
        memory: Bytes of the GPU.
    """

    cudaMemcpyKind = MemcpyKind

    def __init__(self, memory: int = 1 << 30, capability: tuple[int, int] = (8, 7)) -> None:
        self.memory = memory
        self.capability = capability
        self.copies: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._device: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}

    def used(self) -> int:
        return sum(len(block) for block in self._device.values())

    def check(self, address: int, nbytes: int, *, device: bool = True) -> None:
        """What is touched lies in one allocation of the GPU, or in none of them."""
        inside = any(
            start <= address and address + nbytes <= start + len(block)
            for start, block in self._device.items()
        )
        assert inside == device, (
            f"{nbytes} bytes at {address:x} are not {'' if device else 'no '}GPU's"
        )

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.check(address, nbytes)
        memory = (ctypes.c_char * nbytes).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)

    def host_array(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.check(address, nbytes, device=False)
        memory = (ctypes.c_char * nbytes).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape).copy()

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaGetDeviceProperties(self, _number: int) -> tuple[int, Any]:
        major, minor = self.capability
        return 0, SimpleNamespace(name=b"Orin", major=major, minor=minor, integrated=1)

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13020

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return 0, 13020

    def cudaStreamCreate(self) -> tuple[int, int]:
        return 0, 77

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, f"error {status}".encode()

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.memory - self.used(), self.memory

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        if self.used() + size > self.memory:
            return 2, None
        memory = bytearray(b"\xff" * (size + 256))
        whole = (ctypes.c_char * len(memory)).from_buffer(memory)
        shift = -ctypes.addressof(whole) % 256
        block = (ctypes.c_char * size).from_buffer(memory, shift)
        self._device[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[int]:
        del self._device[address]
        return (0,)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        block = ctypes.create_string_buffer(size)
        self._pinned[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        del self._pinned[address]
        return (0,)

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: MemcpyKind, stream: int
    ) -> tuple[int]:
        assert stream == 77
        self._count(kind, nbytes)
        self.check(target, nbytes, device=kind != MemcpyKind.cudaMemcpyDeviceToHost)
        self.check(source, nbytes, device=kind != MemcpyKind.cudaMemcpyHostToDevice)
        overlap = target < source + nbytes and source < target + nbytes
        assert not overlap, "CUDA does not say what copying onto itself gives"
        ctypes.memmove(target, source, nbytes)
        return (0,)

    def cudaMemcpy2DAsync(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        kind: MemcpyKind,
        stream: int,
    ) -> tuple[int]:
        assert stream == 77
        assert width <= min(target_pitch, source_pitch)
        self._count(kind, width * rows)
        for row in range(rows):
            self.check(target + row * target_pitch, width)
            self.check(source + row * source_pitch, width)
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[int]:
        assert stream == 77
        self.check(address, nbytes)
        ctypes.memset(address, value, nbytes)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert stream == 77
        return (0,)

    def _count(self, kind: MemcpyKind, nbytes: int) -> None:
        self.copies[kind.name.removeprefix("cudaMemcpy")] += 1
        self.bytes[kind.name.removeprefix("cudaMemcpy")] += nbytes


class FakeTensorRT:
    """The package `tensorrt`, or `tensorrt_rtx`, over a fake GPU."""

    __version__ = "10.16.1"

    @property
    def updates_in_place(self) -> bool:
        """TensorScatter is known; without, what is written must not be what is read."""
        return self.__version__ == "10.16.1"

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    class IProgressMonitor:
        pass

    Logger = ILogger
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    LayerType = SimpleNamespace(KV_CACHE_UPDATE="TensorScatter")
    TensorLocation = SimpleNamespace(DEVICE="device", HOST="host")
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.on_host: set[str] = set()
        self.built = 0
        self.runs: list[dict[str, tuple[int, ...]]] = []

    def nptype(self, kind: Any) -> Any:
        return kind

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(
            deserialize_cuda_engine=lambda data: Engine(self, logger, *pickle.loads(data))
        )

    def Builder(self, logger: Any) -> Any:
        return Builder(self, logger)

    def OnnxParser(self, network: Any, _logger: Any) -> Any:
        return Parser(network)


class Parser:
    num_errors = 0

    def __init__(self, network: Any) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        model = _load(Path(path))
        self._network.model = model
        shapes = [_dims(value) for value in model.graph.input]
        inputs = [
            SimpleNamespace(name=value.name, shape=[n if isinstance(n, int) else -1 for n in shape])
            for value, shape in zip(model.graph.input, shapes, strict=True)
        ]
        self._network.num_inputs = len(inputs)
        self._network.get_input = inputs.__getitem__
        self._network.num_outputs = len(model.graph.output)
        self._network.get_output = model.graph.output.__getitem__
        layers = [SimpleNamespace(type=node.op_type) for node in model.graph.node]
        self._network.num_layers = len(layers)
        self._network.get_layer = layers.__getitem__
        return True


class Builder:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def create_network(self, flags: int) -> Any:
        assert flags == 2
        return SimpleNamespace()

    def create_builder_config(self) -> Any:
        config = SimpleNamespace(profile={})
        config.set_memory_pool_limit = lambda _pool, _size: None
        config.add_optimization_profile = lambda profile: config.profile.update(profile.shapes)
        config.create_timing_cache = _timing_cache
        config.set_timing_cache = lambda _timings, _ignore: True
        return config

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, *three: shapes.__setitem__(name, three)
        )

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        self._trt.built += 1
        config.progress_monitor.phase_start("Building engine", None, 1)
        config.progress_monitor.step_complete("Building engine", 0)
        config.progress_monitor.phase_finish("Building engine")
        return bytearray(pickle.dumps((network.model.SerializeToString(), config.profile)))


class Engine:
    def __init__(
        self, trt: FakeTensorRT, logger: Any, data: bytes, profile: dict[str, Any]
    ) -> None:
        self._trt, self._logger, self.profile = trt, logger, profile
        model = onnx.load_from_string(data)
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.num_layers = len(model.graph.node)
        self._names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self._names)
        self.get_tensor_name = self._names.__getitem__

    def _value(self, name: str) -> Any:
        return self.inputs.get(name) or self.outputs[name]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_location(self, name: str) -> str:
        return "host" if name in self._trt.on_host else "device"

    def get_tensor_dtype(self, name: str) -> Any:
        return _KINDS[self._value(name).type.tensor_type.elem_type]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [n if isinstance(n, int) else -1 for n in _dims(self._value(name))]

    def get_tensor_profile_shape(self, name: str, number: int) -> Any:
        assert number == 0
        return self.profile[name]

    def create_execution_context(self) -> Any:
        return Context(self._trt, self._logger, self)


class Context:
    def __init__(self, trt: FakeTensorRT, logger: Any, engine: Engine) -> None:
        self._trt, self._logger, self._engine = trt, logger, engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        known = self._engine.get_tensor_shape(name)
        least, _, largest = self._engine.profile.get(name, (known,) * 3)
        if len(shape) != len(least) or not all(
            a <= b <= c for a, b, c in zip(least, shape, largest, strict=True)
        ):
            self._logger.log(1, f"{name} {shape} is outside of the profile")
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        aligned = address % 256 == 0 or name in self._trt.on_host
        assert aligned, "TensorRT wants tensors aligned"
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = {
            axis: size
            for given, shape in self._shapes.items()
            for axis, size in zip(_dims(self._engine.inputs[given]), shape, strict=True)
        }
        dims = _dims(self._engine.outputs[name])
        return tuple(n if isinstance(n, int) else sizes[n] for n in dims)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        engine, cuda = self._engine, self._trt.cuda
        feeds = {}
        for name in engine.inputs:
            shape = self._shapes.get(name) or tuple(engine.get_tensor_shape(name))
            if name.startswith("past_") and name != "past_length":
                present = name.replace("past_", "present_")
                in_place = self._addresses[name] == self._addresses[present]
                assert in_place == self._trt.updates_in_place
            where = cuda.host_array if name in self._trt.on_host else cuda.array
            feeds[name] = where(self._addresses[name], shape, engine.get_tensor_dtype(name))
        self._trt.runs.append({name: feed.shape for name, feed in feeds.items()})
        found = engine.session.run(list(engine.outputs), feeds)
        for name, values in zip(engine.outputs, found, strict=True):
            assert values.shape == self.get_tensor_shape(name)
            cuda.array(self._addresses[name], values.shape, values.dtype)[...] = values
        return True


def _timing_cache(data: bytes) -> Any:
    """None where the bytes are not those of a cache."""
    if data.strip(b"t"):
        return None
    return SimpleNamespace(serialize=lambda: bytearray(data + b"t"))


def _load(path: Path) -> onnx.ModelProto:
    """A model with its weights, which may be links into a bundle: `onnx.load` refuses those."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            with (path.parent / where["location"]).open("rb") as stream:
                stream.seek(int(where.get("offset", 0)))
                tensor.raw_data = stream.read(int(where["length"]))
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
    return model


def _dims(value: Any) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]


def put_in_place(
    monkeypatch: Any, cache: Path, cuda: FakeCuda | None = None, version: str = "10.16.1"
) -> FakeTensorRT:
    """Make lrs-edge find the fake library and its GPU, and an empty cache of engines."""
    from lrs_edge.engines.tensorrt import device, library

    cuda = cuda or FakeCuda()
    trt = FakeTensorRT(cuda)
    trt.__version__ = version
    find = library.importlib.import_module
    names = {"tensorrt": trt, "cuda.bindings.runtime": cuda}
    fake = SimpleNamespace(import_module=lambda name: names.get(name) or find(name))
    monkeypatch.setattr(library, "importlib", fake)
    monkeypatch.setattr(device, "importlib", fake)
    monkeypatch.setenv("LRS_EDGE_CACHE", str(cache))
    device.open_device.cache_clear()
    return trt
