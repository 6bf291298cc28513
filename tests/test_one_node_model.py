"""Protobuf written by hand: engines run it, the onnx package takes it, our own reader reads it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.bundle import wire_format
from lrs_edge.bundle.wire_format import BYTES, VARINT, Field, Reader, Span
from lrs_edge.engines.gather_model import gather_model
from lrs_edge.engines.one_node_model import one_node_model
from lrs_edge.engines.runtime import ort


def run(model: bytes, **feeds: np.ndarray) -> np.ndarray:
    (y,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)
    return y


@given(number=st.integers(1, 500), value=st.integers(0, 2**63 - 1), text=st.text(max_size=200))
def test_what_is_written_is_read_again(number: int, value: int, text: str) -> None:
    inner = wire_format.number_field(number, value) + wire_format.text_field(number + 1, text)
    data = wire_format.bytes_field(number, inner)
    reader = Reader(data, most_fields=3)
    (span,) = reader.message(Span(0, len(data)), {number: Field(BYTES)})[number]
    assert isinstance(span, Span)
    found = reader.message(span, {number: Field(VARINT), number + 1: Field(BYTES)})
    assert found[number] == [value]
    assert reader.text(found[number + 1][0]) == text


def test_constants_are_stored_and_engines_run_the_model() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 255, (3, 5), np.uint8)
    b = rng.integers(-128, 127, (5, 4), np.int8)
    model = one_node_model("MatMulInteger", ["a", "b"], {"a": "uint8", "y": "int32"}, {"b": b})
    np.testing.assert_array_equal(run(model, a=a), a.astype(np.int32) @ b.astype(np.int32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_buffers_are_gathered_along_their_length(dtype: str) -> None:
    x = np.random.default_rng(0).integers(-9, 9, (1, 2, 200, 4)).astype(dtype)
    indices = np.array([0, 3, 199], np.int64)
    found = run(gather_model(dtype), x=x, indices=indices)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, x[:, :, indices])


def test_models_are_valid() -> None:
    onnx = pytest.importorskip("onnx")
    types = {"a": "float16", "b": "float16", "y": "float16"}
    for model in (one_node_model("MatMul", ["a", "b"], types), gather_model("int8")):
        onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
