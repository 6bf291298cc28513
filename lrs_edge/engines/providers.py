"""ONNX Runtime's execution providers: what runs a session's nodes, and with which options.

A provider is built into an onnxruntime (CUDA, TensorRT), or comes as a plugin in a package of its
own, `onnxruntime_ep_*`, whose library is registered once a process. `cpu` and `cuda` are devices of
their own; `onnxruntime:NAME` names any other, by ONNX Runtime's name or a short one.

Nothing of a plugin and nothing of CUDA is loaded before a stage is placed there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lrs_edge.engines.devices import PROVIDER_PREFIX
from lrs_edge.engines.install import gpu_advice
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import BackendError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

#: ONNX Runtime's names by short ones. A plugin of CUDA's has a name of its own.
NAMES: Mapping[str, tuple[str, ...]] = {
    "cpu": (CPU,),
    "cuda": (CUDA, "CudaPluginExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider",),
    "tensorrt-rtx": ("NvTensorRTRTXExecutionProvider",),
}

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

#: Packages of plugins are named so by convention, and say themselves where their library lies.
PLUGIN_PREFIX = "onnxruntime_ep_"

#: How CUDA's provider is set. onnxruntime-gpu 1.31.1 takes these options; what they gain has not
#: been measured on a card.
CUDA_OPTIONS: Mapping[str, str] = {
    # Each of the three sessions has an arena of its own, which otherwise grows to the next power of
    # two and never shrinks: several GB that no other stage can have.
    "arena_extend_strategy": "kSameAsRequested",
    # No `gpu_mem_limit`: it bounds one session's arena and not the process. Where memory ends, the
    # search is told so and goes on with smaller batches (`OutOfMemoryError`).
    # Copies in the stream of the kernels: a run then never reads what is still on its way.
    "do_copy_in_default_stream": "1",
    # Otherwise every new number of tiles makes cuDNN try all its algorithms.
    "cudnn_conv_algo_search": "HEURISTIC",
    # TF32 has ten bits of mantissa: who exports float32 wants its numbers, float16 is faster still.
    "use_tf32": "0",
}


@dataclass(frozen=True)
class Provider:
    """One execution provider that this process can use.

    Attributes:
        name: ONNX Runtime's.
        device: As `--device` names it.
        memory: Where tensors and key/value buffers lie between runs, as ONNX Runtime names it.
            `cpu` for a provider that brings its own device: everything is copied at every run.
        options: Set in every session.
        beside: Other providers, on the same device, that may run what this one does not.
        plugin: The devices of a plugin, which a session is given instead of a name.
    """

    name: str
    device: str
    memory: str = "cpu"
    options: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    plugin: tuple[Any, ...] = ()

    @property
    def own(self) -> frozenset[str]:
        """Names of all providers that count as this one's device."""
        return frozenset((self.name, *self.beside))

    def add_to(self, options: ort.SessionOptions, *, strict: bool) -> dict[str, Any]:
        """Let a session use the provider.

        Args:
            options: Of the session; changed.
            strict: Whether a node that would run on the CPU is an error. The CPU is then not named.

        Returns:
            Further arguments of `InferenceSession`.
        """
        last = [] if strict or self.name == CPU else [CPU]
        if strict:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # Without it, onnxruntime's Python prints to standard output and goes on with the CPU alone.
        arguments: dict[str, Any] = {"enable_fallback": 0}
        if self.plugin:
            options.add_provider_for_devices(list(self.plugin), dict(self.options))
            return arguments
        others = [(name, dict(CUDA_OPTIONS)) for name in self.beside]
        return {**arguments, "providers": [(self.name, dict(self.options)), *others, *last]}


def provider(device: str) -> Provider:
    """The provider of a device: `cpu`, `cuda` or `onnxruntime:NAME`.

    Raises:
        BackendError: This onnxruntime has none, or its plugin does not load.
    """
    short = device.removeprefix(PROVIDER_PREFIX).lower().removesuffix("executionprovider")
    built_in = ort.get_available_providers()
    for name in built_in:
        if _is_named(name, short):
            if name == CUDA:
                preload()
                return Provider(name, "cuda", "cuda", CUDA_OPTIONS)
            if name == NAMES["tensorrt"][0]:
                preload()
                beside = (CUDA,) if CUDA in built_in else ()
                return Provider(name, f"{PROVIDER_PREFIX}tensorrt", "cuda", beside=beside)
            shown = "cpu" if name == CPU else f"{PROVIDER_PREFIX}{short}"
            return Provider(name, shown)
    found = register_plugins()
    for one in ep_devices():
        if _is_named(one.ep_name, short):
            # Memory of a plugin's device is not bound: this has only been tried on a CPU.
            return Provider(one.ep_name, f"{PROVIDER_PREFIX}{short}", plugin=(one,))
    raise BackendError(_absent(short, found))


