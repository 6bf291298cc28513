"""`lrs-edge doctor`: what it finds on machines that lack something."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lrs_edge.commands import checks as doctor
from lrs_edge.commands import device_checks
from lrs_edge.commands.check import Check
from lrs_edge.commands.main import run
from lrs_edge.engines import install
from lrs_edge.errors import BackendError

STATUSES = {"ok", "warn", "missing"}


def found(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that these versions of onnxruntime's distributions are installed."""

    def pretend(**versions: str) -> None:
        wanted = {name.replace("_", "-"): version for name, version in versions.items()}
        real = doctor._version
        monkeypatch.setattr(
            doctor,
            "_version",
            lambda name: wanted.get(name) if name in doctor.ONNXRUNTIMES else real(name),
        )

    return pretend


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    checks = doctor.run_checks()
    assert {check.status for check in checks} <= STATUSES
    assert [check for check in checks if check.status != "ok" and not check.advice] == []
    assert found(checks, "CPUExecutionProvider").status == "ok"
    assert found(checks, "rasterio").detail.count(".") >= 2


def test_two_onnxruntimes_are_a_conflict(installed: Callable[..., None]) -> None:
    installed(onnxruntime="1.32.0", onnxruntime_gpu="1.32.0")
    check = found(doctor.run_checks(), "onnxruntime")
    assert check.status == "warn"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in check.advice


def test_without_onnxruntime_ask_cannot_work(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "lrs_edge.engines.runtime", raising=False)
    checks = doctor.run_checks()
    assert found(checks, "onnxruntime").status == "missing"
    assert doctor.exit_code(checks) == 5


def test_a_listed_provider_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("lrs_edge.engines.runtime").ort
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            device_checks, "try_provider", lambda name: "" if name[:3] == "CPU" else "no driver"
        )
        checks = doctor.run_checks()
    assert found(checks, "CUDAExecutionProvider").status == "warn"
    assert found(checks, "CUDAExecutionProvider").exit_code == 0
    assert found(checks, "CPUExecutionProvider").status == "ok"


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for nvidia-smi")
def test_a_gpu_that_nothing_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 580.65, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    checks = doctor.run_checks()
    assert "H100" in found(checks, "GPU").detail
    if "CUDAExecutionProvider" not in sys.modules["onnxruntime"].get_available_providers():
        assert ".[gpu]" in found(checks, "CUDAExecutionProvider").advice
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert found(doctor.run_checks(), "GPU").status == "warn"


def test_little_memory_is_worth_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "machine_memory", lambda: (4 << 30, 512 << 20))
    assert found(doctor.run_checks(), "memory").status == "warn"


def test_json_and_text_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [Check("python", "ok", "3.11"), Check("model", "missing", "gone", "get it", 4)]
    monkeypatch.setattr("lrs_edge.commands.doctor.run_checks", lambda: checks)
    assert run(["doctor"]) == 4
    text = capsys.readouterr().out
    assert "missing  model" in text
    assert "-> get it" in text
    assert run(["doctor", "--format", "json"]) == 4
    facts = json.loads(capsys.readouterr().out)
    assert facts["ready"] is False
    assert facts["checks"][1]["advice"] == "get it"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that brings a provider, whose library is no library."""
    providers = importlib.import_module("lrs_edge.engines.providers")
    if not hasattr(providers.ort, "register_execution_provider_library"):
        pytest.skip("this onnxruntime knows no plugins")
    library = tmp_path / "libbroken.so"
    library.write_bytes(b"not a library")
    package = tmp_path / "onnxruntime_ep_broken"
    package.mkdir()
    (package / "__init__.py").write_text(f"def get_library_path():\n    return {str(library)!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    providers.register_plugins.cache_clear()
    yield package
    providers.register_plugins.cache_clear()
    sys.modules.pop("onnxruntime_ep_broken", None)


@pytest.mark.usefixtures("plugin")
def test_a_plugin_whose_library_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = importlib.import_module("lrs_edge.engines.providers")
    monkeypatch.setattr(providers, "no_discovery", lambda: " (no /sys/class/drm)")
    checks = doctor.run_checks()
    check = found(checks, "onnxruntime_ep_broken")
    assert (check.status, check.exit_code) == ("warn", 0)
    assert "libbroken.so" in check.detail
    assert "/sys/class/drm" in found(checks, "GPU discovery").detail
    with pytest.raises(BackendError, match="plugin onnxruntime_ep_broken does not load"):
        providers.provider("onnxruntime:broken")


def test_where_the_embedded_model_runs() -> None:
    check = found(doctor.run_checks(), "placement")
    if check.status == "ok":
        assert "vision on " in check.detail
        assert "llm on " in check.detail


@pytest.mark.parametrize(
    ("system", "machine", "version", "said"),
    [
        ("Linux", "x86_64", (3, 10, 13), "Python 3.10.13 the last onnxruntime-gpu is 1.23.2"),
        ("Linux", "aarch64", (3, 12, 1), "NVIDIA's wheels for your JetPack"),
        ("Darwin", "arm64", (3, 12, 1), "no wheel of onnxruntime-gpu for Darwin arm64"),
        ("Windows", "AMD64", (3, 12, 1), ""),
    ],
)
def test_where_there_is_no_wheel_for_gpus(
    system: str,
    machine: str,
    version: tuple[int, int, int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(install.platform, "system", lambda: system)
    monkeypatch.setattr(install.platform, "machine", lambda: machine)
    monkeypatch.setattr(install.platform, "python_version", lambda: ".".join(map(str, version)))
    monkeypatch.setattr(install.sys, "version_info", version)
    assert said in install.gpu_wheel_problem()
    assert bool(said) == bool(install.gpu_wheel_problem())
    assert said in install.install_advice()
    assert (said or "'.[gpu]'") in install.gpu_advice()
