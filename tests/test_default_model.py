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


@pytest.mark.parametrize(
    ("question", "answers"),
    [
        # The name of the place is a near tie here: the model card says so.
        ("What can be seen in this image?", {"many green trees are in a piece of green mountain"}),
        ("Is there a forest?", {"yes"}),
        ("Is there an airport?", {"no"}),
        ("Is there a stadium in this image?", {"no"}),
        ("Rural or urban?", {"rural"}),
    ],
)
def test_sensible_answers_about_a_shipped_image(
    engine: lrs_edge.Engine, question: str, answers: set[str]
) -> None:
    with engine.open(EXAMPLES / "yellowstone.tif") as scene:
        answer = scene.ask(question)
    assert answer.text in answers
    assert answer.finish_reason == "stop"
    assert answer.search_end == "finest_level"
    assert [level.level for level in answer.levels] == [0, 1]


def test_both_policies_answer(engine: lrs_edge.Engine) -> None:
    with engine.open(EXAMPLES / "road.tif") as scene:
        for policy in ("full", "reference"):
            assert scene.ask("What kind of place is this?", policy=policy).text
