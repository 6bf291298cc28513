"""`benchmarks.gpu` itself, on a CPU with small sizes: what it will do on a card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the benchmarks need the `export` extra")

import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.model import SMALL, write_model
from benchmarks.reference_torch.clip import ClipOnDevice
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.torch_model.vision import vision_tokens


@pytest.mark.slow
def test_all_of_it_runs(tmp_path: Path) -> None:
    found = gpu.measure(SMALL, "cpu", 600, list(gpu.STEPS), tmp_path)
    assert found["left_out"] == {}
    assert found["seconds"].keys() == set(gpu.STEPS)
    rows = found["ms"]
    for what in ("vision, a tile of 1", "prefill 64", "rfm, 96 tokens", "decode at 99"):
        assert rows[what].keys() == {"graph", "runtime", "torch", "floor"}
        assert min(rows[what].values()) > 0
    for precision in ("int8-weight", "int4-weight"):
        assert rows[f"decode at 99, {precision}"].keys() == {"graph", "floor"}
    assert len(found["ask"]) == 4
    shown = gpu.table(found)
    assert "| decode at 99 |" in shown
    assert "| PyTorch, first |" in shown


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    run = gpu.Run(SMALL, "cpu", tmp_path, ends=0.0)
    run.step("graphs", lambda _: None)
    run.ends = float("inf")
    run.step("ask", lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    left = run.results["left_out"]
    assert left["graphs"] == "no time left"
    assert left["ask"].startswith("ZeroDivisionError")
    assert "no time left" in gpu.table(run.results)


def test_the_references_tower_on_a_device_is_that_of_pytorch(tmp_path: Path) -> None:
    stage = read_model(find_checkpoint(str(write_model(SMALL, tmp_path)))).vision
    pixels = torch.randn(2, 3, stage.tile, stage.tile)
    with torch.inference_mode():
        found = ClipOnDevice(stage, "cpu", torch.float32)(pixels).numpy()
    wanted = vision_tokens(stage, pixels).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
