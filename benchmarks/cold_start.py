"""Cold start: `lrs_edge.load` against onnxruntime alone loading the same graphs.

Every figure is a fresh process, from its start to its end; both sides alternate, after one round
that fills the system's file cache. Ours also hashes every file, and loads tokenizer, embeddings and
the raster library. `python` is an interpreter that does nothing, `import` one that only imports
onnxruntime, its telemetry off.

    python -m benchmarks.cold_start [--bundle DIR] [--repeat 9]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import parser_for
from lrs_edge.bundle.bundle import default_bundle_path, read_manifest
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.engines.placement import unpacks_weights

BARE = """
import sys
from lrs_edge.engines.runtime import ort
sessions = []
for path, unpack in zip(sys.argv[1::2], sys.argv[2::2]):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if unpack == "unpack":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    sessions.append(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
"""
OURS = "import sys, lrs_edge; engine = lrs_edge.load(sys.argv[1], provider='cpu')"


def seconds(code: str, *arguments: str) -> float:
    """Seconds from the start to the end of a fresh interpreter that runs the code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print medians, ratios and one line of JSON."""
    parser = parser_for(__doc__)
    parser.add_argument("--bundle", type=Path, help="default: the embedded model")
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    bundle = options.bundle or default_bundle_path()
    manifest = read_manifest(bundle)
    vision = "unpack" if unpacks_weights("vision", manifest.vision.precision) else "keep"
    graphs = [str(bundle / manifest.vision.path(Flavour.PLAIN)), vision]
    for spec in (manifest.rfm, manifest.llm):
        graphs += [str(bundle / spec.path(Flavour.GQA)), "keep"]
    sides = {
        "lrs-edge": (OURS, str(bundle)),
        "onnxruntime": (BARE, *graphs),
        "import": ("from lrs_edge.engines.runtime import ort",),
        "python": ("pass",),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.repeat + 1):
        for name, call in sides.items():
            taken = seconds(*call)
            if turn:
                found[name].append(taken)
    medians = {name: statistics.median(times) for name, times in found.items()}
    for name, median in medians.items():
        print(f"{name:12} {median:.3f} s  (least {min(found[name]):.3f})")
    least = min(found["lrs-edge"]) / min(found["onnxruntime"])
    print(
        f"lrs-edge takes {medians['lrs-edge'] / medians['onnxruntime']:.2f} times as long as "
        f"onnxruntime alone (of the least times: {least:.2f})"
    )
    print(json.dumps({"bundle": str(bundle), "seconds": found}))


if __name__ == "__main__":
    main()
