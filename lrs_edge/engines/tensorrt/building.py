"""Making an engine of a graph."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrs_edge.engines.tensorrt.library import Library
from lrs_edge.engines.tensorrt.targets import Target
from lrs_edge.errors import BackendError, out_of_memory
from lrs_edge.files import replacing

#: Least, usual and largest shape of inputs with open dimensions.
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

#: Told the builder's phase, and how far it is in it.
OnProgress = Callable[[str, int, int], None]

_PRESENT = "present_"


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        target: For which GPUs.
        workspace: Bytes that the builder may use on the GPU for trying kernels.
        timings: File of kernels' times, read and written; None for none. TensorRT-RTX measures
            nothing and has none.
        on_progress: Told what the builder does.
    """

    target: Target
    workspace: int
    timings: Path | None = None
    on_progress: OnProgress | None = None


def build_engine(
    library: Library, path: Path, profile: Profile, options: BuildOptions
) -> memoryview:
    """Build an engine of an ONNX file.

    Args:
        library: TensorRT or TensorRT-RTX.
        path: The file, with its weights beside it.
        profile: Shapes of every input that has open dimensions; the one profile.
        options: How.

    Returns:
        The engine, in the library's own memory: it may be as large as the weights.

    Raises:
        BackendError: The parser or the builder refuses the graph.
        OutOfMemoryError: It says that it has no memory.
        KeyboardInterrupt: It was interrupted.
    """
    trt, log = library.module, library.logger()
    builder = library.start("Builder")
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log.handle)
    if not parser.parse_from_file(str(path)):
        raise BackendError(
            f"{library.name} {library.version} cannot read {path.name}: {_parser_errors(parser)}"
        )
    if library.updates_in_place:
        _check_in_place(trt, network, path.name)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if library.is_rtx:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(trt, options.target), 0)
    config.add_optimization_profile(_profile(builder, network, profile, path.name))
    timings = _timings(config, options.timings)
    monitor = _monitor(trt, options.on_progress)
    config.progress_monitor = monitor
    with _interruptible(monitor):
        data = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if data is None:
        said = log.last_error() or "it does not say why"
        if log.says_no_memory():
            raise out_of_memory(f"{path.name} cannot be built", MemoryError(said))
        raise BackendError(f"{library.name} {library.version} cannot build {path.name}: {said}")
    if timings is not None and options.timings is not None:
        with suppress(OSError), replacing(options.timings) as stream:  # a help, no more
            stream.write(memoryview(timings.serialize()))
    return memoryview(data)


def _strongly_typed(trt: Any) -> int:
    """The flag of TensorRT 10; networks of TensorRT 11 and TensorRT-RTX are so in any case."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _capability(trt: Any, target: Target) -> Any:
    return getattr(trt.ComputeCapability, target.capability.replace("sm_", "SM"))


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(number) for number in range(min(parser.num_errors, 2))]
    said = [
        f"{error.node_operator() or 'graph'} {error.node_name()}: {error.desc()}"
        for error in errors
    ]
    return " ".join("; ".join(said).split())[:300] or "it does not say why"


def _check_in_place(trt: Any, network: Any, name: str) -> None:
    """Buffers that the builder would copy at every token are a mistake of the graph's."""
    buffers = sum(
        network.get_output(number).name.startswith(_PRESENT)
        for number in range(network.num_outputs)
    )
    # Where the Python package has no name for the layer, the builder's word has to do.
    kind = getattr(trt.LayerType, "KV_CACHE_UPDATE", None)
    if kind is None or not buffers:
        return
    found = sum(network.get_layer(number).type == kind for number in range(network.num_layers))
    if found != buffers:
        raise BackendError(
            f"{name} updates {found} of its {buffers} key and value buffers in place; this is a bug"
        )


def _profile(builder: Any, network: Any, shapes: Profile, name: str) -> Any:
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        if -1 not in tuple(tensor.shape):
            continue
        if tensor.name not in shapes:
            raise BackendError(f"{name} leaves the shape of {tensor.name} open; this is a bug")
        profile.set_shape(tensor.name, *shapes[tensor.name])
    return profile


def _timings(config: Any, path: Path | None) -> Any:
    """The timing cache, from its file where there is one; one of another GPU is left alone."""
    if path is None:
        return None
    known = path.read_bytes() if path.is_file() else b""
    timings = config.create_timing_cache(known)
    # None where the bytes are not those of a cache.
    if timings is None or not config.set_timing_cache(timings, False):
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return timings


@contextmanager
def _interruptible(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C end a build at its next step.

    Python would raise KeyboardInterrupt inside of whatever the library calls next, most likely its
    logger: there the library drops it, and builds on for minutes.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        monitor.interrupted = True

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _monitor(trt: Any, on_progress: OnProgress | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes on the outermost phases; an interrupt ends the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, _parent: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.pop(phase_name, 0))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.interrupted

        def _tell(self, phase: str, step: int) -> None:
            # An exception would have to pass through C++.
            try:
                if on_progress is not None:
                    on_progress(phase, step, self._steps.get(phase, step))
            except BaseException:
                self.interrupted = True

    return Monitor()
