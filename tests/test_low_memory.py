"""Processes that run out of memory, or are ended from outside, say so and leave nothing behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lrs_edge.errors import ImageError
from lrs_edge.requests.memory import means_no_memory
from tests.test_engine import picture

ROOT = Path(__file__).resolve().parent.parent

#: Asks once, so that everything is imported, and then again with little room to grow.
LIMITED = """
import re, resource, sys
from pathlib import Path
from lrs_edge.commands.main import run
line = ["ask", sys.argv[1], "What is this?", "-q", "--max-tokens", "1", "--threads", "1"]
line += ["--provider", "cpu"]
assert run(line) == 0
used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20,) * 2)
sys.exit(run(line))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
@pytest.mark.parametrize("room", [1, 24, 48])
def test_low_memory_is_said_and_no_bug(tmp_path: Path, room: int) -> None:
    image = picture(tmp_path / "a.png", 1500, 900)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(image), str(room)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("\n") == 1
    assert "out of memory" in done.stderr
    assert "--max-tiles" in done.stderr
    assert "bug" not in done.stderr


def caused(error: Exception, cause: BaseException | None) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (ImportError("x.so: failed to map segment from shared object"), True),
        (RuntimeError("can't start new thread"), True),
        (caused(ImageError("no"), MemoryError()), True),
        (OSError(errno.ENOENT, "missing", "out of memory.tif"), False),
        (RuntimeError("wrong"), False),
        (None, False),
    ],
)
def test_errors_that_mean_no_memory(error: Exception | None, means: bool) -> None:
    assert means_no_memory(error) == means


SHORTENED = """
import os, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from lrs_edge.bundle.bundle import Embeddings
path = Path(sys.argv[1])
rows = np.arange(4000 * 8, dtype=np.float32).reshape(4000, 8)
save_file({"embed_tokens": rows, "image_newline": rows[0]}, path)
table = Embeddings(path, 8, 4000)
os.truncate(path, 0)
ids = np.array([0, 1999, 3999])
assert np.array_equal(table.lookup(ids), rows[ids])
"""


def test_a_file_of_embeddings_that_is_shortened_ends_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHORTENED, str(tmp_path / "e.safetensors")]
    done = subprocess.run(command, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0


WAITING = """
import tempfile, time
from pathlib import Path
{ending}
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "image").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(
    "ending",
    [
        "from benchmarks.measure import parser_for; parser_for(None)",
        "from lrs_edge.commands.main import end_in_order; end_in_order()",
    ],
)
def test_a_benchmark_that_is_ended_leaves_nothing_behind(tmp_path: Path, ending: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(ending=ending)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert child.stdout is not None
    folder = Path(child.stdout.readline().strip())
    assert (folder / "image").is_file()
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 128 + signal.SIGTERM
    child.stdout.close()
    assert list(tmp_path.iterdir()) == []
