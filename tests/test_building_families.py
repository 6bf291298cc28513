"""Graphs for TensorRT of every kind of decoder and tower that transformers' families have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("transformers")

from lrs_edge.building.stage_graphs import write_std_graph, write_vision_graph
from lrs_edge.bundle.bundle import Bundle, open_bundle
from lrs_edge.engines.runtime import ort
from tests import (
    test_family_idefics3,
    test_family_internvl,
    test_family_llava_onevision,
    test_family_qwen_vl,
)
from tests import (
    transformers_parity as parity,
)
from tests.std_parity import CAPACITY, assert_agree, unlinked
from tests.tensorrt_builder import built

#: Queries and keys with norms, positions with three axes, vectors added after layers, norms and
#: scales in towers, tied and untied heads: each is in one of these.
WRITERS: dict[str, Callable[[Path], Any]] = {
    "Qwen2VL": lambda folder: test_family_qwen_vl.written(folder, "Qwen2VL"),
    "Qwen2_5_VL": lambda folder: test_family_qwen_vl.written(folder, "Qwen2_5_VL"),
    "Qwen3VL": lambda folder: test_family_qwen_vl.written(folder, "Qwen3VL"),
    "OneVision": lambda folder: test_family_llava_onevision.written(folder, tied=True),
    "InternVL": lambda folder: test_family_internvl.written(folder, test_family_internvl.LARGE),
    "SmolVLM": lambda folder: test_family_idefics3.written(
        folder, "SmolVLM", tile=64, patch=8, factor=2
    ),
}


@pytest.fixture(scope="module", params=WRITERS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One of its first layers is the RFM."""
    folder = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](folder / "hf")
    return open_bundle(parity.exported(folder / "hf", folder / "bundle", rfm_layers=1))


def test_decoders_compute_what_they_did(bundle: Bundle, tmp_path: Path) -> None:
    for stage, spec, flavour in (
        ("rfm", bundle.manifest.rfm, "gqa"),
        ("llm", bundle.manifest.llm, "gqa-rest"),
    ):
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path / "float32", floats="float32")
        assert_agree(graph.path, bundle.graph(spec.path(flavour)))
        graph = write_std_graph(bundle, stage, CAPACITY, tmp_path / "float16")
        assert_agree(graph.path, bundle.graph(spec.path(flavour)), limit=2e-2)


def test_towers_compute_what_they_did(bundle: Bundle, tmp_path: Path) -> None:
    spec = bundle.manifest.vision
    tiles = np.random.default_rng(0).standard_normal((2, 3, spec.tile, spec.tile))
    graph = write_vision_graph(bundle, tmp_path)
    found, wanted = (
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
            None, {"pixel_values": tiles.astype(np.float32)}
        )[0]
        for path in (unlinked(graph.path), bundle.graph(spec.path("plain")))
    )
    assert np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()


@pytest.mark.slow
def test_tensorrt_builds_all_of_it(bundle: Bundle, tmp_path: Path) -> None:
    built(write_vision_graph(bundle, tmp_path))
    for stage in ("rfm", "llm"):
        built(write_std_graph(bundle, stage, CAPACITY, tmp_path))
    if bundle.manifest.rfm.has("masked"):
        built(write_std_graph(bundle, "rfm", CAPACITY, tmp_path, masked=True))
