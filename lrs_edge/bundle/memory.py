"""How much memory a model takes while it answers, by arithmetic: weights, KV caches, workspace.

`of_bundle` reads it off a bundle's manifest and graphs. `memory_sizes.py` does the same for models
that nobody has exported yet. What onnxruntime makes of weights when it loads them was measured, and
so was the part of the process that is no model: `benchmarks/memory.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lrs_edge.bundle.bundle import HELD_BYTES, Bundle
from lrs_edge.bundle.graphs import GraphRun, graph_run
from lrs_edge.bundle.manifest import DecoderSpec, Flavour, StageSpec

Device = Literal["cpu", "cuda"]

#: Devices that are told of, by their memory in GB as it is sold, and the share of it that the
#: operating system and other programs leave.
DEVICES_GB = (8, 16, 24, 64)
USABLE = 0.8

#: Tokens that run through a decoder at once (`language/decoder.py`; on a GPU at least, and more
#: where there is room), tiles through the vision
#: encoder (`vision/encoder.py`), and places by which a KV buffer grows (`language/kv_cache.py`).
CHUNK = 256
TILES: Mapping[Device, int] = {"cpu": 1, "cuda": 16}
_GROWTH = 256

#: Tokens of text around an image, and tiles of a level (`--tiles-per-level`).
_TEXT, _LEVEL_TILES = 64, 16

#: Python, onnxruntime, GDAL, and an image that is being read; with CUDA also its context and the
#: workspace of its libraries.
PROCESS: Mapping[Device, int] = {"cpu": 210 << 20, "cuda": 1200 << 20}

#: Tiles that a search of several levels looks at, whose tokens are kept, and the bound of that
#: (`engine.FEATURE_CACHE_BYTES`).
_TILES_KEPT = 64
_MOST_KEPT = 256 << 20

#: Bytes that onnxruntime's allocator takes for a byte that is needed at a time.
_ALLOCATED, _ALLOCATED_FIXED = 2.5, 2.2

#: Ends the names of files of weights.
_DATA = ".data"

#: Bytes of a float that is computed.
FLOAT: Mapping[Device, int] = {"cpu": 4, "cuda": 2}

#: Bytes in memory for a byte of weights on disk, on a CPU, by precision. Weight-only formats are
#: held as the engine's products want them, with scales and sums of blocks in floats; where the
#: engine makes MatMulNBits of DequantizeLinear and MatMul itself, as the file has them besides;
#: those of vision encoders are unpacked to floats (`engines/placement.py`).
_UNPACKED: Mapping[str, float] = {
    "fp16": 2.1,
    "int8-weight": 1.05,
    "int4-weight": 1.2,
}
_UNPACKED_DEQUANTIZED: Mapping[str, float] = {
    "int8-weight": 2.3,
    "int4-weight": 2.0,
}
_UNPACKED_VISION: Mapping[str, float] = {
    "fp16": 3.0,
    "int8-weight": 4.7,
    "int4-weight": 7.4,
}


@dataclass(frozen=True)
class Stage:
    """What one stage takes, in bytes.

    Attributes:
        name: vision, rfm or llm.
        precision: Of its weights.
        file: Weights on disk; 0 where they are another stage's.
        weights: Weights in memory.
        kv: Key/value buffers at the context that was asked for.
        workspace: Largest tensors of one run.
    """

    name: str
    precision: str
    file: int
    weights: int
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.workspace


@dataclass(frozen=True)
class Need:
    """What a model takes while it answers a question, in bytes.

    Attributes:
        name: Of the model.
        device: It is computed for.
        context: Tokens in the language model's cache.
        stages: Vision, RFM where there is one, language model.
        embeddings: Token embeddings that are held in memory; larger ones are mapped, and count 0.
        kept: Tokens of tiles, which are kept between levels and questions.
        process: What is there besides the model.
    """

    name: str
    device: Device
    context: int
    stages: tuple[Stage, ...]
    embeddings: int
    kept: int
    process: int

    @property
    def total(self) -> int:
        """Of the process at its peak."""
        others = self.embeddings + self.kept + self.process
        return others + sum(stage.total for stage in self.stages)

    def fits(self, device_gb: int) -> bool:
        """Whether a device of so many GB holds it beside its system."""
        return self.total <= USABLE * device_gb * 1e9

    @property
    def smallest_gb(self) -> int | None:
        """The smallest of `DEVICES_GB` that holds it; None where none does."""
        return next((size for size in DEVICES_GB if self.fits(size)), None)


class Layers(Protocol):
    """Shape of a stack of decoder layers, as far as its key/value buffers depend on it."""

    @property
    def layers(self) -> int:
        """Full layers."""
        ...

    @property
    def heads(self) -> int:
        """Query heads."""
        ...

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        ...


@dataclass(frozen=True)
class Lengths:
    """Tokens in the caches at most.

    Attributes:
        llm: In the language model's.
        base: In the RFM's, of the base level, which is kept for the next question.
        level: In the RFM's other one, of the finer level that is searched.
    """

    llm: int
    base: int
    level: int

    @classmethod
    def of(cls, context: int, whole: int, local: int, base_tiles: int) -> Lengths:
        """Of a search with the usual budget of tiles.

        Args:
            context: Of the language model.
            whole: Tokens of the global view.
            local: Of a local tile.
            base_tiles: Tiles of the base level.
        """
        base, level = (
            min(context, _TEXT + whole + tiles * local) for tiles in (base_tiles, _LEVEL_TILES)
        )
        return cls(context, base, level)


def kv_bytes(stack: Layers, tokens: Sequence[int], item: int, *, keys: int = 0) -> int:
    """Key/value buffers of a stack.

    Args:
        stack: The layers.
        tokens: In each of its caches.
        item: Bytes of one number.
        keys: Buffers more than two for each layer.
    """
    places = sum(-(-count // _GROWTH) * _GROWTH for count in tokens)
    return (2 * stack.layers + keys) * stack.kv_heads * stack.head_dim * places * item


def attention_bytes(stack: Layers, tokens: int, device: Device) -> int:
    """What attention takes inside its operator: every head's weights for a part of the tokens.

    On CUDA they are computed piece by piece (flash attention).
    """
    return 4 * stack.heads * min(CHUNK, tokens) * tokens if device == "cpu" else 0


def workspace_bytes(numbers: int, device: Device, *, tiles: bool = False) -> int:
    """What the engine's allocator takes for so many numbers that are alive at a time.

    Args:
        numbers: Of one run; of one tile, for vision.
        device: Where it runs.
        tiles: Whether it is vision, whose sizes never change: the engine then keeps one block for
            all of them, beside what it took piece by piece in the first run.
    """
    most = numbers * FLOAT[device] * (TILES[device] if tiles else 1)
    return int(most * (_ALLOCATED_FIXED if tiles else _ALLOCATED))


def weights_in_memory(
    file: int, stage: str, precision: str, device: Device, *, dequantized: bool = False
) -> int:
    """Bytes in memory of a stage's weights that take so many on disk.

    Args:
        file: Bytes on disk.
        stage: vision, rfm or llm.
        precision: Of the weights.
        device: Where the stage runs.
        dequantized: The graph of a decoder has DequantizeLinear and MatMul, not MatMulNBits.
    """
    if device != "cpu":
        return file
    unpacked = _UNPACKED_VISION if stage == "vision" else _UNPACKED
    if dequantized and stage != "vision":
        unpacked = {**unpacked, **_UNPACKED_DEQUANTIZED}
    return int(file * unpacked.get(precision, 1.0))


def held_bytes(size: int) -> int:
    """Token embeddings of so many bytes in memory: large ones are mapped, a row at a time."""
    return size if size <= HELD_BYTES else 0


def kept_bytes(tokens: int, hidden: int) -> int:
    """Tokens of a search's tiles, of so many tokens of this width each."""
    return min(_MOST_KEPT, _TILES_KEPT * tokens * hidden * 4)


