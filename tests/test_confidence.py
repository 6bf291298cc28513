"""Yes and no by a threshold, confidence, and warnings about strange scenes, on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lrs_edge
from lrs_edge import Answer
from lrs_edge.answer import report
from lrs_edge.answer.confidence import Certainty, certainty, confidence, sigmoid
from lrs_edge.answer.domain import domain_warnings
from lrs_edge.bundle.calibration import Calibration, Domain, OpenCalibration, YesNoCalibration
from lrs_edge.commands.main import run
from lrs_edge.language.sampling import Sampler, TokenChooser, log_probability
from lrs_edge.language.yes_no import YesNo
from lrs_edge.vision.colours import colours_of, distance, fit_colours
from tests.checkpoints import write_nano
from tests.test_engine import picture
from tests.test_report import make_answer

QUESTION = "Is there a ship?"
LOGITS = np.array([0.0, 1.0, 5.0, 4.0, 3.0], np.float32)


def chooser(threshold: float | None, *, temperature: float = 0.0) -> TokenChooser:
    return TokenChooser(Sampler(temperature, 1.0, 0), YesNo((0, 2), (3, 4)), threshold)


def test_yes_and_no_are_decided_by_the_threshold() -> None:
    for threshold, token in ((None, 2), (0.9, 2), (1.0, 3), (20.0, 3), (-20.0, 2)):
        chosen = chooser(threshold)
        assert chosen.choose(LOGITS, []) == token
        assert chosen.margin == 1.0
    # The first token only.
    assert chooser(20.0).choose(LOGITS, [1]) == 2


def test_other_answers_are_left_alone() -> None:
    chosen = chooser(20.0)
    assert chosen.choose(np.array([0, 9, 5, 4, 3], np.float32), []) == 1
    assert chosen.margin is None
    for words in (YesNo((), (2,)), YesNo((2,), ())):
        assert words.margin(LOGITS, 2) is None


def test_what_was_chosen_is_remembered_with_its_probability() -> None:
    chosen = chooser(1.5)
    assert [chosen.choose(LOGITS, []), chosen.choose(LOGITS, [3])] == [3, 2]
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert chosen.log_probabilities == pytest.approx([math.log(shares[3]), math.log(shares[2])])
    assert log_probability(np.array([3e38, -3e38], np.float32), 0) == 0.0


FITTED = Calibration(
    yes_no=YesNoCalibration((0,), (1,), threshold=2.0, slope=0.5, intercept=0.1),
    open=OpenCalibration(intercept=3.0, mean_slope=1.0, least_slope=2.0),
)


def test_confidence_of_yes_and_no() -> None:
    def sure(margin: float) -> float | None:
        return confidence(FITTED, Certainty(margin, -1.0, -1.0))

    assert sure(4.0) == pytest.approx(sigmoid(1.1))
    assert sure(-4.0) == pytest.approx(1 - sigmoid(-2.9))
    assert sure(1e30) == 1.0
    assert sure(-1e30) == 1.0


def test_confidence_of_other_answers() -> None:
    assert certainty(None, [-0.5, -1.5]) == Certainty(None, -1.0, -1.5)
    assert confidence(FITTED, certainty(None, [-0.5, -1.5])) == pytest.approx(sigmoid(-1.0))
    assert confidence(FITTED, certainty(None, [])) == 0.0
    assert confidence(replace_open(None), certainty(None, [-1.0])) is None
    # Yes and no are answers like any others where only those were fitted.
    only_open = Calibration(open=OpenCalibration(1.0, 0.0))
    assert confidence(only_open, certainty(3.0, [-1.0])) == pytest.approx(sigmoid(1.0))


def replace_open(value: OpenCalibration | None) -> Calibration:
    return Calibration(yes_no=FITTED.yes_no, open=value)


def test_a_low_confidence_is_one_word_in_the_text_and_a_number_in_json() -> None:
    sure, unsure = (make_answer(confidence=value) for value in (0.91, 0.42))
    assert report.mark(sure) == report.mark(make_answer()) == ""
    assert report.mark(unsure) == " (unsure)"
    assert report.mark(replace(unsure, text="")) == "(unsure)"
    assert "Confidence: 42 % (unsure)" in report.evidence(unsure)
    assert "Confidence" not in report.evidence(make_answer())
    image = report.ImageFacts("image.tif", 2000, 1000)
    written = json.loads(report.to_json(unsure, image))
    assert written["confidence"] == 0.42
    without = json.loads(report.to_json(make_answer(), image))
    assert {**without, "confidence": 0.42} == written


def some_colours(count: int = 40) -> np.ndarray:
    random = np.random.default_rng(5)
    return np.array([0.4, 0.4, 0.3, 0.1, 0.1, 0.1]) + 0.03 * random.standard_normal((count, 6))


def test_colours_far_from_those_of_training() -> None:
    found = some_colours()
    domain = fit_colours(found)
    assert sum(distance(row, domain) > domain.limit for row in found) <= 1
    assert distance(found.mean(0) + 0.2 * np.eye(6)[2], domain) > domain.limit
    # Fewer pictures than numbers, all of them the same.
    one = fit_colours(np.repeat(found[:1], 3, axis=0))
    assert distance(found[0], one) == 0.0
    assert distance(found[0] + 0.1, one) > one.limit


def test_black_pixels_have_no_colours() -> None:
    pixels = np.zeros((40, 40, 3), np.float32)
    assert colours_of(pixels) is None
    pixels[:20] = (0.2, 0.4, 0.6)
    assert colours_of(pixels) == pytest.approx([0.2, 0.4, 0.6, 0, 0, 0], abs=1e-6)


def test_ground_resolutions_far_from_those_of_training() -> None:
    domain = Domain(resolutions=((0.1, 0.5), (2.0, 10.0)))
    for gsd in (None, 0.1, 0.3, 10.0):
        assert list(domain_warnings(domain, gsd, None)) == []
    for gsd in (0.05, 1.0, 30.0):
        (warning,) = domain_warnings(domain, gsd, None)
        assert f"{gsd:g} m" in warning
        assert "0.1 to 0.5, 2 to 10 m" in warning


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny nano checkpoint, without a calibration."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("confidence")
    target = folder / "bundle"
    export_bundle(str(write_nano(folder / "nano")), target, ExportOptions(parity=False))
    return target


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture(tmp_path_factory.mktemp("image") / "image.png", 500, 300)


@pytest.fixture
def calibrated(plain: Path) -> Iterator[Any]:
    """Puts a calibration into the bundle's manifest."""
    path = plain / "manifest.json"
    before = path.read_bytes()

    def put(**calibration: Any) -> Path:
        path.write_text(json.dumps(json.loads(before) | {"calibration": calibration}))
        return plain

    yield put
    path.write_bytes(before)


