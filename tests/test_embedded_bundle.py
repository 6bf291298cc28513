"""A bundle of the embedded model's family, written again from its own weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

pytest.importorskip("torch", reason="exporting needs the `export` extra")

import lrs_edge
from benchmarks.embedded_bundle import write_bundle
from benchmarks.embedded_checkpoint import write_checkpoint
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.errors import BundleError
from lrs_edge_export import ExportOptions, export_bundle
from lrs_edge_export.bundle.options import Precisions
from tests.checkpoints import write_nano
from tests.rasters import noise, write
from tests.test_rfm_of_llm import without_rfm

QUESTION = "How many ships?"


def test_a_bundle_is_written_again_without_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_nano(tmp_path / "checkpoint")
    (checkpoint / "MODEL_CARD.md").write_text("Trained on ships.")
    options = ExportOptions(
        name="small", licence="CC0-1.0", parity=False, int8_kv=True, attention_layers=(1,)
    )
    old = tmp_path / "old"
    export_bundle(str(checkpoint), old, options)
    # What bundles of before could say of their integers.
    path = old / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exact_integers": False}))
    new = write_bundle(old, tmp_path / "new")

    before, after = open_bundle(old).manifest, open_bundle(new).manifest
    assert after.exact_integers
    assert before.llm.has(Flavour.GQA_INT8_KV)
    assert not after.llm.has(Flavour.GQA_INT8_KV)
    assert not list(new.glob("*int8_kv*"))
    assert after.llm.segments == before.llm.segments
    for name in ("name", "licence", "family", "limits", "search", "rfm"):
        assert getattr(after, name) == getattr(before, name), name
    assert "from the bundle of" in after.source.name
    assert "Trained on ships." in (new / "MODEL_CARD.md").read_text()
    image = write(tmp_path / "image.tif", noise(3, 90, 120))
    ids = []
    for bundle in (old, new):
        with lrs_edge.load(bundle, provider="cpu") as engine, engine.open(image) as scene:
            ids.append(scene.ask(QUESTION, max_tokens=6).token_ids)
    assert np.array_equal(*ids)


NECK = {"width": 48, "low": 40, "words": 5}


def check_same_graph(found: Path, wanted: Path) -> None:
    """Nodes are equal, weights as equal as a batch norm that adds nothing leaves them."""
    graphs = [onnx.load(path).graph for path in (found, wanted)]
    assert graphs[0].node == graphs[1].node, wanted.name
    tensors = [{t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in graphs]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[1].items():
        assert tensors[0][name].dtype == value.dtype, name
        np.testing.assert_allclose(tensors[0][name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "int8-weight"])
def test_a_neck_and_an_rfm_of_the_language_model_come_back(tmp_path: Path, precision: str) -> None:
    trained = write_nano(tmp_path / "trained", vision_neck=NECK)
    bare = without_rfm(trained, tmp_path / "bare")
    dynamic = "fp32" if precision == "fp32" else "int8-dynamic"
    options = ExportOptions(
        precisions=Precisions(precision, dynamic, dynamic), parity=False, rfm_layers=2
    )
    old = tmp_path / "old"
    export_bundle(str(bare), old, options)
    assert not (old / "rfm.onnx.data").exists()

    checkpoint = write_checkpoint(old, tmp_path / "checkpoint")
    names = set(load_file(checkpoint / "model.safetensors"))
    wanted = set(load_file(bare / "model.safetensors"))
    assert names == wanted | {"lm_head.weight"}
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["vision_neck"] == NECK
    assert config["rfm_from_llm"] == 2
    assert "llm_layer_list" not in config
    new = write_bundle(old, tmp_path / "new")
    assert {p.name for p in new.iterdir()} == {p.name for p in old.iterdir()}
    for name in ("vision.onnx", "rfm.onnx", "rfm_masked.onnx", "llm.onnx"):
        check_same_graph(new / name, old / name)


@pytest.mark.slow
def test_static_integers_become_what_they_were(tmp_path: Path) -> None:
    checkpoint = write_nano(tmp_path / "checkpoint", vision_neck=NECK)
    options = ExportOptions(
        precisions=Precisions(vision="int8-static"), parity=False, keep_higher=0.0
    )
    export_bundle(str(checkpoint), tmp_path / "bundle", options)
    found = load_file(write_checkpoint(tmp_path / "bundle", tmp_path / "new") / "model.safetensors")
    for name, wanted in load_file(checkpoint / "model.safetensors").items():
        # The tower's kernels come back with their batch norms in them.
        if name.startswith(
            ("model.vision_neck.", "model.mm_projector.mlp", "model.mm_projector.n")
        ):
            limit = 0.01 * np.abs(wanted).max()
            np.testing.assert_allclose(found[name], wanted, rtol=0, atol=limit, err_msg=name)


def test_a_bundle_without_rfm_stays_without(tmp_path: Path) -> None:
    bare = without_rfm(write_nano(tmp_path / "trained"), tmp_path / "bare")
    old = tmp_path / "old"
    export_bundle(str(bare), old, ExportOptions(parity=False))
    assert open_bundle(write_bundle(old, tmp_path / "new")).manifest.rfm is None


def test_other_families_are_refused(golden_bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="family"):
        write_bundle(golden_bundles["llama"], tmp_path / "new")
    assert not (tmp_path / "new").exists()
