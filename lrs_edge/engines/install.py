"""What to install for a GPU, and where there is nothing to install."""

from __future__ import annotations

import platform
import sys

#: Wheels of onnxruntime-gpu: x86-64 Linux and Windows; on aarch64 for cards of servers alone.
_X86 = ("x86_64", "amd64")
_WHERE = "where lrs-edge was installed from"


def install_advice() -> str:
    """How to get an engine on this machine, in one line."""
    gpu = gpu_wheel_problem()
    also = f"; {gpu}" if gpu else " (or '.[gpu]' on an NVIDIA GPU)"
    return f"run, {_WHERE}: pip install '.[cpu]'{also}"


def gpu_advice() -> str:
    """How to get ONNX Runtime with CUDA on this machine, in one line."""
    return gpu_wheel_problem() or (
        f"pip uninstall -y onnxruntime; then, {_WHERE}: pip install '.[gpu]'"
    )


def gpu_wheel_problem() -> str:
    """Why the extra `gpu` gives less than it should here, or nothing; else empty."""
    system, machine = platform.system(), platform.machine().lower()
    if machine == "aarch64" and system == "Linux":
        return (
            "onnxruntime-gpu's wheels for aarch64 have code for servers' cards (compute capability "
            "8.9 and newer), none for Jetson Orin: there use --device tensorrt (docs/jetson.md), "
            "or NVIDIA's wheels for your JetPack"
        )
    if machine not in _X86 or system not in ("Linux", "Windows"):
        return f"there is no wheel of onnxruntime-gpu for {system} {machine}: use the extra `cpu`"
    if sys.version_info < (3, 11):
        return (
            f"for Python {platform.python_version()} the last onnxruntime-gpu is 1.23.2 (CUDA 12), "
            "which does not tell where nodes run; use Python 3.11 or newer for the extra `gpu`"
        )
    return ""
