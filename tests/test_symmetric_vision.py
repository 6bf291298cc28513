"""Vision graphs in symmetric int8, the kind that TensorRT builds: transformers, CLIP among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import onnx
from onnx import numpy_helper

from lrs_edge.engines.runtime import ort
from lrs_edge_export.graphs.vision_graph import write_vision
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization import static_vision
from tests.towers import GRID, PATCH, TOWERS, stage_of

KINDS = ["clip", "siglip", "internvit", "qwen2.5"]
assert set(KINDS) < set(TOWERS)


def tiles() -> np.ndarray:
    shape = 4, 3, PATCH * GRID, PATCH * GRID
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module", params=KINDS)
def graphs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A vision graph in floats, and in symmetric int8."""
    folder = tmp_path_factory.mktemp("vision")
    floats, symmetric = folder / "floats.onnx", folder / "vision.onnx"
    with WeightFile(folder / "floats.onnx.data") as weights:
        write_vision(stage_of(request.param), floats, weights)
    static_vision(floats, tiles(), symmetric, symmetric=True)
    return floats, symmetric


def test_only_weighted_products_are_quantized(graphs: tuple[Path, Path]) -> None:
    _, path = graphs
    model = onnx.load(path)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    weighted = 0
    for node in products:
        read = {makers[name].op_type for name in node.input[:2] if name in makers}
        weighted += read == {"DequantizeLinear"}
        assert "DequantizeLinear" not in read or read == {"DequantizeLinear"}
    linears = sum(v.dtype == np.int8 and v.ndim > 1 for v in constants.values())
    assert weighted == linears > 10
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "RMSNormalization", "Softmax", "Gelu", "Sigmoid"):
            assert makers[node.input[0]].op_type != "DequantizeLinear"


def test_constants_of_one_number_stay_floats(graphs: tuple[Path, Path]) -> None:
    """The root of a head's width, and QuickGELU's factor: as integers nothing is built of them."""
    floats, path = graphs
    single = {
        tensor.name
        for tensor in onnx.load(floats).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and int(np.prod(tensor.dims)) == 1
    }
    read = {name for node in onnx.load(path).graph.node for name in node.input}
    assert single
    assert single <= read


def test_it_is_near_to_floats(graphs: tuple[Path, Path]) -> None:
    wanted, found = (
        ort.InferenceSession(str(path)).run(["tokens"], {"pixel_values": tiles()})[0].ravel()
        for path in graphs
    )
    assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.995


@pytest.mark.parametrize("card", ["86", "89"])
def test_tensorrt_builds_it(graphs: tuple[Path, Path], card: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graphs[1])), parser.get_error(0).desc()
    config = builder.create_builder_config()
    pixels = network.get_input(0)
    profile = builder.create_optimization_profile()
    profile.set_shape(pixels.name, *[(count, *pixels.shape[1:]) for count in (1, 1, 16)])
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{card}"), 0)
    assert builder.build_serialized_network(network, config) is not None
