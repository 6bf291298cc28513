"""One engine in a process of its own, told by lines of JSON on standard input what to run.

`python -m benchmarks.other_engines.worker ENGINE PATH THREADS PLACES` from the root of the
repository, under the interpreter that has the engine; the other engines need nothing else of this
project. It answers one line of JSON per line; whatever an engine prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

MODULES = {"ours": "ours", "llama.cpp": "llama_cpp_engine", "genai": "genai_engine"}


class Engine(Protocol):
    """What is measured. All engines decode greedily and never stop early."""

    def start(self) -> None:
        """Forget all tokens; what an engine sets up per conversation is set up here."""
        ...

    def prefill(self, ids: list[int]) -> None:
        """Run a prompt through the model, up to the logits of its last token."""
        ...

    def decode(self, steps: int) -> list[int]:
        """Choose a token, run it, and so on for `steps` runs; the steps + 1 tokens chosen."""
        ...


def main() -> None:
    """Load the engine, then serve requests until standard input ends."""
    name, path, threads, places = sys.argv[1:5]
    # Native libraries print where they like; only answers may reach the parent's pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = time.perf_counter()
    module = importlib.import_module(f"benchmarks.other_engines.{MODULES[name]}")
    engine: Engine = module.load(Path(path), int(threads), int(places))
    loaded = {"load_s": time.perf_counter() - start, "version": module.version()}
    _send(answers, loaded)
    for line in sys.stdin:
        request = json.loads(line)
        _send(answers, measure(engine, request["prompt"], request["steps"]))


def measure(engine: Engine, prompt: list[int], steps: int) -> dict[str, Any]:
    """Run one prompt; seconds of prefill and of all decoding steps, tokens, peak memory."""
    engine.start()
    begin = time.perf_counter()
    engine.prefill(prompt)
    middle = time.perf_counter()
    ids = engine.decode(steps)
    end = time.perf_counter()
    return {
        "prefill_s": middle - begin,
        "decode_s": end - middle,
        "ids": [int(token) for token in ids],
        "peak_mib": _peak_mib(),
    }


def _peak_mib() -> float:
    """Peak resident memory of this process so far; 0 where the system has no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _send(stream: Any, value: dict[str, Any]) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
