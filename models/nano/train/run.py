"""The whole recipe in one command: features, base model, training, figures. Resumable.

    python models/nano/train/run.py [--minutes 60] [--threads 2]

Every step finds what an earlier, interrupted run left in NANO_WORK and continues from it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def step(script: str, *arguments: str) -> None:
    """Run one script of this folder; stop when it fails."""
    print(f"== {script} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", default="60", help="training time after the warm start")
    parser.add_argument("--rfm-minutes", default="12", help="training time of the RFM")
    parser.add_argument("--threads", default="2")
    options = parser.parse_args()
    step("features.py")
    step("base.py")
    step("train.py", "--minutes", options.minutes, "--threads", options.threads)
    step("rfm.py", "--minutes", options.rfm_minutes, "--threads", options.threads)
    for what in (["scenes", "--split", "test"], ["questions"], ["localise"], ["samples"]):
        step("evaluate.py", *what, "--threads", options.threads)


if __name__ == "__main__":
    main()
