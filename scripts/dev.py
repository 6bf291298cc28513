"""Set up and run the demo, or set up and pass the tests. Needs nothing but Python.

    python3 scripts/dev.py demo    # virtual environment .venv, then a question about a sample image
    python3 scripts/dev.py test    # virtual environment .venv-dev, then linters, types and tests
    python3 scripts/dev.py slow    # the same environment, then the tests that take over ten seconds

Each environment is made once and brought up to date when pyproject.toml changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: The demo asks the first of these.
QUESTIONS = ROOT / "examples" / "questions.jsonl"

#: The build for CPUs is a tenth of the size of the one that PyPI serves for Linux.
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

LINTERS = [["ruff", "check", "."], ["ruff", "format", "--check", "."]]


def main() -> int:
    """Run one task; returns its exit status."""
    if sys.version_info < (3, 10):  # noqa: UP036 - nothing has checked it before this script
        raise SystemExit("lrs-edge needs Python 3.10 or later; name it: python3.12 scripts/dev.py")
    parser = argparse.ArgumentParser(description="Set up and run the demo or the tests.")
    parser.add_argument("task", choices=["demo", "test", "slow"])
    parser.add_argument("--venv", type=Path, help="directory of the virtual environment")
    parser.add_argument(
        "--extras",
        default="cpu,export,train,dev",
        help="extras of the package that the tests get (default: %(default)s)",
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.task == "demo":
        programs = environment(arguments.venv or ROOT / ".venv", "cpu", torch=False)
        return run(programs / "lrs-edge", *demo())
    programs = environment(arguments.venv or ROOT / ".venv-dev", arguments.extras, torch=True)
    if arguments.task == "slow":
        return run(programs / "pytest", "-m", "slow")
    for name, *options in LINTERS:
        if status := run(programs / name, *options):
            return status
    return run(programs / "mypy") or run(programs / "pytest", "-m", "not slow")


def demo() -> list[str]:
    """Arguments of the demo's command."""
    question = json.loads(QUESTIONS.read_text(encoding="utf-8").splitlines()[0])
    return ["ask", f"examples/{question['image']}", question["text"]]


def environment(place: Path, extras: str, *, torch: bool) -> Path:
    """Make a virtual environment with the package in editable mode.

    Returns:
        The directory of its programs.
    """
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    stamp = place / "installed"
    described = (ROOT / "pyproject.toml").read_bytes() + extras.encode()
    wanted = hashlib.sha256(described).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return programs
    print(f"Setting up {place} ...", flush=True)
    venv.create(place, with_pip=True)
    pip = [programs / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if torch:
        index = ["--index-url", TORCH_CPU_INDEX] if reachable(TORCH_CPU_INDEX) else []
        must_run(*pip, TORCH, *index)
    must_run(*pip, "--editable", f".[{extras}]")
    stamp.write_text(wanted)
    return programs


def reachable(address: str) -> bool:
    """Whether a package index answers."""
    try:
        with urllib.request.urlopen(f"{address}/", timeout=10) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def run(*command: str | Path, folder: Path = ROOT) -> int:
    """Show a command and run it; returns its exit status."""
    shown = " ".join(Path(part).name if isinstance(part, Path) else part for part in command)
    print(f"$ {shown}", flush=True)
    return subprocess.run(command, check=False, cwd=folder).returncode


def must_run(*command: str | Path) -> None:
    """Run a command that must succeed."""
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("the environment could not be set up; see above")


if __name__ == "__main__":
    sys.exit(main())
