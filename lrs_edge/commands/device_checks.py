"""What `doctor` says of onnxruntime's providers, GPUs, and where the embedded model runs."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from lrs_edge.commands.check import Check
from lrs_edge.engines.install import gpu_advice
from lrs_edge.errors import BackendError, BundleError, LrsEdgeError

_JETSON_RELEASE = Path("/etc/nv_tegra_release")
#: Sends tensors to a service on the internet, and is in every onnxruntime; never used here.
_REMOTE = "AzureExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"


def provider_checks(listed: list[str]) -> Iterator[Check]:
    """Every provider that onnxruntime was built with, its plugins, and what it sees of GPUs.

    Args:
        listed: What `get_available_providers` says: what was compiled in, whether it works or not.
    """
    for name in listed:
        if name != _REMOTE:
            yield _provider(name)
    yield from _plugins()
    jetson = _JETSON_RELEASE.is_file()
    # A Jetson has its GPU's engines from TensorRT, and no onnxruntime-gpu that runs there.
    if "CUDAExecutionProvider" not in listed and shutil.which("nvidia-smi") and not jetson:
        yield Check(
            "CUDAExecutionProvider",
            "warn",
            "there is an NVIDIA GPU, and this onnxruntime does not use it",
            gpu_advice(),
        )


def _provider(name: str) -> Check:
    """Whether a listed provider really runs a graph: onnxruntime falls back without an error."""
    required = BackendError.exit_code if name == "CPUExecutionProvider" else 0
    advice = "reinstall onnxruntime" if required else "its driver or libraries are not found"
    try:
        problem = try_provider(name)
    # Providers fail with whatever their libraries raise.
    except Exception as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
    if not problem:
        return Check(name, "ok", "loads and runs")
    if name == "CUDAExecutionProvider":
        from lrs_edge.engines.node_places import NO_CARD
        from lrs_edge.engines.providers import cuda_problem

        if "fallback to CPU EP" in problem:  # What a provider that failed leaves behind.
            problem = f"does not load; {NO_CARD}"
        problem = cuda_problem() or problem
        advice = "use --device cpu, or install what is missing"
    if name == _TENSORRT:
        # Comes with every onnxruntime-gpu, and needs libraries that hardly anybody has.
        return Check(name, "ok", "not used: its libraries are not installed")
    return Check(name, "missing" if required else "warn", problem, advice, required)


def try_provider(name: str) -> str:
    """Run a one-node graph on a provider; returns what went wrong."""
    import numpy as np

    from lrs_edge.engines.onnx import open_mover
    from lrs_edge.engines.providers import CPU

    session = open_mover("float32", "cpu" if name == CPU else f"onnxruntime:{name}")
    if name not in session.get_providers():
        return "listed, but does not load"
    x = np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2)
    (y,) = session.run(None, {"x": x, "indices": np.array([2, 0], np.int64)})
    return "" if np.array_equal(y, x[:, :, [2, 0]]) else "runs, but computes wrong results"


def _plugins() -> Iterator[Check]:
    """Packages that bring a provider of their own, and whether ONNX Runtime can see a GPU."""
    providers = importlib.import_module("lrs_edge.engines.providers")
    plugins = providers.register_plugins()
    gpus = [one for one in providers.ep_devices() if str(one.device.type).endswith("GPU")]
    for package, problem in plugins.items():
        if problem:
            advice = "install what it names, or uninstall the plugin"
            yield Check(package, "warn", f"does not load: {problem}", advice)
        else:
            yield Check(package, "ok", "its library loads")
    for one in gpus:
        vendor = one.device.vendor or "GPU"
        yield Check(one.ep_name, "ok", f"can use {vendor}: --device onnxruntime:{one.ep_name}")
    unseen = providers.no_discovery()
    if unseen and not gpus and (plugins or shutil.which("nvidia-smi")):
        yield Check(
            "GPU discovery",
            "warn",
            f"plugins of ONNX Runtime get no GPU{unseen}",
            "none for --device cuda, which does not ask; for a plugin, run where that folder is",
        )


def gpu_checks() -> Iterator[Check]:
    """The GPU that nvidia-smi or JetPack names."""
    if _JETSON_RELEASE.is_file():
        release = _JETSON_RELEASE.read_text(errors="replace").splitlines()[0].strip("# ")
        yield Check("Jetson", "ok", release)
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Check("GPU", "ok", "no NVIDIA GPU found (nvidia-smi is not installed); using the CPU")
        return
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command, found on PATH
            [tool, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        yield Check("GPU", "warn", f"nvidia-smi fails ({error})", "check the NVIDIA driver")
        return
    for line in done.stdout.splitlines():
        yield Check("GPU", "ok", line.strip())


def placement_check() -> Iterator[Check]:
    """Where the stages of the embedded model run under `auto`, node by node."""
    if "lrs_edge.engines.runtime" not in sys.modules:
        return  # onnxruntime does not load, which its own check says.
    from lrs_edge.engine import load

    try:
        with load(verify=False) as engine:
            shown = [
                f"{place.stage} on {place.device}{_counts(place.nodes)}" for place in engine.places
            ]
            fallen = next((text for text in engine.warnings if "auto" in text), "")
    except BundleError:
        return  # told by the check of the model
    except LrsEdgeError as error:
        yield Check("placement", "missing", str(error), "see the checks above", error.exit_code)
        return
    detail = ", ".join(shown)
    if fallen:
        yield Check("placement", "warn", detail, fallen)
    else:
        yield Check("placement", "ok", detail)


def _counts(nodes: Mapping[str, int]) -> str:
    """Such as ` (163 nodes)`, and which provider runs how many where there are several."""
    if len(nodes) < 2:
        return "".join(f" ({count} nodes)" for count in nodes.values())
    return f" ({', '.join(f'{count} {name}' for name, count in nodes.items())})"
