"""The engine ONNX Runtime: the CPU, CUDA, and its other providers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import (
    BackendOptions,
    Feed,
    HostTensor,
    KVBuffers,
    Tensor,
    TensorSpec,
    on_host,
)
from lrs_edge.engines.cores import thread_count
from lrs_edge.engines.gather_model import gather_model
from lrs_edge.engines.node_places import RECORD, check_places, node_places
from lrs_edge.engines.onnx_buffers import OnnxKVBuffers
from lrs_edge.engines.onnx_errors import first_line, translated_error
from lrs_edge.engines.onnx_rows import RowGatherer
from lrs_edge.engines.providers import CPU, Provider, available, quiet
from lrs_edge.engines.providers import provider as resolve
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import BackendError, BundleError, OutOfMemoryError

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
}
#: onnxruntime's errors for files that are not graphs (their module is private).
_DAMAGED = ("InvalidProtobuf", "InvalidGraph", "NoModel", "NoSuchFile", "Fail", "InvalidArgument")


def devices() -> tuple[str, ...]:
    """Devices that this onnxruntime was built for, the fastest first.

    Whether they work is seen when a graph is loaded.
    """
    return ("cuda", "cpu") if available("cuda") else ("cpu",)


@dataclass(frozen=True)
class OrtTensor:
    """A tensor in onnxruntime's memory, on any device."""

    value: ort.OrtValue

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.value.shape())

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return str(self.value.device_name())

    def numpy(self) -> NDArray[Any]:
        """It on the host."""
        array: NDArray[Any] = self.value.numpy()
        return array


class OnnxGraph:
    """One ONNX file in an inference session."""

    def __init__(
        self,
        session: ort.InferenceSession,
        memory: str,
        path: Path,
        provider: Provider | None = None,
    ) -> None:
        self._session = session
        self._device = memory
        self._provider = provider
        self._nodes = {} if provider is None else node_places(session)
        self._path = path
        self._inputs = _specs(session.get_inputs())
        self._outputs = _specs(session.get_outputs())
        self._movers: dict[int, ort.InferenceSession] = {}
        self._gatherer: RowGatherer | None = None

    @classmethod
    def load(cls, path: Path, options: BackendOptions) -> OnnxGraph:
        """Load a graph.

        Raises:
            BundleError: The file is not a graph.
            BackendError: The engine cannot run the graph, or the provider fails.
            OutOfMemoryError: It does not fit into memory.
        """
        provider = resolve(devices()[0] if options.provider == "auto" else options.provider)
        try:
            session = _checked_session(path, provider, options)
        except Exception as error:
            translated = translated_error(error, f"{path.name} cannot be loaded")
            damaged = type(error).__name__ in _DAMAGED and provider.name == CPU
            if damaged and not isinstance(translated, OutOfMemoryError):
                raise BundleError(
                    f"{path} is not an ONNX graph that can be run ({first_line(error)}); copy or "
                    "export the bundle again"
                ) from error
            raise translated from error
        return cls(session, provider.memory, path, provider)

    @property
    def name(self) -> str:
        """Name of its file."""
        return self._path.name

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        return self._outputs

    @property
    def device(self) -> str:
        """`cpu`, `cuda` or `onnxruntime:NAME`."""
        return self._device if self._provider is None else self._provider.device

    @property
    def nodes(self) -> Mapping[str, int]:
        """Nodes by the provider that runs them."""
        return self._nodes

    def run(
        self,
        feeds: Mapping[str, Feed],
        outputs: Sequence[str],
        buffers: KVBuffers | None = None,
    ) -> list[NDArray[np.float32]]:
        """Run once; see `lrs_edge.engines.base.Graph.run`."""
        try:
            if buffers is None:
                results = self._session.run(
                    list(outputs), {name: on_host(feed) for name, feed in feeds.items()}
                )
            else:
                results = self._run_bound(feeds, outputs, buffers)
        except Exception as error:
            raise translated_error(error, f"{self._path.name} failed while running") from error
        return [np.asarray(result, dtype=np.float32) for result in results]

    def run_on_device(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[Tensor]:
        """Run once; see `lrs_edge.engines.base.Graph.run_on_device`."""
        if self._device == "cpu":
            return [HostTensor(array) for array in self.run(feeds, outputs, buffers)]
        try:
            return self._run_kept(feeds, outputs, buffers)
        except Exception as error:
            raise translated_error(error, f"{self._path.name} failed while running") from error

    def _run_bound(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers
    ) -> list[Any]:
        wanted = [self._outputs[name] for name in outputs]
        # Binding copies what lies elsewhere than the provider wants it, so it is done at every run.
        stays = self.device == self._device
        bound = self._own(buffers).bound(self._session, wanted, again=stays)
        _bind(bound.binding, feeds)
        if bound.results is not None:
            self._session.run_with_iobinding(bound.binding)
            # Copied, since the next run writes into the same memory.
            return [np.array(result.numpy()) for result in bound.results]
        # Bound anew: otherwise the last run's output would have to have the same shape.
        for name in outputs:
            bound.binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(bound.binding)
        return [value.numpy() for value in bound.binding.get_outputs()[len(buffers.names) :]]

    def _run_kept(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None
    ) -> list[Tensor]:
        """Outputs in memory of their own on the device, which no later run writes into."""
        if buffers is None:
            binding, others = self._session.io_binding(), 0
        else:
            wanted = [self._outputs[name] for name in outputs]
            binding = self._own(buffers).bound(self._session, wanted, kept=True).binding
            others = len(buffers.names)
        _bind(binding, feeds)
        for name in outputs:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        return [OrtTensor(value) for value in binding.get_outputs()[others:]]

    def _own(self, buffers: KVBuffers) -> OnnxKVBuffers:
        if not isinstance(buffers, OnnxKVBuffers):
            raise TypeError(f"{type(buffers).__name__} does not belong to the ONNX engine")
        return buffers

    def new_buffers(self, names: Sequence[str]) -> OnnxKVBuffers:
        """Empty buffers for the inputs `past_<name>`."""
        spec = self._inputs[f"past_{names[0]}"]
        heads, head_dim = spec.shape[1], spec.shape[3]
        if heads is None or head_dim is None:
            raise BackendError(
                f"{self._path.name}: past_{names[0]} must state its heads and head size; "
                "export the bundle again"
            )
        # The host has no memory for a second cache to spare, and calls cost little there.
        together = 1 if self._device == "cpu" else len(names)
        if together not in self._movers:
            self._movers[together] = open_mover(spec.dtype, self._device, together)
        mover = self._movers[together]
        return OnnxKVBuffers(tuple(names), heads, head_dim, spec.dtype, self._device, mover)

    def upload(self, array: NDArray[Any]) -> Tensor:
        """See `lrs_edge.engines.base.Graph.upload`."""
        if self._device == "cpu":
            return HostTensor(array)
        try:
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
        except Exception as error:
            raise translated_error(error, f"inputs of {self.name} cannot be copied") from error
        return OrtTensor(value)

    def gather_rows(self, tables: Sequence[Feed], places: NDArray[np.int64]) -> Tensor:
        """See `lrs_edge.engines.base.Graph.gather_rows`."""
        if self._gatherer is None:
            self._gatherer = RowGatherer(self._open_beside, self._device)
        values = [
            table.value if isinstance(table, OrtTensor) else _as_value(table) for table in tables
        ]
        try:
            return OrtTensor(self._gatherer.gather(values, places))
        except Exception as error:
            raise translated_error(error, f"inputs of {self.name} cannot be gathered") from error

    def beside(self, model: bytes) -> OnnxGraph:
        """See `lrs_edge.engines.base.Graph.beside`."""
        return OnnxGraph(self._open_beside(model), self._device, self._path)

    def _open_beside(self, model: bytes) -> ort.InferenceSession:
        """The session of a small graph; one thread, since it does little."""
        return _session(model, self._device, BackendOptions(threads=1))


def open_mover(dtype: str, provider: str, buffers: int = 1) -> ort.InferenceSession:
    """The session that moves places of key/value buffers; one thread, since it only copies.

    Args:
        dtype: Of the buffers.
        provider: Where they are.
        buffers: How many one run moves.
    """
    return _session(
        gather_model(dtype, buffers), provider, BackendOptions(threads=1), strict=provider != "cpu"
    )


def _as_value(table: Feed) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(on_host(table)))


