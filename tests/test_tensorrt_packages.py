"""What lrs-edge calls of NVIDIA's packages is there, and the simulated ones are called alike."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lrs_edge.commands.main import run
from lrs_edge.engines.gather_model import gather_model
from lrs_edge.engines.tensorrt import device
from lrs_edge.engines.tensorrt.building import BuildOptions, build_engine
from lrs_edge.engines.tensorrt.device import Device
from lrs_edge.engines.tensorrt.execution import Execution
from lrs_edge.engines.tensorrt.library import Library, find_library
from lrs_edge.engines.tensorrt.targets import Target
from lrs_edge.errors import BackendError, OutOfMemoryError
from tests import fake_tensorrt
from tests.fake_tensorrt import FakeCuda, FakeTensorRT, MemcpyKind, put_in_place

SM86 = BuildOptions(Target("sm_86", "", "", ""), 64 << 20)
PLACES = {"x": ((1, 2, 8, 4),) * 3, "indices": ((8,),) * 3}
COPY = MemcpyKind.cudaMemcpyHostToDevice

#: Every call of CUDA that `device.py` makes, on addresses that are no one's.
CALLS: dict[str, tuple[Any, ...]] = {
    "cudaGetDeviceCount": (),
    "cudaGetDeviceProperties": (0,),
    "cudaDriverGetVersion": (),
    "cudaRuntimeGetVersion": (),
    "cudaStreamCreate": (),
    "cudaMemGetInfo": (),
    "cudaMalloc": (512,),
    "cudaFree": (4096,),
    "cudaMallocHost": (512,),
    "cudaFreeHost": (4096,),
    "cudaMemcpyAsync": (4096, 8192, 16, COPY, 77),
    "cudaMemcpy2DAsync": (4096, 16, 8192, 16, 8, 2, COPY, 77),
    "cudaMemsetAsync": (4096, 0, 16, 77),
    "cudaStreamSynchronize": (77,),
}
#: Values that each gives besides its status.
GIVES = dict.fromkeys(CALLS, 0) | {
    "cudaGetDeviceCount": 1,
    "cudaGetDeviceProperties": 1,
    "cudaDriverGetVersion": 1,
    "cudaRuntimeGetVersion": 1,
    "cudaStreamCreate": 1,
    "cudaMemGetInfo": 2,
    "cudaMalloc": 1,
    "cudaMallocHost": 1,
}


@pytest.fixture
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return find_library("tensorrt-rtx")


@pytest.fixture
def move(tmp_path: Path) -> Path:
    path = tmp_path / "move.onnx"
    path.write_bytes(gather_model("float16"))
    return path


def test_cuda_is_called_as_its_package_takes_it() -> None:
    """Without a driver each call reaches CUDA, which refuses it; with one they are not made."""
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    facts = cuda.cudaDeviceProp()
    assert (facts.name, facts.major, facts.minor, facts.integrated) == (b"", 0, 0, 0)
    assert int(cuda.cudaStream_t(77)) == 77
    assert int(cuda.cudaError_t.cudaErrorMemoryAllocation) == 2
    assert {kind.name: int(kind) for kind in MemcpyKind}.items() <= {
        kind.name: int(kind) for kind in cuda.cudaMemcpyKind
    }.items()
    status, text = cuda.cudaGetErrorString(cuda.cudaError_t.cudaErrorNoDevice)
    assert (int(status), type(text)) == (0, bytes)
    if cuda.cudaDriverGetVersion()[1]:
        pytest.skip("there is a driver, which would act on these calls")
    for name, arguments in CALLS.items():
        given = [cuda.cudaMemcpyKind(int(a)) if a is COPY else a for a in arguments]
        status, *found = getattr(cuda, name)(*given)
        assert len(found) == GIVES[name], name
        assert int(status) == (0 if name.endswith("Version") else 35), name


def test_the_simulated_cuda_gives_as_many_values() -> None:
    cuda = FakeCuda()
    for name in CALLS:
        assert hasattr(cuda, name)
    gives = ("cudaGetDeviceCount", "cudaStreamCreate", "cudaMemGetInfo", "cudaDriverGetVersion")
    for name in gives:
        assert len(getattr(cuda, name)()) == 1 + GIVES[name]


def test_the_simulated_tensorrt_has_no_call_that_the_real_one_lacks(rtx: Library) -> None:
    trt = rtx.module
    config = vars(fake_tensorrt.Builder(None, None).create_builder_config())
    pairs: list[tuple[Any, set[str]]] = [
        (trt.Builder, _public(fake_tensorrt.Builder)),
        (trt.IBuilderConfig, set(config) - {"profile"} | {"progress_monitor"}),
        (trt.OnnxParser, _public(fake_tensorrt.Parser) | {"get_error"}),
        (trt.ICudaEngine, _public(fake_tensorrt.Engine) | {"get_tensor_name", "num_io_tensors"}),
        (trt.IExecutionContext, _public(fake_tensorrt.Context)),
        (trt.Runtime, {"deserialize_cuda_engine"}),
        (trt.INetworkDefinition, {"num_inputs", "get_input", "num_outputs", "get_output"}),
        (trt.INetworkDefinition, {"num_layers", "get_layer"}),
        (trt.LayerType, {"KV_CACHE_UPDATE"}),
        (trt.MemoryPoolType, {"WORKSPACE"}),
        (trt.TensorLocation, {"HOST", "DEVICE"}),
        (trt.TensorIOMode, {"INPUT", "OUTPUT"}),
        (trt.ICudaEngine, {"create_runtime_config"}),
        (trt.IRuntimeConfig, {"create_runtime_cache", "set_runtime_cache"}),
        (trt.IRuntimeCache, {"serialize", "deserialize"}),
    ]
    for real, names in pairs:
        assert names <= set(dir(real)), real
    kinds = (trt.DataType.INT64, trt.DataType.HALF, trt.DataType.FLOAT, trt.DataType.BOOL)
    names = [np.dtype(trt.nptype(kind)).name for kind in kinds]
    assert names == ["int64", "float16", "float32", "bool"]


def _public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_one_logger_serves_the_process(rtx: Library, move: Path) -> None:
    """The library keeps to the first, and warns of others."""
    assert rtx.logger() is find_library("tensorrt-rtx").logger()
    assert build_engine(rtx, move, PLACES, SM86).nbytes > 1000
    gc.collect()
    move.write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"cannot read move\.onnx"):
        build_engine(rtx, move, PLACES, SM86)


def test_ctrl_c_is_not_lost_in_the_library(rtx: Library, move: Path) -> None:
    """It would be raised in the logger, where the library drops it and builds on."""
    # A shell lets what it starts in the background ignore the signal.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    during: list[Any] = []

    def tell(_phase: str, _step: int, _of: int) -> None:
        during.append(signal.getsignal(signal.SIGINT))
        os.kill(os.getpid(), signal.SIGINT)

    options = BuildOptions(SM86.target, SM86.workspace, on_progress=tell)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(rtx, move, PLACES, options)
        assert during[0] is not before
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_build_beside_the_main_thread_leaves_signals_alone(rtx: Library, move: Path) -> None:
    sizes: list[int] = []
    thread = threading.Thread(
        target=lambda: sizes.append(build_engine(rtx, move, PLACES, SM86).nbytes)
    )
    thread.start()
    thread.join()
    assert sizes[0] > 1000


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorRT:
    return put_in_place(monkeypatch, tmp_path)


@pytest.mark.parametrize("kind", ["Builder", "Runtime"])
def test_a_library_that_cannot_use_the_driver_is_named(
    fake: FakeTensorRT, kind: str, move: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python package only says that it was given a null pointer."""
    library = find_library("tensorrt")

    def null(handle: Any) -> Any:
        handle.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, kind, null)
    words = r"tensorrt 10\.16\.1 does not start \(CUDA init.* 35\)"
    if kind == "Builder":
        with pytest.raises(BackendError, match=words):
            build_engine(library, move, PLACES, SM86)
    else:
        with pytest.raises(BackendError, match=words):
            Execution(library, b"", "an engine", Device(fake.cuda))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Error Code 1: Cuda Runtime (an illegal memory access was encountered)", BackendError),
        ("Error Code 1: Cuda Runtime (out of memory)", OutOfMemoryError),
        ("Requested amount of GPU memory (9 bytes) could not be allocated", OutOfMemoryError),
    ],
)
def test_not_every_error_about_memory_is_of_too_little(
    fake: FakeTensorRT,
    said: str,
    error: type[BackendError],
    move: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = find_library("tensorrt")

    def fails(*_: Any) -> None:
        library.logger().handle.log(1, said)

    monkeypatch.setattr(fake_tensorrt.Builder, "build_serialized_network", fails)
    assert fake
    with pytest.raises((BackendError, OutOfMemoryError)) as caught:
        build_engine(library, move, PLACES, SM86)
    assert type(caught.value) is error


def test_times_of_kernels_that_are_damaged_are_measured_again(
    fake: FakeTensorRT, move: Path, tmp_path: Path
) -> None:
    timings = tmp_path / "sm_87.timings"
    timings.write_bytes(b"half of a fi")
    options = BuildOptions(SM86.target, SM86.workspace, timings)
    build_engine(find_library("tensorrt"), move, PLACES, options)
    assert fake.built == 1
    assert timings.read_bytes() == b"t"


def test_compiled_kernels_are_kept_while_their_engine_is_there(tmp_path: Path) -> None:
    happened: list[str] = []

    def noted(what: str, result: Any = None) -> Callable[..., Any]:
        def note(*_: Any) -> Any:
            happened.append(what)
            return result

        return note

    compiled = SimpleNamespace(serialize=noted("kept", b"kernels"))
    config = SimpleNamespace(
        create_runtime_cache=lambda: compiled, set_runtime_cache=lambda _cache: None
    )

    class Engine:
        num_io_tensors = 0

        def create_runtime_config(self) -> Any:
            return config

        def create_execution_context(self, _config: Any) -> Any:
            return SimpleNamespace()

        def __del__(self) -> None:
            happened.append("engine gone")

    class Module:
        ILogger = FakeTensorRT.ILogger

        def Runtime(self, _handle: Any) -> Any:
            return SimpleNamespace(deserialize_cuda_engine=lambda _data: Engine())

    library = Library("tensorrt-rtx", Module(), "1.7.1")
    kernels = tmp_path / "an.kernels"
    execution = Execution(library, b"", "an engine", Device(FakeCuda()), kernels)
    del execution
    gc.collect()
    assert happened == ["kept", "engine gone"]
    assert kernels.read_bytes() == b"kernels"


def test_weights_that_an_older_builder_may_not_take_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_place(monkeypatch, tmp_path, version="10.3.0")
    monkeypatch.setattr(fake_tensorrt.Builder, "build_serialized_network", lambda *_: None)
    assert run(["build", "--device", "tensorrt", "--stage", "llm"]) == 5
    said = capsys.readouterr().err
    assert "tensorrt 10.3.0 cannot build llm_std_8192.onnx: it does not say why" in said
    assert "may not take weights of int8-" in said
    assert "export llm at fp16 or int4-weight" in said


def test_memory_that_nobody_uses_is_there_for_an_engine(fake: FakeTensorRT, move: Path) -> None:
    library, gpu = find_library("tensorrt"), Device(fake.cuda)
    data = build_engine(library, move, PLACES, SM86)
    block = gpu.allocate(1 << 20)
    del block
    assert fake.cuda.used() == 1 << 20
    Execution(library, data, "an engine", gpu)
    assert fake.cuda.used() == 0


def test_blocks_of_sizes_that_are_gone_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is the machine's, nothing refuses it before the machine is full."""
    monkeypatch.setattr(device, "_MOST_KEPT", 1 << 20)
    cuda = FakeCuda()
    gpu = Device(cuda)
    for length in range(1, 100):
        gpu.allocate(length * 1024)
    assert cuda.used() < 2 << 20
    block = gpu.allocate(2 << 20)
    again = block.address
    del block
    assert gpu.allocate(2 << 20).address == again


def test_a_driver_that_does_not_answer_is_explained(
    fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_library() -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    cuda = fake.cuda
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (35, None))
    monkeypatch.setattr(cuda, "cudaDriverGetVersion", lambda: (0, 12060))
    monkeypatch.setattr(cuda, "cudaRuntimeGetVersion", lambda: (0, 12090))
    gpu, why = device.find_gpu()
    assert gpu is None
    assert "no NVIDIA GPU answers" in why
    # A later minor version does elsewhere, and not on a Jetson.
    assert "pip install" not in why
    tegra = tmp_path / "nv_tegra_release"
    tegra.touch()
    monkeypatch.setattr(device, "_TEGRA", tegra)
    why = device.find_gpu()[1]
    assert "cuda-bindings 12.9 is newer than this machine's driver, which knows CUDA 12.6" in why
    assert why.endswith("pip install 'cuda-python==12.6.*'")
    monkeypatch.setattr(cuda, "cudaDriverGetVersion", lambda: (0, 12090))
    assert "groups video and render" in device.find_gpu()[1]
    assert "pip install" not in device.find_gpu()[1]
    # The predecessor of cuda-bindings finds no driver to ask, and raises.
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", no_library)
    monkeypatch.setattr(cuda, "cudaDriverGetVersion", no_library)
    assert "there is no NVIDIA driver" in device.find_gpu()[1]
