"""Where a graph's nodes run: what may stay on the CPU, what is refused, what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lrs_edge
from lrs_edge.bundle.bundle import default_bundle_path, open_bundle
from lrs_edge.bundle.host_nodes import host_nodes
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.engines import node_places, onnx, providers
from lrs_edge.engines.base import BackendOptions, HostNodes
from lrs_edge.engines.metered import Meter
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.engines.placement import GraphLoader, placements
from lrs_edge.engines.providers import CUDA_OPTIONS, Provider
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import BackendError
from tests.golden_data import checkpoint

BUNDLE = default_bundle_path()
#: Of every onnxruntime for CPUs; it has no kernels, so all nodes fall to the CPU.
EMPTY = "AzureExecutionProvider"
needs_empty = pytest.mark.skipif(
    EMPTY not in ort.get_available_providers(), reason=f"this onnxruntime has no {EMPTY}"
)
CUDA = Provider("CUDAExecutionProvider", "cuda", "cuda")


def check(session: object, host: HostNodes | None = None) -> None:
    node_places.check_places(session, "vision.onnx", CUDA, host)  # type: ignore[arg-type]


def of_file(name: str) -> HostNodes:
    """What a graph of the embedded bundle says may run on the CPU."""
    facts = open_bundle(BUNDLE, verify=False).graph_facts(name)
    may = host_nodes(facts)
    return HostNodes(may, frozenset(node.name for node in facts.nodes) - may)


def test_only_numbers_of_the_host_may_stay_there() -> None:
    assert of_file("vision.onnx").may == frozenset()
    facts = open_bundle(BUNDLE, verify=False).graph_facts("llm.onnx")
    may = host_nodes(facts)
    operators = {node.op for node in facts.nodes if node.name in may}
    assert {"Shape", "Range", "Cos"} <= operators
    # It takes the last token's state, the angles are of positions: the same operators, other data.
    assert not {"Gather", "MatMulInteger", "GroupQueryAttention", "RMSNormalization"} & operators
    made = {name for node in facts.nodes if node.name not in may for name in node.outputs}
    read = {name for node in facts.nodes if node.name in may for name in node.inputs}
    assert not (made & read)


def test_what_is_exported_for_cuda(tmp_path: Path) -> None:
    """The tower leaves nothing to the CPU; decoders nothing that reads states, keys or values."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export.bundle.writer import ExportOptions, export_bundle

    source = checkpoint("llama")
    if source is None:
        pytest.skip("only a part of the golden data is here")
    export_bundle(str(source), tmp_path / "cuda", ExportOptions(parity=False, target="cuda"))
    bundle = open_bundle(tmp_path / "cuda", verify=False)
    (placed,) = placements(bundle, BackendOptions("cpu"))
    loader = GraphLoader(bundle, placed, BackendOptions("cpu"), Meter())
    fused = bundle.manifest.vision.path(Flavour.FUSED)
    assert not loader._host_nodes(fused).may
    for path in (bundle.manifest.llm.path(Flavour.GQA), bundle.manifest.rfm.path(Flavour.GQA)):
        may = loader._host_nodes(path).may
        operators = {node.op for node in bundle.graph_facts(path).nodes if node.name in may}
        assert operators <= node_places._SHAPE_OPERATORS | {"Cos", "Sin"}


@needs_empty
@pytest.mark.parametrize("known", [True, False])
def test_a_real_session_that_would_fall_to_the_cpu_is_refused(known: bool) -> None:
    options = BackendOptions("onnxruntime:azure", threads=1)
    for name, operator in {"vision.onnx": "Conv", "llm.onnx": "GroupQueryAttention"}.items():
        host = of_file(name) if known else None
        with pytest.raises(BackendError, match=rf"{name} would run on the CPU.*{operator}"):
            OnnxGraph.load(BUNDLE / name, replace(options, host_nodes=host))


@needs_empty
def test_the_engines_own_switch_is_used_where_no_node_may_stay() -> None:
    azure = Provider(EMPTY, "onnxruntime:azure")
    with pytest.raises(Exception, match="fallback to CPU EP has been explicitly disabled"):
        onnx._session(str(BUNDLE / "vision.onnx"), azure, BackendOptions(threads=1), strict=True)


