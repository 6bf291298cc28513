"""Weights in blocks, written as MatMulNBits against DequantizeLinear and MatMul: memory and time.

Writes a random language model of SmolLM2-135M's size (30 layers of width 576, 49,152 tokens) in the
ways below, and runs each in fresh processes, in turns, on one thread: memory that loading takes,
that no file is mapped to (its share with other processes is 0) and that one is; processor time of a
prompt and of one more token. Ratios are to DequantizeLinear and MatMul, of medians.

    python -m benchmarks.nbits_memory [--precision int4-weight] [--rounds 5] [--work DIR]
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import onnx

from benchmarks.measure import head, in_fresh_process, parser_for, row
from lrs_edge_export.bundle.stages import LLM, StageWriter
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.families.registry import find_family, read_model
from lrs_edge_export.quantization import Quantized
from lrs_edge_export.quantization.precision import INT4_BLOCK, N_BITS, Plan, Precision
from scripts.make_checkpoint import Sizes, TowerSizes, write_checkpoint

SIZES = Sizes(
    layers=30, hidden=576, heads=9, kv_heads=3, intermediate=1536, rows=49_152, vocabulary=49_000,
    rfm_layers=1, tied=True,
)  # fmt: skip

PRECISIONS: tuple[Precision, ...] = ("int4-weight", "int8-weight")

#: What is compared: name, whether MatMulNBits is written, its accuracy level, and prepacking.
BEFORE = "DequantizeLinear, MatMul"
WAYS = (
    (BEFORE, False, 4, True),
    ("MatMulNBits, level 4", True, 4, True),
    ("MatMulNBits, level 1", True, 1, True),
    ("MatMulNBits, level 4, mapped", True, 4, False),
)

#: Tokens of the prompt, and tokens after it.
PROMPT, DECODED = 256, 16


def rounded(name: str, number: int, shape: tuple[int, int], _make: object) -> Quantized:
    """Any weight in 4 bits, the same at every call: which one takes no part in what is measured."""
    numbers = np.random.default_rng([zlib.crc32(name.encode()), number])
    blocks = shape[0], -(-shape[1] // INT4_BLOCK)
    integers = numbers.integers(-8, 8, shape, np.int8)
    # Their standard deviation is 4.6; activations stay of the order of 1.
    scales = np.full(blocks, shape[1] ** -0.5 / 4.6, np.float32)
    return Quantized(integers, scales, numbers.integers(-2, 2, blocks, np.int8))


def write(model: Model, folder: Path, precision: Precision, *, n_bits: bool) -> Path:
    """The language model's graph."""
    folder.mkdir(parents=True)
    with patch.dict(N_BITS, cpu=n_bits), StageWriter(model, folder) as writer:
        writer.write("llm", Plan(precision, rounded=rounded))
    return folder / LLM


def at_level(path: Path, name: str, level: int) -> Path:
    """The graph at another accuracy level, beside it, over the same weights."""
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    other = path.with_name(f"{name}.onnx")
    other.write_bytes(graph.SerializeToString())
    return other


def memory() -> tuple[int, int]:
    """Bytes of this process that no file is mapped to, and those of mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes["Anonymous"], sizes["Rss"] - sizes["Anonymous"]


def measured(path: Path, *, prepacks: bool) -> dict[str, float]:
    """Run in a process of its own: memory in bytes, processor time in seconds."""
    import time

    from lrs_edge.engines.runtime import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "0" if prepacks else "1")
    start = memory()
    begun = time.process_time()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = {"load": time.process_time() - begun}
    for name, now, then in zip(("anonymous", "mapped"), memory(), start, strict=True):
        found[name] = now - then
    shape = (1, SIZES.kv_heads, PROMPT + DECODED, SIZES.hidden // SIZES.heads)
    buffers = {
        value.name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
        for value in session.get_inputs()
        if value.name.startswith("past_") and value.name != "past_length"
    }
    embeds = np.random.default_rng(0).standard_normal((1, PROMPT, SIZES.hidden), np.float32)

    def run(x: np.ndarray, past: int) -> tuple[np.ndarray, float]:
        binding = session.io_binding()
        binding.bind_cpu_input("inputs_embeds", x)
        places = np.arange(past, past + x.shape[1], dtype=np.int64)[None]
        binding.bind_cpu_input("position_ids", places)
        binding.bind_cpu_input("past_length", np.array([past], np.int64))
        for name, value in buffers.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"present_{name.removeprefix('past_')}", value)
        binding.bind_output("logits", "cpu")
        begun = time.process_time()
        session.run_with_iobinding(binding)
        spent = time.process_time() - begun
        # The buffers come first, in the order in which they were bound.
        return binding.get_outputs()[-1].numpy(), spent

    run(embeds, 0)
    logits, found["prompt"] = run(embeds, 0)
    token = np.ascontiguousarray(embeds[:, -1:])
    found["token"] = median(run(token, PROMPT + i)[1] for i in range(DECODED))
    np.save(path.with_suffix(".npy"), logits)
    return found


def error(path: Path, exact: Path) -> float:
    """Largest difference of the prompt's logits over the largest of them."""
    found, wanted = (np.load(p.with_suffix(".npy")) for p in (path, exact))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def show(name: str, figures: Mapping[str, float], before: Mapping[str, float], off: float) -> None:
    """One row of the table."""
    cells = [name]
    for key, unit in (("anonymous", 1e6), ("mapped", 1e6), ("prompt", 1e-3), ("token", 1e-3)):
        cells.append(f"{figures[key] / unit:.1f} ({figures[key] / before[key]:.2f})")
    print(row((*cells, f"{figures['load']:.2f}", f"{off:.1e}")), flush=True)


def main() -> None:
    """Write, run in turns, print tables."""
    parser = parser_for(__doc__)
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--work", type=Path, help="folder for temporary files (some 2 GB)")
    parser.add_argument("--run", nargs=2, help="one measurement, as JSON (GRAPH, prepacking 0/1)")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measured(Path(options.run[0]), prepacks=options.run[1] == "1")))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        write_checkpoint(Path(name) / "random", SIZES, TowerSizes(layers=1))
        model = read_model(find_checkpoint(str(Path(name) / "random"), find_family), None)
        for precision in options.precision:
            folder = Path(name) / precision
            written = [
                write(model, folder / str(n_bits), precision, n_bits=n_bits)
                for n_bits in (False, True)
            ]
            paths = [
                at_level(written[way[1]], f"way{number}", way[2]) for number, way in enumerate(WAYS)
            ]
            runs: list[list[dict[str, float]]] = [[] for _ in WAYS]
            for _ in range(options.rounds):
                for found, path, way in zip(runs, paths, WAYS, strict=True):
                    arguments = ("--run", str(path), str(int(way[3])))
                    found.append(in_fresh_process("nbits_memory", *arguments))
            medians = [{key: median(run[key] for run in of) for key in of[0]} for of in runs]
            sizes = [path.with_name(f"{LLM}.data").stat().st_size for path in written]
            before, now = (f"{size / 1e6:.1f}" for size in sizes)
            print(f"\n{precision}: {before} MB on disk, laid out for MatMulNBits {now} MB")
            titles = ("anonymous, MB", "mapped, MB", f"{PROMPT} tokens, ms", "a token, ms")
            print(head(("way", *titles, "load, s", "difference")))
            for way, path, figures in zip(WAYS, paths, medians, strict=True):
                show(way[0], figures, medians[0], error(path, paths[0]))


if __name__ == "__main__":
    main()
