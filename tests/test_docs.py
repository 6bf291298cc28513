"""The documentation: its commands run, and what is generated is up to date."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lrs_edge import report
from lrs_edge.bundle import default_bundle_path
from lrs_edge.cli import PROGRAM
from lrs_edge.errors import BundleError
from scripts import draw_search
from tests.test_report import make_answer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: A fenced block behind a comment that starts with `run:`.
RUN_BLOCK = re.compile(r"<!-- run:.*?-->\n```sh\n(.*?)```", re.DOTALL)
COMMANDS = [line for block in RUN_BLOCK.findall(README) for line in block.splitlines()]


def has_default_model() -> bool:
    try:
        default_bundle_path()
    except (BundleError, ModuleNotFoundError):
        return False
    return True


def test_generated_files_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.make_docs", "--check"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"run `make docs`: {done.stdout}{done.stderr}"


def test_readme_has_commands_to_run() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_run(command: str, tmp_path: Path) -> None:
    if not has_default_model():
        pytest.skip("the default model is not installed")
    left, _, right = command.rpartition("|")
    program, *arguments = shlex.split(right)
    assert program == PROGRAM
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-m", "lrs_edge.cli", *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        input=shlex.split(left)[1] if left else "", timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout or "-o" in arguments


def test_the_picture_of_a_search_can_be_drawn(tmp_path: Path) -> None:
    image = report.ImageFacts(str(ROOT / "examples" / "florida.tif"), 400, 400)
    answer = tmp_path / "answer.json"
    answer.write_text(report.to_json(make_answer(), image))
    draw_search.main(str(answer), str(tmp_path / "search.png"))
    with Image.open(tmp_path / "search.png") as picture:
        assert picture.width > draw_search.PANEL
        assert picture.height > draw_search.PANEL


def test_links_to_files_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        missing = [target for target in targets if not (page.parent / target).exists()]
        assert missing == [], page.name
