"""Golden runs of the authors' code, reproduced through export and `ask --trace`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lrs_edge
from tests.golden_data import ROOT, GoldenRun, checkpoint, load_run, run_names

#: Scores differ by at most this share of the largest score, logits by at most this.
SCORE_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 1e-3

#: A top-k boundary closer than this (relative) is a tie that float32 cannot decide.
TIE = 1e-6


@pytest.fixture(scope="module", params=["llama", "qwen"])
def engine(request: pytest.FixtureRequest, golden_bundles: dict[str, Path]) -> lrs_edge.Engine:
    if request.param not in golden_bundles:
        pytest.skip("only a part of the golden data is here")
    with lrs_edge.load(golden_bundles[request.param], provider="cpu") as loaded:
        yield loaded


def runs_of(engine: lrs_edge.Engine) -> list[GoldenRun]:
    variant = {"llava_qwen": "qwen", "llava_llama": "llama"}[engine.manifest.family]
    return [load_run(name) for name in run_names() if name.startswith(variant)]


def test_generated_text_is_the_reference_s(engine: lrs_edge.Engine) -> None:
    for run in runs_of(engine):
        with engine.open(run.image) as scene:
            answer = scene.ask(
                run.info["question"],
                policy="reference",
                resampling="reference",
                max_tokens=len(run.arrays["new_ids"]),
                end_str=run.info["end_str"],
            )
        assert answer.text == run.info["text"].strip(), run.name


def trace_of(engine: lrs_edge.Engine, run: GoldenRun, path: Path) -> dict[str, np.ndarray]:
    with engine.open(run.image) as scene:
        scene.ask(
            run.info["question"],
            policy="reference",
            resampling="reference",
            max_tokens=len(run.arrays["new_ids"]),
            end_str=run.info["end_str"],
            trace=path,
        )
    with np.load(path) as data:
        return {key: data[key] for key in data}


def same_scores(found: np.ndarray, wanted: np.ndarray) -> bool:
    return float(np.abs(found - wanted).max()) <= SCORE_TOLERANCE * float(wanted.max())


def test_every_golden_run_is_reproduced(engine: lrs_edge.Engine, tmp_path: Path) -> None:
    runs = runs_of(engine)
    assert len(runs) >= 6
    for run in runs:
        check_run(run, trace_of(engine, run, tmp_path / "trace.npz"))


def check_run(run: GoldenRun, found: dict[str, np.ndarray]) -> None:
    golden, info = run.arrays, run.info
    assert np.array_equal(found["input_ids"], golden["input_ids"]), run.name
    check_levels(run, found)
    for key in ("rfm1_attn", "rfm2_attn", "rfm2_attn_if_properly_masked"):
        assert same_scores(found[key], golden[key]), (run.name, key)
    for key in ("seq1_rownorm", "seq2_rownorm", "final_embeds_rownorm"):
        assert np.allclose(found[key], golden[key], rtol=1e-3, atol=1e-3), (run.name, key)
    tied = [info[f"topk{s}_rel_margin"] < TIE for s in (1, 2)]
    if not tied[0]:
        assert np.array_equal(
            np.sort(found["topk1_raw_indices"]), np.sort(golden["topk1_raw_indices"])
        ), run.name
        for key in ("next_selected_positions", "next_local_mask", "rfm2_bool_mask_added"):
            assert np.array_equal(found[key], golden[key]), (run.name, key)
    if not any(tied):
        key = "keep2_indices_with_newlines"
        assert np.array_equal(found[key], golden[key]), (run.name, key)
    difference = np.abs(found["step_logits"][0] - golden["step_logits"][0]).max()
    assert difference <= LOGIT_TOLERANCE, (run.name, difference)
    assert np.array_equal(found["new_ids"], golden["new_ids"]), run.name
    assert np.array_equal(found["prefill_position_ids"], golden["prefill_position_ids"])


def check_levels(run: GoldenRun, found: dict[str, np.ndarray]) -> None:
    path = ROOT / "image_stage" / f"{run.info['image']}.json"
    if not path.is_file():
        return
    levels = json.loads(path.read_text())["scale_infos"]
    for key in ("resize_hw", "resize_padding_hw", "block_num_hw"):
        assert found[f"scale_infos_{key}"].tolist() == [level[key] for level in levels], run.name


def test_full_scores_like_the_reference_where_it_looks_at_the_same(
    engine: lrs_edge.Engine, tmp_path: Path
) -> None:
    """The first pass of both policies is the same; later ones depend on the tiles chosen."""
    compared = 0
    for run in runs_of(engine):
        with engine.open(run.image) as scene:
            scene.ask(
                run.info["question"],
                resampling="reference",
                max_tokens=1,
                end_str=run.info["end_str"],
                trace=tmp_path / "trace.npz",
            )
        with np.load(tmp_path / "trace.npz") as found:
            assert same_scores(found["rfm1_attn"], run.arrays["rfm1_attn"]), run.name
            compared += 1
    assert compared >= 6


def test_checkpoints_are_there() -> None:
    assert checkpoint("llama") is not None


EDGE_CASES = json.loads((ROOT / "edge_cases.json").read_text())


@pytest.mark.parametrize("size", [size for size, case in EDGE_CASES.items() if case["ok"]])
def test_odd_shapes_are_laid_out_as_in_the_reference(
    golden_bundles: dict[str, Path], tmp_path: Path, size: str
) -> None:
    """Counts that do not depend on the image's content, for sizes at the edges of the algorithm."""
    case = EDGE_CASES[size]
    width, height = map(int, size.split("x"))
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    with lrs_edge.load(golden_bundles["llama"], provider="cpu") as engine:
        engine.open(tmp_path / "image.png").ask(
            "What?",
            policy="reference",
            resampling="reference",
            max_tokens=1,
            trace=tmp_path / "trace.npz",
        )
    with np.load(tmp_path / "trace.npz") as found:
        layout = case["layout1"]
        rows, cols = found["seq1_local_hw_incl_newline"].tolist()
        assert (rows, cols) == (layout["local_rows"], layout["local_cols_incl_newline"])
        assert len(found["rfm1_attn"]) == layout["local"]
        assert len(found["topk1_raw_indices"]) == case["k1"]
        assert int(found["next_lvl_index_used"]) == case["lvl"]
        blocks = found["scale_infos_block_num_hw"][case["lvl"]]
        assert int(np.prod(blocks)) == case["tiles"][1]
        if len(found["next_selected_positions"]) == case["tiles"][0]:
            assert len(found["topk2_raw_indices"]) == case["k2"]
