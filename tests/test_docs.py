"""The documentation: its commands run, and what is generated is up to date."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lrs_edge
from lrs_edge.answer import report
from lrs_edge.bundle.bundle import default_bundle_path
from lrs_edge.commands.main import PROGRAM
from lrs_edge.errors import BundleError
from scripts import draw_search

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: A fenced block after a comment that starts with `run:`.
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
        [sys.executable, "-m", "lrs_edge.commands.main", *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        input=shlex.split(left)[1] if left else "", timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout or "-o" in arguments


def test_the_picture_of_a_search_can_be_drawn(tmp_path: Path) -> None:
    path, trace = ROOT / "examples" / "coast.tif", tmp_path / "trace.npz"
    with lrs_edge.load(provider="cpu") as engine, engine.open(path) as scene:
        answer = scene.ask("Is there a swimming pool?", tiles_per_level=4, trace=trace)
        image = report.ImageFacts(str(path), scene.raster.width, scene.raster.height)
    written = tmp_path / "answer.json"
    written.write_text(report.to_json(answer, image))
    picture = tmp_path / "search.png"
    draw_search.main(str(written), str(trace), str(picture))
    with np.load(trace) as arrays:
        kept = dict(arrays)
    across = draw_search.tokens_across(kept, 2)
    tokens = draw_search.kept_tokens(kept, 2)
    # Newlines are kept too, and are not drawn.
    assert 0 < len(tokens) <= answer.levels[1].tokens_kept
    assert max(col for _, col in tokens) < across
    with Image.open(picture) as drawn:
        assert drawn.width > 2 * draw_search.PANEL * 0.9
        assert len(drawn.getcolors(1 << 16) or []) > 50
    # What is asked about gets a panel of its own, and a frame; also at the image's edge.
    framed = draw_search.draw(json.loads(written.read_text()), kept, (2990, 600, 3072, 680))
    assert framed.width > drawn.width
    colours = {colour for _, colour in framed.getcolors(1 << 20) or []}
    assert draw_search.EVIDENCE in colours


#: Folders that names of Python files are relative to, beside the folder of the text.
TOPS = (ROOT, ROOT / "lrs_edge", ROOT / "export" / "lrs_edge_export")

#: Files of the authors' repositories.
THEIRS = ("Script/", "LRS-VQA-Code/", "evaluation_LRSVQA.py", "evaluation/eval_your_results.py")


def test_named_python_files_are_there() -> None:
    places = ("*.md", "docs/*.md", "lrs_edge/**/*.py", "export/**/*.py", "models/nano/train/*.*")
    for text in (path for place in places for path in ROOT.glob(place)):
        if text.suffix in (".py", ".md") and text.name != "moved.md":
            named = re.findall(r"`([\w./-]+\.py)`", text.read_text(encoding="utf-8"))
            missing = [
                name
                for name in named
                if not any((top / name).is_file() for top in (*TOPS, text.parent))
                and not name.startswith(THEIRS)
            ]
            assert missing == [], text


def test_links_to_files_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        missing = [target for target in targets if not (page.parent / target).exists()]
        assert missing == [], page.name
