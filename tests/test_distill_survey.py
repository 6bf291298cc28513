"""`distill --measure`: the layers of a language model are compared, and nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="distilling needs the `export` extra")
pytest.importorskip("onnx", reason="distilling needs the `export` extra")

import lrs_edge
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.commands.main import run
from lrs_edge.errors import UsageError
from lrs_edge_export.bundle.options import ExportOptions
from lrs_edge_export.bundle.writer import export_bundle
from lrs_edge_export.distill import DistillOptions, Sampling, survey_layers, survey_table
from lrs_edge_export.distill.localise import Row
from lrs_edge_export.distill.survey import Survey
from tests.checkpoints import LAYERS, edit_json, write_qwen

GENERIC = "Describe the image."
BOXES = ([4, 4, 20, 18], [30, 15, 44, 30])
WIDTH, HEIGHT = 48, 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("survey") / "checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of one level with two questions that have boxes, and one without."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0.png")
    lines = []
    for number, text in enumerate(("What is this?", "Where?", "how many cars")):
        box = BOXES[number] if number < len(BOXES) else []
        values = {"question_id": number, "image": "0.png", "text": text, "ground_truth": "x"}
        lines.append(json.dumps(values | {"hbox": box}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def test_the_table_is_printed_and_nothing_written(
    source: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in source.parent.iterdir())
    command = ["distill", str(source), "--data", str(data), "--measure", "-q"]
    assert run(command) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    rows = [line for line in shown.out.splitlines() if line[2:3].isdigit()]
    assert [line[2] for line in rows] == [str(layer) for layer in range(LAYERS)]
    assert sum(line.startswith("*") for line in rows) == 1
    assert "--rfm from-llm:" in shown.out
    assert "2502.17422" in shown.out
    assert sorted(path.name for path in source.parent.iterdir()) == before
    assert sorted(path.name for path in data.iterdir()) == ["0.png", "questions.jsonl"]
    # What is kept is used again, and the figures are the same.
    kept = [*command, "--work", str(tmp_path / "work"), "--format", "json"]
    found = []
    for _ in range(2):
        assert run(kept) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["best"]["layers"] in range(1, LAYERS)
    assert len(found[0]["plain"]) == len(found[0]["relative"]) == LAYERS
    assert run([*kept, "--relative-to", GENERIC]) == 2
    assert "another measured" in capsys.readouterr().err


@pytest.mark.parametrize("relative", [False, True])
def test_figures_are_those_of_the_bundle(
    source: Path, data: Path, tmp_path: Path, relative: bool
) -> None:
    """Mass on the evidence, from the scores that the exported bundle gives."""
    options = DistillOptions(limit=1, sampling=Sampling(tiles=64))
    survey = survey_layers(str(source), data, options, GENERIC)
    rows = survey.relative if relative else survey.plain
    bundle = tmp_path / "bundle"
    export_bundle(str(source), bundle, ExportOptions(parity=False, rfm_layers=1))
    if relative:
        search = json.loads((bundle / "manifest.json").read_text())["search"]
        edit_json(bundle / "manifest.json", search=search | {"relative_to": GENERIC})
    trace = tmp_path / "trace.npz"
    with lrs_edge.load(bundle, provider="cpu") as engine, engine.open(data / "0.png") as scene:
        scene.ask("What is this?", max_tokens=1, trace=trace, tiles_per_level=64)
        tile, per_tile = open_bundle(bundle).manifest.vision.tile, engine._loaded().vision.per_tile
    masses = []
    with np.load(trace) as arrays:
        sizes = arrays["scale_infos_resize_hw"][arrays["searched_levels"]]
        for number in range(1, 1 + sum(name.endswith("_attn") for name in arrays.files)):
            scores, places = (arrays[f"rfm{number}_{name}"] for name in ("attn", "local_indices"))
            height, width = sizes[number - 1]
            columns = arrays[f"seq{number}_local_hw_incl_newline"][1]
            cell = tile / per_tile
            ys, xs = places // columns, places % columns
            shown = xs < columns - 1
            x0, y0, x1, y1 = np.array(BOXES[0]) * np.tile([width / WIDTH, height / HEIGHT], 2)
            wide = np.minimum((xs + 1) * cell, x1) - np.maximum(xs * cell, x0)
            high = np.minimum((ys + 1) * cell, y1) - np.maximum(ys * cell, y0)
            area = np.clip(wide, 0, None) * np.clip(high, 0, None)
            inside = shown & (area >= 0.25 * min(cell**2, (x1 - x0) * (y1 - y0)))
            masses.append(scores[inside].sum() / scores[shown].sum())
    assert rows[1].questions == len(masses) == 1
    assert rows[1].mass == pytest.approx(np.mean(masses), rel=2e-3)


def test_the_best_layer_can_score() -> None:
    rows = [Row(9, 0.1, 0.2, recall, 0.3) for recall in (0.9, 0.5, 0.5)]
    others = [Row(9, 0.1, 0.2, recall, 0.3) for recall in (0.9, 0.5, 0.4)]
    # Layer 0 has nothing before it; of equals the first, and the simpler way.
    survey = Survey(tuple(rows), tuple(others), GENERIC, 1, "a source")
    assert survey.best == (1, False)
    better = Survey(tuple(rows), (*others[:2], Row(9, 0.1, 0.2, 0.6, 0.3)), GENERIC, 1, "a source")
    assert better.best == (2, True)
    assert f"--rfm from-llm:2 --relative-to '{GENERIC}'" in survey_table(better)


def test_what_cannot_be_measured(
    source: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", str(source), "--data", str(data)]
    assert run(command) == 2
    assert "--measure" in capsys.readouterr().err
    assert run([*command, "-o", str(tmp_path / "new"), "--relative-to", GENERIC]) == 2
    assert "--relative-to is a text for --measure" in capsys.readouterr().err
    file = tmp_path / "unboxed.jsonl"
    lines = [json.loads(text) for text in (data / "questions.jsonl").read_text().splitlines()]
    file.write_text("\n".join(json.dumps(values | {"hbox": None}) for values in lines))
    with pytest.raises(UsageError, match=r"no question has an evidence box.*lrs-edge scenes"):
        survey_layers(str(source), file, DistillOptions(images=data))
