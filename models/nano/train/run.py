"""From labelled pictures to the calibrated bundle, as one command that may be killed anywhere.

    export NANO_DATA=DATA NANO_WORK=WORK
    python models/nano/train/run.py -o BUNDLE [--slice 115] [--share 0.1]

Finished steps stand in `<work>/run.json`; within a step, each goes on from its own state, which is
at most four minutes old. `--slice MINUTES` stops in time for a machine that is lent for so long:
the same command goes on from WORK, on that machine or, with WORK copied, on another.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import Paths, write_atomically

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LICENCE = "Apache-2.0 parts, trained on images published for research: see MODEL_CARD.md"
DOMAIN = tuple(f"{name}/images" for name in (
    "vhr10_rgb", "airport_338", "simd552_640", "open_objects", "dubai_cc0", "aid150_rsicd"
))  # fmt: skip
"""Folders of images whose colours are those of training."""
FULL_MINUTES = {"vision": 17.0, "objects": 13.0, "first": 38.0, "again": 24.0}
PRECISIONS = (
    ("--llm", "int8-dynamic", "--keep-higher", "5"),
    ("--llm", "int8-dynamic", "--keep-higher", "20"),
    ("--llm", "int8-weight", "--keep-higher", "20"),
)
"""How the bundle is quantized: the first that passes the export's parity check.

