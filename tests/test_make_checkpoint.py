"""Random checkpoints in the released layout: names, shards, and that they can be exported."""

from __future__ import annotations

import json
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

from benchmarks.export_memory import largest_layer, watch
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge_export import ExportOptions, export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.tensors import open_tensors
from lrs_edge_export.families.registry import read_model
from scripts.make_checkpoint import SMALL_TOWER, Sizes, language_tensors, write_checkpoint
from tests.golden_data import ROOT

TINY = Sizes(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    intermediate=96,
    rows=320,
    vocabulary=300,
    rfm_layers=1,
)


def test_names_are_those_of_the_released_layout() -> None:
    path = ROOT / "checkpoint_keys.json"
    if not path.is_file():
        pytest.skip("only a part of the golden data is here")
    golden = json.loads(path.read_text())["llava_largeimg_Qwen2_tiny"]
    tower = "model.vision_tower."
    released = {name for name in golden if not name.startswith(tower)}
    made = {tensor.name for tensor in language_tensors(replace(TINY, layers=5, rfm_layers=2), 32)}
    assert made == released


def test_it_is_read_and_exported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "random", TINY, SMALL_TOWER, shard_bytes=100_000)
    assert len(list((tmp_path / "random").glob("model-*.safetensors"))) > 2
    model = read_model(find_checkpoint(str(tmp_path / "random")))
    assert (model.vocabulary, model.llm.config.layers, model.region_focus.config.layers) == (
        300,
        2,
        1,
    )
    weight = model.llm.read(0, "mlp.up_proj.weight")
    assert weight.std() == pytest.approx(1 / 8, rel=0.1)
    head = open_tensors(tmp_path / "random").shape("lm_head.weight")
    assert head == (320, 64)
    result = export_bundle(str(tmp_path / "random"), tmp_path / "bundle")
    assert result.manifest.parity.passed
    # Weights are beside the graphs, which protobuf limits to 2 GB.
    for name in open_bundle(tmp_path / "bundle").manifest.files:
        if name.endswith(".onnx"):
            assert (tmp_path / "bundle" / name).stat().st_size < 100_000


def test_memory_of_an_export_does_not_grow_with_layers(tmp_path: Path) -> None:
    peaks = []
    sizes = replace(TINY, hidden=256, intermediate=1024)
    for layers in (2, 12):
        source = tmp_path / f"random{layers}"
        write_checkpoint(source, replace(sizes, layers=layers), SMALL_TOWER)
        tracemalloc.start()
        try:
            target = tmp_path / f"bundle{layers}"
            export_bundle(str(source), target, ExportOptions(parity=False))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    grown = (tmp_path / "bundle12" / "llm.onnx.data").stat().st_size - (
        tmp_path / "bundle2" / "llm.onnx.data"
    ).stat().st_size
    assert grown > 30 << 20
    # Nodes and names of ten layers, no weights.
    assert peaks[1] - peaks[0] < 2 << 20


def test_the_largest_layer() -> None:
    decoder = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64 + 64 + 2 * 32
    assert largest_layer(language_tensors(TINY, 32)) == 4 * decoder
    wide = replace(TINY, rows=10_000)
    assert largest_layer(language_tensors(wide, 32)) == 4 * 10_000 * 64


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_of_a_process_is_seen_from_outside() -> None:
    size = 200_000_000
    code = f"import time; x = bytearray({size}); x[::4096] = b'1' * len(x[::4096]); time.sleep(0.3)"
    run = watch("test", [sys.executable, "-c", code])
    assert run.code == 0
    assert size < run.peak < 2 * size
    assert np.isclose(run.anonymous, size, rtol=0.3)
