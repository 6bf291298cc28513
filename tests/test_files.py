"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrs_edge.files import replacing


def test_a_finished_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replacing(target) as stream:
        stream.write(b"new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
    (tmp_path / "b.txt").write_text("")
    assert target.stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(TypeError), replacing(target) as stream:
        stream.write("not bytes")  # type: ignore[arg-type]
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
