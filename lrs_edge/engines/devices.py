"""Names of devices, as `--device` and `lrs_edge.load(device=...)` take them.

Nothing here looks at the machine: whether a device is there is found in `placement.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lrs_edge.engines.base import BackendOptions
from lrs_edge.errors import UsageError

StageName = Literal["vision", "rfm", "llm"]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True)
class StagePlace:
    """Where a stage runs.

    Attributes:
        stage: `vision`, `rfm` or `llm`.
        engine: `onnxruntime`, ...
        device: As `--device` names it.
        nodes: Nodes of its graphs that are loaded, by what runs them; empty where the engine does
            not tell.
    """

    stage: StageName
    engine: str
    device: str
    nodes: Mapping[str, int]


AUTO = "auto"
#: Where a stage can be told to run; besides, `onnxruntime:NAME` is a provider of ONNX Runtime.
DEVICES = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")
PROVIDER_PREFIX = "onnxruntime:"

#: How `--device` is written, for messages and help.
GRAMMAR = f"{AUTO}, {', '.join(DEVICES)}, onnxruntime:PROVIDER, or vision=...,rfm=...,llm=..."


def backend_options(device: str = AUTO, threads: int | None = None) -> BackendOptions:
    """Where stages run, as a user writes it.

    Args:
        device: `cuda` for all stages, `vision=cuda,llm=cpu` for single ones (others are `auto`), or
            both, such as `cpu,llm=cuda`.
        threads: Threads of one operation.

    Raises:
        UsageError: A stage or a device that there is not, or one that is named twice.
    """
    everywhere: list[str] = []
    stages: dict[str, str] = {}
    for part in device.split(","):
        stage, equals, name = (text.strip() for text in part.rpartition("="))
        _check_name(name, device)
        if not equals:
            everywhere.append(name)
        elif stage not in STAGE_NAMES:
            raise UsageError(
                f"device {device!r}: there is no stage {stage!r}; name vision, rfm or llm, such as "
                "vision=cuda"
            )
        elif stage in stages:
            raise UsageError(f"device {device!r} places {stage} twice; name one device")
        else:
            stages[stage] = name
    if len(everywhere) > 1:
        raise UsageError(
            f"device {device!r} names {' and '.join(everywhere)} for all stages; name one, and "
            f"others by stage, such as {everywhere[0]},llm={everywhere[1]}"
        )
    return BackendOptions(everywhere[0] if everywhere else AUTO, threads, stages=stages)


def _check_name(name: str, given: str) -> None:
    if name not in (AUTO, "onnxruntime", *DEVICES) and not name.startswith(PROVIDER_PREFIX):
        raise UsageError(f"device {given!r}: {name!r} is unknown; use {GRAMMAR}")
