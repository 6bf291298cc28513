"""Graphs in ONNX Runtime alone, and the same through the runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.metered import Meter
from lrs_edge.engines.placement import GraphLoader, placements
from lrs_edge.engines.rows import Embeds, Rows
from lrs_edge.engines.runtime import ort
from lrs_edge.language.decoder import Decoder
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.pyramid.levels import TileIndex, build_pyramid
from lrs_edge.vision.encoder import VisionEncoder
from lrs_edge.vision.on_device import DeviceTiles

#: Of an answer's timings.
PARTS = ("read", "encode", "score", "prefill", "decode")

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def milliseconds(run: Callable[[], object], repeat: int) -> float:
    """Median of several runs after two that are not counted."""
    return measure.milliseconds(run, repeat, uncounted=2)


class BareGraph:
    """A graph in a session of its own, over tensors that lie on the device.

    Args:
        path: The graph.
        device: `cpu` or `cuda`.
        capture: Capture a CUDA graph of what is run.
    """

    def __init__(self, path: Path, device: str, *, capture: bool = False) -> None:
        self._device = device
        self._capture = capture
        options = ort.SessionOptions()
        options.log_severity_level = 3
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            given = {"enable_cuda_graph": "1"} if capture else {}
            providers.insert(0, ("CUDAExecutionProvider", given))
        start = time.perf_counter()
        self.session = ort.InferenceSession(str(path), options, providers=providers)
        self.load_seconds = time.perf_counter() - start
        if device not in ("cpu", self.session.get_providers()[0][:4].lower()):
            raise RuntimeError("onnxruntime's CUDA provider does not load here")

    def bound(self, sizes: dict[str, int]) -> Callable[[], None]:
        """A run at sizes of the graph's open dimensions; past and present are the same memory."""
        binding = self.session.io_binding()
        kept = {}
        for value in self.session.get_inputs():
            shape = [sizes[side] if isinstance(side, str) else side for side in value.shape]
            array = self._content(value.name, shape, _TYPES[value.type], sizes)
            # Read on the host, by graphs for CUDA.
            on_host = value.name == "total_length"
            kept[value.name] = self._tensor(array, "cpu" if on_host else self._device)
            binding.bind_ortvalue_input(value.name, kept[value.name])
        for value in self.session.get_outputs():
            past = kept.get(value.name.replace("present_", "past_"))
            if value.name.startswith("present_") and past is not None:
                binding.bind_ortvalue_output(value.name, past)
            else:
                shape = [sizes[side] if isinstance(side, str) else side for side in value.shape]
                made = self._tensor(np.zeros(shape, _TYPES[value.type]), self._device)
                binding.bind_ortvalue_output(value.name, made)
        return lambda: self.session.run_with_iobinding(binding)

    def _tensor(self, array: np.ndarray, device: str) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array, device, 0)

    def _content(
        self, name: str, shape: list[int], kind: type, sizes: dict[str, int]
    ) -> np.ndarray:
        new, past = sizes.get("L", 0), sizes.get("past", 0)
        if name == "position_ids":
            return np.tile(np.arange(past, past + new), (shape[0], 1)).astype(kind)
        if name == "past_length":
            return np.array([past], kind)
        if name == "total_length":
            return np.array([sizes["S"] if self._capture else past + new], kind)
        if name.startswith("past_"):
            return np.zeros(shape, kind)
        drawn = np.random.default_rng(0).standard_normal(shape, np.float32)
        return drawn.astype(kind)


def vision_graph(bundle: Path, device: str) -> Path:
    """The vision graph that this device gets."""
    opened = open_bundle(bundle, verify=False)
    options = BackendOptions(device)
    (placed,) = placements(opened, options)
    name = GraphLoader(opened, placed, options, Meter()).path("vision")
    assert name is not None
    return bundle / name


class Runtime:
    """The bundle's stages as the runtime loads them.

    Args:
        bundle: The bundle.
        device: `cpu` or `cuda`.
    """

    def __init__(self, bundle: Path, device: str) -> None:
        opened = open_bundle(bundle, verify=False)
        manifest, options = opened.manifest, BackendOptions(device)
        (placed,) = placements(opened, options)
        graphs = GraphLoader(opened, placed, options, Meter())
        self._manifest, self._on_host = manifest, device == "cpu"
        vision = graphs.stage("vision")
        around = DeviceTiles(vision, manifest.vision, None, half=True) if device != "cpu" else None
        self._vision = VisionEncoder(vision, manifest.vision, manifest.llm.width, None, around)
        axes = manifest.prompt.position_axes
        self._llm = Decoder(graphs.stage("llm"), manifest.llm, scoring=False, axes=axes)
        assert manifest.rfm is not None
        self._rfm = Decoder(graphs.stage("rfm"), manifest.rfm, scoring=True, axes=axes)

    def encode(self, tiles: int) -> Callable[[], object]:
        """Encodes so many tiles; their tokens stay where they are."""
        side = self._manifest.vision.tile
        drawn = np.random.default_rng(0).standard_normal((tiles, 3, side, side), np.float32)
        ready = [tile.astype(np.float32 if self._on_host else np.float16) for tile in drawn]
        level = build_pyramid(side, side * tiles, tile=side, base_side=side * tiles).levels[0]
        places = [(level, TileIndex(0, number)) for number in range(tiles)]
        return lambda: list(self._vision.features(ready, "local", places))

    def prefill(self, new: int) -> Callable[[], object]:
        """The language model over so many new tokens after none."""
        return self._over(self._llm, new, 0)

    def decode(self, past: int) -> Callable[[], object]:
        """One token of the language model after so many."""
        return self._over(self._llm, 1, past)

    def score(self, new: int) -> Callable[[], object]:
        """The region focus module over a level."""
        return self._over(self._rfm, new, 0)

    def _over(self, decoder: Decoder, new: int, past: int) -> Callable[[], object]:
        width = self._manifest.llm.width
        drawn = np.random.default_rng(0).standard_normal((past + new, width), np.float32)
        labels = make_tokens(np.arange(past + new, dtype=np.int64), TokenKind.TILE)
        cache = decoder.new_cache()
        if past:
            decoder.forward(cache, drawn[:past], labels[:past])
        # As tokens of tiles are, or a text's after its first use: where the graph runs.
        embeds: Embeds = drawn[past:] if new == 1 else Rows.of(drawn[past:])

        def run() -> None:
            cache.truncate(past)
            decoder.forward(cache, embeds, labels[past:])

        return run
