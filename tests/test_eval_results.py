"""The results file: appended, resumed after a kill, merged, refused where it is of another run."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_edge.errors import LrsEdgeError, UsageError
from lrs_edge.evaluation import results
from lrs_edge.evaluation.results import open_results, read_results
from tests.evaluation import make_header, make_result

#: Characters of one to four bytes.
ANSWER = "zwei Häfen, 港 🚢"


def written(path: Path, count: int, **header: object) -> bytes:
    _, writer = open_results(path, make_header(**header))
    with writer:
        for index in range(count):
            writer.append(make_result(index, ANSWER))
    return path.read_bytes()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    written(path, 3)
    found = read_results([path])
    assert found.header == make_header()
    assert list(found) == [make_result(index, ANSWER) for index in range(3)]


def test_lines_are_there_as_soon_as_they_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _, writer = open_results(path, make_header())
    with writer:
        writer.append(make_result(0))
        assert len(read_results([path])) == 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_run_killed_anywhere_goes_on(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("killed") / "r.jsonl"
    header = {"model": "modèle 港"}
    whole = written(path, 3, **header)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n")
    known, writer = open_results(path, make_header(**header))
    with writer:
        assert sorted(known.by_index) == list(range(max(lines - 1, 0)))
        for index in range(3):
            if index not in known.by_index:
                writer.append(make_result(index, ANSWER))
    assert path.read_bytes() == whole


def test_other_settings_are_refused_and_the_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    before = written(path, 1)
    for changes in (
        {"options": {"policy": "full", "max_tiles": 9}},
        {"manifest_sha256": "00" * 32},
        {"questions": results.QuestionSource("questions.jsonl", "ef" * 32, "lrs-vqa", 4)},
        {"chunk": 1, "num_chunks": 2},
        {"lrs_edge": "0.2.0"},
    ):
        with pytest.raises(UsageError, match="other settings"):
            open_results(path, make_header(**changes))
    with pytest.raises(UsageError, match="max_tiles: None, not 9"):
        open_results(path, make_header(options={"policy": "full", "max_tiles": 9}))
    # The file's name is not what makes it the same file.
    renamed = results.QuestionSource("renamed.jsonl", "cd" * 32, "lrs-vqa", 4)
    open_results(path, make_header(questions=renamed))[1].__exit__()
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"my own notes", b"my own notes\n", b"{}\n", b"\n", b"{"])
def test_a_file_that_is_something_else_is_never_written_to(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    if content == b"{":
        # The first byte of a header that was cut off.
        open_results(path, make_header())[1].__exit__()
        return
    with pytest.raises(UsageError):
        open_results(path, make_header())
    assert path.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    whole = written(path, 2)
    path.write_bytes(whole.replace(b'{"index":0', b'{"index":"x"'))
    with pytest.raises(UsageError, match="line 2 is not what"):
        read_results([path])
    path.write_bytes(whole + b"[" * 200_000 + b"\n")
    with pytest.raises(UsageError, match="line 4 is not what"):
        read_results([path])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 10**400) for name in ("height", "tile_cols", "tiles_encoded", "vision", "sent")),
        *(("tile_rows", -1), ("width", 0), ("total", -1.0), ("index", -1), ("generated", -2)),
    ],
)
def test_numbers_that_no_run_has_are_refused(tmp_path: Path, field: str, value: float) -> None:
    path = tmp_path / "r.jsonl"
    whole = written(path, 1)
    changed = re.sub(rf'"{field}":[\d.]+'.encode(), f'"{field}":{value}'.encode(), whole)
    assert changed != whole
    path.write_bytes(changed)
    with pytest.raises(UsageError, match="line 2 is not what"):
        read_results([path])
    path.write_bytes(whole.replace(b'"tile":100', b'"tile":%d' % 10**400))
    with pytest.raises(UsageError, match="line 1 is not what"):
        read_results([path])


def test_questions_with_one_id_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _, writer = open_results(path, make_header())
    with writer:
        for index, text in enumerate(("two", "three", "two")):
            writer.append(make_result(index, text, question_id="FAIR_7"))
    assert [result.text for result in read_results([path])] == ["two", "three", "two"]


def test_giant_lines_and_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    written(path, 2)
    monkeypatch.setattr(results, "MAX_LINE_BYTES", 100)
    with pytest.raises(UsageError, match="a line of more than 100 bytes"):
        read_results([path])
    monkeypatch.setattr(results, "MAX_FILE_BYTES", 100)
    with pytest.raises(UsageError, match="is larger than"):
        read_results([path])
    with pytest.raises(UsageError, match="cannot be read"):
        read_results([tmp_path / "none.jsonl"])


def test_chunks_are_merged_from_several_files_or_one(tmp_path: Path) -> None:
    paths = [tmp_path / f"r{chunk}.jsonl" for chunk in range(2)]
    for chunk, path in enumerate(paths):
        _, writer = open_results(path, make_header(num_chunks=2, chunk=chunk))
        with writer:
            writer.append(make_result(chunk))
            writer.append(make_result(chunk + 2))
    merged = read_results(paths)
    assert [result.index for result in merged] == [0, 1, 2, 3]
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(paths[0].read_bytes() + paths[1].read_bytes())
    assert list(read_results([joined])) == list(merged)
    other = tmp_path / "other.jsonl"
    written(other, 1, model="another")
    with pytest.raises(UsageError, match=r"another run.*model"):
        read_results([paths[0], other])
    joined.write_bytes(paths[0].read_bytes() + other.read_bytes())
    with pytest.raises(UsageError, match="another run"):
        read_results([joined])


def test_of_two_results_for_one_question_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _, writer = open_results(path, make_header())
    with writer:
        writer.append(make_result(0, "", error="no memory", work=None))
        writer.append(make_result(0, "two"))
    (found,) = read_results([path])
    assert (found.text, found.error) == ("two", "")


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="locks are POSIX's")
    path = tmp_path / "r.jsonl"
    _, writer = open_results(path, make_header())
    with writer, pytest.raises(UsageError, match="another run is writing"):
        open_results(path, make_header())
    open_results(path, make_header())[1].__exit__()


def test_a_device_is_no_results_file() -> None:
    with pytest.raises(UsageError, match="not a regular file"):
        open_results(Path("/dev/null"), make_header())


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(LrsEdgeError, match="cannot be written"):
        open_results(tmp_path / "none" / "r.jsonl", make_header())


def test_a_line_begins_with_what_tells_header_from_result() -> None:
    """`_parsed` looks at the first bytes."""
    assert msgspec.json.encode(make_header()).startswith(b'{"schema"')
    assert not msgspec.json.encode(make_result(0)).startswith(b'{"schema"')
