"""What a GPU makes of this runtime, beside PyTorch in the same run and the card's own limits.

    python -m benchmarks.gpu [--device cuda] [--budget SECONDS] [--json FILE] [--only STEP ...]
    python -m benchmarks.gpu --device cpu --small

Writes a random model in the released layout (eight layers as wide as Qwen2-7B's, a region focus
module of 1 + 1 layers, CLIP ViT-L/14-336), exports it for CUDA, and measures, in milliseconds:

    vision      a tile, alone and in batches of 16
    rfm         a level of 2,400 tokens
    prefill     of 512 and 2,400 tokens
    decode      one token after 2,399, also in a captured CUDA graph, and with weights in 8 and in
                4 bits (rounded to nearest)

each as a graph alone with tensors on the device, through the runtime, and in PyTorch (float16,
scaled_dot_product_attention, CUDA graphs where they help), beside a floor: operations over the rate
that a large product reaches here, or bytes over the rate at which memory is read here. Then a
question about an image of 27,328 x 27,328 pixels, beside the reference algorithm in PyTorch; peak
memory, and how long loading takes.

Steps that the budget has no time for are left out and named. Needs PyTorch with CUDA, onnxruntime
with CUDA and the extra `export`, and 25 GB of disk. Until 2026-11-27 it ran on a CPU with small
sizes only, as its test does, and never on a card.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import engine_side, torch_side
from benchmarks.gpu.model import FULL, SMALL, Case, write_bundle, write_language_model, write_model
from benchmarks.measure import ROOT, head, parser_for, peak_mib, row, write_image
from lrs_edge.engines.runtime import ort
from lrs_edge_export.quantization.precision import Precision

STEPS = ("torch", "graphs", "runtime", "ask", "8 bits", "4 bits")
COLUMNS = ("graph", "captured", "runtime", "torch", "torch captured", "floor")
QUESTION = "What kind of place is this?"


@dataclass
class Run:
    """One run: what is measured, where, and what was found so far.

    Attributes:
        case: Sizes.
        device: `cpu` or `cuda`.
        folder: For files.
        ends: When the budget is spent, by `time.monotonic`.
        results: For JSON. `ms` has the table's cells by row and column.
    """

    case: Case
    device: str
    folder: Path
    ends: float
    results: dict[str, Any] = field(default_factory=lambda: {"ms": {}, "left_out": {}})
    checkpoint: Path = Path()
    bundle: Path = Path()

    @property
    def kind(self) -> torch.dtype:
        """Type of PyTorch's weights."""
        return torch.float16 if self.device == "cuda" else torch.float32

    def put(self, what: str, column: str, value: float | None) -> None:
        """Note one cell of the table."""
        if value is not None:
            self.results["ms"].setdefault(what, {})[column] = round(value, 4)
            print(f"{what}, {column}: {value:.3f} ms", file=sys.stderr)

    def step(self, name: str, work: Callable[[Run], None]) -> None:
        """Do one step; one that fails, or that there is no time for, is noted and left out."""
        start = time.monotonic()
        if start > self.ends:
            self.results["left_out"][name] = "no time left"
            return
        try:
            work(self)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            self.results["left_out"][name] = f"{type(error).__name__}: {reason}"
        self.results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        self.results.setdefault("memory_mib", {})[name] = round(self.memory())
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> float:
        """MiB in use on the card by everything, or the peak of this process on a CPU."""
        if self.device != "cuda":
            return peak_mib()
        free, total = torch.cuda.mem_get_info()
        return float(total - free) / 2**20


