"""The parts of the benchmarks that compare, on small inputs: both sides must agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the benchmarks need the `export` extra")

from benchmarks import dense_rfm, efficiency, reference_worker, whole_image
from benchmarks.embedded_checkpoint import write_checkpoint
from benchmarks.measure import write_image
from lrs_edge.errors import BundleError
from tests.golden_data import ROOT, checkpoint

IMAGE = ROOT / "images" / "img_700x500.png"


def test_dense_and_compact_scores_agree(golden_bundles: dict[str, Path]) -> None:
    make = dense_rfm.load_cases(golden_bundles["llama"], 1)
    case = make(4, 3)
    assert case.dense.hidden.sum() == len(case.dense) - len(case.compact) > 0
    found = dense_rfm.compare(case, 1)
    assert 0 < found["difference"] < dense_rfm.TOLERANCE
    assert min(found["dense"], found["compact"]) > 0


def test_both_sides_of_against_reference_give_the_same_tokens(
    golden_bundles: dict[str, Path],
) -> None:
    source = checkpoint("llama")
    assert source is not None
    ours = reference_worker.our_side(golden_bundles["llama"], "reference", 1)
    wanted = ours(IMAGE, "What is this?", 6)
    for keep in reference_worker.KEEPS:
        batch = 1 if keep == "levels" else None
        torch_side = reference_worker.torch_side(source, keep, batch, 1)
        for image in (IMAGE, None):
            found = torch_side(image, "What is this?", 6)
            for key in ("ids", "tiles", "sent"):
                assert found[key] == wanted[key], (keep, key)
            assert found["seconds"].keys() == wanted["seconds"].keys()
            assert found["seconds"]["total"] >= sum(
                seconds for stage, seconds in found["seconds"].items() if stage != "total"
            )


def test_reading_whole_makes_the_tiles_that_windows_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    write_image(path, 2016, overviews=True, width=1000)
    windows = whole_image.read_tiles(path, "reference", 1000)
    whole = whole_image.read_whole(path)
    assert whole["tiles"] == windows["tiles"] > 1
    assert windows["read_mb"] > 0


def test_lines_are_fitted() -> None:
    at, slope, r2 = whole_image.linear_fit([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert np.allclose([at, slope, r2], [3.0, 2.0, 1.0])


def test_every_tile_costs_more_than_the_search(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    write_image(path, 2100, overviews=True)
    full, every = (
        efficiency.ask(path, "What is this?", search, None, 1)
        for search in efficiency.WAYS.values()
    )
    assert every["tiles"] > full["tiles"] > 1
    assert every["tflops"] > full["tflops"] > 0
    assert every["size"] == full["size"] == (2100, 2100)


def test_only_the_embedded_model_s_family_becomes_a_checkpoint(
    golden_bundles: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="--checkpoint"):
        write_checkpoint(golden_bundles["llama"], tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
