"""`lrs-edge watch` as a process, with the embedded model: kills, signals, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrs_edge.commands.main import run
from tests.rasters import UTM, noise, write
from tests.test_docs import has_default_model

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")


def start(place: Path, *options: str) -> subprocess.Popen[str]:
    if not has_default_model():
        pytest.skip("the default model is not installed")
    arguments = ["watch", "in", "--questions", "q.txt", "--out", "out", "--settle", "0.1"]
    limits = ["--interval", "0.2", "--retry-delay", "0", "--max-tiles", "2", "--max-tokens", "3"]
    return subprocess.Popen(
        [sys.executable, "-m", "lrs_edge", *arguments, *limits, "--device", "cpu", *options],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "q.txt").write_text("Is there a ship?\nIs there a bridge?\n")
    write(tmp_path / "in" / "a.tif", noise(3, 400, 500), **UTM)
    return tmp_path


def test_a_killed_command_goes_on(place: Path) -> None:
    shutil.copy(place / "in" / "a.tif", place / "in" / "b.tif")
    damaged = (place / "in" / "a.tif").read_bytes()[:3000]
    (place / "in" / "damaged.tif").write_bytes(damaged)
    lines = []
    with start(place, "--once") as first:
        assert first.stdout is not None
        lines.append(first.stdout.readline())
        first.kill()
        lines += first.stdout.readlines()
    with start(place, "--once", "--hook", "echo hook") as second:
        out, told = second.communicate(timeout=300)
    lines += out.splitlines(keepends=True)
    assert second.returncode == 7, told
    answers = {line["json"]: line for line in map(json.loads, set(lines))}
    assert len(answers) == 4
    assert len(list((place / "out" / "results").iterdir())) == 8
    for name, line in answers.items():
        whole = json.loads(Path(name).read_text())
        assert (whole["answer"], whole["schema"]) == (line["answer"], "lrs-edge/answer")
        assert json.loads(Path(line["geojson"]).read_text())["features"]
    (record,) = (place / "out" / "quarantine").iterdir()
    assert json.loads(record.read_text())["exit_code"] == 3
    assert f"hook {out.splitlines() and json.loads(out.splitlines()[0])['json']}" in told
    assert not list((place / "out").glob("**/.lrs-edge-*"))


def test_a_signal_ends_the_loop_in_order(place: Path) -> None:
    with start(place) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["product"] == "a.tif"
        # Renamed into place while the command runs.
        write(place / "new.tif", noise(3, 400, 500, seed=1), **UTM)
        os.replace(place / "new.tif", place / "in" / "new.tif")
        process.stdout.readline()
        assert json.loads(process.stdout.readline())["product"] == "new.tif"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    # A second, and what a busy machine takes to let the process run.
    assert time.monotonic() - began < 5
    assert process.returncode == 0, told
    with start(place, "--once") as again:
        out, told = again.communicate(timeout=300)
    assert again.returncode == 0, told
    assert len(out.splitlines()) <= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nowhere", "--questions", "q.txt", "--out", "out"], "is not a folder"),
        (["in", "--questions", "none.txt", "--out", "out"], "cannot be read"),
        (["in", "--questions", "q.txt", "--out", "in"], "the watched folder itself"),
        (["in", "--questions", "q.txt", "--out", "out", "--hook", "no-program-x"], "no program"),
        (["in", "--questions", "q.txt", "--out", "out", "--wait-for", "{x}"], "--wait-for"),
        (["in", "--questions", "q.txt", "--out", "q.txt/out"], "cannot be made"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    place: Path,
    options: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    assert run(["watch", *options]) == 2
    assert says in capsys.readouterr().err
