"""The golden runs on an NVIDIA GPU; skipped where onnxruntime has no CUDA provider."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lrs_edge
from lrs_edge.backends.runtime import ort
from tests.golden_data import load_run, run_names
from tests.test_parity import check_run, trace_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers(),
        reason="onnxruntime has no CUDA provider here",
    ),
]


@pytest.mark.parametrize("name", [name for name in run_names() if "700x500" in name])
def test_golden_runs_on_cuda(name: str, golden_bundles: dict[str, Path], tmp_path: Path) -> None:
    variant = name.split("_", maxsplit=1)[0]
    if variant not in golden_bundles:
        pytest.skip("only a part of the golden data is here")
    with lrs_edge.load(golden_bundles[variant], provider="cuda") as engine:
        assert engine.provider == "cuda"
        check_run(load_run(name), trace_of(engine, load_run(name), tmp_path / "trace.npz"))


def test_the_kv_cache_is_compacted_on_the_device(golden_bundles: dict[str, Path]) -> None:
    run = load_run(run_names()[0])
    tokens = []
    for provider in ("cpu", "cuda"):
        with lrs_edge.load(golden_bundles["llama"], provider=provider) as engine:
            scene = engine.open(run.image)
            answer = scene.ask(run.info["question"], kv_budget=200, max_tokens=8)
            tokens.append(np.array(answer.token_ids))
    assert np.array_equal(*tokens)