def _bind(binding: ort.IOBinding, feeds: Mapping[str, Feed]) -> None:
    """Bind what a run reads: tensors of this engine as they are, anything else from the host."""
    for name, feed in feeds.items():
        if isinstance(feed, OrtTensor):
            binding.bind_ortvalue_input(name, feed.value)
        else:
            binding.bind_cpu_input(name, np.ascontiguousarray(on_host(feed)))


def _checked_session(
    path: Path, provider: Provider, chosen: BackendOptions
) -> ort.InferenceSession:
    """A session that runs where it was told to. Raises BackendError, and what loading raises."""
    host = chosen.host_nodes
    if host is not None and not host.may and provider.name != CPU:
        # Where this fails, the other way finds what would run on the CPU, and names it.
        with suppress(Exception):
            session = _session(str(path), provider, chosen, strict=True)
            check_places(session, path.name, provider, host)
            return session
    session = _session(str(path), provider, chosen)
    if provider.name != CPU:
        check_places(session, path.name, provider, host)
    return session


def _session(
    model: str | bytes, where: str | Provider, chosen: BackendOptions, *, strict: bool = False
) -> ort.InferenceSession:
    """A session on a provider, or on the device that names it; raises what ONNX Runtime does.

    Args:
        model: Path of a graph, or the graph itself.
        where: What it runs on.
        chosen: Threads, and whether weights are unpacked.
        strict: Whether a node that would run on the CPU is an error.
    """
    provider = resolve(where) if isinstance(where, str) else where
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Threads of a session go on spinning for a while after a run, which takes the cores from the
    # next session's: several take turns here, and a thread reads tiles beside them. Spinning inside
    # a run stays, without it decoding takes 1.4 times as long (docs/benchmarks.md).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    threads = thread_count(chosen.threads)
    if threads is not None:
        options.intra_op_num_threads = threads
    if chosen.unpack_weights:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry(RECORD, "1")
    arguments = provider.add_to(options, strict=strict)
    with nullcontext() if provider.name == CPU else quiet():
        return ort.InferenceSession(model, options, **arguments)


def _specs(nodes: Sequence[Any]) -> dict[str, TensorSpec]:
    return {
        node.name: TensorSpec(
            node.name,
            _DTYPES.get(node.type, node.type),
            tuple(dim if isinstance(dim, int) else None for dim in node.shape),
        )
        for node in nodes
    }
