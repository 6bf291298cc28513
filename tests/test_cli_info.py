"""`lrs-edge info` and `lrs-edge models`, on files made here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lrs_edge.bundle.bundle import default_bundle_path, read_manifest
from lrs_edge.bundle.parity import Accuracy, Choice, Figure, ParityReport, StageParity
from lrs_edge.commands.main import run
from tests.rasters import UTM, noise, write


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the embedded bundle with a name and a parity figure of its own."""
    root = tmp_path / "bundle"
    shutil.copytree(default_bundle_path(), root)
    path = root / "manifest.json"
    manifest = read_manifest(root)
    parity = ParityReport("3 images", (StageParity("vision", (Figure("max error", 1e-6, "<="),)),))
    changed = msgspec.structs.replace(manifest, name="copy", parity=parity)
    path.write_bytes(msgspec.json.encode(changed))
    return root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A georeferenced GeoTIFF of 600 x 500 pixels whose nodata value JSON cannot say."""
    pixels = noise(3, 500, 600, dtype="float32")
    return write(tmp_path / "image.tif", pixels, nodata=np.nan, **UTM)


Read = Callable[[], str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Read:
    """What was printed since the last call."""
    return lambda: capsys.readouterr().out


def test_image_facts_and_the_levels_of_a_model(image: Path, bundle: Path, printed: Read) -> None:
    assert run(["info", str(image), "-m", str(bundle), "--format", "json"]) == 0
    facts = json.loads(printed())
    assert (facts["width"], facts["height"], facts["crs"]) == (600, 500, "EPSG:32632")
    assert facts["gsd"] == pytest.approx(0.5, rel=0.01)
    assert facts["nodata"] is None
    assert facts["model"] == "copy"
    assert facts["levels"][0]["tiles"] == 4
    assert run(["info", str(image), "-m", str(bundle)]) == 0
    text = printed()
    assert "EPSG:32632" in text
    assert "2 x 2 = 4 tiles" in text


@pytest.mark.parametrize("name", ["", "manifest.json"])
def test_bundle_facts(bundle: Path, name: str, printed: Read) -> None:
    assert run(["info", str(bundle / name), "--format", "json"]) == 0
    facts = json.loads(printed())
    assert facts["name"] == "copy"
    assert facts["tokens_per_tile"] == 144
    assert len(facts["files"]) == len(list(bundle.iterdir())) - 1
    assert run(["info", str(bundle / name)]) == 0
    assert "vision" in (text := printed())
    assert "max error 1e-06" in text


def test_parity_and_accuracy_as_a_table(bundle: Path, printed: Read) -> None:
    path = bundle / "manifest.json"
    manifest = read_manifest(bundle)
    error = Figure("relative error", 0.25, "<=", 0.1)
    figures = (error, Figure("cosine", 0.99, ">=", 0.98))
    report = ParityReport(
        "2 images",
        (
            StageParity("llm-kv", (Figure("cosine", 0.5, ">="),)),
            StageParity("llm", figures, "int4-weight", 1_234_567, "layer by layer"),
        ),
        {"llm": ("layers.0.mlp.down_proj", "lm_head")},
        (Choice("vision", "int8-static", 0.99),),
        Accuracy("harbour", correct=3, total=4, matching="exact", baseline_correct=4),
    )
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, parity=report)))
    assert run(["info", str(bundle), "--format", "json"]) == 0
    facts = json.loads(printed())
    assert facts["parity"] == {"images": "2 images", "passed": False}
    assert facts["choices"] == [{"stage": "vision", "precision": "int8-static", "cosine": 0.99}]
    assert facts["accuracy"] == {
        "share": 0.75,
        "correct": 3,
        "total": 4,
        "failed": 0,
        "dataset": "harbour",
        "matching": "exact",
        "baseline_correct": 4,
    }
    kv, llm = facts["stages"]
    assert kv == {"stage": "llm-kv", "figures": {"cosine": {"value": 0.5}}}
    assert (llm["precision"], llm["bytes"], llm["mode"]) == (
        "int4-weight",
        1_234_567,
        "layer by layer",
    )
    error, cosine = llm["figures"]["relative_error"], llm["figures"]["cosine"]
    assert (error["at_most"], error["passed"]) == (True, False)
    assert (cosine["at_most"], cosine["passed"]) == (False, True)
    assert run(["info", str(bundle)]) == 0
    text = printed()
    for part in (
        "on 2 images",
        "1.2 MB",
        "relative error 0.25 (<= 0.1)",
        "cosine 0.99 (>= 0.98)",
        "layer by layer  2 layers kept higher  FAILED",
        "accuracy on harbour: 3 of 4 right; 4 before quantization",
    ):
        assert part in text, part


def test_a_bundle_that_was_not_checked(bundle: Path, printed: Read) -> None:
    path = bundle / "manifest.json"
    manifest, report = read_manifest(bundle), ParityReport(kept_higher={"rfm": ("lm_head",)})
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, parity=report)))
    assert run(["info", str(bundle)]) == 0
    assert "not checked" in (text := printed())
    assert "1 layers kept higher" in text


def test_a_model_that_is_named_must_be_there(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", str(image), "-m", str(tmp_path / "none")]) == 4
    assert capsys.readouterr().err.count("\n") == 1


def test_verify_names_the_files_that_differ(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["models", "verify", str(bundle)]) == 0
    assert capsys.readouterr().out.count("ok ") == len(list(bundle.iterdir())) - 1
    (bundle / "llm.onnx").write_bytes(b"x" * 80)
    (bundle / "rfm.onnx").unlink()
    assert run(["models", "verify", str(bundle)]) == 4
    captured = capsys.readouterr()
    assert captured.out.count("BAD") == 2
    assert "rfm.onnx" in captured.err
    assert "llm.onnx" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("command", ["info", "models verify"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 99}', b"\xff" * 9])
def test_a_manifest_that_cannot_be_read(
    bundle: Path, command: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "manifest.json").write_bytes(content)
    assert run([*command.split(), str(bundle)]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "bug" not in captured.err


def test_where_a_bundle_runs(
    bundle: Path, image: Path, printed: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["info", str(bundle), "--device", "cpu", "--format", "json"]
    assert run(line) == 0
    facts = json.loads(printed())
    assert "cpu" in facts["runs_on"]
    assert "--target cuda" in facts["refused_on"]["cuda"]
    assert [place["stage"] for place in facts["placement"]] == ["vision", "rfm", "llm"]
    assert {place["device"] for place in facts["placement"]} == {"cpu"}
    assert facts["warnings"] == []
    assert run(line[:4]) == 0
    assert "llm: onnxruntime on cpu" in printed()
    assert run(["info", str(bundle), "--device", "vision=abacus"]) == 2
    assert run(["info", str(image), "--device", "cpu"]) == 2
    assert "is none" in capsys.readouterr().err
