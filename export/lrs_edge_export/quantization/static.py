"""A vision graph with int8 weights and activations, in standard QuantizeLinear pairs.

onnxruntime places the pairs; the ranges of activations are measured here, in bounded memory, with
the same mean squared error as those of linears (`statistics`). onnxruntime's own methods came out
about as good on the embedded model; percentile and entropy take far more memory.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.quantization.statistics import InputObserver

#: What follows a layer closely enough to share its fate when the layer is left out, or is quantized
#: alone: activation functions, and what only moves values. onnxruntime 1.32 cannot load a graph in
#: which int8 values without zero points are moved outside of a pair.
_FOLLOWERS = {"Clip", "DepthToSpace", "Gelu", "Relu", "Reshape", "Transpose"}

#: Behind the last layer of an object head, and left in floats: in one output there are
#: probabilities and sizes, which need steps of their own.
_OBJECTS = {"objects.split", "objects.found", "objects.maps", "objects.output"}

#: Values of one activation of one tile that are looked at, more or less.
_SAMPLES = 1 << 18

#: A logit of a word that is surely there: its probability is within 4e-4 of one.
_SURE = 8.0

#: Tensors of at least this many bytes go to the data file.
_INLINE_BYTES = 1024

_INPUT = "pixel_values"


def spread(tiles: Array, count: int) -> Array:
    """Every nth tile, so that about `count` are left, at least so many where there are."""
    return tiles[:: max(len(tiles) // count, 1)]


def static_vision(
    graph_fp32: Path,
    tiles: Array,
    target: Path,
    *,
    exclude: Collection[str] = (),
    symmetric: bool = False,
) -> None:
    """Quantize a vision graph with what its activations are on calibration tiles.

    Weights become int8 with one scale per output channel (7 bits of it where activations are
    uint8, so that products are exact on every processor); activations uint8 with a zero point and
    biases int32, or, symmetric, activations int8 without a zero point, biases float32, and
    constants of one number as they were (TensorRT builds nothing of an integer that stands for a
    factor). Of transformers the symmetric kind has pairs in front of the weighted products only:
    norms, softmax, activation functions and residual sums stay in floats. The same inputs give the
    same bytes.

    Args:
        graph_fp32: Graph with input `pixel_values` [N, 3, S, S], as `vision_graph` writes it.
        tiles: float32 [N, 3, S, S], normalised.
        target: Graph file to write; its weights go to `<target>.data` beside it.
        exclude: Names of layers kept in float32, without `.weight`, and of single nodes.
        symmetric: What TensorRT's parser asks for; less faithful.

    Raises:
        ExportError: The graph cannot be read or run, or has no layer of an excluded name.
    """
    static = StaticVision(graph_fp32, tiles, target.parent, symmetric=symmetric)
    static.write(target, exclude=exclude)


class StaticVision:
    """A vision graph in floats, with what its activations are on calibration tiles.

    Args:
        graph_fp32: See `static_vision`.
        tiles: See `static_vision`.
        folder: Where graphs lie for a moment.
        symmetric: See `static_vision`.

    Raises:
        ExportError: The graph cannot be read or run.
    """

    def __init__(
        self, graph_fp32: Path, tiles: Array, folder: Path, *, symmetric: bool = False
    ) -> None:
        if not len(tiles):
            raise ExportError("no tiles to calibrate on; name a folder with images")
        try:
            self._model = onnx.load(graph_fp32)
        except Exception as error:
            raise ExportError(f"{graph_fp32} cannot be read as ONNX ({error})") from error
        self._path = graph_fp32
        self._folder = folder
        self._symmetric = symmetric
        self._tile = tiles[:1]
        with tempfile.TemporaryDirectory(dir=folder) as name:
            self._ranges = _ranges(self._model, tiles, Path(name))

    def write(self, target: Path, *, exclude: Collection[str] = ()) -> None:
        """Write the graph with everything quantized but some layers; see `static_vision`."""
        left_out = _nodes_of(self._model, exclude, self._path)
        left_out += [node.name for node in self._model.graph.node if node.name in _OBJECTS]
        self._write(target, nodes_to_exclude=left_out)

    def write_alone(self, target: Path, layers: Collection[str]) -> None:
        """Write the graph with some layers quantized, their activation functions included."""
        self._write(target, nodes_to_quantize=_nodes_of(self._model, layers, self._path))

    def _write(self, target: Path, **nodes: list[str]) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            quantized = _quantize(
                model, self._tile, self._ranges, Path(name), symmetric=self._symmetric, **nodes
            )
        _save(quantized, target)


def _nodes_of(model: onnx.ModelProto, exclude: Collection[str], path: Path) -> list[str]:
    """Names of the nodes of layers, each with its `_FOLLOWERS`."""
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for value in node.input:
            consumers.setdefault(value, []).append(node)
    found, known = [], set()
    for node in model.graph.node:
        layers = {value.removesuffix(".weight").removesuffix(".bias") for value in node.input}
        names = {name for name in exclude if name in layers or name == node.name}
        if names:
            known |= names
            found += [node.name, *_followers(node, consumers)]
    unknown = sorted(set(exclude) - known)
    if unknown:
        raise ExportError(f"{path} has no layer {unknown[0]!r}")
    return sorted(set(found))


def _followers(node: onnx.NodeProto, consumers: dict[str, list[onnx.NodeProto]]) -> list[str]:
    users = [after for out in node.output for after in consumers.get(out, [])]
    close = [after for after in users if after.op_type in _FOLLOWERS]
    return [name for after in close for name in (after.name, *_followers(after, consumers))]


def _ranges(model: onnx.ModelProto, tiles: Array, folder: Path) -> dict[str, tuple[float, float]]:
    """Range of the input and of every node's output over all tiles, one tile at a time."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    outputs = {output.name for output in shown.graph.output}
    names = [name for node in shown.graph.node for name in node.output if name not in outputs]
    for name in names:
        shown.graph.output.add(name=name)
    path = folder / "shown.onnx"
    onnx.save(shown, path, save_as_external_data=True, location="shown.onnx.data")
    names = [output.name for output in shown.graph.output]
    run = _session(path)
    observers = {name: InputObserver(second_moments=False) for name in (_INPUT, *names)}
    for tile in tiles:
        found = run(names, {_INPUT: tile[None]})
        for name, value in zip((_INPUT, *names), (tile, *found), strict=True):
            if value.dtype == np.float16:
                raise ExportError(f"{name} is float16; write the graph in float32 to quantize it")
            if value.dtype == np.float32:
                # An odd step visits all channels and places alike.
                step = (value.size // _SAMPLES) | 1
                observers[name].add(torch.from_numpy(value.ravel()[::step].copy()))
    results = {name: observer.result() for name, observer in observers.items()}
    return {name: (found.low, found.high) for name, found in results.items()} | _words(model)


def _words(model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """Ranges of a neck's words: of their logits, the probabilities, and these multiplied.

    And of an object head's logits, beside which its sizes fit into the same range.

    What they can be, not what they were: of most things that there are words for, calibration tiles
    may show none, and ranges without them would leave no word that is surely there.
    """
    makers = {node.output[0]: node for node in model.graph.node}
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, tuple[float, float]] = {}
    for node in model.graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "Sigmoid" else None
        if maker is not None and maker.op_type == "Split":
            found[maker.input[0]] = (-_SURE, _SURE)
        elif maker is not None and maker.op_type == "Conv":
            found |= {node.input[0]: (-_SURE, _SURE), node.output[0]: (0.0, 1.0)}
        elif node.op_type == "Mul" and node.input[0] in found and node.input[1] in values:
            gain = float(numpy_helper.to_array(values[node.input[1]]))
            found[node.output[0]] = (0.0, gain)
    return found


def _session(path: Path) -> Callable[[list[str], dict[str, Array]], list[Array]]:
    from lrs_edge.engines.runtime import ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # As quantization sees it: no value of the graph may disappear into another.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"the vision graph cannot be run ({error})") from error
    run: Callable[[list[str], dict[str, Array]], list[Array]] = session.run
    return run


class _Reader:
    """Tiles one by one, as onnxruntime's calibration asks for them."""

    def __init__(self, tiles: Array) -> None:
        self._tiles = iter(tiles)

    def get_next(self) -> dict[str, Array] | None:
        tile = next(self._tiles, None)
        return None if tile is None else {_INPUT: tile[None]}


def _quantize(
    model: onnx.ModelProto,
    tiles: Array,
    ranges: dict[str, tuple[float, float]],
    folder: Path,
    *,
    symmetric: bool,
    **nodes: list[str],
) -> onnx.ModelProto:
    """The model with quantization pairs around all nodes, or those that `nodes` say."""
    import lrs_edge.engines.runtime  # noqa: F401, I001 - before anything of onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    add_pre_process_metadata(model)
    source, target = folder / "source.onnx", folder / "quantized.onnx"
    onnx.save(
        onnx.shape_inference.infer_shapes(model),
        source,
        save_as_external_data=True,
        location="source.onnx.data",
    )
    wanted = {name: _around(*ends) if symmetric else ends for name, ends in ranges.items()}
    overrides = {
        name: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
        for name, (low, high) in wanted.items()
        if high > low
    }
    # Ranges are overridden; what is calibrated here on one tile serves no purpose but to run.
    others = _beside_products(model) if symmetric else []
    if others:
        nodes["nodes_to_exclude"] = sorted({*nodes.get("nodes_to_exclude", ()), *others})
    with _quiet():
        quantize_static(
            source,
            target,
            _Reader(tiles),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # Products of uint8 and int8 are exact on every processor where weights have 7 bits
            # (`channels`; here any two may be neighbours). int8 inputs meet no such arithmetic.
            reduce_range=not symmetric,
            **nodes,
            use_external_data_format=True,
            extra_options={
                "ActivationSymmetric": symmetric,
                "WeightSymmetric": True,
                # TensorRT has no int32 in DequantizeLinear, and adds biases in floats.
                "QuantizeBias": not symmetric,
                "TensorQuantOverrides": overrides,
                # What follows a product in floats has no use for its integers.
                "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul"] if others else [],
            },
        )
    quantized = onnx.load(target)
    if symmetric:
        _restore_scalars(quantized, model)
    return quantized