With all of the encoder in int8 its error lies at the bound. Weights that were trained little, as
with a small `--share`, quantize worse.
"""
RATES = {"first": "5e-4", "again": "4.5e-4"}
"""Peak learning rates of the two rounds that the language model is trained in."""


class SliceEndedError(Exception):
    """The time of this slice is spent; the same command goes on."""


class Runner:
    """Runs steps that are not finished, until the slice ends."""

    def __init__(self, paths: Paths, minutes: float | None) -> None:
        self.paths, self.state = paths, paths.work / "run.json"
        self.until = None if minutes is None else time.monotonic() + 60 * minutes
        paths.work.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, float] = (
            json.loads(self.state.read_text(encoding="utf-8")) if self.state.exists() else {}
        )

    def step(self, name: str, *commands: list[str]) -> None:
        """Run the commands of one step, unless an earlier run has finished it.

        Raises:
            SliceEndedError: There was no time left.
            subprocess.CalledProcessError: A command failed.
        """
        if name in self.done:
            return
        begun = time.monotonic()
        for command in commands:
            print(f"== {name}: {' '.join(command)}", flush=True)
            self._run(command)
        self.done[name] = round(time.monotonic() - begun, 1)
        write_atomically(self.state, json.dumps(self.done, indent=1) + "\n")

    def first_that_passes(self, name: str, *commands: list[str]) -> list[str]:
        """Run one command after another until one of them succeeds, and give that.

        What was tried and failed is not tried again after a kill.

        Raises:
            SliceEndedError: There was no time left.
            subprocess.CalledProcessError: All of them failed.
        """
        state = self.state.with_name(f"{name}_failed.json")
        failed = json.loads(state.read_text(encoding="utf-8")) if state.exists() else 0
        for number, command in enumerate(commands[failed:], start=failed):
            try:
                self.step(name, command)
            except subprocess.CalledProcessError as error:
                # A process that was killed, for want of memory say, has refused nothing.
                if command is commands[-1] or error.returncode < 0:
                    raise
                write_atomically(state, json.dumps(number + 1) + "\n")
            else:
                return command
        raise AssertionError("the last command either returns or raises")

    def _run(self, command: list[str]) -> None:
        left = None if self.until is None else max(self.until - time.monotonic(), 0.1)
        environment = {
            **os.environ,
            "NANO_EVERY": str(self.paths.every),
        }
        if not command[1].endswith("detect.py"):
            # Large blocks are kept and used again: about half the time of every training step.
            # What is kept between such blocks, as detections are, would fill the memory.
            environment["MALLOC_MMAP_THRESHOLD_"] = "8589934592"
            environment["MALLOC_TRIM_THRESHOLD_"] = "17179869184"
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = process.wait(left)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(stopped, KeyboardInterrupt):
                raise
            raise SliceEndedError from stopped
        if code:
            raise subprocess.CalledProcessError(code, command)


def script(name: str, *arguments: str) -> list[str]:
    """The command of one script of this folder."""
    return [sys.executable, str(HERE / name), *arguments]


def tool(*arguments: str) -> list[str]:
    """A command of lrs-edge."""
    return [sys.executable, "-m", "lrs_edge", *arguments]


def steps(runner: Runner, options: argparse.Namespace) -> None:
    """All of them, in order."""
    paths, share = runner.paths, options.share
    minutes = {k: str(max(v * share, 1.0)) for k, v in FULL_MINUTES.items()}
    start = paths.work / "start"
    # The encoder, projector and language model go on from the bundle that is named.
    rebuild = [sys.executable, "-m", "benchmarks.embedded_checkpoint", str(start)]
    runner.step("start", [*rebuild, *(["--bundle", str(options.start)] if options.start else [])],
                script("base.py", "copy", str(start)))  # fmt: skip
    runner.step("low", script("low.py"))
    runner.step(
        "vision", script("vision.py", "--minutes", minutes["vision"], "--start", str(start))
    )
    runner.step("tokens", script("tokens.py"))
    runner.step("objects", script("objects.py", "--minutes", minutes["objects"]))
    runner.step("detections", script("detect.py"))
    for name, before in (("first", start), ("again", paths.work / "first")):
        runner.step(
            name,
            script("train.py", "--minutes", minutes[name], "--rate", RATES[name],
                   "--start", str(before), "--name", name),
        )  # fmt: skip
    rounds = [str(paths.work / name) for name in ("first", "again", "mean")]
    runner.step("mean", script("average.py", *rounds))
    checkpoint = paths.work / "mean"
    exported = paths.work / "exported"
    card = ROOT / "models" / "nano" / "MODEL_CARD.md"
    if checkpoint.exists():
        shutil.copy(card, checkpoint)
    export = runner.first_that_passes("export", *(
        tool("export", str(checkpoint), "-o", str(exported), "--name", "lrs-edge-nano",
             "--vision", "int8-weight", *precision, "--rfm", "from-llm:2",
             "--attention-layers", "2", "--licence", LICENCE, "--force")
        for precision in PRECISIONS
    ))  # fmt: skip
    # The detector's thresholds are fitted to what the engines find.
    fit = [sys.executable, str(HERE.parent / "real_scenes" / "thresholds.py"), str(paths.data)]
    runner.step("thresholds", [*fit, "--model", str(exported), "--checkpoint", str(checkpoint)])
    runner.step("export again", export)
    held = paths.work / "held_out"
    runner.step(
        "held out",
        [sys.executable, str(HERE.parent / "real_scenes" / "held_out.py"), str(paths.data),
         "-o", str(held)],
        script("scene_questions.py", "--data", str(paths.data), "--split", "dev", "--every", "8",
               "-o", str(held / "scenes.jsonl")),
    )  # fmt: skip
    results = held / "results"
    results.mkdir(parents=True, exist_ok=True)
    for name, images in (("held_out", paths.data), ("scenes", paths.data / "aid150_rsicd")):
        runner.step(
            f"asked {name}",
            tool("eval", str(held / f"{name}.jsonl"), "--images", str(images), "--model",
                 str(exported), "-o", str(results / f"{name}.jsonl"), "--no-synonyms"),
        )  # fmt: skip
    domain = [part for name in DOMAIN for part in ("--domain-images", str(paths.data / name))]
    runner.step(
        "calibrate",
        tool("calibrate", *(str(results / f"{name}.jsonl") for name in ("held_out", "scenes")),
             "-m", str(exported), "-o", str(options.output), "--no-synonyms",
             "--ground-resolution", "0.1,10", *domain),
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the bundle")
    parser.add_argument("--start", type=Path, help="bundle to go on from (default: the embedded)")
    parser.add_argument("--slice", type=float, help="minutes after which to stop")
    parser.add_argument("--share", type=float, default=1.0, help="of data and time, to try it out")
    options = parser.parse_args()
    try:
        steps(Runner(Paths(every=round(1 / options.share)), options.slice), options)
    except SliceEndedError:
        print("this slice's time is spent: the same command goes on", file=sys.stderr)
        sys.exit(75)
    print(options.output)


if __name__ == "__main__":
    main()