def test_a_provider_that_is_given_its_devices() -> None:
    """The way of plugins, with the one device that every machine has."""
    if not hasattr(ort, "get_ep_devices"):
        pytest.skip("this onnxruntime knows no plugins")
    (device,) = [one for one in providers.ep_devices() if one.ep_name == providers.CPU][:1]
    plugin = Provider(providers.CPU, "onnxruntime:x", plugin=(device,))
    path = BUNDLE / "llm_segment0.onnx"
    given = BackendOptions("cpu", threads=1)
    other = OnnxGraph(onnx._session(str(path), plugin, given), plugin.memory, path, plugin)
    usual = OnnxGraph.load(path, given)
    assert (other.device, usual.device) == ("onnxruntime:x", "cpu")
    assert sum(other.nodes.values()) == sum(usual.nodes.values()) > 100
    results = []
    for graph in (other, usual):
        names = [name[5:] for name in graph.inputs if name.startswith("past_key")]
        names += [name[5:] for name in graph.inputs if name.startswith("past_value")]
        buffers = graph.new_buffers(names)
        buffers.gather(np.arange(0), 8)
        past = 0
        for length in (3, 1, 2):  # The second and third read what the first left in the buffers.
            rng = np.random.default_rng(length)
            states = rng.standard_normal((1, length, 576)).astype(np.float32)
            feeds = {
                "inputs_embeds": states,
                "position_ids": np.arange(past, past + length)[None],
                "past_length": np.array([past], np.int64),
            }
            feeds = {name: feed for name, feed in feeds.items() if name in graph.inputs}
            results.append(graph.run(feeds, ["hidden_states"], buffers)[0])
            past += length
    for one, two in zip(results[:3], results[3:], strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(BackendError, match=r"no provider 'abacus', only .*CPUExecutionProvider"):
        lrs_edge.load(device="vision=onnxruntime:Abacus")
    plugins = {
        "onnxruntime_ep_nv_tensorrt_rtx": "libcuda.so.1: cannot open",
        "onnxruntime_ep_qnn": "",
    }
    assert "does not load: libcuda" in providers._absent("tensorrt-rtx", plugins)
    assert "gives it no device" in providers._absent("qnn", plugins)


def test_providers_are_asked_for_without_the_cpu_or_with_it() -> None:
    cuda = Provider("CUDAExecutionProvider", "cuda", "cuda", CUDA_OPTIONS)
    strict, usual = (cuda.add_to(ort.SessionOptions(), strict=one) for one in (True, False))
    assert [name for name, _ in strict["providers"]] == ["CUDAExecutionProvider"]
    assert usual["providers"][1:] == ["CPUExecutionProvider"]
    assert usual["providers"][0][1]["arena_extend_strategy"] == "kSameAsRequested"
    assert usual["enable_fallback"] == 0
    beside = replace(cuda, name="TensorrtExecutionProvider", beside=("CUDAExecutionProvider",))
    names = [one[0] for one in beside.add_to(ort.SessionOptions(), strict=True)["providers"]]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    assert beside.own == set(names)


def test_every_stage_says_where_its_nodes_run() -> None:
    with lrs_edge.load(device="cpu", threads=1) as engine:
        places = engine.places
    assert [place.stage for place in places] == ["vision", "rfm", "llm"]
    for place in places:
        assert (place.engine, place.device) == ("onnxruntime", "cpu")
        if hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
            assert set(place.nodes) == {"CPUExecutionProvider"}
            assert place.nodes["CPUExecutionProvider"] > 50


class Session:
    """A session that was asked to run on CUDA, and what became of its nodes."""

    def __init__(self, path: Path, cuda: set[str], providers: list[str]) -> None:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._cuda = cuda
        self._providers = providers

    def get_providers(self) -> list[str]:
        return self._providers

    def get_provider_graph_assignment_info(self) -> list[object]:
        parts = self._session.get_provider_graph_assignment_info()
        assert parts
        return [
            part for part in parts if not {node.op_type for node in part.get_nodes()} & self._cuda
        ]


BOTH = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.skipif(
    not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"),
    reason="this onnxruntime does not say where nodes run",
)
def test_a_graph_that_would_run_on_the_cpu_in_part_is_refused() -> None:
    path = BUNDLE / "vision.onnx"
    with pytest.raises(BackendError, match=r"vision\.onnx would run on the CPU in part \(.*Conv"):
        check(Session(path, set(), BOTH))
    nodes = Session(path, set(), BOTH).get_provider_graph_assignment_info()
    operators = {node.op_type for part in nodes for node in part.get_nodes()}  # type: ignore[attr-defined]
    # Shape arithmetic may stay on the CPU, everything else is on the GPU here.
    heavy = operators - node_places._SHAPE_OPERATORS
    check(Session(path, heavy, BOTH))
    for operator in heavy:
        with pytest.raises(BackendError, match=operator):
            check(Session(path, heavy - {operator}, BOTH))


def test_cuda_that_does_not_load_is_told() -> None:
    session = Session(BUNDLE / "vision.onnx", set(), ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="does not load"):
        check(session)
