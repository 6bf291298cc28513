"""Qwen-VL in int8 and int4: within the limits of every stage and of the whole way.

The checkpoints of `test_family_qwen_vl` have matrices too small to be quantized; these are wider.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

from lrs_edge_export.bundle.options import ExportOptions, Precisions
from lrs_edge_export.bundle.writer import export_bundle
from tests import test_family_qwen_vl as qwen_vl

#: Of the language model, of the tower, and of a head of the language model.
WIDTH, TOWER, HEAD = 256, 128, 64


def wider(kind: str) -> dict[str, Any]:
    """The configs of a tiny checkpoint, with matrices of 16,384 weights and more."""
    described = qwen_vl.CONFIGS[kind]
    rope = described["text_config"]["rope_parameters"] | {"mrope_section": [8, 12, 12]}
    text = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH // 2, "rope_parameters": rope}
    if "head_dim" in described["text_config"]:
        text["head_dim"] = HEAD
    vision: dict[str, Any] = {"embed_dim": TOWER, "hidden_size": WIDTH}
    if kind != "Qwen2VL":
        sizes = {"hidden_size": TOWER, "intermediate_size": 3 * TOWER // 2}
        vision = {**sizes, "out_hidden_size": WIDTH}
    return {
        "text_config": described["text_config"] | text,
        "vision_config": described["vision_config"] | vision | {"num_heads": 4},
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", qwen_vl.KINDS)
def test_every_precision_keeps_to_its_limits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(qwen_vl.CONFIGS, kind, wider(kind))
    _, folder = qwen_vl.written(tmp_path / "hf", kind)
    for precision in ("int8-weight", "int8-dynamic", "int4-weight"):
        # Nothing is kept higher, which is worse for numbers and needs no measuring.
        options = ExportOptions(precisions=Precisions.all(precision), rfm_layers=1, keep_higher=0.0)
        report = export_bundle(str(folder), tmp_path / precision, options).report
        assert report is not None
        stages = {stage.stage: stage for stage in report.stages}
        assert set(stages) == {"vision", "rfm", "llm", "pipeline"}
        for name in ("vision", "rfm", "llm"):
            assert stages[name].precision == precision
            # Something was rounded.
            assert stages[name].value("relative error") > 1e-4
        assert all(figure.passed for stage in report.stages for figure in stage.figures)