def measure_torch(run: Run) -> None:
    """PyTorch, and the floors."""
    case, device, repeat = run.case, run.device, run.case.repeat
    torch.set_grad_enabled(False)
    floors = run.results["floors"] = torch_side.floors(device)
    tower = torch_side.Tower(case, device, run.kind)
    # Operations in milliseconds.
    rate = floors["product_TFLOPs"] * 1e9
    for tiles in case.tiles:
        _both(run, f"vision, a tile of {tiles}", partial(tower, tower.pixels(tiles)), tiles)
        run.put(f"vision, a tile of {tiles}", "floor", torch_side.tower_flops(case) / rate)
    del tower
    stack = torch_side.Stack(case, case.sizes.layers, device, run.kind)
    for new in case.prefill:
        wanted = stack.run(new, 0)
        run.put(f"prefill {new}", "torch", torch_side.milliseconds(wanted, device, repeat))
        flops = torch_side.stack_flops(case, case.sizes.layers, new)
        run.put(f"prefill {new}", "floor", flops / rate)
    what = f"decode at {case.decode}"
    _both(run, what, stack.run(1, case.decode), 1)
    # Scales add an eighth of a bit to 8 bits (float16, 128 inputs), half a bit to 4 (32 inputs).
    shares = {what: 1.0, f"{what}, int8-weight": 8.125 / 16, f"{what}, int4-weight": 4.5 / 16}
    for name, share in shares.items():
        run.put(name, "floor", stack.read_bytes * share / floors["read_GBps"] / 1e6)
    del stack
    rfm = torch_side.Stack(case, case.sizes.rfm_layers, device, run.kind)
    found = torch_side.milliseconds(rfm.run(case.level, 0), device, repeat)
    run.put(f"rfm, {case.level} tokens", "torch", found)
    flops = torch_side.stack_flops(case, case.sizes.rfm_layers, case.level)
    run.put(f"rfm, {case.level} tokens", "floor", flops / rate)


def _both(run: Run, what: str, work: Callable[[], object], parts: int) -> None:
    """As PyTorch runs it, and in a CUDA graph, each divided by the parts."""
    device, repeat = run.device, run.case.repeat
    run.put(what, "torch", torch_side.milliseconds(work, device, repeat) / parts)
    replay = torch_side.captured(work, device)
    if replay is not None:
        found = torch_side.milliseconds(replay, device, repeat) / parts
        run.put(what, "torch captured", found)


def measure_graphs(run: Run) -> None:
    """Graphs alone, tensors on the device."""
    case, repeat = run.case, run.case.repeat
    path = engine_side.vision_graph(run.bundle, run.device)
    run.results["vision_graph"] = path.name
    vision = engine_side.BareGraph(path, run.device)
    for tiles in case.tiles:
        found = engine_side.milliseconds(vision.bound({"N": tiles}), repeat)
        run.put(f"vision, a tile of {tiles}", "graph", found / tiles)
    del vision
    rfm = engine_side.BareGraph(run.bundle / "rfm.onnx", run.device)
    sizes = {"L": case.level, "T": case.level, "S": case.capacity, "past": 0}
    found = engine_side.milliseconds(rfm.bound(sizes), repeat)
    run.put(f"rfm, {case.level} tokens", "graph", found)
    del rfm
    llm = engine_side.BareGraph(run.bundle / "llm.onnx", run.device)
    size = (run.bundle / "llm.onnx.data").stat().st_size
    run.results["load"] = {"seconds": llm.load_seconds, "GBps": size / llm.load_seconds / 1e9}
    for new in case.prefill:
        sizes = {"L": new, "S": case.capacity, "past": 0}
        run.put(f"prefill {new}", "graph", engine_side.milliseconds(llm.bound(sizes), repeat))
    _decode(run, f"decode at {case.decode}", llm, run.bundle / "llm.onnx")


def _decode(run: Run, what: str, llm: engine_side.BareGraph, path: Path) -> None:
    """One token, without and with a captured graph."""
    case = run.case
    sizes = {"L": 1, "S": case.capacity, "past": case.decode}
    run.put(what, "graph", engine_side.milliseconds(llm.bound(sizes), case.repeat))
    if run.device != "cuda":
        return
    try:
        captured = engine_side.BareGraph(path, run.device, capture=True)
        run.put(what, "captured", engine_side.milliseconds(captured.bound(sizes), case.repeat))
    except Exception as error:
        run.results["left_out"][f"{what}, captured"] = " ".join(str(error).split())[:300]


def measure_runtime(run: Run) -> None:
    """The same through the runtime."""
    case, repeat = run.case, run.case.repeat
    start = time.monotonic()
    runtime = engine_side.Runtime(run.bundle, run.device)
    run.results["runtime_load_seconds"] = time.monotonic() - start
    work = {f"vision, a tile of {n}": (runtime.encode(n), n) for n in case.tiles}
    work |= {f"prefill {n}": (runtime.prefill(n), 1) for n in case.prefill}
    work[f"rfm, {case.level} tokens"] = runtime.score(case.level), 1
    work[f"decode at {case.decode}"] = runtime.decode(case.decode), 1
    for what, (one, parts) in work.items():
        run.put(what, "runtime", engine_side.milliseconds(one, min(repeat, 8)) / parts)


