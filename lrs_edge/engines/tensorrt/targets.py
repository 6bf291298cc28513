"""GPUs that engines are built for."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

from lrs_edge.engines.tensorrt.device import Gpu
from lrs_edge.engines.tensorrt.library import Library
from lrs_edge.errors import BackendError, UsageError

#: What machines call the GPUs that people ask for most.
_KNOWN = {
    "sm_72": "Jetson Xavier",
    "sm_75": "GeForce RTX 20, T4",
    "sm_80": "A100, A30",
    "sm_86": "GeForce RTX 30, RTX A6000",
    "sm_87": "Jetson Orin",
    "sm_89": "GeForce RTX 40, L4, L40",
    "sm_90": "H100, H200",
    "sm_100": "B200",
    "sm_110": "Jetson Thor",
    "sm_120": "GeForce RTX 50, RTX PRO Blackwell",
    "sm_121": "DGX Spark",
}


@dataclass(frozen=True)
class Target:
    """What an engine is built for.

    Attributes:
        capability: Compute capability, such as `sm_86`.
        gpu: Name of the GPU where the engine is bound to it; empty where any of the capability
            runs it.
        driver: Version of its driver; empty where any will do.
        system: Operating system and processor, such as `linux-x86_64`.
    """

    capability: str
    gpu: str
    driver: str
    system: str

    def __str__(self) -> str:
        return f"{self.gpu or _KNOWN.get(self.capability, 'GPUs')} ({self.capability})"


def this_system() -> str:
    """Operating system and processor of this machine, such as `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def choose_target(
    library: Library, wanted: str | None, gpu: Gpu | None, missing: str = ""
) -> Target:
    """The target of a build.

    TensorRT-RTX compiles for a compute capability and finishes on the user's machine, so that it
    builds anywhere. TensorRT measures kernels on the GPU that is there, and for no other.

    Args:
        library: Builds.
        wanted: `sm_87`, or None for the GPU that is there.
        gpu: The GPU that is there, or None.
        missing: Why there is none, for the message.

    Raises:
        UsageError: `wanted` is no compute capability.
        BackendError: The library cannot build for it here.
    """
    if wanted is not None and not re.fullmatch(r"sm_\d{2,3}", wanted):
        raise UsageError(f"--for {wanted}: name a compute capability, such as sm_86")
    if wanted is None and gpu is None:
        raise BackendError(_no_gpu(library, missing))
    capability = wanted or (gpu.capability if gpu else "")
    if library.is_rtx:
        known = rtx_capabilities(library)
        if capability not in known:
            raise BackendError(
                f"tensorrt-rtx {library.version} does not run on {_named(capability)}, only on "
                f"{', '.join(known)}; {_instead(capability)}"
            )
        return Target(capability, "", "", "")
    if gpu is None or gpu.capability != capability:
        none = f"none is to be had here ({missing})" if missing else "this machine has none"
        here = none if gpu is None else f"here is {gpu.name} ({gpu.capability})"
        raise BackendError(
            f"TensorRT builds for the GPU that it runs on, and {here}: copy the bundle to the "
            f"{_named(capability)} machine and run lrs-edge build there{_or_rtx(capability)}"
        )
    return Target(capability, gpu.name, gpu.driver, this_system())


def rtx_capabilities(library: Library) -> tuple[str, ...]:
    """Compute capabilities that a TensorRT-RTX builds for, ascending."""
    names = [name for name in library.module.ComputeCapability.__members__ if name[:2] == "SM"]
    return tuple(f"sm_{number}" for number in sorted(int(name[2:]) for name in names))


def _no_gpu(library: Library, missing: str) -> str:
    why = f" ({missing})" if missing else ""
    if library.is_rtx:
        known = ", ".join(rtx_capabilities(library))
        return (
            f"there is no GPU to build for{why}; name one with --for, which tensorrt-rtx builds "
            f"without it: {known}"
        )
    return (
        f"TensorRT builds for the GPU that it runs on, and none is to be had here{why}; run "
        "lrs-edge build on the machine that will ask, or build with --device tensorrt-rtx --for "
        "sm_86, which needs no GPU"
    )


def _named(capability: str) -> str:
    return f"{capability} ({_KNOWN[capability]})" if capability in _KNOWN else capability


def _instead(capability: str) -> str:
    return f"use --device tensorrt on the {_named(capability)} machine itself"


def _or_rtx(capability: str) -> str:
    if capability in {"sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"}:
        return f", or build for it here with --device tensorrt-rtx --for {capability}"
    return ""
