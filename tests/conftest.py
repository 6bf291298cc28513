"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden_data import CHECKPOINTS, checkpoint


@pytest.fixture(scope="session")
def golden_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles exported at fp32 from the golden checkpoints that are here, by variant."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge.export.bundle_writer import ExportOptions, export_bundle

    bundles = {}
    for variant in CHECKPOINTS:
        source = checkpoint(variant)
        if source is not None:
            target = tmp_path_factory.mktemp("bundles") / variant
            export_bundle(str(source), target, ExportOptions(parity=False))
            bundles[variant] = target
    return bundles
