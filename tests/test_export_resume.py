"""An export to 4 bits that is killed goes on, and says how long it takes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

from lrs_edge.errors import ExportError
from lrs_edge_export import ExportOptions, Precisions, export_bundle
from lrs_edge_export.bundle.target import check_target, replacing_folder
from lrs_edge_export.graphs import weight_file
from lrs_edge_export.quantization import planning
from lrs_edge_export.quantization.effort import Effort, Speed, spoken
from lrs_edge_export.quantization.results import Results
from lrs_edge_export.quantization.rounding import round_to_nearest
from lrs_edge_export.quantization.work_folder import WorkFolder, digest_of_files

#: Layers' matrices and the output projection that are rounded of the tiny checkpoint.
MATRICES = 3 * 5 + 1

#: Exports to 4 bits, and ends itself the hard way once so many results are kept.
KILLED = """
import os, signal, sys
from pathlib import Path
from lrs_edge_export import ExportOptions, Precisions, export_bundle
from lrs_edge_export.graphs import weight_file
from lrs_edge_export.quantization.work_folder import WorkFolder

weight_file.MIN_QUANTIZED = 1
checkpoint, target, work, most = sys.argv[1:]
put, names = WorkFolder.put, []

def counted(self, arrays, *name):
    put(self, arrays, *name)
    names.append(name)
    if sum("layers" in part for name in names for part in name) == int(most):
        os.kill(os.getpid(), signal.SIGKILL)

WorkFolder.put = counted
options = ExportOptions(
    precisions=Precisions(llm="int4-weight"), keep_higher=0.0, parity=False, work=Path(work)
)
export_bundle(checkpoint, Path(target), options)
"""


def options(**changes: Any) -> ExportOptions:
    asked = {"precisions": Precisions(llm="int4-weight"), "keep_higher": 0.0, "parity": False}
    return ExportOptions(**asked | changes)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that GPTQ has rounded; of small ones too."""
    shapes: list[tuple[int, ...]] = []
    gptq = weight_file.gptq

    def counted(weight: np.ndarray, *rest: Any, **more: Any) -> Any:
        shapes.append(weight.shape)
        return gptq(weight, *rest, **more)

    monkeypatch.setattr(weight_file, "MIN_QUANTIZED", 1)
    monkeypatch.setattr(weight_file, "gptq", counted)
    return shapes


def test_a_killed_export_goes_on(tmp_path: Path, rounded: list[tuple[int, ...]]) -> None:
    checkpoint, work = write_qwen(tmp_path / "checkpoint"), tmp_path / "work"
    export_bundle(str(checkpoint), tmp_path / "whole", options())
    assert len(rounded) == MATRICES
    rounded.clear()
    arguments = [str(checkpoint), str(tmp_path / "resumed"), str(work), "7"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "resumed").exists()
    # Calibration data, states before the second layer, matrices.
    assert len(list(work.iterdir())) == 9
    (left,) = tmp_path.glob(".resumed.*")
    assert (left / "new").is_dir()
    damaged = min(work.iterdir(), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-40])
    told: list[str] = []
    export_bundle(str(checkpoint), tmp_path / "resumed", options(work=work), told.append)
    # The damaged one and those that were not there.
    assert len(rounded) == MATRICES - 7 + 1
    assert "running the model over the calibration data" not in told
    assert any(str(left) in line for line in told)
    assert not list(tmp_path.glob(".resumed.*"))
    for name in ("llm.onnx", "llm.onnx.data", "embeddings.safetensors"):
        found, wanted = (tmp_path / place / name for place in ("resumed", "whole"))
        assert found.read_bytes() == wanted.read_bytes()
    assert not work.exists()


def leftover(target: Path, name: str, *, mark: bool = True, old: bool = False) -> Path:
    """A folder as an export of a target leaves it that is killed."""
    folder = target.with_name(f".{target.name}.{name}")
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "llm.onnx").touch()
    if old:
        (folder / "old").mkdir()
        (folder / "old" / "manifest.json").touch()
    if mark:
        (folder / ".lrs-edge-export").touch()
    return folder


def test_only_what_exports_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    ours = leftover(target, "abcd_123")
    others = [
        leftover(target, "work"),
        leftover(target, "abcd_124", mark=False),
        leftover(tmp_path / "bundles", "abcd_123"),
        leftover(tmp_path / "bundle.old", "abcd_123"),
    ]
    (leftover(target, "abcd_125") / "notes.txt").touch()
    (tmp_path / ".bundle.abcd_126").symlink_to(tmp_path / "bundles")
    told: list[str] = []
    known = {"mark": "manifest.json", "made_by": "a bundle", "force": False}
    check_target(target, **known, progress=told.append)
    assert [str(ours) in line for line in told] == [True]
    assert not ours.exists()
    assert all(path.is_dir() for path in (*others, tmp_path / ".bundle.abcd_125"))
    assert (tmp_path / ".bundle.abcd_126").is_symlink()