def of_bundle(bundle: Bundle, context: int | None = None) -> Need:
    """What a bundle takes, by its manifest, the sizes of its files, and the shapes of its graphs.

    Args:
        bundle: The bundle.
        context: Tokens in the language model's cache; None for as many as it may have.

    Raises:
        BundleError: A graph is not one that a bundle may hold.
    """
    manifest = bundle.manifest
    device: Device = "cuda" if manifest.llm.floats == "float16" else "cpu"
    vision = manifest.vision
    lengths = Lengths.of(
        context or manifest.limits.max_length,
        vision.grid**2,
        (-(-vision.grid // vision.local_pool)) ** 2,
        (-(-manifest.search.base_side // vision.tile)) ** 2,
    )
    reader = _Reader(bundle, lengths, device)
    stages = [reader.vision()]
    if manifest.rfm is not None:
        stages.append(reader.rfm(manifest.rfm))
    stages.append(reader.llm())
    return Need(
        name=manifest.name,
        device=device,
        context=lengths.llm,
        stages=tuple(stages),
        embeddings=held_bytes(manifest.files[manifest.embeddings].size),
        kept=kept_bytes(manifest.vision.grid**2, manifest.llm.hidden),
        process=PROCESS[device],
    )


class _Reader:
    """Reads what stages of a bundle take."""

    def __init__(self, bundle: Bundle, lengths: Lengths, device: Device) -> None:
        self._lengths = lengths
        self._bundle = bundle
        self._device = device
        self._sizes = {name: entry.size for name, entry in bundle.manifest.files.items()}

    def vision(self) -> Stage:
        """The vision encoder."""
        spec = self._bundle.manifest.vision
        run = self._run(spec.path(Flavour.PLAIN), 1, 0)
        workspace = workspace_bytes(run.peak, self._device, tiles=True)
        return self._stage("vision", spec, run, 0, workspace)

    def rfm(self, spec: DecoderSpec) -> Stage:
        """The region focus module."""
        caches = self._lengths.base, self._lengths.level
        # Layers of the language model run the scoring layer's attention as well.
        keys = 2 if self._bundle.manifest.llm.has(Flavour.GQA_REST) else 1
        return self._decoder("rfm", spec, spec.path(Flavour.GQA), caches, keys)

    def llm(self) -> Stage:
        """The language model, or what follows an RFM that is its first layers."""
        spec = self._bundle.manifest.llm
        flavour = Flavour.GQA_REST if spec.has(Flavour.GQA_REST) else Flavour.GQA
        return self._decoder("llm", spec, spec.path(flavour), (self._lengths.llm,), 0)

    def _decoder(
        self, name: str, spec: DecoderSpec, path: str, caches: tuple[int, ...], keys: int
    ) -> Stage:
        longest = max(caches)
        new = min(CHUNK, longest)
        run = self._run(path, new, longest - new)
        workspace = workspace_bytes(run.peak, self._device)
        workspace += attention_bytes(spec, longest, self._device)
        item = 4 if spec.floats == "float32" else 2
        return self._stage(name, spec, run, kv_bytes(spec, caches, item, keys=keys), workspace)

    def _run(self, path: str, new: int, past: int) -> GraphRun:
        return graph_run(self._bundle.path, path, self._sizes, new, past)

    def _stage(self, name: str, spec: StageSpec, run: GraphRun, kv: int, workspace: int) -> Stage:
        own = self._bundle.manifest.files
        file = sum(
            entry.size for path, entry in own.items() if entry.role == name and path.endswith(_DATA)
        )
        read, dequantized = sum(run.stored.values()), "DequantizeLinear" in run.operators
        weights = weights_in_memory(
            read, name, spec.precision, self._device, dequantized=dequantized
        )
        return Stage(name, spec.precision, file, weights, kv, workspace)
