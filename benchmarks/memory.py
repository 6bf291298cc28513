"""Memory of a bundle's process, beside what is reckoned of it (`lrs-edge info --memory`).

Exports a random checkpoint (6 layers of width 1024 and a CLIP tower of ViT-L/14-336's size) at each
precision without parity, and runs each stage alone in a fresh process: the memory that its session
takes, and what one run over `--context` tokens takes besides. The embedded bundle's whole process,
asking about a real scene, comes last.

    python -m benchmarks.memory [--precision fp32 int8-dynamic] [--context 1024] [--work DIR]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import head, parser_for
from lrs_edge.bundle.bundle import default_bundle_path, open_bundle
from lrs_edge.bundle.memory import Stage, of_bundle
from scripts.make_checkpoint import Sizes, TowerSizes, write_checkpoint

SIZES = Sizes(
    layers=6, hidden=1024, heads=16, kv_heads=4, intermediate=2816, rows=8000, vocabulary=7900,
    rfm_layers=2,
)  # fmt: skip
PRECISIONS = ("fp32", "int8-dynamic", "int8-weight", "int4-weight")

#: What a process is told to do with one stage: load it, then run it once.
STAGE = """
import json, sys
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.engines.placement import unpacks_weights
from lrs_edge.language.decoder import Decoder
from lrs_edge.language.kv_cache import TokenKind, make_tokens
import numpy as np

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))

path, stage, context = sys.argv[1], sys.argv[2], int(sys.argv[3])
bundle = open_bundle(path, verify=False)
spec = getattr(bundle.manifest, stage)
# What an onnxruntime session takes of its own is counted with the process.
start = anonymous()
options = BackendOptions(provider="cpu", unpack_weights=unpacks_weights(stage, spec.precision))
graph = OnnxGraph.load(bundle.path / spec.graphs[0].path, options)
loaded = anonymous()
if stage == "vision":
    pixels = np.zeros((1, 3, spec.tile, spec.tile), np.float32)
    for _ in range(2):
        graph.run({"pixel_values": pixels}, ["tokens"])
    kv = 0
else:
    decoder = Decoder(graph, spec, scoring=stage == "rfm")
    cache = decoder.new_cache()
    tokens = make_tokens(np.arange(context), TokenKind.TILE)
    embeds = np.random.default_rng(0).standard_normal((context, spec.hidden)).astype(np.float32)
    before = anonymous()
    decoder.forward(cache, embeds, tokens)
    kv = cache.buffers.nbytes
print(json.dumps([loaded - start, anonymous() - loaded - kv]))
"""

#: A question about a scene, in a process of its own.
ASK = """
import sys
import lrs_edge
from lrs_edge.requests.memory import peak_memory
with lrs_edge.load(sys.argv[1]) as engine:
    answer = engine.open(sys.argv[2]).ask("Is there a ship?")
print(peak_memory(), answer.tokens.sent + answer.tokens.text + answer.tokens.generated)
"""


def in_process(code: str, *arguments: str) -> str:
    """Output of a fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def export(checkpoint: Path, bundle: Path, precision: str) -> None:
    """Export as the command does, without parity, nothing kept higher."""
    command = [sys.executable, "-m", "lrs_edge", "export", str(checkpoint), "-o", str(bundle)]
    command += ["--precision", precision, "--no-parity", "--keep-higher", "0", "-q"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def show(precision: str, stage: Stage, weights: int, workspace: int) -> None:
    """One row of the table."""
    cells = (stage.file, stage.weights, weights, stage.workspace, workspace)
    numbers = " | ".join(f"{size / 1e6:.1f}" for size in cells)
    print(f"| {precision} | {stage.name} | {numbers} |", flush=True)


def main() -> None:
    """Export, run, print tables."""
    parser = parser_for(__doc__)
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, metavar="NAME")
    parser.add_argument("--context", type=int, default=1024, metavar="N")
    parser.add_argument("--work", type=Path, help="folder for temporary files (some 5 GB)")
    parser.add_argument("--bundles", nargs="*", default=[], type=Path, help="measure these instead")
    options = parser.parse_args()
    titles = ("precision", "stage", "on disk", "weights: reckoned", "measured")
    print(head((*titles, "workspace: reckoned", "measured, MB")))
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        bundles = list(options.bundles)
        if not bundles:
            write_checkpoint(Path(name) / "random", SIZES, TowerSizes())
        for precision in () if options.bundles else options.precision:
            bundles.append(Path(name) / precision)
            export(Path(name) / "random", bundles[-1], precision)
        for bundle in bundles:
            for stage in of_bundle(open_bundle(bundle, verify=False), options.context).stages:
                said = in_process(STAGE, str(bundle), stage.name, str(options.context))
                show(bundle.name, stage, *json.loads(said))
    scene = Path(__file__).resolve().parent.parent / "examples" / "islands.tif"
    memory, tokens = map(int, in_process(ASK, str(default_bundle_path()), str(scene)).split())
    need = of_bundle(open_bundle(None), tokens)
    print(f"\nembedded bundle, {tokens} tokens: reckoned {need.total / 1e6:.0f} MB, ", end="")
    print(f"measured {memory / 1e6:.0f} MB, ratio {memory / need.total:.2f}")


if __name__ == "__main__":
    main()