def ask(bundle: Path, image: Path, *times: dict[str, Any], **options: Any) -> list[Answer]:
    """One answer for every set of options, on one scene."""
    with (
        lrs_edge.load(bundle, provider="cpu", threads=1) as engine,
        engine.open(image) as scene,
    ):
        return [scene.ask(QUESTION, max_tokens=3, **options, **more) for more in (times or ({},))]


OPEN = {"intercept": 1.0, "mean_slope": 0.5}


def test_a_bundle_without_a_calibration_answers_as_before(plain: Path, image: Path) -> None:
    (answer,) = ask(plain, image)
    assert answer.confidence is None
    assert answer.log_probability is not None
    assert answer.least_log_probability is not None
    assert answer.least_log_probability <= answer.log_probability < 0


def test_the_threshold_decides_and_decoding_goes_on_from_there(
    plain: Path, image: Path, calibrated: Any
) -> None:
    (usual,) = ask(plain, image)
    yes = usual.token_ids[0]
    no = (yes + 1) % 100
    words = {"yes_ids": [yes], "no_ids": [no], "slope": 1.0}
    low = calibrated(yes_no={**words, "threshold": -1e4}, open=OPEN)
    kinds = ({}, {"policy": "reference"}, {"temperature": 1.0, "seed": 3})
    same, reference, sampled = ask(low, image, *kinds)
    assert same.token_ids == usual.token_ids
    assert same.margin is not None
    assert same.confidence == pytest.approx(1.0)
    high = calibrated(yes_no={**words, "threshold": same.margin, "intercept": -0.5}, open=OPEN)
    other, still, again = ask(high, image, *kinds)
    assert other.token_ids[0] == no
    assert other.margin == same.margin
    assert other.confidence == pytest.approx(1 - sigmoid(-0.5))
    # Neither what the authors' code does nor what a sampler draws is changed.
    assert still.token_ids == reference.token_ids
    assert again.token_ids == sampled.token_ids
    assert still.confidence is again.confidence is None
    assert again.margin is None


