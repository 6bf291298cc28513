"""A bundle of the embedded model's family, written again from its own weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")

import lrs_edge
from benchmarks.embedded_bundle import write_bundle
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.errors import BundleError
from lrs_edge_export import ExportOptions, export_bundle
from tests.checkpoints import write_nano
from tests.rasters import noise, write

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


def test_other_families_are_refused(golden_bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="family"):
        write_bundle(golden_bundles["llama"], tmp_path / "new")
    assert not (tmp_path / "new").exists()
