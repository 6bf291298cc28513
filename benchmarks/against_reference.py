"""lrs-edge against the reference algorithm in PyTorch: same weights, same image, same questions.

The other side is `benchmarks/reference_torch`, a plain PyTorch implementation of what the authors'
released code does. Both start with a loaded model and an image file that is not open. Sides:

    PyTorch                    float32, as the authors' code goes about it: all tiles of a level are
                               encoded in one batch, nothing is kept between questions
    PyTorch, image kept        the decoded image stays in memory after the first question
    PyTorch, levels kept       all its levels do, resampled and cut
    PyTorch, one by one        tiles are encoded one by one: not what the authors do, but on a CPU
                               PyTorch's convolutions are several times as fast so
    PyTorch, one by one,       both: the most that PyTorch gives without another algorithm
      levels kept
    ours, reference            float32, policy `reference`: must give the same token ids, or the
                               exit code is 1
    ours, full (precision)     the default policy: also looks at the levels that the reference
                               does not reach, so it does more and may answer otherwise

Asked are: a first question; the same one again; another one on the same image. The sides take turns
in processes of their own with as many threads each; medians of `--repeat` rounds after one that is
not counted. Peak memory is `VmHWM` of each process after its first question, model and all.

    python -m benchmarks.against_reference [--checkpoint DIR] [--image FILE] [--question Q]
        [--another Q] [--precision NAME ...] [--repeat N] [--max-tokens N] [--threads N]

By default the weights are those of the embedded model (`benchmarks/embedded_checkpoint.py`) and the
image is a mirrored mosaic of examples/islands.tif, 4,100 x 2,300 pixels, as PNG.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import ROOT, default_threads, head, parser_for, row, times

FIRST, SAME, OTHER = "first", "same again", "another"
ASKED = (FIRST, SAME, OTHER)
STAGES = ("read", "encode", "score", "prefill", "decode")
BASELINE, FAIREST = "PyTorch", "PyTorch, one by one, levels kept"
EQUAL = "ours, reference"
#: The PyTorch sides, and the arguments of `benchmarks.reference_worker` that make them.
TORCH: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "PyTorch, image kept": ("--keep", "decoded"),
    "PyTorch, levels kept": ("--keep", "levels"),
    "PyTorch, one by one": ("--batch", "1"),
    FAIREST: ("--keep", "levels", "--batch", "1"),
}


@dataclass
class Side:
    """One side: its process and what it measured.

    Attributes:
        name: In the tables.
        process: Answers questions (`benchmarks.reference_worker`).
        answers: By what was asked, one per round.
        peak_mib: After the first question.
    """

    name: str
    process: subprocess.Popen[str]
    answers: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {asked: [] for asked in ASKED}
    )
    peak_mib: float = 0.0

    def receive(self) -> dict[str, Any]:
        """The next line of the process. Raises SystemExit where it ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended with {self.process.wait()}")
        figures: dict[str, Any] = json.loads(line)
        return figures

    def ask(self, image: Path | None, question: str, max_tokens: int) -> dict[str, Any]:
        """Ask one question, about a newly opened image or the last one."""
        assert self.process.stdin is not None
        wanted = {"image": None if image is None else str(image), "question": question}
        print(json.dumps({**wanted, "max_tokens": max_tokens}), file=self.process.stdin, flush=True)
        return self.receive()

    def round(self, image: Path, questions: tuple[str, str], max_tokens: int) -> None:
        """Ask all questions once."""
        for asked in ASKED:
            opened = image if asked == FIRST else None
            question = questions[1] if asked == OTHER else questions[0]
            answer = self.ask(opened, question, max_tokens)
            self.answers[asked].append(answer)
            self.peak_mib = self.peak_mib or answer["peak_mib"]

    def seconds(self, asked: str, stage: str = "total") -> float:
        """Median over the rounds."""
        taken: list[float] = [answer["seconds"][stage] for answer in self.answers[asked]]
        return statistics.median(taken)

    def last(self, asked: str) -> dict[str, Any]:
        """The answer of the last round."""
        return self.answers[asked][-1]


