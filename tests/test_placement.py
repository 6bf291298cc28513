"""Which engine runs which stage, and on which device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

import lrs_edge
from lrs_edge import stages
from lrs_edge.bundle.bundle import Bundle, default_bundle_path, open_bundle
from lrs_edge.bundle.manifest import Flavour, GraphFile
from lrs_edge.engines import onnx, placement, providers
from lrs_edge.engines.base import BackendOptions, Graph
from lrs_edge.engines.devices import StagePlace, backend_options
from lrs_edge.engines.metered import Meter
from lrs_edge.engines.placement import EngineKind, GraphLoader, Placement, placements
from lrs_edge.errors import BackendError, BundleError, UsageError


@dataclass(frozen=True)
class Loaded:
    provider: str
    warnings: tuple[str, ...] = ()


def bundle_of(floats: str, precision: str = "int8-weight") -> Bundle:
    bundle = open_bundle(default_bundle_path(), verify=False)
    manifest = msgspec.structs.replace(
        bundle.manifest,
        rfm=msgspec.structs.replace(bundle.manifest.rfm, floats=floats, precision=precision),
        llm=msgspec.structs.replace(bundle.manifest.llm, floats=floats, precision=precision),
    )
    return Bundle(bundle.path, manifest)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that was built with CUDA."""
    monkeypatch.setattr(onnx.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])


def places(bundle: Bundle, provider: str = "auto", **wanted: str) -> list[str]:
    return [str(found) for found in placements(bundle, BackendOptions(provider, stages=wanted))]


def test_auto_without_a_gpu_is_the_cpu() -> None:
    assert "CUDAExecutionProvider" in onnx.ort.get_available_providers() or places(
        bundle_of("float16")
    ) == ["cpu"]


@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_gpu_and_then_the_cpu() -> None:
    assert places(bundle_of("float16")) == ["cuda", "cpu"]
    assert places(bundle_of("float16"), "cuda") == ["cuda"]
    assert places(bundle_of("float16"), "cpu") == ["cpu"]


@pytest.mark.usefixtures("gpu")
def test_bundles_without_cuda_kernels_run_on_the_cpu_as_a_whole() -> None:
    assert places(bundle_of("float32")) == ["cpu"]


@pytest.mark.usefixtures("gpu")
def test_stages_can_be_placed_one_by_one() -> None:
    half = bundle_of("float16")
    assert places(half, "cpu", llm="cuda") == ["vision=cpu,rfm=cuda,llm=cuda"]
    assert places(half, "cpu", llm="cuda", rfm="cpu") == ["vision=cpu,rfm=cpu,llm=cuda"]
    assert places(half, vision="cpu") == ["vision=cpu,rfm=cuda,llm=cuda", "cpu"]
    # Products of vision have kernels in every type.
    assert places(bundle_of("float32"), "cpu", vision="cuda") == ["vision=cuda,rfm=cpu,llm=cpu"]
    assert places(half, "auto", vision="onnxruntime") == ["cuda", "vision=cuda,rfm=cpu,llm=cpu"]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("part", ["rfm", "llm"])
def test_a_bundle_that_cuda_would_answer_wrongly_is_refused(part: str) -> None:
    sound = bundle_of("float16")
    changed = msgspec.structs.replace(getattr(sound.manifest, part), floats="float32")
    bundle = Bundle(sound.path, msgspec.structs.replace(sound.manifest, **{part: changed}))
    with pytest.raises(BundleError, match="lrs-edge export CHECKPOINT --target cuda"):
        stages.load_stages(bundle, BackendOptions("cuda"))


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    half = bundle_of("float16")
    with pytest.raises(BackendError, match="no CUDA provider"):
        places(half, "cuda")
    with pytest.raises(BackendError, match=r"tensorrt is not installed.*JetPack"):
        places(half, "auto", vision="tensorrt")
    with pytest.raises(UsageError, match="'abacus'"):
        places(half, "abacus")
    with pytest.raises(UsageError, match="'lm'"):
        places(half, "auto", lm="cpu")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_does_not_work_is_told_in_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_bundle: Bundle, placed: Placement, *_: object) -> Loaded:
        if str(placed) != "cpu":
            raise BackendError("no driver")
        return Loaded(str(placed))

    monkeypatch.setattr(stages, "_load", broken)
    loaded = stages.load_stages(bundle_of("float16"), BackendOptions())
    assert loaded.provider == "cpu"
    assert "no driver" in loaded.warnings[0]
    with pytest.raises(BackendError, match="no driver"):
        stages.load_stages(bundle_of("float16"), BackendOptions("cuda"))


