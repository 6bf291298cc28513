"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden_data import CHECKPOINTS, checkpoint
from tests.scripts import REAL_SCENES, Importer, scripts

#: Why a test may be skipped in CI, which installs all that can be installed: other reasons fail it.
ALLOWED_SKIPS = (
    "onnxruntime has no CUDA provider here",
    "root may read all",
    "the reference fails on this size",
    "no integer is NaN",
    # Of the golden data a clone holds a part.
    "only a part of the golden data is here",
    "the golden checkpoint",
    "the golden image stage is not here",
    "the training data is not here",
)
_REFUSED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin a list of skips that CI does not accept."""
    config.stash[_REFUSED] = []


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Look at modules that are skipped as a whole."""
    report = yield
    _look_at(collector.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Look at tests that are skipped."""
    report = yield
    _look_at(item.config, report)
    return report


def _look_at(config: pytest.Config, report: Any) -> None:
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if os.environ.get("CI") == "true" and not reason.startswith(ALLOWED_SKIPS):
        config.stash[_REFUSED].append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a test was skipped for want of something that CI should have installed."""
    if session.config.stash[_REFUSED] and session.exitstatus in (0, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say which skips fail the run."""
    for line in config.stash[_REFUSED]:
        terminalreporter.write_line(f"must not be skipped in CI: {line}", red=True)


@pytest.fixture(scope="session")
def golden_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles exported at fp32 from the golden checkpoints that are here, by variant."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export.bundle.writer import ExportOptions, export_bundle

    bundles = {}
    for variant in CHECKPOINTS:
        source = checkpoint(variant)
        if source is not None:
            target = tmp_path_factory.mktemp("bundles") / variant
            export_bundle(str(source), target, ExportOptions(parity=False))
            bundles[variant] = target
    return bundles


@pytest.fixture
def real_scenes() -> Iterator[Importer]:
    """Imports a script of models/nano/real_scenes."""
    with scripts(REAL_SCENES) as importer:
        yield importer
