"""The evaluation on real scenes through a real, tiny engine: asked once, gone on with, printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_nano
from tests.scripts import Importer
from tests.test_engine import picture


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny nano checkpoint: tiles of 64 pixels, levels from 192."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("real")
    target = folder / "bundle"
    export_bundle(str(write_nano(folder / "nano")), target, ExportOptions(parity=False))
    return target


def write_data(data: Path) -> None:
    """Real_eval with two images, and the scenes of Dubai that are asked about."""
    images = data / "real_eval" / "images"
    images.mkdir(parents=True)
    picture(images / "fair1m_0.webp", 300, 200)
    picture(images / "airbus_0.webp", 600, 600)
    rows = [
        ("fair1m-0", "fair1m_0", "presence", "Are there any ships?", "yes", [[0, 0, 9, 9]]),
        ("fair1m-1", "fair1m_0", "presence", "Are there any bridges?", "no", []),
        ("airbus-0", "airbus_0", "presence", "Are there any airplanes?", "yes", [[9, 9, 20, 20]]),
    ]
    lines = [
        json.dumps({
            "question_id": name, "image": f"images/{image}.webp", "category": category,
            "text": text, "ground_truth": truth, "source": name.split("-")[0], "hbox": boxes,
        })
        for name, image, category, text, truth, boxes in rows
    ]  # fmt: skip
    (data / "real_eval" / "questions.jsonl").write_text("\n".join(lines))
    (data / "dubai_cc0" / "images").mkdir(parents=True)
    for number in (1, 4, 5, 7):
        picture(data / "dubai_cc0" / "images" / f"scene{number}.webp", 200, 150)


def test_an_evaluation_is_asked_once_and_printed(
    bundle: Path,
    real_scenes: Importer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_data(tmp_path)
    evaluate = real_scenes("evaluate")
    command = [
        "evaluate.py", str(tmp_path), "--work", str(tmp_path / "work"), "--model", str(bundle),
        "--limit", "3", "--threads", "1", "--turns", "1", "--against", str(bundle),
        "--only", "real,finer,global,dubai,cost",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main()
    first = capsys.readouterr()
    for title in ("Presence, default options", "Side", "Count", "The same with 24 tiles a level",
                  "Presence, global view alone", "Dubai, scenes 1, 4 and 5", "Summary",
                  "Cost per question, in turns"):  # fmt: skip
        assert f"**{title}**" in first.out
    assert "| presence, without intersections and roundabouts | " in first.out
    assert "real: 3 of 3" in first.err
    folder = tmp_path / "work" / "results" / evaluate.identity(bundle)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == [
        "blind.jsonl",
        f"cost_{evaluate.identity(bundle)}.jsonl",
        "dubai.jsonl",
        "finer.jsonl",
        "global.jsonl",
        "real.jsonl",
    ]
    evaluate.main()
    second = capsys.readouterr()
    assert second.out == first.out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_parts_that_do_not_exist_are_refused(
    real_scenes: Importer, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = real_scenes("evaluate")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "d", "--work", "w", "--only", "cost,moon"])
    with pytest.raises(SystemExit):
        evaluate.arguments()
