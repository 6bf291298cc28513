"""Peak memory of `lrs-edge export`, against loading the same checkpoint whole.

Writes a random checkpoint in the released layout (sizes of Qwen2-1.5B by default), loads it whole
in PyTorch at float32 in a fresh process, and exports it in a fresh process for every precision,
parity check included. Peak memory is `VmHWM` of the process, read from outside until it ends;
`anonymous` is the most of it that is not a mapped file. The bound is the largest layer (the float32
bytes of one decoder layer, or of the largest single tensor) plus 2 GB. All files are deleted.

    python -m benchmarks.export_memory [--precision fp32 int8-dynamic] [--work DIR]
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import head, parser_for
from scripts.make_checkpoint import (
    Tensor,
    add_size_options,
    chosen_sizes,
    language_tensors,
    tower_tensors,
    write_checkpoint,
)

#: What an export may take besides its largest layer.
ALLOWANCE = 2_000_000_000

_POLL_SECONDS = 0.02

#: What most tools do first: every tensor in memory, at float32.
LOAD_WHOLE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
state = {}
for path in sorted(Path(sys.argv[1]).rglob("*.safetensors")):
    for name, tensor in load_file(path).items():
        state[name] = tensor.float()
print(sum(tensor.numel() * 4 for tensor in state.values()))
"""


@dataclass(frozen=True)
class Run:
    """One process: what it did, its peak memory in bytes, and its seconds."""

    what: str
    peak: int
    anonymous: int
    seconds: float
    code: int
    said: str


def watch(what: str, command: list[str]) -> Run:
    """Run a command, and read its memory from outside until it ends."""
    start, peak, anonymous = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            now = _memory(process.pid)
            peak, anonymous = max(peak, now[0]), max(anonymous, now[1])
            time.sleep(_POLL_SECONDS)
        output.seek(0)
        said = output.read()
    seconds = time.perf_counter() - start
    return Run(what, peak, anonymous, seconds, process.returncode, said.strip())


def _memory(pid: int) -> tuple[int, int]:
    """Largest resident memory so far, and anonymous memory now; zeros when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines)
    # A process that has ended but was not waited for has no memory fields.
    return tuple(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmHWM", "RssAnon"))


def largest_layer(tensors: Iterable[Tensor]) -> int:
    """Float32 bytes of the largest decoder layer, or of the largest tensor if that is more."""
    layers: dict[str, int] = {}
    largest = 0
    for tensor in tensors:
        largest = max(largest, 4 * tensor.count)
        before, found, rest = tensor.name.partition("layers.")
        if found:
            layer = f"{before}{rest.partition('.')[0]}"
            layers[layer] = layers.get(layer, 0) + 4 * tensor.count
    return max([largest, *layers.values()])


def folder_bytes(folder: Path, pattern: str = "*") -> list[int]:
    """Sizes of files below a folder, smallest first."""
    return sorted(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def show(run: Run, bound: int, size: int | None) -> None:
    """One row of the table."""
    written = "" if size is None else f"{size / 1e9:.2f}"
    state = "" if run.code == 0 else f" (exit code {run.code}: {run.said.splitlines()[-1][:160]})"
    print(
        f"| {run.what}{state} | {run.peak / 1e9:.2f} | {run.anonymous / 1e9:.2f} | "
        f"{run.peak / bound:.2f} | {written} | {run.seconds:.0f} |",
        flush=True,
    )


def main() -> None:
    """Generate, load, export; print a table and one line of JSON."""
    parser = parser_for(__doc__)
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8-dynamic"], metavar="NAME")
    parser.add_argument("--work", type=Path, help="folder for temporary files (some 20 GB)")
    parser.add_argument("--more", default="", help="further options of `lrs-edge export`, quoted")
    add_size_options(parser)
    options = parser.parse_args()
    sizes, tower = chosen_sizes(options)
    layer = largest_layer([*language_tensors(sizes, tower.hidden), *tower_tensors(tower)])
    bound = layer + ALLOWANCE
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        source, target = Path(name) / "random", Path(name) / "bundle"
        write_checkpoint(source, sizes, tower)
        stored = sum(folder_bytes(source))
        print(
            f"checkpoint {stored / 1e9:.2f} GB, largest layer {layer / 1e9:.2f} GB at float32, "
            f"bound {bound / 1e9:.2f} GB\n"
        )
        titles = "what", "peak GB", "anonymous GB", "peak / bound", "written GB", "s"
        print(head(titles), flush=True)
        loaded = watch("PyTorch, whole", [sys.executable, "-c", LOAD_WHOLE, str(source)])
        show(loaded, bound, None)
        rows.append(loaded)
        for precision in options.precision:
            command = [sys.executable, "-m", "lrs_edge.commands.main", "export", str(source)]
            command += ["-o", str(target), "--force", "--precision", precision]
            run = watch(precision, [*command, *shlex.split(options.more)])
            rows.append(run)
            show(run, bound, sum(folder_bytes(target)) if run.code == 0 else None)
            graphs = folder_bytes(target, "*.onnx") or [0]
            if run.code == 0:
                print(f"  largest graph file without weights: {graphs[-1] / 1e6:.2f} MB")
    exports = [run for run in rows[1:] if run.code == 0]
    for run in exports:
        print(f"{run.what}: loading whole takes {loaded.peak / run.peak:.2f} times its memory")
    print(
        json.dumps(
            {
                "checkpoint_bytes": stored,
                "largest_layer_bytes": layer,
                "bound_bytes": bound,
                "parameters": sum(
                    math.prod(tensor.shape)
                    for tensor in [*language_tensors(sizes, tower.hidden), *tower_tensors(tower)]
                ),
                "runs": [asdict(run) for run in rows],
            }
        )
    )
    if any(run.code or run.peak > bound for run in rows[1:]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
