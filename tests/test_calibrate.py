"""Fitting a calibration: the arithmetic, the bundle that is written, and the command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lrs_edge.answer.confidence import Certainty, open_confidence, yes_no_confidence
from lrs_edge.bundle.bundle import open_bundle, read_manifest, verify_bundle
from lrs_edge.bundle.calibration import Calibration, OpenCalibration
from lrs_edge.bundle.rewriting import write_calibrated
from lrs_edge.commands.main import run
from lrs_edge.errors import BundleError, UsageError
from lrs_edge.evaluation.calibration import Sample, balanced_weights, fit, samples_of
from lrs_edge.evaluation.domain import joined_ranges
from lrs_edge.evaluation.logistic import fit_logistic, probabilities
from lrs_edge.evaluation.matching import Matcher
from lrs_edge.evaluation.reliability import reliability
from lrs_edge.evaluation.results import Result
from lrs_edge.language.yes_no import YesNo
from tests.checkpoints import write_nano
from tests.evaluation import lrs_row, make_header, make_result, make_results, write_lines
from tests.test_bundle import write_bundle
from tests.test_engine import picture

WORDS = YesNo((1,), (2,))


def test_logistic_regression_finds_what_made_the_answers() -> None:
    random = np.random.default_rng(1)
    features = random.standard_normal((4000, 2)) * [3.0, 0.1] + [5.0, -2.0]
    right = random.random(4000) < probabilities(features @ [0.5, 4.0] + 6.0)
    slopes = fit_logistic(features, right.astype(float), np.full(4000, 0.01))
    assert slopes == pytest.approx([0.5, 4.0, 6.0], rel=0.2)


@pytest.mark.parametrize("count", [4, 400])
def test_one_feature_that_tells_all_stays_finite(count: int) -> None:
    x = np.linspace(-1, 1, count)[:, None]
    slope, intercept = fit_logistic(x, (x[:, 0] > 0).astype(float), np.ones(count))
    assert 0 < slope < 100
    assert abs(intercept) < 0.1


def test_more_certain_is_never_less_right() -> None:
    x = np.linspace(-1, 1, 40)
    against = np.column_stack([x, np.zeros(40)])
    found = fit_logistic(against, (x < 0).astype(float), np.ones(40))
    assert found[:2].tolist() == [0, 0]
    assert found[2] == pytest.approx(0, abs=1e-6)


def test_expected_calibration_error() -> None:
    assert reliability([]) is None
    # Of .75 three in four are right; of 1.0 one of two.
    found = reliability([(0.75, True)] * 3 + [(0.75, False)] + [(1.0, True), (1.0, False)])
    assert found is not None
    assert found.questions == 6
    assert found.calibration_error == pytest.approx(0.5 * 2 / 6)
    assert [(part.low, part.questions, part.accuracy) for part in found.bins] == [
        (0.7, 4, 0.75),
        (0.9, 2, 0.5),
    ]


def sample(truth: Any, margin: float | None, number: int = 0, **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "image": f"{number % 40}.tif",
        "group": "ship",
        "found": Certainty(margin, -0.1, -0.2),
        "truth": truth,
        "right": margin is not None and (margin > 0) == (truth == "yes"),
    }
    return Sample(**(values | changes))


def biased(count: int = 400, shift: float = 3.0) -> list[Sample]:
    """Answers of a model that says yes too often; logits are apart by 2 with a spread of 1."""
    random = np.random.default_rng(2)
    truths = ["yes" if place % 2 else "no" for place in range(count)]
    return [
        sample(
            truth, shift + (1 if truth == "yes" else -1) + float(random.standard_normal()), place
        )
        for place, truth in enumerate(truths)
    ]


def others(count: int = 200) -> list[Sample]:
    """Answers of one and two tokens whose probability is the chance that they are right."""
    random = np.random.default_rng(3)
    found = []
    for place, chance in enumerate(random.uniform(0.1, 1.0, count).tolist()):
        certain = Certainty(None, math.log(chance), math.log(chance))
        right = bool(random.random() < chance)
        found.append(sample(None, None, place, found=certain, right=right))
    return found


def test_the_threshold_takes_the_prior_away() -> None:
    found = fit(biased(), WORDS)
    fitted, figures = found.calibration.yes_no, found.yes_no
    assert fitted is not None
    assert figures is not None
    assert (fitted.yes_ids, fitted.no_ids) == ((1,), (2,))
    assert fitted.threshold == pytest.approx(3.0, abs=0.35)
    assert figures.by_logits < 0.6
    assert figures.by_threshold > 0.8
    assert figures.left_out == pytest.approx(figures.by_threshold, abs=0.03)
    # A logistic curve between two normal distributions of spread 1 that are 2 apart.
    assert fitted.slope == pytest.approx(2.0, abs=0.6)
    assert yes_no_confidence(fitted, 3.0 - 5) > 0.99
    assert found.calibration.open is None
    assert "other answers" in found.notes[0]


def test_confidence_is_what_it_says_on_questions_left_out() -> None:
    found = fit([*biased(), *others()], WORDS)
    assert found.left_out is not None
    assert found.left_out.questions == 600
    assert found.left_out.calibration_error < 0.08
    assert found.calibration.calibration_error == found.left_out.calibration_error
    assert found.calibration.questions == 600
    assert found.open_questions == 200
    fitted = found.calibration.open
    assert fitted is not None
    sure, guessed = (open_confidence(fitted, value, value) for value in (-0.01, -2.0))
    assert sure > 0.75
    assert guessed < 0.4


def test_groups_count_alike_in_yes_and_in_no() -> None:
    found = [
        *[sample("yes", 1.0, group="ship") for _ in range(8)],
        *[sample("yes", 1.0, group="bridge") for _ in range(2)],
        sample("no", 1.0, group="ship"),
    ]
    weights = balanced_weights(found)
    assert weights.sum() == pytest.approx(1.0)
    assert weights[:8].sum() == weights[8:10].sum() == pytest.approx(0.25)
    assert weights[10] == 0.5


def test_too_few_answers_fit_nothing() -> None:
    with pytest.raises(UsageError, match="nothing can be fitted to 4 answers"):
        fit(biased(4), WORDS)
    without = fit([*biased(), *others()], YesNo((), ()))
    assert without.calibration.yes_no is None
    assert "no single token" in without.notes[0]


def test_answers_that_a_calibration_is_not_for() -> None:
    certain = {"log_probability": -0.5, "least_log_probability": -1.0}
    matcher = Matcher(None)
    for options in ({"policy": "reference"}, {"policy": "full", "temperature": 0.7}):
        with pytest.raises(UsageError, match="greedy answers"):
            samples_of(make_results(make_result(0, **certain), options=options), matcher)
    with pytest.raises(UsageError, match="run the evaluation again"):
        samples_of(make_results(make_result(0)), matcher)
    (found,) = samples_of(
        make_results(make_result(0, **certain), make_result(1, "", error="no image", work=None)),
        matcher,
    )
    assert found == Sample("1.tif", "count", Certainty(None, -0.5, -1.0), None, True)


def test_ranges_of_ground_resolution() -> None:
    assert joined_ranges([(2, 5), (0.1, 0.3), (0.2, 0.5)]) == ((0.1, 0.5), (2, 5))
    for wrong in ((1, 0.5), (0, 1), (1, float("inf")), (float("nan"), 1)):
        with pytest.raises(UsageError, match="not a range"):
            joined_ranges([wrong])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_a_copy_has_the_calibration_and_all_files(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    calibration = Calibration(open=OpenCalibration(1.0, 2.0), questions=12)
    target = tmp_path / "new" / "copy"
    write_calibrated(open_bundle(bundle), target, calibration)
    assert read_manifest(target).calibration == calibration
    assert not any(check.problem for check in verify_bundle(target))
    assert (bundle / "manifest.json").read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["copy"]
    with pytest.raises(UsageError, match="exists"):
        write_calibrated(open_bundle(bundle), target, calibration)
    # Its own folder: only the manifest is another.
    write_calibrated(open_bundle(bundle), bundle, calibration)
    assert read_manifest(bundle) == read_manifest(target)
    assert not any(check.problem for check in verify_bundle(bundle))


def test_no_bundle_is_written_that_would_be_refused(bundle: Path, tmp_path: Path) -> None:
    wrong = Calibration(open=OpenCalibration(float("nan"), 1.0))
    with pytest.raises(BundleError, match=r"open\.intercept"):
        write_calibrated(open_bundle(bundle), tmp_path / "copy", wrong)
    assert not (tmp_path / "copy").exists()


def results_file(path: Path, samples: list[Sample], **header: Any) -> Path:
    lines = [make_header(**header)]
    for place, one in enumerate(samples):
        said = "yes" if (one.found.margin or 0) > 0 else "no"
        result = make_result(
            place, said, image=one.image, ground_truth=one.truth or ("no" if one.right else "x"),
            thing=one.group, margin=one.found.margin,
            log_probability=one.found.log_probability,
            least_log_probability=one.found.least_log_probability,
        )  # fmt: skip
        lines.append(result)
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    assert msgspec.json.decode(path.read_bytes().splitlines()[1], type=Result).thing == "ship"
    return path


def with_words(bundle: Path) -> Path:
    """A bundle whose manifest says which tokens are yes and no."""
    path = bundle / "manifest.json"
    fitted = {"yes_ids": [1], "no_ids": [2], "threshold": 0.0, "slope": 1.0}
    domain = {"resolutions": [[0.3, 2]]}
    content = json.loads(path.read_text())
    content["calibration"] = {"yes_no": fitted, "domain": domain}
    path.write_text(json.dumps(content))
    return bundle


def test_the_command_fits_to_results(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_words(bundle)
    files = [
        str(results_file(tmp_path / "a.jsonl", biased())),
        str(results_file(tmp_path / "b.jsonl", others(), options={})),
    ]
    target = tmp_path / "copy"
    line = ["calibrate", *files, "-m", str(bundle), "-o", str(target), "--no-synonyms"]
    assert run([*line, "--format", "json"]) == 0
    captured = capsys.readouterr()
    # These results say that another bundle gave them.
    assert "another manifest" in captured.err
    facts = json.loads(captured.out)
    calibration = read_manifest(target).calibration
    assert calibration is not None
    assert calibration.yes_no is not None
    assert facts["calibration"]["yes_no"]["threshold"] == round(calibration.yes_no.threshold, 6)
    assert facts["left_out"]["questions"] == 600
    # What was not fitted stays.
    assert calibration.domain is not None
    assert calibration.domain.resolutions == ((0.3, 2.0),)
    assert run(line) == 2
    shutil.rmtree(target)
    assert run([*line, "-q", "--ground-resolution", "0.1,0.5"]) == 0
    captured = capsys.readouterr()
    assert "by the threshold" in captured.out
    assert "expected calibration error" in captured.out
    assert "ground resolution: 0.1 to 0.5 m a pixel" in captured.out


def test_what_the_command_refuses(bundle: Path, tmp_path: Path) -> None:
    target = ["-m", str(bundle), "-o", str(tmp_path / "copy"), "-q", "--no-synonyms"]
    questions = str(write_lines(tmp_path / "q.jsonl", lrs_row()))
    results = str(results_file(tmp_path / "a.jsonl", biased(40)))
    assert run(["calibrate", *target]) == 2
    assert run(["calibrate", questions, *target]) == 2
    assert run(["calibrate", str(tmp_path / "nothing.jsonl"), *target]) == 2
    assert run(["calibrate", results, "--images", str(tmp_path), *target]) == 2
    assert run(["calibrate", results, "--ground-resolution", "5,1", *target]) == 2
    assert run(["calibrate", results, "--domain-images", str(tmp_path), *target]) == 2
    assert not (tmp_path / "copy").exists()


def test_the_command_asks_questions_and_looks_at_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export import ExportOptions, export_bundle

    bundle, images = tmp_path / "bundle", tmp_path / "images"
    export_bundle(str(write_nano(tmp_path / "nano")), bundle, ExportOptions(parity=False))
    images.mkdir()
    for number in range(20):
        picture(images / f"{number}.png", 70 + number, 60)
    (images / "damaged.png").write_bytes(b"no image")
    rows = [lrs_row(i, image=f"{i % 3}.png", text="What is it?", thing="ship") for i in range(11)]
    questions = str(write_lines(tmp_path / "q.jsonl", *rows))
    line = ["calibrate", questions, "--images", str(images), "-m", str(bundle), "--no-synonyms"]
    line += ["--domain-images", str(images), "--threads", "1", "--provider", "cpu"]
    kept = ["--results", str(tmp_path / "kept")]
    assert run([*line, *kept, "-o", str(bundle)]) == 0
    captured = capsys.readouterr()
    assert "colours: distance up to" in captured.out
    assert "of 20 images" in captured.out
    assert "damaged.png" in captured.err
    calibration = read_manifest(bundle).calibration
    assert calibration is not None
    assert calibration.open is not None
    assert calibration.domain is not None
    assert calibration.domain.resolutions == ()
    results = (tmp_path / "kept" / "1-q.results.jsonl").read_text().splitlines()
    assert len(results) == 12
    assert all('"log_probability"' in result and '"thing"' in result for result in results[1:])
    # The calibrated bundle's own answers have a confidence, which the evaluation sums up.
    line = ["eval", questions, "--images", str(images), "-m", str(bundle), "--no-synonyms"]
    line += ["--max-tokens", "2", "-o", str(tmp_path / "r.jsonl"), "--limit", "3"]
    assert run([*line, "--threads", "1", "--provider", "cpu"]) == 0
    assert "expected calibration error" in capsys.readouterr().out
