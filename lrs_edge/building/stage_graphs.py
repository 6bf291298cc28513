"""The graphs of a bundle's stages as TensorRT takes them, written for one length of buffers.

    write_std_graph(open_bundle(path), "llm", 4096, folder)   ->  StageGraph

One contract with the bundle's own graphs (`lrs_edge.bundle.manifest`): names, element types and
meanings are the same, and differ in this alone:

- every buffer has S = `capacity` places, which is written into the file, and is attended to as a
  whole. `past_*` and `present_*` are the same memory, and hold finite numbers from the start
  (zeros), also where nothing has been written: masked places are multiplied by zero;
- buffers are float16, whatever the bundle's are; every other float input and output is float32;
- what was T = past + new places long is S: `logits` [H, S] of the RFM, of which the first past +
  new are to be read, and `attention_bias` [1, 1, L, S] of the masked graphs, which has to hide the
  places behind them;
- the mask of causality is made inside, of `past_length`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from onnx import helper

from lrs_edge.building.attention import with_static_buffers
from lrs_edge.building.editable import EditableGraph, declared
from lrs_edge.building.fusing import with_channels, with_halved_bytes
from lrs_edge.building.halves import with_halves
from lrs_edge.building.older import with_older_operators
from lrs_edge.building.weights import with_explicit_weights
from lrs_edge.bundle.bundle import Bundle
from lrs_edge.bundle.manifest import DecoderSpec, Flavour
from lrs_edge.errors import UsageError

DecoderStage = Literal["rfm", "llm"]
Floats = Literal["float16", "float32"]

#: Most new tokens of one run: the end of the one profile L = 1..256.
LONGEST = 256
#: Most tiles of one run.
LARGEST_BATCH = 16
#: TensorScatter and Attention over a buffer are operators of this set.
_OPSET = 24
#: What vision graphs are declared with, as in bundles.
_VISION_OPSET = 23


@dataclass(frozen=True)
class Binding:
    """One input or output of a graph: element type (`float16`, `int64`, ...) and shape.

    A dimension is a name where the graph leaves it open: `L` new tokens, `N` tiles.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StageGraph:
    """A graph that was written for TensorRT's parser.

    Attributes:
        path: The file. Its weights lie beside it, some of them as a link into the bundle.
        stage: `vision`, `rfm` or `llm`.
        inputs: In order.
        outputs: In order.
        buffers: Names of key/value buffers without `past_` and `present_`, which are inputs and
            outputs of the same memory.
        capacity: Places S of each buffer; 0 for vision.
        open: Least, usual and largest size of each dimension that the graph leaves open: the one
            optimisation profile.
    """

    path: Path
    stage: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    buffers: tuple[str, ...]
    capacity: int
    open: Mapping[str, tuple[int, int, int]]

    def profile(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Least, usual and largest shape of every input with an open dimension."""
        found = {}
        for binding in self.inputs:
            if any(isinstance(size, str) for size in binding.shape):
                least, usual, largest = (
                    tuple(self.open[s][i] if isinstance(s, str) else s for s in binding.shape)
                    for i in range(3)
                )
                found[binding.name] = least, usual, largest
        return found


def write_std_graph(
    bundle: Bundle,
    stage: DecoderStage,
    capacity: int,
    folder: Path,
    *,
    masked: bool = False,
    floats: Floats = "float16",
    older: bool = False,
) -> StageGraph:
    """Write the RFM or the language model with operators of the standard (flavour `std`).

    The language model of a bundle whose RFM is its first layers is what follows those, as its
    flavour `gqa-rest` is: it takes `hidden_states` as `inputs_embeds`, and `attended`, which that
    RFM gives.

    Args:
        bundle: The bundle.
        stage: Which.
        capacity: Places S of each buffer, at least 1.
        folder: Where to write; made where it is not there.
        masked: The RFM's graph with an attention bias (flavour `masked`).
        floats: Element type of everything that is not quantized. TensorRT's builder takes float16
            alone; `float32` is for comparing on onnxruntime, and asks for a bundle of float32.
        older: Of operators that TensorRT 10.3 has. `past_*` and `present_*` are then two memories.

    Raises:
        BundleError: The bundle has no such stage or graph, or one that is not written as
            `lrs-edge export` does.
        UsageError: The capacity is out of bounds.
        LrsEdgeError: A file cannot be read or written.
    """
    spec = decoder_spec(bundle, stage)
    if not 0 < capacity <= 1 << 24:
        raise UsageError(f"a capacity of {capacity} places is out of bounds; use 1 to {1 << 24}")
    flavour = Flavour.MASKED if masked else Flavour.GQA
    if stage == "llm" and spec.has(Flavour.GQA_REST):
        flavour = Flavour.GQA_REST
    graph = EditableGraph(bundle.graph(spec.path(flavour)))
    with_explicit_weights(graph)
    with_static_buffers(graph, capacity)
    if floats == "float16":
        with_channels(graph)
        if not older:
            with_halved_bytes(graph)
        with_halves(graph)
    opset = with_older_operators(graph) if older else _OPSET
    name = f"{stage}_{'masked_' if masked else ''}std"
    path = folder / f"{name}_{capacity}.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    graph.save(path, folder / f"{name}.data", opset)
    return _described(graph, path, stage, capacity, {"L": (1, LONGEST, LONGEST)})


def write_vision_graph(
    bundle: Bundle, folder: Path, *, floats: Floats = "float16", older: bool = False
) -> StageGraph:
    """Write the vision stage: the bundle's own graph, of float16 and dequantized weights.

    Args:
        bundle: The bundle.
        folder: Where to write; made where it is not there.
        floats: As for `write_std_graph`.
        older: As for `write_std_graph`.

    Raises:
        BundleError: The graph is not written as `lrs-edge export` does, or has weights that
            float16 cannot hold.
        LrsEdgeError: A file cannot be read or written.
    """
    graph = EditableGraph(bundle.graph(bundle.manifest.vision.path(Flavour.PLAIN)))
    with_explicit_weights(graph)
    if floats == "float16":
        with_channels(graph)
        with_halves(graph)
    opset = with_older_operators(graph) if older else _VISION_OPSET
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vision_std.onnx"
    graph.save(path, folder / "vision_std.data", opset)
    return _described(graph, path, "vision", 0, {"N": (1, LARGEST_BATCH, LARGEST_BATCH)})


def decoder_spec(bundle: Bundle, stage: DecoderStage) -> DecoderSpec:
    """A decoder of the manifest. Raises UsageError where the bundle has none."""
    manifest = bundle.manifest
    spec = manifest.llm if stage == "llm" else manifest.rfm
    if spec is None:
        raise UsageError(f"{bundle.path} has no region focus module to build an engine of")
    return spec


def _described(
    graph: EditableGraph,
    path: Path,
    stage: str,
    capacity: int,
    sizes: Mapping[str, tuple[int, int, int]],
) -> StageGraph:
    inputs, outputs = (
        tuple(_binding(name, *declared(value)) for name, value in values.items())
        for values in (graph.inputs, graph.outputs)
    )
    buffers = [b.name.removeprefix("past_") for b in inputs if b.name.startswith("past_")]
    kept = tuple(name for name in buffers if f"present_{name}" in graph.outputs)
    return StageGraph(path, stage, inputs, outputs, kept, capacity, sizes)


def _binding(name: str, element: int, shape: tuple[int | str, ...]) -> Binding:
    return Binding(name, np.dtype(helper.tensor_dtype_to_np_dtype(element)).name, shape)