def start(name: str, threads: int, *arguments: str) -> Side:
    """Start one side's process and wait until its model is loaded."""
    command = [sys.executable, "-m", "benchmarks.reference_worker", *arguments]
    process = subprocess.Popen(
        [*command, "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    side = Side(name, process)
    side.receive()
    return side


def mosaic(path: Path, width: int = 4100, height: int = 2300) -> None:
    """A photograph, mirrored until it has the size."""
    with Image.open(ROOT / "examples" / "islands.tif") as image:
        pixels = np.asarray(image.convert("RGB"))
    more = [(0, max(height - len(pixels), 0)), (0, max(width - pixels.shape[1], 0)), (0, 0)]
    Image.fromarray(np.pad(pixels, more, mode="reflect")[:height, :width]).save(path)


def start_sides(
    checkpoint: Path, precisions: Sequence[str], folder: Path, threads: int
) -> list[Side]:
    """Export the bundles and start all sides; float32 is always among them."""
    from lrs_edge_export import ExportOptions, Precisions, export_bundle

    bundles = {name: folder / name for name in dict.fromkeys(["fp32", *precisions])}
    for name, target in bundles.items():
        print(f"exporting at {name}", file=sys.stderr)
        options = ExportOptions(precisions=Precisions.all(name), parity=False)  # type: ignore[arg-type]
        export_bundle(str(checkpoint), target, options)
    sides = [
        start(name, threads, "torch", str(checkpoint), *arguments)
        for name, arguments in TORCH.items()
    ]
    sides.append(start(EQUAL, threads, "reference", str(bundles["fp32"])))
    for name in precisions:
        sides.append(start(f"ours, full ({name})", threads, "full", str(bundles[name])))
    return sides


def check(sides: dict[str, Side]) -> bool:
    """Whether the runtime under policy `reference` gave the reference's tokens every time."""
    equal = all(
        mine["ids"] == wanted["ids"]
        for asked in ASKED
        for mine, wanted in zip(
            sides[EQUAL].answers[asked], sides[BASELINE].answers[asked], strict=True
        )
    )
    count = sum(len(sides[BASELINE].last(asked)["ids"]) for asked in (FIRST, OTHER))
    verdict = "identical" if equal else "DIFFERENT"
    print(f"\ntokens of `{EQUAL}` and of {BASELINE} at float32: {verdict} ({count} compared)")
    return equal


def print_tables(sides: dict[str, Side]) -> None:
    """Seconds with ratios, then seconds by stage."""
    base = sides[BASELINE]
    columns = [text for asked in ASKED for text in (f"{asked}, s", "ratio")]
    print(head(["side", *columns, "tiles", "vision tokens", "generated", "peak MiB", "ratio"]))
    for side in sides.values():
        cells: list[object] = [side.name]
        for asked in ASKED:
            seconds = side.seconds(asked)
            cells += [f"{seconds:.2f}", times(base.seconds(asked), seconds)]
        answer = side.last(FIRST)
        cells += [answer["tiles"], answer["sent"], len(answer["ids"])]
        cells += [f"{side.peak_mib:.0f}", times(base.peak_mib, side.peak_mib)]
        print(row(cells))
    fairest, mine = sides[FAIREST], sides[EQUAL]
    ratios = (f"{asked} {times(fairest.seconds(asked), mine.seconds(asked))}" for asked in ASKED)
    print(f"\n`{EQUAL}` against `{FAIREST}`: {', '.join(ratios)}")
    print("\nSeconds by stage:\n")
    print(head(["side", "question", *STAGES, "total"]))
    for side in sides.values():
        for asked in ASKED:
            parts = [f"{side.seconds(asked, stage):.2f}" for stage in (*STAGES, "total")]
            print(row([side.name, asked, *parts]))


def main() -> None:
    """Export, ask, print; exit code 1 where tokens differ."""
    parser = parser_for(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: the embedded model's weights")
    parser.add_argument("--image", type=Path, help="default: a mosaic of 4,100 x 2,300 pixels")
    parser.add_argument("--question", default="What kind of place is this?")
    parser.add_argument("--another", default="Is there a road?")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8"], metavar="NAME")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=default_threads(), help="of each side")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = options.image
        if image is None:
            image = folder / "mosaic.png"
            mosaic(image)
        checkpoint = options.checkpoint
        if checkpoint is None:
            from benchmarks.embedded_checkpoint import write_checkpoint

            checkpoint = write_checkpoint(None, folder / "checkpoint")
        listed = start_sides(checkpoint.resolve(), options.precision, folder, options.threads)
        sides = {side.name: side for side in listed}
        try:
            for number in range(options.repeat + 1):
                print(f"round {number} of {options.repeat}", file=sys.stderr)
                for side in listed:
                    side.round(
                        image.resolve(), (options.question, options.another), options.max_tokens
                    )
                    if number == 0:
                        side.answers = {asked: [] for asked in ASKED}
        finally:
            for side in listed:
                side.process.kill()
                side.process.communicate()
    print(f"{options.threads} threads a side, medians of {options.repeat} rounds\n")
    print_tables(sides)
    equal = check(sides)
    figures = {side.name: {"peak_mib": side.peak_mib, "answers": side.answers} for side in listed}
    print(json.dumps({"image": str(options.image or "mosaic"), "sides": figures}))
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