def _is_named(name: str, short: str) -> bool:
    """Whether a provider's name is the short one, or among those that it stands for."""
    return name in NAMES.get(short, ()) or name.lower().removesuffix("executionprovider") == short


def _absent(short: str, plugins: Mapping[str, str]) -> str:
    """Why there is no provider of a name, in one line."""
    for package, problem in plugins.items():
        if _squeezed(package).endswith(_squeezed(short)):
            reason = f"does not load: {problem}"
            if not problem:
                reason = f"is there, and ONNX Runtime gives it no device{no_discovery()}"
            return f"the plugin {package} {reason}; see `lrs-edge doctor`, or use --device cpu"
    if short == "cuda":
        return f"this onnxruntime has no CUDA provider; {gpu_advice()}, or use --device cpu"
    have = ", ".join(sorted({*ort.get_available_providers(), *plugins}))
    return (
        f"onnxruntime {ort.__version__} has no provider {short!r}, only {have}; install a package "
        "that brings it, or use --device cpu"
    )


def _squeezed(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def available(device: str) -> bool:
    """Whether this onnxruntime was built with a device's provider; plugins are not looked at."""
    return any(name in ort.get_available_providers() for name in NAMES.get(device, ()))


@functools.cache
def register_plugins() -> Mapping[str, str]:
    """Register the library of every installed plugin, once.

    Returns:
        Names of the plugins' packages, and what went wrong; empty text where nothing did.
    """
    found: dict[str, str] = {}
    if not hasattr(ort, "register_execution_provider_library"):
        return found
    for module in pkgutil.iter_modules():
        if module.name.startswith(PLUGIN_PREFIX):
            try:
                package = importlib.import_module(module.name)
                ort.register_execution_provider_library(module.name, package.get_library_path())
                found[module.name] = ""
            # A library fails with whatever its own loading raises.
            except Exception as error:
                found[module.name] = _reason(error)
    return found


def _reason(error: Exception) -> str:
    """The end of the message, where loaders say what they lack."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rpartition("with error: ")[2][-300:]


def ep_devices() -> list[Any]:
    """Pairs of provider and device that ONNX Runtime has found; empty before 1.23."""
    return list(ort.get_ep_devices()) if hasattr(ort, "get_ep_devices") else []


def no_discovery() -> str:
    """Why ONNX Runtime sees no GPU for a plugin although there may be one; else empty."""
    if sys.platform == "linux" and not os.path.isdir("/sys/class/drm"):
        return " (it looks for GPUs in /sys/class/drm, which this machine or container lacks)"
    return ""


@functools.cache
def preload() -> tuple[str, ...]:
    """Load CUDA's and cuDNN's libraries out of NVIDIA's Python packages, once a process.

    Must come before the first session on CUDA: the provider's own library finds them by name only.

    Returns:
        What did not load, one line each.
    """
    if not hasattr(ort, "preload_dlls"):
        return ()
    # It prints what it misses to standard output, where answers go.
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    return tuple(line for line in said.getvalue().splitlines() if line.startswith("Failed"))


def has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, ONNX Runtime's own log is silent: providers tell it all that they fail to load.

    What fails is told in one line by whoever asks. It cannot be asked for its level, so it is back
    at the usual one afterwards.
    """
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def cuda_problem() -> str:
    """What CUDA's provider lacks on this machine, as far as that can be told; else empty."""
    missing = [text.split(":")[0].removeprefix("Failed to load ") for text in preload()]
    said = [] if has_driver() else [f"there is no NVIDIA driver ({_DRIVER})"]
    if missing:
        said.append(f"{', '.join(missing)} missing: pip install 'onnxruntime-gpu[cuda,cudnn]'")
    return "; ".join(said)
