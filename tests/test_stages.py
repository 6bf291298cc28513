"""Which provider the stages are loaded on."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest

from lrs_edge.bundle.bundle import Bundle, default_bundle_path, open_bundle
from lrs_edge.engines import placement as stages
from lrs_edge.engines.base import BackendOptions
from lrs_edge.errors import BackendError, BundleError


@dataclass(frozen=True)
class Loaded:
    provider: str
    warnings: tuple[str, ...] = ()


def bundle_of(floats: str) -> Bundle:
    bundle = open_bundle(default_bundle_path(), verify=False)
    manifest = msgspec.structs.replace(
        bundle.manifest,
        rfm=msgspec.structs.replace(bundle.manifest.rfm, floats=floats),
        llm=msgspec.structs.replace(bundle.manifest.llm, floats=floats),
    )
    return Bundle(bundle.path, manifest)


def broken_cuda(_bundle: Bundle, options: BackendOptions, _kv_cache: str) -> Loaded:
    if options.provider != "cpu":
        raise BackendError("no driver")
    return Loaded(options.provider)


def test_bundles_without_cuda_kernels_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_load", lambda _bundle, options, _kv: Loaded(options.provider))
    for floats, provider in (("float32", "cpu"), ("float16", "auto")):
        assert stages.load_stages(bundle_of(floats), BackendOptions()).provider == provider
    insisted = stages.load_stages(bundle_of("float16"), BackendOptions("cuda"))
    assert insisted.provider == "cuda"


@pytest.mark.parametrize("part", ["rfm", "llm"])
def test_a_bundle_that_cuda_would_answer_wrongly_is_refused(part: str) -> None:
    sound = bundle_of("float16")
    assert stages.runs_on_cuda(sound.manifest)
    changed = msgspec.structs.replace(getattr(sound.manifest, part), floats="float32")
    manifest = msgspec.structs.replace(sound.manifest, **{part: changed})
    assert not stages.runs_on_cuda(manifest)
    with pytest.raises(BundleError, match="lrs-edge export CHECKPOINT --target cuda"):
        stages.load_stages(Bundle(sound.path, manifest), BackendOptions("cuda"))


def test_a_gpu_that_does_not_work_is_told_in_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_load", broken_cuda)
    loaded = stages.load_stages(bundle_of("float16"), BackendOptions())
    assert loaded.provider == "cpu"
    assert "no driver" in loaded.warnings[0]
    with pytest.raises(BackendError, match="no driver"):
        stages.load_stages(bundle_of("float16"), BackendOptions("cuda"))
