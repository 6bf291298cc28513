"""Graphs that a bundle may not hold: refused by reading, before an engine sees them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from lrs_edge.bundle.bundle import default_bundle_path, open_bundle
from lrs_edge.bundle.graph_shapes import check_sizes
from lrs_edge.bundle.graphs import check_graph, read_graph
from lrs_edge.bundle.wire_format import WireError
from lrs_edge.errors import BundleError

onnx = pytest.importorskip("onnx", reason="makes the graphs")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT = TensorProto.FLOAT


def node(op: str, *inputs: str, out: str | Sequence[str] = "tokens", **values: Any) -> Any:
    return helper.make_node(op, inputs, [out] if isinstance(out, str) else out, **values)


def model(
    nodes: Sequence[Any],
    constants: dict[str, Any] | None = None,
    side: int | str = 16,
    opsets: dict[str, int] | None = None,
    outputs: Sequence[str] = ("tokens",),
) -> Any:
    """A vision graph of these nodes."""
    shape = ["N", 3, side, side]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("pixel_values", FLOAT, shape)],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )
    imports = [helper.make_opsetid(d, v) for d, v in (opsets or {"": 23}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=11)


def check(made: Any, sizes: dict[str, int] | None = None) -> None:
    data = made if isinstance(made, bytes) else made.SerializeToString()
    check_sizes(read_graph(data, PurePosixPath("."), sizes or {}))


def refused(made: Any, words: str, sizes: dict[str, int] | None = None) -> None:
    with pytest.raises((WireError, ValueError), match=words):
        check(made, sizes)


def loop(count: str) -> Any:
    body = helper.make_graph(
        [node("Identity", "c", out="d"), node("Add", "v", "v", out="w")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", FLOAT, [1]),
        ],
    )
    return node("Loop", count, "true", "x", body=body)


def test_the_embedded_graphs_pass() -> None:
    bundle = open_bundle(default_bundle_path(), verify=False)
    for name in bundle.manifest.files:
        if name.endswith(".onnx"):
            assert bundle.graph(name) == bundle.path / name


def test_ordinary_arithmetic_passes() -> None:
    check(
        model(
            [
                node("Div", "pixel_values", "half", out="a"),
                node("Round", "a", out="b"),
                node("Clip", "b", "low", "half", out="c"),
                node("ReduceMax", "c", "axes", out="d", keepdims=1),
                node("Cast", "d", out="tokens", to=FLOAT),
            ],
            {"half": np.float32(0.5), "low": np.float32(0), "axes": np.array([1, 2])},
        )
    )


@pytest.mark.parametrize("count", ["", "many"])
def test_loops(count: str) -> None:
    constants = {"true": np.array(True), "x": np.ones(1, "f4"), "many": np.array(1 << 62)}
    refused(model([loop(count)], constants), "Loop")


def test_subgraphs_of_allowed_operators() -> None:
    made = node("Identity", "pixel_values")
    made.attribute.append(helper.make_attribute("body", loop("").attribute[0].g))
    refused(model([made]), "field 6")


@pytest.mark.parametrize(
    "op",
    ["If", "Scan", "ConstantOfShape", "Tile", "Resize", "Einsum", "NonZero", "TopK", "Constant"],
)
def test_other_operators(op: str) -> None:
    refused(model([node(op, "pixel_values")]), op)


def test_functions() -> None:
    made = model([node("Identity", "pixel_values")])
    body = [helper.make_node("Identity", ["x"], ["y"])]
    imports = [helper.make_opsetid("", 23)]
    made.functions.append(helper.make_function("", "Relu", ["x"], ["y"], body, imports))
    refused(made, "field 25")


@pytest.mark.parametrize(
    "opsets", [{"": 23, "ai.onnx.ml": 1}, {"": 5}, {"": 99}, {"": 23, "com.microsoft": 2}, {"x": 1}]
)
def test_operator_sets(opsets: dict[str, int]) -> None:
    refused(model([node("Identity", "pixel_values")], opsets=opsets), "wants operators")


@pytest.mark.parametrize("domain", ["com.microsoft", "custom"])
def test_other_domains(domain: str) -> None:
    made = model([node("Identity", "pixel_values", domain=domain)], opsets={"": 23})
    refused(made, "Identity")


@pytest.mark.parametrize("side", ["h", "w"])
def test_dimensions_that_no_graph_has(side: str) -> None:
    refused(model([node("Identity", "pixel_values")], side=side), "dimension")


def test_a_large_expand() -> None:
    shape = np.array([1 << 16, 1 << 16])
    made = model([node("Expand", "x", "s")], {"x": np.ones(1, "f4"), "s": shape})
    refused(made, "Expand")


def test_a_shape_that_is_computed() -> None:
    nodes = [node("Mul", "s", "s", out="s1"), node("Mul", "s1", "s1", out="s2")]
    nodes.append(node("Expand", "x", "s2"))
    constants = {"x": np.ones(1, "f4"), "s": np.array([1 << 8, 1 << 8])}
    refused(model(nodes, constants), "Expand")


def test_a_shape_of_data() -> None:
    nodes = [node("Cast", "pixel_values", out="i", to=TensorProto.INT64)]
    nodes += [node("Reshape", "i", "flat", out="s"), node("Expand", "x", "s")]
    refused(model(nodes, {"x": np.ones(1, "f4"), "flat": np.array([-1])}), "depends on data")


def test_a_large_range() -> None:
    nodes = [node("Range", "a", "b", "c")]
    refused(model(nodes, {"a": np.array(0), "b": np.array(1 << 40), "c": np.array(1)}), "Range")


def test_doubling() -> None:
    """Tensors that double node by node, and those that are all kept alive."""
    nodes = [node("Concat", "pixel_values", "pixel_values", out="x0", axis=3)]
    nodes += [node("Concat", f"x{i}", f"x{i}", out=f"x{i + 1}", axis=3) for i in range(40)]
    nodes.append(node("Identity", "x40"))
    refused(model(nodes), "elements|too large")
    names = [f"y{i}" for i in range(200)]
    nodes = [node("Concat", *["pixel_values"] * 256, *["pixel_values"] * 256, out="x", axis=3)]
    nodes.append(node("Concat", *["x"] * 64, out="z", axis=3))
    nodes += [node("Neg", "z", out=name) for name in names]
    nodes += [
        node("Add", "tokens0" if i else "z", name, out=f"t{i}") for i, name in enumerate(names)
    ]
    nodes = [n for n in nodes if not n.output[0].startswith("t")]
    nodes.append(node("Sum", *names))
    refused(model(nodes), "too large together")


def test_outer_products() -> None:
    flat = np.array([-1, 1])
    nodes = [
        node("Concat", *["pixel_values"] * 64, out="x", axis=3),
        node("Reshape", "x", "column", out="c"),
        node("Reshape", "x", "row", out="r"),
        node("Mul", "c", "r"),
    ]
    refused(model(nodes, {"column": flat, "row": flat[::-1].copy()}), "elements")


def test_much_work_without_weights() -> None:
    nodes = [
        node("Concat", *["pixel_values"] * 32, out="x", axis=2),
        node("Concat", *["x"] * 32, out="y0", axis=3),
    ]
    nodes += [node("MatMul", f"y{i}", f"y{i}", out=f"y{i + 1}") for i in range(1000)]
    nodes.append(node("Identity", "y1000"))
    refused(model(nodes), "far more")


def test_padding_of_convolutions() -> None:
    kernel = np.ones((1, 3, 1, 1), "f4")
    made = node("Conv", "pixel_values", "k", pads=[1 << 20, 1 << 20, 0, 0])
    refused(model([made], {"k": kernel}), "Conv")


def blocked(**changes: Any) -> Any:
    """A product of 16 inputs and 3 outputs with weights of 4 bits; changes are of its parts."""
    parts: dict[str, Any] = {
        "blocks": np.zeros((3, 1, 8), np.uint8),
        "scales": np.ones(3, "f4"),
        "zeros": np.zeros(3, np.uint8),
    }
    attributes = {"K": 16, "N": 3, "bits": 4, "block_size": 16, "accuracy_level": 4}
    numbers = {name for name, change in changes.items() if isinstance(change, int)}
    values = attributes | {name: changes[name] for name in numbers}
    given = parts | {name: change for name, change in changes.items() if name not in numbers}
    made = node("MatMulNBits", "pixel_values", *given, domain="com.microsoft", **values)
    return model([made], given, opsets={"": 23, "com.microsoft": 1})


def test_blocks_of_weights_pass() -> None:
    check(blocked())
    check(blocked(bits=8, blocks=np.zeros((3, 16), np.uint8)))
    check(blocked(scales=np.ones((3, 1), "f2")))
    # Two blocks, of which the last is not whole; their zero points share a byte.
    short = {"blocks": np.zeros((3, 2, 8), np.uint8), "scales": np.ones(6, "f4")}
    refused(blocked(**short), "do not fit")
    made = blocked(**short, K=17)
    made.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 17
    check(made)


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": np.zeros((3, 1, 7), np.uint8)},
        {"blocks": np.zeros((3, 1, 8), np.int8)},
        {"blocks": np.zeros((3, 1, 9), np.uint8)},
        {"scales": np.ones(2, "f4")},
        {"scales": np.ones(3, "f8")},
        {"zeros": np.zeros(2, np.uint8)},
        {"zeros": np.zeros(3, "f4")},
        {"order": np.zeros(16, "i4")},
        {"N": 4},
        {"N": -3},
        {"N": 0},
        {"K": 0},
        {"K": 32},
        {"bits": 0},
        {"bits": 2},
        {"bits": 16},
        {"block_size": 0},
        {"block_size": 15},
        {"block_size": 32},
        {"block_size": -16},
        {"weight_prepacked": 1},
    ],
    ids=str,
)
def test_blocks_of_weights_that_are_shorter_than_a_kernel_reads(changes: dict[str, Any]) -> None:
    refused(blocked(**changes), "MatMulNBits has")


def test_blocks_of_weights_that_are_computed() -> None:
    made = blocked()
    made.graph.node.insert(0, node("Identity", "blocks", out="others"))
    made.graph.node[1].input[1] = "others"
    refused(made, "MatMulNBits has")


def external(location: str, offset: int = 0, length: int = 4096, **more: str) -> Any:
    made = model([node("Add", "pixel_values", "w")], {"w": np.ones((32, 32), "f4")})
    weight = made.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    place = {"location": location, "offset": str(offset), "length": str(length)} | more
    for key, value in place.items():
        weight.external_data.add(key=key, value=value)
    return made


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../w.data", "a/../../w.data", "other.data", "", "*/_ORT_MEM_ADDR_/*", "..\\w"],
)
def test_weights_elsewhere(location: str) -> None:
    refused(external(location), "not listed", {"w.data": 4096})


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"offset": 1}, "inside"),
        ({"length": 4095}, "inside"),
        ({"offset": -1}, "cannot be read"),
        ({"length": 1 << 60}, "cannot be read"),
        ({"checksum": "0"}, "cannot be read"),
    ],
)
def test_weights_at_other_places(place: dict[str, Any], words: str) -> None:
    refused(external("w.data", **place), words, {"w.data": 4096})


def test_a_small_file_that_stands_for_many_weights() -> None:
    made = external("w.data")
    for i in range(1000):
        made.graph.initializer.add().CopyFrom(made.graph.initializer[0])
        made.graph.initializer[-1].name = f"w{i}"
    refused(made, "more than", {"w.data": 4096})


@pytest.mark.parametrize("data", [b"", b"\xff" * 99, b"not a graph" * 10, b"\x08\x0b", b"\x3a\x05"])
def test_what_is_no_graph(data: bytes) -> None:
    refused(data, "it ")


def test_parts_that_readers_would_merge() -> None:
    good = model([node("Identity", "pixel_values")])
    bad = model([loop("")], {"true": np.array(True), "x": np.ones(1, "f4")})
    check(good)
    refused(good.SerializeToString() + bad.SerializeToString(), "twice")


def test_every_cut_and_flipped_byte_is_an_error_or_a_graph() -> None:
    data = model([node("Identity", "pixel_values")], {"s": np.array([1, 2])}).SerializeToString()
    for place in range(len(data)):
        for changed in (
            data[:place],
            data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :],
        ):
            with suppress(ValueError):
                check(changed)


def test_one_message_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "vision.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(
        BundleError, match=r"vision\.onnx is not an ONNX graph that a bundle may hold"
    ):
        check_graph(tmp_path, "vision.onnx", {})
