"""Files appear whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lrs_edge.files import check_replaceable, replacing


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


def test_permissions_of_a_file_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "secret"
    target.write_text("old")
    for mode in (0o600, 0o640, 0o664):
        target.chmod(mode)
        with replacing(target) as stream:
            (part,) = (path for path in tmp_path.iterdir() if path != target)
            assert stat.S_IMODE(part.stat().st_mode) & ~mode == 0
            stream.write(b"new")
        assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "a.txt", tmp_path / "link"
    link.symlink_to("folder/a.txt")
    for text in (b"first", b"second"):
        with replacing(link) as stream:
            stream.write(text)
        assert link.is_symlink()
        assert target.read_bytes() == text


def test_pipes_and_devices_are_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    check_replaceable(pipe)
    with replacing(pipe) as stream:
        stream.write(b"text")
    reader.join()
    assert found == [b"text"]
    check_replaceable(Path(os.devnull))
    with replacing(Path(os.devnull)) as stream:
        stream.write(b"text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_standard_output_is_appended_to_where_it_is_a_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lrs_edge.files import *\n"
        "check_replaceable(Path(sys.argv[1]))\n"
        "with replacing(Path(sys.argv[1])) as stream: stream.write(b'new')"
    )
    log = tmp_path / "log"
    for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        log.write_text("old ")
        with log.open("ab") as stream:
            subprocess.run([sys.executable, "-c", code, name], stdout=stream, check=True)
        assert log.read_text() == "old new"


def test_threads_do_not_get_into_each_others_way(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    together = threading.Barrier(8)

    def write(number: int) -> None:
        with replacing(target) as stream:
            together.wait()
            stream.write(f"{number}".encode() * 10_000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(set(target.read_text())) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_the_longest_name_can_be_written_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    longest = tmp_path / ("x" * 255)
    check_replaceable(longest)
    with replacing(longest) as stream:
        stream.write(b"x")
    with pytest.raises(OSError, match="too long"):
        check_replaceable(tmp_path / ("x" * 256))


@pytest.mark.parametrize("name", ["no/file", "", "file/below", "/proc/nothing", "/dev/fd/9876"])
def test_what_cannot_be_written_is_found_out_before(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="Errno"):
        check_replaceable(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