def test_what_another_export_writes_stays(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with replacing_folder(target) as folder:
        check_target(target, mark="manifest.json", made_by="a bundle", force=False)
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_that_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    leftover(target, "abcd_123", old=True)
    with pytest.raises(ExportError, match="--force"):
        check_target(target, mark="manifest.json", made_by="a bundle", force=False)
    assert [path.name for path in target.iterdir()] == ["manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_results_of_anything_else_are_not_taken(tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = WorkFolder(work, "checkpoint", "images")
    first.put({"x": np.arange(3)}, "llm", "layers.0")
    assert np.array_equal((first.get("llm", "layers.0") or {})["x"], np.arange(3))
    for other in (WorkFolder(work, "changed", "images"), WorkFolder(work, "checkpoint", "others")):
        assert other.get("llm", "layers.0") is None
    assert first.get("llm", "layers.1") is None
    assert first.get("llmlayers.0") is None
    (work / "notes.txt").touch()
    first.remove()
    # What somebody else put there stays.
    assert [path.name for path in work.iterdir()] == ["notes.txt"]


def test_calibration_images_that_change_are_others(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    before = digest_of_files(tmp_path)
    assert digest_of_files(tmp_path) == before
    (tmp_path / "a.png").write_bytes(b"three")
    assert digest_of_files(tmp_path) != before
    with pytest.raises(ExportError, match="is not a folder"):
        digest_of_files(tmp_path / "nowhere")


def test_a_work_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"name another folder with --work"):
        WorkFolder(tmp_path / "file" / "work", "key").put({"x": np.zeros(1)}, "name")


def test_kept_integers_are_those_that_were_rounded(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 45)).astype(np.float32)
    made = round_to_nearest(weight, 4, 32)
    effort = Effort({"llm": ([(7, 45)], 10)}, Speed(1e9, 1e-6), lambda _: None)
    results = Results("llm", WorkFolder(tmp_path, "key"), effort)
    assert results.rounded("a", 0, (7, 45), lambda: made) is made

    def refused() -> Any:
        raise AssertionError

    kept = results.rounded("a", 0, (7, 45), refused)
    assert np.array_equal(kept.integers, made.integers)
    assert np.array_equal(kept.scales, made.scales)
    other = round_to_nearest(weight[:3], 4, 32)
    assert results.rounded("a", 0, (3, 45), lambda: other) is other


def test_large_stages_are_kept_beside_the_target(
    tmp_path: Path, rounded: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MOST_WEIGHTS", 1)
    told: list[str] = []
    asked = ExportOptions(precisions=Precisions(llm="int4-weight"), parity=False)
    checkpoint = write_qwen(tmp_path / "checkpoint")
    export_bundle(str(checkpoint), tmp_path / "bundle", asked, told.append)
    assert any(str(tmp_path / ".bundle.work") in line for line in told)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "checkpoint"}
    # Down projections are kept higher by rule.
    assert len(rounded) == MATRICES - 3


# -- time ----------------------------------------------------------------------------------------


def test_what_is_left_is_estimated_before_and_corrected_on_the_way() -> None:
    now, told = [0.0], []
    shapes = [(1000, 1000)] * 100
    effort = Effort({"llm": (shapes, 0)}, Speed(1e12, 1e-4), told.append, lambda: now[0])
    assert effort.estimate == pytest.approx(100 * 100, rel=0.01)
    effort.announce()
    assert told == ["int4-weight should take about 2 h 50 min on this machine"]
    effort.begin()
    # A quarter was kept by an earlier export; the rest takes three times as long as expected.
    for _ in range(25):
        effort.did("llm", (1000, 1000), computed=False)
    assert effort.left() == pytest.approx(75 * 100, rel=0.01)
    for _ in range(25):
        now[0] += 300
        effort.did("llm", (1000, 1000), computed=True)
    assert effort.left() == pytest.approx(50 * 300, rel=0.01)
    assert told[-1] == "quantized 50% of the weights, about 4 h 10 min left"
    for _ in range(60):
        effort.did("llm", (1000, 1000), computed=True)
    assert effort.left() == 0


def test_times_are_spoken_as_people_do() -> None:
    times = {0.2: "1 s", 42: "42 s", 100: "2 min", 3000: "50 min", 7200: "2 h", 9000: "2 h 30 min"}
    assert {seconds: spoken(seconds) for seconds in times} == times
