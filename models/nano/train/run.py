"""The steps of the recipe one after the other, from labelled pictures to a checkpoint.

    python models/nano/train/run.py [--minutes 90] [--start CHECKPOINT]

Every step finds what an earlier, interrupted run of it left in NANO_WORK and continues from it. The
released weights were made by running the steps one by one; the whole has not been run in one go.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from common import Paths

HERE = Path(__file__).resolve().parent


def run(*command: str) -> None:
    """Run one command; stop when it fails."""
    print(f"== {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)


def step(script: str, *arguments: str) -> None:
    """Run one script of this folder."""
    run(sys.executable, str(HERE / script), *arguments)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vision-minutes", default="20", help="fine-tuning the encoder")
    parser.add_argument("--minutes", default="90", help="projector and language model")
    parser.add_argument("--rfm-minutes", default="10", help="distilling the RFM")
    parser.add_argument("--answer-minutes", default="15", help="what comes after the looking")
    parser.add_argument("--start", help="checkpoint to go on from (default: SmolLM2)")
    options = parser.parse_args()
    paths = Paths()
    step("vision.py", "--minutes", options.vision_minutes)
    step("features.py")
    step("base.py")
    start = ["--start", options.start] if options.start else []
    step("train.py", "--minutes", options.minutes, *start)
    tool = [str(Path(sys.executable).with_name("lrs-edge"))]
    scenes, data = paths.work / "scenes", paths.work / "distill"
    tiles = str(paths.data / "aid150_rsicd")
    sizes = [part for size in (2000, 3000, 4500, 6000, 8000) for part in ("--size", str(size))]
    asked = ["--split", "train", "--count", "40", "--questions", "10", "--seed", "2", *sizes]
    run(*tool, "scenes", tiles, "-o", str(scenes), *asked)
    step("distill_data.py", str(scenes), str(data))
    learned = ["--data", str(data), "-o", str(paths.work / "distilled"), "--force"]
    weights = ["--evidence-weight", "1", "--minutes", options.rfm_minutes]
    run(*tool, "distill", str(paths.checkpoint), *learned, *weights)
    step("answers.py", "--minutes", options.answer_minutes)


if __name__ == "__main__":
    main()
