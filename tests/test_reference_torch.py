"""The PyTorch reference of the benchmarks against the golden runs of the authors' code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference needs the `export` extra")

import lrs_edge
from benchmarks.reference_torch import Reference
from tests.golden_data import CHECKPOINTS, COMMITTED, checkpoint, load_run, run_names

#: Images whose runs the repository ships; the larger ones take long.
SHIPPED = [path.stem for path in sorted((COMMITTED / "images").glob("*.png"))]


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS))
def reference(request: pytest.FixtureRequest) -> tuple[str, Reference]:
    source = checkpoint(request.param)
    if source is None:
        pytest.skip("only a part of the golden data is here")
    return request.param, Reference(source)


def test_golden_runs_are_reproduced(reference: tuple[str, Reference]) -> None:
    variant, model = reference
    runs = [
        load_run(name)
        for name in run_names()
        if name.startswith(variant) and any(image in name for image in SHIPPED)
    ]
    assert len(runs) == 6
    for run in runs:
        found = model.ask(
            run.image,
            run.info["question"],
            max_tokens=len(run.arrays["new_ids"]),
            end_str=run.info["end_str"],
        )
        assert found.token_ids == run.arrays["new_ids"].tolist(), run.name
        assert found.kept == run.arrays["keep2_indices_with_newlines"].tolist(), run.name
        assert np.array_equal(found.tiles, run.arrays["next_selected_positions"]), run.name
        for scores, key in zip(found.scores, ("rfm1_attn", "rfm2_attn"), strict=True):
            wanted = run.arrays[key]
            assert np.abs(scores.numpy() - wanted).max() < 1e-4 * wanted.max(), (run.name, key)


def test_what_is_left_of_the_work_on_an_image_changes_no_answer(
    reference: tuple[str, Reference],
) -> None:
    variant, model = reference
    from benchmarks.reference_torch.image import decode

    run = load_run(f"{variant}_img_700x500_q0")
    image = decode(run.image)
    answers = [
        model.ask(source, run.info["question"], max_tokens=4).token_ids
        for source in (run.image, image, model.levels(image))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_images_on_which_the_authors_code_fails_are_refused(
    reference: tuple[str, Reference], tmp_path: Path
) -> None:
    from PIL import Image

    for size in ((336, 336), (2000, 50)):
        path = tmp_path / "image.png"
        Image.new("RGB", size).save(path)
        with pytest.raises(ValueError, match="the reference fails"):
            reference[1].ask(path, "What?", max_tokens=1)


def test_the_embedded_model_answers_as_in_the_runtime(tmp_path: Path) -> None:
    """With position tables and another tower; the weights are those of the bundle, dequantized."""
    from benchmarks.embedded_checkpoint import write_checkpoint
    from lrs_edge_export import ExportOptions, export_bundle

    folder = write_checkpoint(None, tmp_path / "checkpoint")
    export_bundle(str(folder), tmp_path / "bundle", ExportOptions(parity=False))
    image = Path(__file__).parent.parent / "examples" / "coast.tif"
    question = "What kind of scene is this?"
    found = Reference(folder).ask(image, question, max_tokens=8)
    with lrs_edge.load(tmp_path / "bundle", provider="cpu") as engine:
        wanted = engine.open(image).ask(
            question, policy="reference", resampling="reference", max_tokens=8
        )
    assert tuple(found.token_ids) == wanted.token_ids
    assert found.sent == wanted.tokens.sent
    tiles = {(region.row, region.col) for region in wanted.regions if region.level == 1}
    assert set(found.tiles) == tiles
