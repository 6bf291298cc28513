"""Running one stage's graph on calibration inputs: what it gives, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.devices import StageName
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.engines.placement import unpacks_weights
from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export.bundle.stages import LLM, RFM, VISION
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs.sessions import DecoderSession
from lrs_edge_export.quantization import CalibrationData
from lrs_edge_export.quantization.precision import Precision

#: Tiles, and prompts, that a stage is run on.
_TILES, _PROMPTS = 16, 6

#: Tokens decoded where time is taken, and runs of which the median counts.
_DECODED, _RUNS = 16, 5


class Probe:
    """Runs graphs of one stage.

    Args:
        stage: Which.
        data: Calibration data.
        tiles: Tiles that a vision graph is run on, at most.
        prompts: Prompts that a decoder is run on, at most.
    """

    def __init__(
        self,
        stage: StageName,
        data: CalibrationData,
        *,
        tiles: int = _TILES,
        prompts: int = _PROMPTS,
    ) -> None:
        self._stage = stage
        step = max(len(data.tiles) // tiles, 1)
        self._tiles = data.tiles[::step][:tiles]
        self._prompts = (data.sequences if stage == "rfm" else data.pruned)[:prompts]

    @property
    def graph(self) -> str:
        """File of the stage's main graph."""
        return {"vision": VISION, "rfm": RFM, "llm": LLM}[self._stage]

    def outputs(self, path: Path, precision: Precision) -> list[Array]:
        """What a graph of the stage gives: tokens of tiles, or logits of prompts.

        Args:
            path: The graph.
            precision: It was written in.
        """
        if self._stage == "vision":
            graph = self._vision(path, precision)
            return [graph.run({"pixel_values": tile[None]}, ["tokens"])[0] for tile in self._tiles]
        return [
            self._session(path, len(prompt)).run(prompt.values, prompt.positions)
            for prompt in self._prompts
        ]

    def seconds(self, path: Path, precision: Precision) -> float:
        """Median time of one tile, or of one prompt with, for the LLM, some decoded tokens."""
        if self._stage == "vision":
            graph = self._vision(path, precision)
            return _median([self._timed_tile(graph, tile) for tile in self._tiles])
        prompt = max(self._prompts, key=len)
        session = self._session(path, len(prompt) + _DECODED)
        return _median([self._timed_prompt(session, prompt) for _ in range(_RUNS)])

    def _vision(self, path: Path, precision: Precision) -> OnnxGraph:
        options = BackendOptions("cpu", unpack_weights=unpacks_weights("vision", precision))
        return OnnxGraph.load(path, options)

    def _session(self, path: Path, capacity: int) -> DecoderSession:
        return DecoderSession(path, capacity=capacity)

    def _timed_tile(self, graph: OnnxGraph, tile: Array) -> float:
        start = time.perf_counter()
        graph.run({"pixel_values": tile[None]}, ["tokens"])
        return time.perf_counter() - start

    def _timed_prompt(self, session: DecoderSession, prompt: TokenSequence) -> float:
        session.length = 0
        start = time.perf_counter()
        session.run(prompt.values, prompt.positions)
        if self._stage == "llm":
            for _ in range(_DECODED):
                session.run(prompt.values[-1:])
        return time.perf_counter() - start


def relative_error(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    """Root of the squared differences over that of the squares."""
    difference = sum(float(np.square(a - b).sum()) for a, b in zip(found, wanted, strict=True))
    return float(np.sqrt(difference / sum(float(np.square(b).sum()) for b in wanted)))


def least_cosine(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    """Smallest cosine between an output and the wanted one."""
    cosines = [
        float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
        for a, b in zip(found, wanted, strict=True)
    ]
    return min(cosines)


def _median(values: list[float]) -> float:
    return float(np.median(values))