def measure_ask(run: Run) -> None:
    """A whole question, beside the reference algorithm in PyTorch, each from the file on."""
    import lrs_edge
    from benchmarks.reference_torch import Reference

    image, found = run.folder / "image.tif", run.results.setdefault("ask", {})
    with lrs_edge.load(run.bundle, device=run.device) as engine:
        for name in ("first", "a second time"):
            start = time.monotonic()
            answer = engine.open(image).ask(QUESTION, max_tokens=16)
            found[f"ours, {name}"] = {
                "total": time.monotonic() - start,
                **{part: getattr(answer.timings, part) for part in engine_side.PARTS},
            }
    reference = Reference(run.checkpoint, 16, run.device)
    for name in ("first", "a second time"):
        start = time.monotonic()
        given = reference.ask(image, QUESTION, max_tokens=16)
        found[f"PyTorch, {name}"] = {"total": time.monotonic() - start, **given.seconds}


def measure_bits(precision: Precision) -> Callable[[Run], None]:
    """Decoding with weights in fewer bits."""

    def measure(run: Run) -> None:
        target: Any = "cuda" if run.device == "cuda" else "cpu"
        path = write_language_model(run.checkpoint, run.folder, precision, target)
        llm = engine_side.BareGraph(path, run.device)
        _decode(run, f"decode at {run.case.decode}, {precision}", llm, path)

    return measure


def table(results: dict[str, Any]) -> str:
    """All figures as Markdown."""
    lines = [head(["ms", *COLUMNS])]
    for what, cells in results["ms"].items():
        shown = [f"{cells[c]:.3f}" if c in cells else "" for c in COLUMNS]
        lines.append(row([what, *shown]))
    if asked := results.get("ask"):
        lines += ["", head(["a question, s", "total", *engine_side.PARTS])]
        for name, parts in asked.items():
            shown = [f"{parts.get(part, 0.0):.2f}" for part in ("total", *engine_side.PARTS)]
            lines.append(row([name, *shown]))
    for key in ("card", "floors", "load", "memory_mib", "seconds", "left_out"):
        lines.append(f"\n{key}: {json.dumps(results.get(key))}")
    return "\n".join(lines)


def measure(
    case: Case, device: str, budget: float, only: list[str], folder: Path
) -> dict[str, Any]:
    """Everything; returns what goes into the JSON file."""
    run = Run(case, device, folder, time.monotonic() + budget)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    run.results["card"] = {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
    }
    # Compressing takes long, and one core.
    command = [sys.executable, "-m", "benchmarks.gpu", "--write-image", str(folder / "image.tif")]
    with subprocess.Popen([*command, "--side", str(case.side)], cwd=ROOT) as writing:
        start = time.monotonic()
        run.checkpoint = write_model(case, folder)
        run.bundle = write_bundle(run.checkpoint, folder, "cuda" if device == "cuda" else "cpu")
        writing.wait()
        run.results["written_seconds"] = round(time.monotonic() - start, 1)
    steps: dict[str, Callable[[Run], None]] = {
        "torch": measure_torch,
        "graphs": measure_graphs,
        "runtime": measure_runtime,
        "ask": measure_ask,
        "8 bits": measure_bits("int8-weight"),
        "4 bits": measure_bits("int4-weight"),
    }
    for step, work in steps.items():
        if step in only:
            run.step(step, work)
    return run.results


def main() -> None:
    """Measure and print; the exit code is 1 where a step failed."""
    parser = parser_for(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--budget", type=float, default=330.0, help="seconds; default: 330")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--work", type=Path, help="folder with room; default: that for such files")
    parser.add_argument("--write-image", type=Path, help="only that")
    parser.add_argument("--side", type=int, default=FULL.side)
    options = parser.parse_args()
    if options.write_image is not None:
        write_image(options.write_image, options.side, overviews=True)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here; --device cpu --small tries the script itself")
    case = SMALL if options.small else FULL
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        found = measure(case, options.device, options.budget, options.only, Path(name))
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if found["left_out"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
