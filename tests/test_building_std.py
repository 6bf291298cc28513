"""Graphs for TensorRT compute what the bundle's own do, and its parser and builder take them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from lrs_edge.building.editable import EditableGraph
from lrs_edge.building.stage_graphs import (
    write_std_graph,
    write_vision_graph,
)
from lrs_edge.bundle.bundle import Bundle, default_bundle_path, open_bundle
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import UsageError
from tests.tensorrt_builder import built

#: Places of the buffers.
CAPACITY = 320
#: Lengths of what is run after one another, until tokens are dropped, and after.
CHUNKS, LATER = (90, 170, 3, 1), (5, 1)
KEPT = 150


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return open_bundle(default_bundle_path())


class Session:
    """A decoder graph on onnxruntime, with buffers of its own."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self.inputs = {value.name: value.shape for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._buffers = {
            name: np.zeros([CAPACITY if size == "S" else size for size in shape], np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past_") and name != "past_length"
        }

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: value for name, value in feeds.items() if name in self.inputs}
        found = self._session.run(None, {**given, **self._buffers})
        results = dict(zip(self.outputs, found, strict=True))
        for name in self._buffers:
            self._buffers[name] = results.pop(name.replace("past_", "present_"))
        return results

    def keep(self, places: np.ndarray) -> None:
        for name, buffer in self._buffers.items():
            self._buffers[name] = np.zeros_like(buffer)
            self._buffers[name][:, :, : len(places)] = buffer[:, :, places]


def assert_agree(ours: Path, theirs: Path, *, masked: bool = False) -> None:
    """Run both over the same tokens, drop some, go on; positions stay what they were."""
    sessions = [Session(_unlinked(ours)), Session(theirs)]
    rng = np.random.default_rng(0)
    past, position = 0, 0
    for number, count in enumerate((*CHUNKS, *LATER)):
        if number == len(CHUNKS):
            places = np.sort(rng.permutation(past)[:KEPT])
            for session in sessions:
                session.keep(places)
            past = KEPT
        axes = sessions[1].inputs["position_ids"][0]
        feeds = {
            name: rng.standard_normal((1, count, shape[2])).astype(np.float32)
            for name, shape in sessions[1].inputs.items()
            if name in ("inputs_embeds", "attended")
        }
        # Of tokens with several positions each axis goes its own way.
        steps = np.arange(1, axes + 1)[:, None]
        feeds["position_ids"] = position + np.arange(count) * steps
        feeds["past_length"] = np.array([past])
        past, position = past + count, position + count
        results = []
        for session in sessions:
            if masked:
                feeds["attention_bias"] = _bias(session, count, past)
            results.append(session.run(feeds))
        for name, wanted in results[1].items():
            # Scores are as long as the buffers.
            found = results[0][name][:, : wanted.shape[1]]
            assert np.abs(found - wanted[:, : found.shape[1]]).max() < 1e-4, name


def _bias(session: Session, count: int, total: int) -> np.ndarray:
    """Causality, and a token that nobody but itself sees."""
    size = session.inputs["attention_bias"][3]
    places = np.arange(size if isinstance(size, int) else total)
    own = np.arange(total - count, total)[:, None]
    seen = (places <= own) & ((places != 7) | (own == 7))
    return np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)[None, None]


def _unlinked(path: Path) -> Path:
    """The graph with copies for links, which onnxruntime does not follow out of a folder."""
    for file in path.parent.iterdir():
        if file.is_symlink():
            source = file.resolve()
            file.unlink()
            shutil.copyfile(source, file)
    return path


@pytest.mark.parametrize("variant", ["qwen", "llama"])
def test_std_computes_what_gqa_does(
    golden_bundles: dict[str, Path], variant: str, tmp_path: Path
) -> None:
    if variant not in golden_bundles:
        pytest.skip("the golden checkpoint is not here")
    bundle = open_bundle(golden_bundles[variant])
    for stage, spec in (("rfm", bundle.manifest.rfm), ("llm", bundle.manifest.llm)):
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path, floats="float32")
        assert graph.capacity == CAPACITY
        assert len(graph.buffers) == 2 * spec.layers + (stage == "rfm")
        assert_agree(graph.path, bundle.graph(spec.path("gqa")))
    spec = bundle.manifest.rfm
    graph = write_std_graph(bundle, "rfm", CAPACITY, tmp_path, masked=True, floats="float32")
    assert_agree(graph.path, bundle.graph(spec.path("masked")), masked=True)


def test_embedded_bundle_is_described(embedded: Bundle, tmp_path: Path) -> None:
    rfm = write_std_graph(embedded, "rfm", 4096, tmp_path)
    llm = write_std_graph(embedded, "llm", 4096, tmp_path)
    # The language model goes on from the RFM, which is its first layers.
    assert {b.name: b.shape for b in rfm.outputs if not b.name.startswith("present_")} == {
        "logits": (9, 4096),
        "hidden_states": (1, "L", 576),
        "attended": (1, "L", 576),
    }
    assert llm.buffers == ("key_3", "value_3", "key_4", "value_4")
    kinds = {b.name: b.dtype for b in (*llm.inputs, *llm.outputs)}
    assert {kind for name, kind in kinds.items() if name.endswith("_3")} == {"float16"}
    assert kinds["inputs_embeds"] == kinds["attended"] == kinds["logits"] == "float32"
    assert kinds["position_ids"] == kinds["past_length"] == "int64"
    assert llm.profile()["attended"] == ((1, 1, 576), (1, 256, 576), (1, 256, 576))
    assert "past_key_3" not in llm.profile()
    vision = write_vision_graph(embedded, tmp_path)
    assert vision.profile() == {"pixel_values": tuple((n, 3, 384, 384) for n in (1, 16, 16))}
    assert vision.buffers == ()


def test_weights_of_the_embedded_bundle_stay_where_they_are(
    embedded: Bundle, tmp_path: Path
) -> None:
    before = {path.name: path.stat() for path in embedded.path.iterdir()}
    stages = [write_std_graph(embedded, stage, 1024, tmp_path) for stage in ("rfm", "llm")]
    stages.append(write_vision_graph(embedded, tmp_path))
    new = sum(p.stat().st_size for p in tmp_path.iterdir() if not p.is_symlink())
    assert new < 0.1 * sum(path.st_size for path in before.values())
    assert {path.name: path.stat() for path in embedded.path.iterdir()} == before
    # The integers themselves are the bundle's.
    graph, own = EditableGraph(stages[1].path), EditableGraph(embedded.graph("llm.onnx"))
    name = "layers.4.mlp.gate_proj.weight.int8"
    node = next(node for node in graph.nodes if name in node.input)
    assert node.op_type == "DequantizeLinear"
    assert np.array_equal(graph.array(name), own.array(name))
    scales = own.array(name.replace("int8", "scale"))
    assert np.allclose(graph.array(node.input[1]), scales, rtol=1e-3)


def test_a_capacity_has_to_be_one(embedded: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="capacity of 0"):
        write_std_graph(embedded, "llm", 0, tmp_path)


@pytest.mark.parametrize("stage", ["rfm", "llm"])
def test_tensorrt_builds_the_embedded_decoders(
    embedded: Bundle, stage: str, tmp_path: Path
) -> None:
    built(write_std_graph(embedded, stage, 1024, tmp_path))
