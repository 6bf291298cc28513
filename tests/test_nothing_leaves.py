"""Nothing leaves the machine: no socket, no lookup, and no file outside the named paths."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMAGE = str(ROOT / "examples" / "coast.tif")

ASK = ["-m", "lrs_edge", "ask", IMAGE, "What is this?", "--max-tiles", "2", "-q"]
COMMANDS = {
    "ask": ASK,
    "doctor": ["-m", "lrs_edge", "doctor"],
    # Loads the bundle in a process of its own.
    "bench": ["-m", "lrs_edge", "bench", "--stages", "load", "-r", "1", "--no-warmup", "-q"],
    "export": [
        "-c",
        "import lrs_edge_export.graphs.sessions, lrs_edge_export.quantization.kv_scales",
    ],
}
#: onnxruntime looks its vendor's host up a minute after it was loaded.
ASKING_FOR_OVER_A_MINUTE = """
import sys, time, lrs_edge
end = time.monotonic() + 75
with lrs_edge.load() as engine, engine.open(sys.argv[1]) as scene:
    while time.monotonic() < end:
        scene.ask("What is this?", max_tiles=2)
"""


def run_traced(
    folder: Path, arguments: list[str], *, trace: bool = True
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run Python with an empty home; what it did on the network, as strace tells it."""
    home, temporary, log = folder / "home", folder / "tmp", folder / "calls.txt"
    home.mkdir()
    temporary.mkdir()
    strace = shutil.which("strace")
    if trace and strace is None:
        pytest.skip("strace is not installed")
    prefix = [str(strace), "-f", "-qq", "-e", "trace=%network", "-o", str(log)] if trace else []
    kept = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    done = subprocess.run(
        [*prefix, sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=kept | {"HOME": str(home), "TMPDIR": str(temporary)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(home.rglob("*")) == []
    assert sorted(temporary.rglob("*")) == []
    return done, log.read_text() if trace else ""


def sockets(calls: str) -> list[str]:
    """Lines about sockets other than a pair between two threads of the process itself."""
    return [line for line in calls.splitlines() if re.search(r"\b(socket|connect|send\w+)\(", line)]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_file_is_left_behind(name: str, tmp_path: Path) -> None:
    done, _ = run_traced(tmp_path, COMMANDS[name], trace=False)
    if name == "ask":
        assert done.stdout.strip()
        assert done.stderr == ""


def test_no_file_is_written_where_the_home_folder_cannot_be(tmp_path: Path) -> None:
    command = [sys.executable, *ASK]
    environment = os.environ | {"HOME": str(tmp_path / "nowhere" / "home")}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ask", "bench"])
def test_no_socket_is_opened(name: str, tmp_path: Path) -> None:
    _, calls = run_traced(tmp_path, COMMANDS[name])
    assert sockets(calls) == []


def test_a_socket_would_be_seen(tmp_path: Path) -> None:
    code = "import socket; s = socket.socket(); s.settimeout(0); s.connect_ex(('127.0.0.1', 9))"
    _, calls = run_traced(tmp_path, ["-c", code])
    assert len(sockets(calls)) == 2


@pytest.mark.slow
def test_no_name_is_looked_up_later(tmp_path: Path) -> None:
    _, calls = run_traced(tmp_path, ["-c", ASKING_FOR_OVER_A_MINUTE, IMAGE])
    assert sockets(calls) == []


def test_onnxruntime_is_imported_in_one_place() -> None:
    pattern = re.compile(r"^\s*(import onnxruntime\b|from onnxruntime\b)(?!_)", re.MULTILINE)
    folders = ("lrs_edge", "export", "models", "benchmarks", "scripts", "tests")
    found = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
        if not match[0].strip().startswith("from") or "engines.runtime" not in path.read_text()
    }
    assert found == {str(Path("lrs_edge/engines/runtime.py"))}