class Other:
    """A second engine: one entry, and graphs of its own flavour."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, str]] = []

    def kind(self) -> EngineKind:
        return EngineKind(
            name="other",
            flavours={"usual": ("std", Flavour.PLAIN)},
            every=("npu",),
            devices=lambda: ("npu",),
            absent=lambda device: f"no {device}",
            load=self.load,
            problem=lambda _spec, _device: "",
        )

    def load(self, path: Path, options: BackendOptions) -> Graph:
        self.loaded.append((path.name, options.provider))
        return object()  # type: ignore[return-value]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Other:
    other, known = Other(), placement.engines
    both: Callable[[], tuple[EngineKind, ...]] = lambda: (*known(), other.kind())  # noqa: E731
    monkeypatch.setattr(placement, "engines", both)
    return other


def with_graph(bundle: Bundle, stage: str, graph: GraphFile) -> Bundle:
    spec = getattr(bundle.manifest, stage)
    more = msgspec.structs.replace(spec, graphs=(*spec.graphs, graph))
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, **{stage: more}))


def test_another_engine_gets_the_graphs_that_were_written_for_it(other: Other) -> None:
    # The file is one that exists; that it was written for another engine is only said here.
    graph = GraphFile("llm_segment0.onnx", "std", ("other",))
    bundle = with_graph(bundle_of("float32"), "llm", graph)
    options = BackendOptions("cpu", stages={"llm": "npu", "rfm": "cpu"})
    (placed,) = placements(bundle, options)
    assert str(placed) == "vision=cpu,rfm=cpu,llm=npu"
    assert placed.on("cpu") == {"vision", "rfm"}
    graphs = GraphLoader(bundle, placed, options, Meter())
    assert graphs.stage("llm").name == "llm_segment0.onnx"
    assert other.loaded == [("llm_segment0.onnx", "npu")]
    assert graphs.path("rfm") == "rfm.onnx"
    assert graphs.path("rfm", "masked") == "rfm_masked.onnx"
    assert graphs.path("llm", "int8-kv") is None
    (by_name,) = placements(bundle, BackendOptions("cpu", stages={"vision": "other"}))
    with pytest.raises(BundleError, match="no graph of vision for other"):
        GraphLoader(bundle, by_name, options, Meter()).stage("vision")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("device", "path"), [("cuda", "fused.onnx"), ("cpu", "vision.onnx")])
def test_fused_vision_is_for_cuda(device: str, path: str) -> None:
    """Where a bundle has one: the embedded model's tower of convolutions does not."""
    usual = bundle_of("float16")
    (placed,) = placements(usual, BackendOptions(device))
    fused = with_graph(usual, "vision", GraphFile("fused.onnx", Flavour.FUSED))
    for bundle, wanted in ((usual, "vision.onnx"), (fused, path)):
        assert GraphLoader(bundle, placed, BackendOptions(), Meter()).path("vision") == wanted


def test_flavours_that_nobody_knows_are_left_alone() -> None:
    bundle = with_graph(bundle_of("float32"), "llm", GraphFile("std.onnx", "std", ("later",)))
    (placed,) = placements(bundle, BackendOptions("cpu"))
    assert GraphLoader(bundle, placed, BackendOptions(), Meter()).path("llm") == "llm.onnx"


def test_devices_are_written_in_one_word_or_one_a_stage() -> None:
    assert backend_options().provider == "auto"
    assert backend_options("tensorrt-rtx", 2) == BackendOptions("tensorrt-rtx", 2)
    both = backend_options("cpu, llm=cuda")
    assert (both.provider, both.stages) == ("cpu", {"llm": "cuda"})
    each = backend_options("vision=onnxruntime:tensorrt,llm=cuda")
    assert (each.provider, each.stages["vision"]) == ("auto", "onnxruntime:tensorrt")
    for wrong, said in {
        "gpu": "'gpu' is unknown; use auto, cpu",
        "": "'' is unknown",
        "lm=cpu": "no stage 'lm'",
        "llm=cpu,llm=cuda": "places llm twice",
        "cpu,cuda": "cpu,llm=cuda",
        "llm=": "'' is unknown",
    }.items():
        with pytest.raises(UsageError, match=said):
            backend_options(wrong)
    with pytest.raises(UsageError, match="older name"):
        lrs_edge.load(device="cpu", provider="cpu")
    with pytest.raises(UsageError, match="vision, rfm or llm"):
        lrs_edge.load(device="decoder=cpu")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static"])
def test_integers_are_not_sent_to_cuda(precision: str) -> None:
    half = bundle_of("float16", precision)
    with pytest.raises(BundleError, match=rf"{precision}.*no integer products.*--target cuda"):
        places(half, "cuda")
    assert places(half) == ["cpu"]
    assert places(half, "cpu", vision="cuda") == ["vision=cuda,rfm=cpu,llm=cpu"]


@pytest.mark.usefixtures("gpu")
def test_auto_says_why_it_leaves_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "has_driver", lambda: False)
    (without,) = placements(bundle_of("float32"), BackendOptions())
    assert without.notes == ()
    monkeypatch.setattr(providers, "has_driver", lambda: True)
    (placed,) = placements(bundle_of("float32"), BackendOptions())
    assert "auto takes no cuda here" in placed.notes[0]
    assert "float32" in placed.notes[0]
    (asked,) = placements(bundle_of("float32"), BackendOptions("cpu"))
    assert asked.notes == ()


def test_an_onnxruntime_that_does_not_tell_is_named() -> None:
    known = StagePlace("vision", "onnxruntime", "cuda", {"CUDAExecutionProvider": 9})
    here = StagePlace("rfm", "onnxruntime", "cpu", {})
    assert stages._untold([known, here]) == ()
    (said,) = stages._untold([known, here, StagePlace("llm", "onnxruntime", "cuda", {})])
    assert "nodes of llm run" in said
