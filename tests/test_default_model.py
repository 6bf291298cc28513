"""The embedded default model as a newcomer meets it: no -m, a shipped image, a sensible answer."""

from __future__ import annotations

from pathlib import Path

import pytest

import lrs_edge
from lrs_edge.bundle.bundle import default_bundle_path, verify_bundle

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def engine() -> lrs_edge.Engine:
    with lrs_edge.load(provider="cpu") as loaded:
        yield loaded


def test_the_bundle_is_whole_and_small() -> None:
    checks = verify_bundle(default_bundle_path())
    assert [check.path for check in checks if check.problem] == []
    assert sum(check.size for check in checks) <= 40_000_000


def test_the_last_onnxruntime_for_python_3_10_has_all_operators() -> None:
    onnx = pytest.importorskip("onnx", reason="reading graphs needs the `export` extra")
    for path in default_bundle_path().glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        assert "QuantizeLinear" not in {node.op_type for node in graph.node}, path.name


def test_a_shipped_image_is_searched_to_its_finest_level(engine: lrs_edge.Engine) -> None:
    """What it says there is held by test_demo.py, together with the README."""
    with engine.open(EXAMPLES / "coast.tif") as scene:
        answer = scene.ask("Is there an airport?")
    assert answer.text in {"yes", "no"}
    assert answer.finish_reason == "stop"
    assert answer.search_end == "finest_level"
    assert [level.level for level in answer.levels] == [0, 1]


def test_both_policies_answer(engine: lrs_edge.Engine) -> None:
    with engine.open(EXAMPLES / "coast.tif") as scene:
        for policy in ("full", "reference"):
            assert scene.ask("What kind of place is this?", policy=policy).text
