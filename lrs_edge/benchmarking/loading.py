"""The load stage: a bundle loaded in fresh processes, against onnxruntime alone with its graphs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from lrs_edge.benchmarking.machine import FileReads
from lrs_edge.benchmarking.measure import Measurement
from lrs_edge.bundle.bundle import Bundle
from lrs_edge.errors import BackendError


def measure_load(
    bundle: Bundle,
    *,
    device: str,
    threads: int | None,
    kv_cache: str,
    verify: bool,
    repetitions: int,
    warmup: bool,
) -> Measurement:
    """Load a bundle in one fresh process per repetition.

    Each process then makes the same sessions once more with onnxruntime alone: the floor. Peak
    memory is that of those processes.

    Args:
        bundle: The bundle.
        device: See `lrs_edge.load`, as the next three.
        threads: Threads of one operation.
        kv_cache: Type of the language model's KV cache.
        verify: Whether hashes are checked.
        repetitions: How often.
        warmup: Whether one process goes before, untimed; its reads leave the files in memory.

    Raises:
        BackendError: A process fails.
    """
    arguments = {
        "bundle": str(bundle.path.resolve()),
        "device": device,
        "threads": threads,
        "kv_cache": kv_cache,
        "verify": verify,
    }
    if warmup:
        _probe(arguments)
    found = [_probe(arguments) for _ in range(repetitions)]
    last = found[-1]
    reads = None
    if last["requested"] is not None:
        reads = FileReads(last["requested"], last["disk"])
    size = sum(entry.size for entry in bundle.manifest.files.values())
    return Measurement(
        stage="load",
        parameters=f"{last['sessions']} graphs, {size / 1e6:.1f} MB",
        seconds=tuple(probe["seconds"] for probe in found),
        unit="load",
        units=1,
        rate_unit="MB/s",
        rated=size / 1e6,
        floor_seconds=tuple(probe["floor"] for probe in found),
        peak=max(probe["peak"] for probe in found),
        reads=reads,
    )


def _probe(arguments: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603 - this interpreter, and arguments that are JSON
        [sys.executable, "-m", "lrs_edge.benchmarking.load_probe", json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise BackendError(
            f"{arguments['bundle']} cannot be loaded in a fresh process ({last}); leave `load` "
            "out of --stages to measure the others"
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result
