"""Workers as seen from the benchmark: one process per engine and precision, and what to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Contender:
    """One engine at one precision.

    Attributes:
        engine: `ours`, `llama.cpp` or `genai`.
        precision: As the engine names it, such as `Q8_0`.
        path: The file or folder that the engine loads.
        weights: The files that hold its weights, for their size.
        python: The interpreter that has the engine.
    """

    engine: str
    precision: str
    path: Path
    weights: tuple[Path, ...]
    python: Path

    @property
    def name(self) -> str:
        """Engine and precision."""
        return f"{self.engine} {self.precision}"

    @property
    def file_mib(self) -> float:
        """MiB of the weights on disk."""
        return sum(path.stat().st_size for path in self.weights) / 2**20


class Worker:
    """A running worker; use as a context manager.

    Args:
        contender: What it runs.
        threads: Threads of the engine.
        places: Tokens that its cache must hold.
    """

    def __init__(self, contender: Contender, threads: int, places: int) -> None:
        self.contender = contender
        module = "benchmarks.other_engines.worker"
        command = [str(contender.python), "-m", module, contender.engine, str(contender.path)]
        # A pipe that nobody reads would fill up and block the engine.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, str(threads), str(places)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=quiet_environment(),
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def loaded(self) -> dict[str, Any]:
        """Wait until the engine is loaded; seconds and version."""
        return self._answer()

    def run(self, prompt: list[int], steps: int) -> dict[str, Any]:
        """Measure one prompt; see `benchmarks.other_engines.worker.measure`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompt": prompt, "steps": steps}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._failed()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._failed()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self) -> None:
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()[-12:]
        raise SystemExit("\n".join([f"{self.contender.name} failed:", *said]))


def quiet_environment() -> dict[str, str]:
    """This process's environment, with what keeps libraries and pip from calling home."""
    return os.environ | {"ORT_DISABLE_TELEMETRY": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def has_module(python: Path, module: str) -> bool:
    """True where an interpreter can import a module; says on standard error where it cannot."""
    try:
        done = subprocess.run(
            [str(python), "-c", f"import {module}"],
            capture_output=True,
            text=True,
            check=False,
            env=quiet_environment(),
        )
    except OSError as error:
        note(f"{module} is left out: {python} does not run ({error})")
        return False
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        note(f"{module} is left out: {python} cannot import it ({reason})")
    return done.returncode == 0


def run_quietly(command: list[str], log: Path, **variables: str) -> None:
    """Run a command in the repository's root, with what it prints in a file.

    Args:
        command: The command.
        log: The file.
        variables: Of the environment, besides those that are there.

    Raises:
        SystemExit: It fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = quiet_environment() | {"HF_HUB_OFFLINE": "1"} | variables
    with log.open("w") as stream:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}; see {log}")


def note(text: str) -> None:
    """Progress, and what is left out, on standard error."""
    print(text, file=sys.stderr, flush=True)
