"""Heads of widths that onnxruntime's attention does not take as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

from lrs_edge.building.stage_graphs import write_std_graph
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge_export.bundle.options import ExportOptions
from lrs_edge_export.bundle.writer import export_bundle
from tests import transformers_parity as parity
from tests.test_building_std import CAPACITY, assert_agree
from tests.test_family_llava_1_5 import TILE, written


@pytest.mark.parametrize(("width", "buffer"), [(24, 24), (20, 24)])
def test_every_graph_of_a_bundle(tmp_path: Path, width: int, buffer: int) -> None:
    """Export's own check of each, int8 buffers too; the cut model answers as the whole one."""
    _, folder = written(tmp_path / "hf", text={"head_dim": width})
    # Calibrating int8 buffers takes a while; filled ones are the case.
    filled = width != buffer
    options = ExportOptions(rfm_layers=1, attention_layers=(1,), int8_kv=filled)
    report = export_bundle(str(folder), tmp_path / "bundle", options).report
    assert report is not None
    assert {stage.stage for stage in report.stages} >= {"vision", "rfm", "llm"}
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.llm.head_dim == buffer
    image = parity.image_file(tmp_path / "image.png", 2 * TILE, 2 * TILE)
    whole = parity.asked(tmp_path / "bundle", image, prune="none")
    cut = parity.asked(tmp_path / "bundle", image, prune="fastv", prune_ratio=0.0)
    np.testing.assert_allclose(cut.logits, whole.logits, atol=1e-3)
    assert cut.ids == whole.ids


def test_graphs_for_tensorrt(tmp_path: Path) -> None:
    _, folder = written(tmp_path / "hf", text={"head_dim": 20})
    bundle = open_bundle(parity.exported(folder, tmp_path / "bundle", rfm_layers=1))
    manifest = bundle.manifest
    graphs = ("rfm", manifest.rfm, "gqa"), ("rfm", manifest.rfm, "masked")
    for stage, spec, flavour in (*graphs, ("llm", manifest.llm, "gqa-rest")):
        assert spec is not None
        masked = flavour == "masked"
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path, masked=masked, floats="float32")
        assert_agree(graph.path, bundle.graph(spec.path(flavour)), masked=masked)
