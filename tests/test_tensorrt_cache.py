"""The cache of TensorRT engines, and everything that is refused before one runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lrs_edge.bundle.bundle import Bundle, default_bundle_path, open_bundle
from lrs_edge.commands import tensorrt_checks
from lrs_edge.commands.main import run
from lrs_edge.engines.tensorrt import device, engine_cache, library, room
from lrs_edge.engines.tensorrt.device import Gpu
from lrs_edge.engines.tensorrt.engine_cache import (
    EngineCache,
    EngineRecord,
    cache_folder,
    stage_hash,
)
from lrs_edge.engines.tensorrt.library import Library, find_library
from lrs_edge.engines.tensorrt.room import BuildMemory, check_room, estimate
from lrs_edge.engines.tensorrt.stages import (
    chosen_capacity,
    chosen_stages,
    plan_memory,
    weight_bytes,
)
from lrs_edge.engines.tensorrt.targets import Target, choose_target, this_system
from lrs_edge.errors import BackendError, OutOfMemoryError, UsageError
from tests.fake_tensorrt import FakeCuda, put_in_place

EXAMPLES = Path(__file__).parent.parent / "examples"
ORIN = Gpu("Orin", "sm_87", "540.4.0", shares_memory=True)
TENSORRT = Library("tensorrt", SimpleNamespace(), "10.16.1")


def record(**changes: Any) -> EngineRecord:
    fields: dict[str, Any] = {
        "library": "tensorrt",
        "version": "10.16.1",
        "stage": "llm",
        "flavour": "std",
        "bundle": "0123456789abcdef",
        "capability": "sm_87",
        "gpu": "Orin",
        "driver": "540.4.0",
        "system": this_system(),
        "profile": "L=1..256",
        "capacity": 4096,
        "graphs": engine_cache.GRAPHS,
        "created": "2026-11-27T12:00:00",
    }
    return EngineRecord(**(fields | changes))


def find(cache: EngineCache, **changes: Any) -> engine_cache.CachedEngine:
    wanted = {"bundle": "0123456789abcdef", "stage": "llm", "flavour": "std"} | changes
    return cache.find(TENSORRT, ORIN, **wanted)


def test_an_engine_is_found_where_it_was_built_for(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    written = cache.write(record(), b"engine")
    found = find(cache)
    assert found == written
    assert bytes(found.read()) == b"engine"
    assert found.record.size == 6
    assert find(cache, capacity=4096) == written
    with pytest.raises(BackendError, match="no tensorrt engine of llm"):
        find(cache, capacity=512)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": "sm_86"}, "it was built for sm_86 and this GPU, Orin, is sm_87"),
        ({"version": "10.15.0"}, r"tensorrt 10\.15\.0 built it and 10\.16\.1 is installed"),
        ({"gpu": "Orin NX"}, "built for the GPU Orin NX and here is Orin"),
        ({"driver": "535.1"}, r"built for the driver 535\.1 and here is 540\.4\.0"),
        ({"system": "plan9-mips"}, "built for the system plan9-mips"),
        ({"graphs": 0}, "another version of lrs-edge built it"),
    ],
)
def test_an_engine_from_elsewhere_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    cache = EngineCache(tmp_path)
    cache.write(record(**changes), b"engine")
    with pytest.raises(BackendError, match=f"was refused: .*{reason}.*run: lrs-edge build"):
        find(cache)


@pytest.mark.parametrize(
    "changes", [{"library": "tensorrt-rtx"}, {"stage": "rfm"}, {"bundle": "f" * 16}]
)
def test_other_engines_are_not_mentioned(changes: dict[str, Any], tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    cache.write(record(**changes), b"engine")
    with pytest.raises(BackendError) as error:
        find(cache)
    assert "refused" not in str(error.value)


def test_every_part_of_the_key_makes_another_file(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    fields = [f for f in EngineRecord.__struct_fields__ if f not in ("created", "size", "sha256")]
    paths = {cache.write(record(), b"").path}
    for field in fields:
        value = 7 if isinstance(getattr(record(), field), int) else "else"
        paths.add(cache.write(record(**{field: value}), b"").path)
    assert len(paths) == len(fields) + 1
    assert cache.write(record(created="later"), b"new").path in paths


def test_the_newest_of_several_lengths_is_taken(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    cache.write(record(capacity=8192, created="2026-11-27T11:00:00"), b"long")
    cache.write(record(capacity=1024, created="2026-11-27T13:00:00"), b"short")
    assert find(cache).record.capacity == 1024


def test_a_damaged_engine_is_not_loaded(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    engine = cache.write(record(), b"engine")
    engine.path.write_bytes(b"Engine")
    with pytest.raises(BackendError, match="is damaged; run lrs-edge build again"):
        find(cache).read()
    engine.path.write_bytes(b"")
    with pytest.raises(BackendError, match="it is empty; run lrs-edge build again"):
        find(cache).read()
    engine.path.unlink()
    with pytest.raises(BackendError, match="run lrs-edge build again"):
        find(cache).read()
    engine.path.with_suffix(".json").write_text("{")
    with pytest.raises(BackendError, match="there is no tensorrt engine"):
        find(cache)


def test_a_record_cannot_point_elsewhere(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    engine = cache.write(record(), b"engine")
    moved = msgspec.structs.replace(engine.record, capability="sm_87/../..")
    engine.path.with_suffix(".json").write_bytes(msgspec.json.encode(moved))
    assert list(cache.of("0123456789abcdef")) == []


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    engine = cache.write(record(), b"engine")
    engine.path.parent.chmod(0o777)
    with pytest.raises(BackendError, match=r"can be written by others.*LRS_EDGE_CACHE"):
        find(cache)


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache.sys, "platform", "linux")
    for name in ("LRS_EDGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "lrs-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/lrs-edge")
    monkeypatch.setenv("LRS_EDGE_CACHE", "/y")
    assert cache_folder() == Path("/y")


def test_calibrating_a_bundle_keeps_its_engines() -> None:
    bundle = open_bundle(default_bundle_path(), verify=False)
    digests = {stage: stage_hash(bundle, stage) for stage in ("vision", "rfm", "llm")}
    assert len(set(digests.values())) == 2
    files = dict(bundle.manifest.files)
    for name, changed in (("MODEL_CARD.md", set()), ("vision.onnx", {"vision"})):
        other = {**files, name: msgspec.structs.replace(files[name], sha256="0" * 64)}
        edited = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, files=other))
        assert {s for s, digest in digests.items() if stage_hash(edited, s) != digest} == changed


def test_tensorrt_builds_for_the_gpu_that_is_there() -> None:
    assert choose_target(TENSORRT, None, ORIN) == Target("sm_87", "Orin", "540.4.0", this_system())
    assert choose_target(TENSORRT, "sm_87", ORIN).gpu == "Orin"
    with pytest.raises(
        BackendError, match=r"here is Orin \(sm_87\).*--device tensorrt-rtx --for sm_89"
    ):
        choose_target(TENSORRT, "sm_89", ORIN)
    with pytest.raises(
        BackendError, match=r"this machine has none: copy the bundle to the sm_87 \(Je"
    ):
        choose_target(TENSORRT, "sm_87", None)
    with pytest.raises(BackendError, match="run lrs-edge build on the machine that will ask"):
        choose_target(TENSORRT, None, None)
    with pytest.raises(BackendError, match=r"to be had here .cuda-bindings is not installed"):
        choose_target(TENSORRT, None, None, "cuda-bindings is not installed")


def test_an_old_tensorrt_is_refused() -> None:
    TENSORRT.check_operators()
    jetpack6 = Library("tensorrt", SimpleNamespace(), "10.3.0")
    jetpack6.check_operators()
    assert TENSORRT.updates_in_place
    assert not jetpack6.updates_in_place
    with pytest.raises(BackendError, match=r"8\.6\.2 is too old.*10\.3.*JetPack 6\.2"):
        Library("tensorrt", SimpleNamespace(), "8.6.2").check_operators()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda()
    fake = put_in_place(monkeypatch, tmp_path, cuda)
    assert find_library("tensorrt").version == fake.__version__
    with pytest.raises(UsageError, match="tensorrt or tensorrt-rtx"):
        find_library("tensorflow")
    device.open_device.cache_clear()
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (35, None))
    monkeypatch.setattr(cuda, "cudaDriverGetVersion", lambda: (0, 0))
    monkeypatch.setattr(cuda, "cudaRuntimeGetVersion", lambda: (0, 13050))
    with pytest.raises(BackendError, match=r"no NVIDIA GPU answers.*--device cpu"):
        device.open_device()
    monkeypatch.setattr(cuda, "cudaDriverGetVersion", lambda: (0, 12060))
    with pytest.raises(
        BackendError, match=r"cuda-bindings 13\.5 is newer.*'cuda-bindings==12\.\*'"
    ):
        device.open_device()

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(device, "importlib", SimpleNamespace(import_module=missing))
    monkeypatch.setattr(library, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(BackendError, match="cuda-bindings is not installed"):
        device.open_device()
    with pytest.raises(BackendError, match=r"tensorrt is not installed.*JetPack"):
        find_library("tensorrt")
    shell = SimpleNamespace(import_module=lambda _name: SimpleNamespace(__version__="11.4"))
    monkeypatch.setattr(library, "importlib", shell)
    with pytest.raises(BackendError, match="is installed but does not load"):
        find_library("tensorrt")


@pytest.mark.parametrize("command", ["ask", "build"])
def test_commands_say_what_to_install(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    fake = SimpleNamespace(
        import_module=missing, util=SimpleNamespace(find_spec=lambda _name: None)
    )
    monkeypatch.setattr(library, "importlib", fake)
    image = [str(EXAMPLES / "coast.tif"), "Is there a pool?"] if command == "ask" else []
    assert run([command, *image, "--device", "tensorrt"]) == 5
    assert "tensorrt is not installed: on a Jetson it comes with JetPack" in capsys.readouterr().err
    if command == "build":
        assert run([command]) == 5
        assert "neither tensorrt nor tensorrt-rtx is installed" in capsys.readouterr().err


def test_asking_without_an_engine_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_place(monkeypatch, tmp_path)
    image = str(EXAMPLES / "coast.tif")
    assert run(["ask", image, "Is there a pool?", "--device", "tensorrt"]) == 5
    told = capsys.readouterr().err
    assert "no tensorrt engine of vision (std) of this bundle for Orin (sm_87)" in told
    assert "run: lrs-edge build BUNDLE --device tensorrt" in told
    # One stage alone of two that share layers has no engine.
    assert run(["ask", image, "Is there a pool?", "--device", "cpu,llm=tensorrt,rfm=cpu"]) == 5
    assert "place both on the same device" in capsys.readouterr().err
    device.open_device.cache_clear()


def test_a_build_that_would_swap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "machine_memory", lambda: (8 << 30, 4 << 30))
    need = estimate(800 << 20, 1 << 30)
    check_room("llm", need, 8 << 30, shared=False)
    with pytest.raises(OutOfMemoryError, match=r"the machine would swap.*--stage"):
        check_room("llm", need, None, shared=True)
    with pytest.raises(OutOfMemoryError, match="MB on the GPU and 1000 MB are free"):
        check_room("llm", need, 10**9, shared=False)
    with pytest.raises(OutOfMemoryError, match="about 30401 MB and 4295 MB are free"):
        check_room("llm", BuildMemory(30_400_100_000, 0), None, shared=False)
    # Where the system does not tell, the builder is left to it.
    monkeypatch.setattr(room, "machine_memory", lambda: (None, None))
    check_room("llm", estimate(1 << 40, 0), None, shared=False)


def test_memory_is_reckoned_from_the_weights_a_graph_uses() -> None:
    bundle = open_bundle(default_bundle_path(), verify=False)
    whole, first = (weight_bytes(bundle.graph(f"{name}.onnx")) for name in ("llm", "rfm"))
    # Both name one file of weights.
    assert first < whole / 2
    assert plan_memory(bundle, "rfm", 0).host < plan_memory(bundle, "llm", 0).host


def test_lengths_and_stages_are_those_of_the_bundle() -> None:
    bundle = open_bundle(default_bundle_path(), verify=False)
    assert chosen_capacity(bundle, None) == 8192
    assert chosen_capacity(bundle, 1000) == 1024
    assert chosen_stages(bundle, ()) == ("vision", "rfm", "llm")
    assert chosen_stages(bundle, ("llm", "vision")) == ("vision", "llm")
    alone = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, rfm=None))
    with pytest.raises(UsageError, match="no stage rfm; it has vision, llm"):
        chosen_stages(alone, ("rfm",))


def test_doctor_says_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_in_place(monkeypatch, tmp_path)
    monkeypatch.setattr(
        tensorrt_checks, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=_only_one))
    )
    (check,) = tensorrt_checks.tensorrt_checks()
    assert (check.name, check.status) == ("tensorrt", "ok")
    assert check.detail == "10.16.1, no engine for Orin yet"
    assert check.advice == "lrs-edge build BUNDLE --device tensorrt"
    gpu = device.open_device().gpu
    EngineCache().write(record(driver=gpu.driver), bytes(2_000_000))
    EngineCache().write(record(driver="older"), b"another's")
    (check,) = tensorrt_checks.tensorrt_checks()
    assert check.detail.startswith("10.16.1, 1 engines for Orin, 2 MB, ")
    device.open_device.cache_clear()
    monkeypatch.setattr(FakeCuda, "cudaGetDeviceCount", lambda _self: (0, 0))
    (check,) = tensorrt_checks.tensorrt_checks()
    assert check.status == "warn"
    assert check.detail.startswith("10.16.1 cannot be used: no NVIDIA GPU answers")
    monkeypatch.setattr(tensorrt_checks.importlib.util, "find_spec", lambda _name: None)
    (check,) = tensorrt_checks.tensorrt_checks()
    assert "not installed" in check.detail


def _only_one(module: str) -> bool:
    return module == "tensorrt"
