"""How much memory a build takes, and whether the machine has it."""

from __future__ import annotations

from dataclasses import dataclass

from lrs_edge.errors import OutOfMemoryError
from lrs_edge.requests.memory import machine_memory

#: Measured with tensorrt-rtx 1.7.1: its libraries, and what a build holds for each byte of weights
#: (docs/tensorrt.md): graphs of 0.3 to 1.4 GB took 3.1 to 3.3 times their weights.
BASE_BYTES = 300 << 20
PER_WEIGHT = 3.5


@dataclass(frozen=True)
class BuildMemory:
    """What a build takes at its peak, in bytes.

    Attributes:
        host: Of the machine.
        workspace: Of the GPU, for trying kernels; 0 where none are tried.
    """

    host: int
    workspace: int


def estimate(weights: int, workspace: int) -> BuildMemory:
    """What building an engine takes.

    Args:
        weights: Bytes of the graph's file and its weights.
        workspace: What `--workspace` allows the builder on the GPU; 0 where it uses none.
    """
    return BuildMemory(
        BASE_BYTES + int(PER_WEIGHT * weights), workspace + (weights if workspace else 0)
    )


def check_room(stage: str, need: BuildMemory, free_on_gpu: int | None, *, shared: bool) -> None:
    """Refuse a build that would make the machine swap.

    Args:
        stage: What is built, for the message.
        need: What it takes.
        free_on_gpu: Bytes; None where no GPU is used.
        shared: Whether the GPU's memory is the machine's (Jetson).

    Raises:
        OutOfMemoryError: There is less memory than that.
    """
    _, free = machine_memory()
    host = need.host + (need.workspace if shared else 0)
    if free is not None and host > free:
        raise OutOfMemoryError(
            f"building {stage} takes about {_mb(host)} MB and {_mb(free)} MB are free: the machine "
            "would swap. Close other programs, give a smaller --workspace, build one stage at a "
            "time (--stage), or build on a larger machine with the same GPU"
        )
    if not shared and free_on_gpu is not None and need.workspace > free_on_gpu:
        raise OutOfMemoryError(
            f"building {stage} takes about {_mb(need.workspace)} MB on the GPU and "
            f"{_mb(free_on_gpu)} MB are free; give a smaller --workspace"
        )


def _mb(count: int) -> int:
    return -(-count // 1_000_000)