def _beside_products(model: onnx.ModelProto) -> list[str]:
    """Of a transformer, all nodes but convolutions and products with weights; of others none."""
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = model.graph.node
    if not any(node.op_type == "MatMul" and node.input[1] not in weights for node in nodes):
        return []
    return [
        node.name
        for node in nodes
        if node.op_type != "Conv" and not (node.op_type == "MatMul" and node.input[1] in weights)
    ]


def _restore_scalars(quantized: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Let nodes read constants of one number as floats again, in place of a pair around them."""
    scalars = {t.name: t for t in model.graph.initializer if int(np.prod(t.dims)) == 1}
    graph = quantized.graph
    integers = {tensor.name: tensor for tensor in graph.initializer}
    restored: dict[str, str] = {}
    for node in list(graph.node):
        name = node.input[0].removesuffix("_quantized") if node.input else ""
        if node.op_type == "DequantizeLinear" and node.input[0] in integers and name in scalars:
            restored[node.output[0]] = name
            graph.node.remove(node)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = restored.get(name, name)
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    kept += [scalars[n] for n in sorted(set(restored.values())) if n not in integers]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _around(low: float, high: float) -> tuple[float, float]:
    most = max(-low, high)
    return -most, most


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime.quantization from printing, and from configuring the root logger."""
    root = logging.getLogger()
    handler = logging.NullHandler()
    root.addHandler(handler)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.removeHandler(handler)


def _save(model: onnx.ModelProto, target: Path) -> None:
    """Write graph and data; metadata of tools is left out."""
    del model.metadata_props[:]
    model.producer_name, model.producer_version = "lrs-edge", ""
    kept: list[Any] = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for tensor in model.graph.initializer:
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT
    data = target.with_name(f"{target.name}.data")
    # onnx appends to a data file that is there already.
    data.unlink(missing_ok=True)
    onnx.save(
        model,
        target,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=data.name,
        size_threshold=_INLINE_BYTES,
    )
