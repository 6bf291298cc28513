"""Cores that may be used, and threads for them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import lrs_edge
from lrs_edge.engines import cores
from lrs_edge.errors import UsageError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight processors on four physical cores, and no control group; returns their folder."""
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "_TOPOLOGY", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(cores, "_allowed", lambda: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for number in range(8):
        (tmp_path / f"cpu{number}").write_text(f"{number // 2 * 2}-{number // 2 * 2 + 1}\n")
    return tmp_path


def test_the_engine_chooses_where_nothing_is_limited(machine: Path) -> None:
    assert machine.is_dir()
    assert cores.available_cores() == 8
    assert cores.thread_count(None) is None
    assert [cores.thread_count(wanted) for wanted in (1, 8, 64)] == [1, 8, 8]


@pytest.mark.usefixtures("machine")
def test_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: {0, 1, 4})
    assert cores.available_cores() == 3
    # Processors 0 and 1 share a core.
    assert cores.thread_count(None) == 2
    assert cores.thread_count(64) == 3


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "rubbish"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_quotas_of_containers_count(machine: Path, files: dict[str, str], limit: int) -> None:
    for name, text in files.items():
        (machine / name).parent.mkdir(exist_ok=True)
        (machine / name).write_text(text)
    assert cores.available_cores() == limit
    assert cores.thread_count(64) == limit
    assert cores.thread_count(None) == (None if limit == 8 else min(limit, 4))


@pytest.mark.parametrize("wanted", [0, -1, -64, True, 1.5, "2", np.int64(-1)])
def test_counts_that_are_none(wanted: object) -> None:
    with pytest.raises(UsageError, match="whole number of at least 1"):
        cores.thread_count(wanted)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="whole number of at least 1"):
        lrs_edge.load(threads=wanted)  # type: ignore[arg-type]


def test_numpy_numbers_are_numbers() -> None:
    assert cores.thread_count(np.int64(1)) == 1  # type: ignore[arg-type]
