"""`models/nano/train/run.py`: steps that are finished, and precisions that are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import TRAIN, scripts


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    """The script as a module."""
    with scripts(TRAIN) as importer:
        yield importer("run")


@pytest.fixture
def runner(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A runner whose work lies in a fresh folder."""
    monkeypatch.setenv("NANO_DATA", str(tmp_path))
    monkeypatch.setenv("NANO_WORK", str(tmp_path / "work"))
    return run.Runner(run.Paths(every=1), None)


def command(tmp_path: Path, word: str, code: int = 0) -> list[str]:
    """Writes a word into a file and exits with a code."""
    text = f"import sys; open({str(tmp_path / 'log')!r}, 'a').write({word!r}); sys.exit({code})"
    return [sys.executable, "-c", text]


def test_a_finished_step_is_not_run_again(run: Any, runner: Any, tmp_path: Path) -> None:
    """Nor by the command that goes on from its folder."""
    runner.step("one", command(tmp_path, "a"))
    runner.step("one", command(tmp_path, "b"))
    run.Runner(runner.paths, None).step("one", command(tmp_path, "c"))
    assert (tmp_path / "log").read_text() == "a"


def test_the_first_precision_that_passes_is_taken(run: Any, runner: Any, tmp_path: Path) -> None:
    """What was refused is not tried again by the command that goes on."""
    commands = [command(tmp_path, "a", 1), command(tmp_path, "b"), command(tmp_path, "c")]
    assert runner.first_that_passes("export", *commands) is commands[1]
    assert run.Runner(runner.paths, None).first_that_passes("export", *commands) is commands[1]
    assert (tmp_path / "log").read_text() == "ab"


def test_all_precisions_refused_is_an_error(runner: Any, tmp_path: Path) -> None:
    """The last one's."""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        runner.first_that_passes("export", command(tmp_path, "a", 1), command(tmp_path, "b", 2))
    assert failed.value.returncode == 2
    assert "export" not in runner.done


def test_a_killed_export_is_tried_again(run: Any, runner: Any, tmp_path: Path) -> None:
    """It is no precision that was refused."""
    text = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(subprocess.CalledProcessError):
        runner.first_that_passes(
            "export", [sys.executable, "-c", text], command(tmp_path, "second")
        )
    first = command(tmp_path, "first")
    again = run.Runner(runner.paths, None)
    assert again.first_that_passes("export", first, command(tmp_path, "second")) is first
    assert (tmp_path / "log").read_text() == "first"
