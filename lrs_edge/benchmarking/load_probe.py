"""Loads one bundle in this process and says how long that took; run as a program of its own.

    python -m lrs_edge.benchmarking.load_probe '{"bundle": ..., "device": ..., ...}'

Prints one JSON object: `seconds` of `lrs_edge.load`, `floor` seconds that onnxruntime alone takes
for the same sessions afterwards, `sessions`, `peak` bytes of resident memory, and the bytes of
files that loading read (`requested`, `disk`; null where the system does not tell). Imports of
onnxruntime and numpy are in neither time, those of lrs-edge are in the first.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from lrs_edge.benchmarking.machine import FileReads, file_reads
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import LrsEdgeError


class _Recorder:
    """Remembers what sessions were made of, by standing for `onnxruntime.InferenceSession`."""

    def __init__(self) -> None:
        self.made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.original = ort.InferenceSession
        made = self.made

        class Recorded(ort.InferenceSession):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                made.append((args, kwargs))

        # This process does nothing else, and no other way shows the options that sessions get.
        ort.InferenceSession = Recorded

    def make_again(self) -> float:
        """Make the same sessions with onnxruntime alone, one after another; seconds."""
        start = time.perf_counter()
        kept = [self.original(*args, **kwargs) for args, kwargs in self.made]
        seconds = time.perf_counter() - start
        del kept
        return seconds


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Load the bundle; see the module's text.

    Args:
        arguments: Of `lrs_edge.load`.
    """
    recorder = _Recorder()
    before = file_reads()
    start = time.perf_counter()
    from lrs_edge.engine import load
    from lrs_edge.requests.memory import peak_memory

    engine = load(**arguments)
    seconds = time.perf_counter() - start
    after = file_reads()
    peak = peak_memory()
    engine.close()
    reads = None if before is None or after is None else after - before
    reads = reads or FileReads(-1, -1)
    return {
        "seconds": seconds,
        "floor": recorder.make_again(),
        "sessions": len(recorder.made),
        "peak": peak,
        "requested": None if reads.requested < 0 else reads.requested,
        "disk": None if reads.disk < 0 else reads.disk,
    }


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
    except LrsEdgeError as refused:
        sys.exit(str(refused))
