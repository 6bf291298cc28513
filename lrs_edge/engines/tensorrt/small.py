"""Small graphs around an engine, such as the pooling of tokens: built when they first run.

They are made of the shapes that they are given, in a second or less, and kept in the cache like all
engines.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.engines.base import Feed, Graph, KVBuffers, Tensor, TensorSpec
from lrs_edge.engines.tensorrt.building import BuildOptions, Profile, build_engine
from lrs_edge.engines.tensorrt.device import Device
from lrs_edge.engines.tensorrt.engine_cache import GRAPHS, EngineCache, EngineRecord
from lrs_edge.engines.tensorrt.execution import Execution, Serialized
from lrs_edge.engines.tensorrt.graph import TensorRTGraph
from lrs_edge.engines.tensorrt.library import Library
from lrs_edge.engines.tensorrt.rows import gathered, uploaded
from lrs_edge.engines.tensorrt.targets import choose_target
from lrs_edge.errors import BackendError, LrsEdgeError

#: Folder of the cache, in place of a bundle's hash; and the stage in the record.
SMALL = "small"
#: Tiles of one run.
_LARGEST_BATCH = 16
_WORKSPACE = 64 << 20

Shapes = Mapping[str, tuple[int, ...]]


class SmallGraph:
    """A small graph; see `lrs_edge.engines.base.Graph`.

    Args:
        model: Serialized ONNX.
        name: File of the graph that it belongs to, for messages.
        library: Builds it.
        device: Runs it.
        place: What the device is called.
    """

    def __init__(
        self, model: bytes, name: str, library: Library, device: Device, place: str
    ) -> None:
        self._model = model
        self._name = name
        self._library = library
        self._device = device
        self._place = place
        self._graphs: dict[str, TensorRTGraph] = {}

    @property
    def name(self) -> str:
        """File of the graph that it belongs to."""
        return self._name

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name, once it has run."""
        return next(iter(self._graphs.values())).inputs if self._graphs else {}

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name, once it has run."""
        return next(iter(self._graphs.values())).outputs if self._graphs else {}

    @property
    def device(self) -> str:
        """`tensorrt` or `tensorrt-rtx`."""
        return self._place

    @property
    def nodes(self) -> Mapping[str, int]:
        """Layers of what has run."""
        return {self._place: sum(sum(graph.nodes.values()) for graph in self._graphs.values())}

    def run(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[NDArray[np.float32]]:
        """Run once; see `lrs_edge.engines.base.Graph.run`."""
        return self._graph(feeds).run(feeds, outputs, buffers)

    def run_on_device(
        self, feeds: Mapping[str, Feed], outputs: Sequence[str], buffers: KVBuffers | None = None
    ) -> list[Tensor]:
        """Run once; see `lrs_edge.engines.base.Graph.run_on_device`."""
        return self._graph(feeds).run_on_device(feeds, outputs, buffers)

    def _graph(self, feeds: Mapping[str, Feed]) -> TensorRTGraph:
        """The engine for inputs of these shapes. Raises BackendError where it cannot be built."""
        profile = profile_of({name: tuple(feed.shape) for name, feed in feeds.items()})
        described = repr(sorted(profile.items()))
        if described not in self._graphs:
            data = self._engine(profile, described)
            execution = Execution(self._library, data, f"beside {self._name}", self._device)
            self._graphs[described] = TensorRTGraph(
                execution, self._name, self._device, self._place
            )
        return self._graphs[described]

    def _engine(self, profile: Profile, described: str) -> Serialized:
        library, cache = self._library, EngineCache()
        target = choose_target(library, None, self._device.gpu)
        record = EngineRecord(
            library=library.name,
            version=library.version,
            stage=SMALL,
            flavour=_digest(self._model),
            bundle=SMALL,
            capability=target.capability,
            gpu=target.gpu,
            driver=target.driver,
            system=target.system,
            profile=_digest(described.encode()),
            capacity=0,
            graphs=GRAPHS,
        )
        if engine := cache.same(record):
            with suppress(BackendError):  # damaged: built again
                return engine.read()
        with tempfile.TemporaryDirectory(prefix="lrs-edge-build-") as folder:
            path = Path(folder) / f"{SMALL}.onnx"
            path.write_bytes(self._model)
            data = build_engine(library, path, profile, BuildOptions(target, _WORKSPACE))
        # Where it cannot be kept, it is built again next time.
        with suppress(LrsEdgeError):
            cache.write(record, data)
        return data

    def new_buffers(self, names: Sequence[str]) -> KVBuffers:
        """It has none. Raises BackendError."""
        raise BackendError(f"the graph beside {self._name} has no buffers ({', '.join(names)})")

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A copy of a host array on the GPU."""
        return uploaded(self._device, self._place, array)

    def gather_rows(self, tables: Sequence[Feed], places: NDArray[np.int64]) -> Tensor:
        """See `lrs_edge.engines.base.Graph.gather_rows`."""
        return gathered(self._device, self._place, tables, places)

    def beside(self, model: bytes) -> Graph:
        """Another small graph."""
        return SmallGraph(model, self._name, self._library, self._device, self._place)


def profile_of(shapes: Shapes) -> Profile:
    """Tiles, the first of three or more axes, may be 1 to 16; all else is as it is given."""
    found = {}
    for name, shape in shapes.items():
        least = largest = shape
        if len(shape) >= 3 and shape[0] <= _LARGEST_BATCH:
            least, largest = (1, *shape[1:]), (_LARGEST_BATCH, *shape[1:])
        found[name] = (least, largest, largest)
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