def test_other_answers_have_a_confidence(plain: Path, image: Path, calibrated: Any) -> None:
    (usual,) = ask(plain, image)
    unused = [token for token in range(8) if token not in usual.token_ids]
    words = {"yes_ids": unused[:1], "no_ids": unused[1:2], "threshold": 0.0, "slope": 1.0}
    (answer,) = ask(calibrated(yes_no=words, open=OPEN), image)
    assert answer.token_ids == usual.token_ids
    assert answer.margin is None
    assert answer.log_probability is not None
    assert answer.confidence == pytest.approx(sigmoid(1.0 + 0.5 * answer.log_probability))


def test_the_command_line_says_that_it_is_unsure(
    plain: Path, image: Path, calibrated: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["ask", str(image), QUESTION, "--max-tokens", "3", "-q", "-m", str(plain)]
    assert run(line) == 0
    usual = capsys.readouterr().out
    calibrated(open={"intercept": -1.0, "mean_slope": 0.0})
    trace = tmp_path / "trace.npz"
    assert run([*line, "--trace", str(trace)]) == 0
    assert capsys.readouterr().out == usual.replace("\n", " (unsure)\n")
    with np.load(trace) as arrays:
        assert arrays["confidence"] == pytest.approx(sigmoid(-1.0))
        assert arrays["log_probability"] < 0
    assert run([*line, "-o", str(tmp_path / "answer.txt")]) == 0
    assert (tmp_path / "answer.txt").read_text().endswith(" (unsure)\n")
    assert run([*line, "--format", "json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["answer"] == usual.strip()
    assert written["confidence"] == pytest.approx(sigmoid(-1.0), abs=1e-4)


def colour_domain(image: Path, shift: float = 0.0) -> dict[str, Any]:
    with Image.open(image) as opened:
        shown = np.asarray(opened.convert("RGB"), np.float32) / 255
    colours = colours_of(shown)
    assert colours is not None
    diagonal = [[1e-3 if row == col else 0.0 for col in range(6)] for row in range(6)]
    return {"mean": (colours + shift).tolist(), "covariance": diagonal, "limit": 4.0}


@pytest.mark.parametrize("order", [({}, {}), ({"max_tiles": 0}, {"max_tiles": 3})])
def test_a_strange_scene_gives_one_warning(
    image: Path, calibrated: Any, order: tuple[dict[str, Any], ...]
) -> None:
    usual = calibrated(domain={"colours": colour_domain(image)})
    assert all("colours" not in "".join(answer.warnings) for answer in ask(usual, image, *order))
    strange = calibrated(domain={"colours": colour_domain(image, 0.3)})
    # The second question finds the tokens of the global view remembered.
    for answer in ask(strange, image, *order):
        assert sum("colours" in warning for warning in answer.warnings) == 1
        assert answer.confidence is None
