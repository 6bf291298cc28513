"""The golden runs on an NVIDIA GPU; skipped where onnxruntime has no CUDA provider."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lrs_edge
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import BundleError
from tests.golden_data import CHECKPOINTS, checkpoint, load_run, run_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers(),
        reason="onnxruntime has no CUDA provider here",
    ),
]


@pytest.fixture(scope="module")
def cuda_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of the golden checkpoints for CUDA: everything float16."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export.bundle.writer import ExportOptions, export_bundle

    bundles = {}
    for variant in CHECKPOINTS:
        source = checkpoint(variant)
        if source is not None:
            bundles[variant] = tmp_path_factory.mktemp("cuda") / variant
            options = ExportOptions(parity=False, target="cuda")
            export_bundle(str(source), bundles[variant], options)
    return bundles


def test_float32_bundles_are_refused(golden_bundles: dict[str, Path]) -> None:
    for bundle in golden_bundles.values():
        with pytest.raises(BundleError, match="--target cuda"):
            lrs_edge.load(bundle, provider="cuda")


@pytest.mark.parametrize("budget", [None, 200])
@pytest.mark.parametrize("name", [name for name in run_names() if "700x500" in name])
def test_golden_answers_on_cuda(
    name: str, budget: int | None, cuda_bundles: dict[str, Path]
) -> None:
    """The CPU's tokens, with and without a cache that is compacted on the device."""
    variant, run = name.split("_", maxsplit=1)[0], load_run(name)
    if variant not in cuda_bundles:
        pytest.skip("only a part of the golden data is here")
    tokens = []
    for provider in ("cpu", "cuda"):
        with lrs_edge.load(cuda_bundles[variant], provider=provider) as engine:
            assert engine.provider == provider
            scene = engine.open(run.image)
            answer = scene.ask(run.info["question"], kv_budget=budget, max_tokens=8)
            tokens.append(np.array(answer.token_ids))
    assert np.array_equal(*tokens)
