"""Building engines with the real TensorRT-RTX, which needs no GPU. Nothing of it runs here."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from lrs_edge.building.stage_graphs import write_std_graph
from lrs_edge.bundle.bundle import default_bundle_path, open_bundle
from lrs_edge.commands.main import run
from lrs_edge.engines.gather_model import gather_model
from lrs_edge.engines.one_node_model import one_node_model
from lrs_edge.engines.tensorrt.building import BuildOptions, build_engine
from lrs_edge.engines.tensorrt.library import Library, find_library
from lrs_edge.engines.tensorrt.small import profile_of
from lrs_edge.engines.tensorrt.targets import Target, rtx_capabilities
from lrs_edge.errors import BackendError
from lrs_edge.vision.on_device import DeviceTiles
from lrs_edge.vision.positions import ImagePositions

SM86 = BuildOptions(Target("sm_86", "", "", ""), 64 << 20)
PLACES = {"x": ((1, 2, 8, 4),) * 3, "indices": ((8,),) * 3}


@pytest.fixture
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return find_library("tensorrt-rtx")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LRS_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[dict], str]:
    """Engines that the command names, and what it told meanwhile."""
    code = run(["build", "--device", "tensorrt-rtx", "--format", "json", *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)["engines"], err


@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("capability", ["sm_86", "sm_89"])
def test_the_embedded_model_builds_as_it_is_shipped(
    capability: str, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    found, told = build(capsys, "--for", capability, "--context", "1000", "--masked")
    parts = [(engine["stage"], engine["flavour"], engine["capacity"]) for engine in found]
    assert parts == [
        ("vision", "std", 0),
        ("rfm", "std", 1024),
        ("rfm", "std-masked", 1024),
        ("rfm", "move", 1024),
        ("llm", "std-rest", 1024),
        ("llm", "move", 1024),
    ]
    for engine in found:
        path = Path(engine["path"])
        assert path.is_relative_to(cache / "engines")
        assert path.stat().st_size == engine["size"]
        assert (engine["capability"], engine["gpu"]) == (capability, "")
        assert f"{engine['stage']} ({engine['flavour']}): building" in told
    # No larger than the integers that it was built of, and kernels.
    assert sum(engine["size"] for engine in found) < 64 << 20
    assert {engine["profile"] for engine in found} == {"N=1..16", "L=1..256", ""}


@pytest.mark.usefixtures("rtx")
def test_what_is_built_is_not_built_again(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    (first,), _ = build(capsys, "--for", "sm_86", "--stage", "vision")
    assert not first["in_cache"]
    (few,), _ = build(capsys, "--for", "sm_86", "--stage", "vision", "--tiles", "2")
    assert (few["profile"], few["in_cache"]) == ("N=1..2", False)
    assert few["size"] <= first["size"]
    (second,), told = build(capsys, "--for", "sm_86", "--stage", "vision")
    assert second["in_cache"]
    assert second["path"] == first["path"]
    assert "in the cache" in told
    assert len(list(cache.rglob("*.engine"))) == 2
    assert cache.joinpath("engines").stat().st_mode & 0o077 in (0, 0o055)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 5, "there is no GPU to build for (no driver); name one with --for, which"),
        (["--for", "sm_87"], 5, "does not run on sm_87 (Jetson Orin)"),
        (["--for", "sm_90"], 5, "use --device tensorrt on the sm_90 (H100, H200) machine"),
        (["--for", "ampere"], 2, "name a compute capability, such as sm_86"),
        (["--for", "sm_86", "--context", "2000000"], 2, "out of bounds"),
    ],
)
def test_what_cannot_be_built_here_is_refused(
    arguments: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lrs_edge.engines.tensorrt import device

    monkeypatch.setattr(device, "find_gpu", lambda: (None, "no driver"))
    assert run(["build", "--device", "tensorrt-rtx", *arguments]) == code
    assert said in capsys.readouterr().err


def test_the_builder_names_what_it_builds_for(rtx: Library) -> None:
    assert {"sm_86", "sm_89", "sm_120"} <= set(rtx_capabilities(rtx))
    assert not {"sm_87", "sm_90"} & set(rtx_capabilities(rtx))


def test_a_graph_that_the_parser_refuses_is_named_with_its_words(
    rtx: Library, tmp_path: Path
) -> None:
    path = default_bundle_path() / "rfm.onnx"
    with pytest.raises(BackendError, match=r"cannot read rfm\.onnx: .*DynamicQuantizeLinear"):
        build_engine(rtx, path, {}, SM86)
    open_shape = tmp_path / "open.onnx"
    open_shape.write_bytes(gather_model("float16"))
    with pytest.raises(BackendError, match="leaves the shape of"):
        build_engine(rtx, open_shape, {}, SM86)


def test_buffers_that_would_be_copied_are_refused(rtx: Library, tmp_path: Path) -> None:
    path = tmp_path / "copies.onnx"
    model = one_node_model("Identity", ["past_key_0"], {"past_key_0": "float16", "y": "float16"})
    import onnx

    graph = onnx.load_from_string(model)
    graph.graph.node[0].output[0] = graph.graph.output[0].name = "present_key_0"
    onnx.save(graph, path)
    with pytest.raises(BackendError, match="updates 0 of its 1"):
        build_engine(rtx, path, {"past_key_0": ((4, 4),) * 3}, SM86)


@pytest.mark.slow
def test_buffers_of_decoders_are_updated_in_place(rtx: Library, tmp_path: Path) -> None:
    written = write_std_graph(open_bundle(default_bundle_path()), "rfm", 256, tmp_path)
    assert len(written.buffers) == 6
    assert build_engine(rtx, written.path, written.profile(), SM86).nbytes > 1 << 20


@pytest.mark.parametrize("stage", ["rfm", "llm"])
def test_no_shape_is_made_of_what_lies_on_the_gpu(rtx: Library, stage: str, tmp_path: Path) -> None:
    """TensorRT would read such an input on the host, and wait for it."""
    trt, log = rtx.module, rtx.logger()
    written = write_std_graph(open_bundle(default_bundle_path()), stage, 256, tmp_path)
    network = trt.Builder(log.handle).create_network(0)
    assert trt.OnnxParser(network, log.handle).parse_from_file(str(written.path))
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    assert [tensor.name for tensor in inputs if tensor.is_shape_tensor] == []


def test_progress_is_told_and_an_interrupt_ends_the_build(rtx: Library, tmp_path: Path) -> None:
    path = tmp_path / "move.onnx"
    path.write_bytes(gather_model("float16"))
    phases: list[tuple[str, int, int]] = []

    def tell(phase: str, step: int, of: int) -> None:
        phases.append((phase, step, of))

    options = BuildOptions(SM86.target, SM86.workspace, on_progress=tell)
    engine = build_engine(rtx, path, PLACES, options)
    assert engine.nbytes > 1000
    assert ("Building engine", 0, 6) in phases
    assert all(step <= of for _, step, of in phases)

    def interrupt(_phase: str, _step: int, _of: int) -> None:
        raise KeyboardInterrupt

    options = BuildOptions(SM86.target, SM86.workspace, on_progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_engine(rtx, path, PLACES, options)


def test_an_engine_that_is_moved_about_stays_in_one_piece(rtx: Library, tmp_path: Path) -> None:
    """The bytes belong to the library, and outlive its builder."""
    path = tmp_path / "move.onnx"
    path.write_bytes(gather_model("float16"))
    engine = build_engine(rtx, path, PLACES, SM86)
    assert np.frombuffer(engine, np.uint8).any()


@pytest.mark.parametrize(("pool", "pooling"), [(1, "mean"), (2, "mean"), (3, "bilinear")])
def test_small_graphs_around_the_tower_build(
    rtx: Library, pool: int, pooling: str, tmp_path: Path
) -> None:
    bundle = open_bundle(default_bundle_path(), verify=False)
    spec = msgspec.structs.replace(
        bundle.manifest.vision, local_pool=pool, pooling=pooling, grid=12 if pool != 3 else 13
    )
    models: list[bytes] = []
    small = SimpleNamespace(device="gpu")
    graph = SimpleNamespace(
        beside=lambda model: models.append(model) or small, upload=lambda array: array
    )
    tables = np.zeros((16, 576), np.float32)
    DeviceTiles(graph, spec, ImagePositions(tables, tables), half=True)
    short = spec.per_tile
    tokens = {"tokens": (16, spec.grid**2, 576), "number": (1,)}
    for name in ("row", "col"):
        tokens[f"{name}_table"] = tables.shape
        tokens |= {
            f"{name}_below": (short,),
            f"{name}_above": (short,),
            f"{name}_share": (short, 1),
        }
    widened, _, local = models
    for number, (model, shapes) in enumerate(
        ((widened, {"x": (16, 3, 384, 384)}), (local, tokens))
    ):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(model)
        assert build_engine(rtx, path, profile_of(shapes), SM86).nbytes > 1000


def test_the_library_takes_an_engine_from_a_mapped_file(
    rtx: Library, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So that loading takes no memory for the file; without a GPU it fails only after that."""
    path = tmp_path / "move.onnx"
    path.write_bytes(gather_model("float16"))
    path.write_bytes(build_engine(rtx, path, PLACES, SM86))
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    log = rtx.logger()
    engine = rtx.module.Runtime(log.handle).deserialize_cuda_engine(mapped)
    assert engine is not None or "CUDA" in log.last_error()
    # What the library says stays in the log.
    assert capfd.readouterr() == ("", "")
