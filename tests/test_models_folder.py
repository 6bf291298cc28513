"""The folder of models, and bundles packed into one file: hostile names and archives included."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import lrs_edge
from lrs_edge.bundle.bundle import default_bundle_path, read_manifest
from lrs_edge.bundle.manifest import FileEntry
from lrs_edge.commands.main import run
from lrs_edge.errors import BundleError
from lrs_edge.transfer import archive, writing
from lrs_edge.transfer.archive import pack, unpack
from lrs_edge.transfer.folder import EMBEDDED, find_bundle, models_folder
from lrs_edge.transfer.members import check_members, is_plain_name
from tests.test_bundle import write_bundle

IMAGE = str(Path(__file__).parent.parent / "examples" / "coast.tif")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "models"
    monkeypatch.setenv("LRS_EDGE_MODELS", str(place))
    return place


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def content(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert run(["models", "list", "--format", "json"]) == 0
    return {model["name"]: model for model in json.loads(capsys.readouterr().out)}


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert models_folder() == tmp_path / "models"
    monkeypatch.setenv("LRS_EDGE_MODELS", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert models_folder() == tmp_path / "lrs-edge" / "models"
    # A relative path there is to be ignored, as XDG says.
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".local/share/lrs-edge/models"
    monkeypatch.setenv("LRS_EDGE_MODELS", "here")
    assert models_folder() == Path.cwd() / "here"


def test_packed_twice_is_the_same_and_comes_back_as_it_was(bundle: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.tar", tmp_path / "b.tar"
    packed = pack(bundle, first)
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    os.utime(copy / "llm.onnx", (1, 1))
    (copy / "llm.onnx").chmod(0o600)
    pack(copy, second)
    assert first.read_bytes() == second.read_bytes()
    assert packed.sha256 == hashlib.sha256(first.read_bytes()).hexdigest()
    assert packed.size == first.stat().st_size
    unpack(first, tmp_path / "out")
    assert content(tmp_path / "out") == content(bundle)
    # Other tools read it.
    with tarfile.open(first) as tar:
        assert tar.getnames()[0] == "manifest.json"
        assert sorted(tar.getnames()) == sorted(content(bundle))


def test_ask_finds_an_unpacked_model_by_name(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "carried.tar"
    assert run(["models", "pack", EMBEDDED, "-o", str(packed)]) == 0
    line = capsys.readouterr()
    assert line.out == f"{hashlib.sha256(packed.read_bytes()).hexdigest()}  {packed}\n"
    digest = hashlib.sha256((default_bundle_path() / "manifest.json").read_bytes()).hexdigest()
    assert digest in line.err
    assert run(["models", "unpack", str(packed), "--manifest-sha256", digest.upper()]) == 0
    assert capsys.readouterr().out == "carried\n"
    assert content(folder / "carried") == content(default_bundle_path())
    question = ["ask", IMAGE, "Is there a ship?", "-m", "carried", "--max-tiles", "2", "-q"]
    assert run(question) == 0
    assert capsys.readouterr().out.strip()
    assert run(["info", IMAGE, "-m", "carried"]) == 0
    assert run([*question[:4], "absent"]) == 4
    with lrs_edge.load("carried") as engine:
        assert engine.manifest == read_manifest(folder / "carried")


def test_list_verify_and_remove(
    bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listed(capsys).keys() == {EMBEDDED}
    assert not folder.exists()
    pack(bundle, tmp_path / "tiny.tar")
    assert run(["models", "unpack", str(tmp_path / "tiny.tar")]) == 0
    # Whoever copies a bundle there by hand has it found, not verified.
    shutil.copytree(bundle, folder / "by-hand")
    (folder / "no-bundle").mkdir()
    found = listed(capsys)
    assert found["tiny"]["source"] == str(tmp_path / "tiny.tar")
    assert found["tiny"]["verified"].endswith("Z")
    assert found["tiny"]["size"] > 0
    assert found["by-hand"]["verified"] is None
    assert found["no-bundle"]["problem"]
    assert run(["models", "verify", "by-hand"]) == 0
    assert listed(capsys)["by-hand"]["verified"]
    assert run(["models", "list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    changed = folder / "tiny" / "llm.onnx"
    changed.write_bytes(bytes(changed.stat().st_size))
    assert listed(capsys)["tiny"]["verified"] is None
    assert run(["models", "verify", "tiny"]) == 4
    assert listed(capsys)["tiny"]["verified"] is None
    assert run(["models", "remove", "tiny", "--yes"]) == 0
    assert not (folder / "tiny").exists()
    assert listed(capsys).keys() == {EMBEDDED, "by-hand", "no-bundle"}


def test_remove_takes_nothing_but_bundles_of_the_folder(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("keep")
    shutil.copytree(bundle, folder / "mixed")
    (folder / "mixed" / "mine.txt").write_text("keep")
    (folder / "link").symlink_to(bundle)
    names = ["notes", "mixed", "link", "absent", "../bundle", str(bundle), ".", "", EMBEDDED]
    for name in names:
        assert run(["models", "remove", "--yes", "--", name]) == 2, name
    shutil.copytree(bundle, folder / "tiny")
    # Nobody can be asked here.
    assert run(["models", "remove", "tiny"]) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert run(["models", "remove", "tiny"]) == 1
    assert (folder / "tiny").is_dir()
    assert (folder / "notes" / "mine.txt").is_file()
    assert (folder / "mixed" / "mine.txt").is_file()
    assert content(bundle)


def test_a_damaged_model_can_be_removed(bundle: Path, folder: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "tiny.tar")
    assert run(["models", "unpack", str(tmp_path / "tiny.tar")]) == 0
    (folder / "tiny" / "manifest.json").write_bytes(b"{")
    assert run(["models", "remove", "tiny", "-y"]) == 0
    assert not (folder / "tiny").exists()


def test_a_folder_where_one_stands_comes_before_a_model(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, folder / "tiny")
    monkeypatch.chdir(tmp_path)
    assert find_bundle(Path("tiny")) == folder / "tiny"
    (tmp_path / "tiny").mkdir()
    assert find_bundle(Path("tiny")) == folder / "tiny"
    (tmp_path / "tiny" / "manifest.json").write_text("{}")
    assert find_bundle(Path("tiny")) == Path("tiny")
    assert find_bundle(Path("absent")) == Path("absent")
    assert find_bundle(Path(EMBEDDED)) == default_bundle_path()


def test_names_that_are_taken_or_cannot_be(
    bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "tiny.tar"
    pack(bundle, packed)
    for name in ["../up", "a/b", ".hidden", "-x", "x" * 65, "a b", EMBEDDED, "end.", "nul"]:
        assert run(["models", "unpack", str(packed), f"--name={name}"]) == 2, name
    assert run(["models", "unpack", str(packed)]) == 0
    assert run(["models", "unpack", str(packed)]) == 2
    assert run(["models", "unpack", str(packed), "--name", "other"]) == 0
    out = tmp_path / "elsewhere"
    assert run(["models", "unpack", str(packed), "-o", str(out)]) == 0
    assert content(out) == content(bundle)
    assert run(["models", "unpack", str(packed), "-o", str(out)]) == 2
    assert run(["models", "unpack", str(packed), "-o", str(tmp_path / "no" / "x")]) == 2
    assert run(["models", "pack", str(bundle), "-o", str(bundle / "x.tar")]) == 2
    assert run(["models", "unpack", str(tmp_path / "absent.tar")]) == 1
    assert run(["models", "unpack", str(packed), "--name", "w", "--manifest-sha256", "12"]) == 2
    wrong = ["--manifest-sha256", "0" * 64]
    assert run(["models", "unpack", str(packed), "--name", "w", *wrong]) == 4
    assert run(["models", "unpack", str(packed), "--name", "w", "--max-size", "1e-7"]) == 4
    assert sorted(path.name for path in folder.iterdir()) == [
        ".partial",
        ".records",
        "other",
        "tiny",
    ]
    assert list((folder / ".partial").iterdir()) == []
    assert "bug" not in capsys.readouterr().err


NOT_TAKEN = ["../x", "/x", "a/../x", "./x", "a//b", "a\\b", "C:x", "nul", "COM1.txt", "a/con/b"]
NOT_TAKEN += ["x.", "x ", "a\nb", "x" * 101, "", ".", "a/", "a*"]


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_file_names_that_are_not_taken(name: str, bundle: Path) -> None:
    assert not is_plain_name(name)
    manifest = read_manifest(bundle)
    files = {**manifest.files, name: FileEntry("x", 0, "")}
    with pytest.raises(BundleError):
        check_members(msgspec.structs.replace(manifest, files=files))


CLASHING = [("A", "a"), ("a", "a/b"), ("D/x", "d/y"), ("\u00e9", "e\u0301"), ("\u00df", "ss")]
CLASHING += [("MANIFEST.json",), ("manifest.json",), ("A", "a/b")]


@pytest.mark.parametrize("names", CLASHING)
def test_file_names_that_clash(names: tuple[str, ...], bundle: Path) -> None:
    manifest = read_manifest(bundle)
    files = {**manifest.files, **{name: FileEntry("x", 0, "") for name in names}}
    with pytest.raises(BundleError):
        check_members(msgspec.structs.replace(manifest, files=files))
    plain = {**manifest.files, "sub/a": FileEntry("x", 0, ""), "sub/b.c": FileEntry("x", 0, "")}
    assert check_members(msgspec.structs.replace(manifest, files=plain)) > 0
    huge = {**manifest.files, "a": FileEntry("x", 1 << 62, "")}
    negative = {**manifest.files, "a": FileEntry("x", -1, "")}
    for files in (huge, negative):
        with pytest.raises(BundleError):
            check_members(msgspec.structs.replace(manifest, files=files))


def archived(bundle: Path, change: Callable[[tarfile.TarFile, dict[str, bytes]], None]) -> bytes:
    """A tar archive as `pack` would write it, but for what a test adds to or takes from it."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.GNU_FORMAT) as tar:
        files = content(bundle)
        add(tar, "manifest.json", files.pop("manifest.json"))
        change(tar, files)
        for name, data in files.items():
            add(tar, name, data)
    return written.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def renamed(files: dict[str, bytes]) -> None:
    files["LLM.onnx"] = files.pop("llm.onnx")


HOSTILE: dict[str, Callable[[tarfile.TarFile, dict[str, bytes]], None]] = {
    "up": lambda tar, _: add(tar, "../up.txt", b"x"),
    "absolute": lambda tar, _: add(tar, "/tmp/lrs-edge-absolute", b"x"),
    "link": lambda tar, _: add(tar, "llm.onnx", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": lambda tar, _: add(tar, "llm.onnx", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": lambda tar, _: add(tar, "null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "pipe": lambda tar, _: add(tar, "pipe", type=tarfile.FIFOTYPE),
    "folder": lambda tar, _: add(tar, "sub", type=tarfile.DIRTYPE),
    "long name": lambda tar, _: add(tar, "x" * 200, b"x"),
    "unlisted": lambda tar, _: add(tar, "more.txt", b"x"),
    "twice": lambda tar, files: add(tar, "llm.onnx", files["llm.onnx"]),
    "manifest again": lambda tar, _: add(tar, "manifest.json", b"{}"),
    "missing": lambda _, files: files.pop("llm.onnx") and None,
    "other bytes": lambda _, files: files.update({"llm.onnx": bytes(len(files["llm.onnx"]))}),
    "other size": lambda _, files: files.update({"llm.onnx": b"x"}),
    "other case": lambda _, files: renamed(files),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives(kind: str, bundle: Path, tmp_path: Path, folder: Path) -> None:
    packed = tmp_path / "hostile.tar"
    packed.write_bytes(archived(bundle, HOSTILE[kind]))
    before = content(tmp_path)
    assert run(["models", "unpack", str(packed)]) == 4
    assert content(tmp_path) == before
    assert list(folder.rglob("*")) == [folder / ".partial"]
    assert not Path("/tmp/lrs-edge-absolute").exists()


def test_the_archive_that_hostile_ones_are_made_of_is_taken(bundle: Path, tmp_path: Path) -> None:
    packed = tmp_path / "plain.tar"
    packed.write_bytes(archived(bundle, lambda *_: None))
    assert run(["models", "unpack", str(packed)]) == 0


def test_archives_that_are_none_or_cut_short_or_too_long(
    bundle: Path, tmp_path: Path, folder: Path
) -> None:
    packed = tmp_path / "x.tar"
    whole = tmp_path / "whole.tar"
    pack(bundle, whole)
    data = whole.read_bytes()
    bad = [b"", b"x" * 600, bytes(2048), data[:100], data[:5000], data[:-1024], data[:-512]]
    bad += [data + b"x" * 512, data + bytes(1 << 20), b"\x1f\x8b" + data]
    for number, content_ in enumerate(bad):
        packed.write_bytes(content_)
        assert run(["models", "unpack", str(packed)]) == 4, number
    # A header that claims more than any file has, in binary and in octal.
    for size in (1 << 60, (8 << 30) - 1):
        info = tarfile.TarInfo("manifest.json")
        info.size = size
        packed.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + data[512:])
        assert run(["models", "unpack", str(packed)]) == 4
    assert run(["models", "unpack", str(tmp_path)]) == 1
    assert list(folder.rglob("*")) == [folder / ".partial"]


def test_no_space_is_said_before_anything_is_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    pack(bundle, tmp_path / "x.tar")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    assert run(["models", "unpack", str(tmp_path / "x.tar")]) == 1
    assert list(folder.rglob("*")) == [folder / ".partial"]


def test_pack_refuses_what_is_not_whole(bundle: Path, tmp_path: Path) -> None:
    (bundle / "llm.onnx").write_bytes(b"x")
    assert run(["models", "pack", str(bundle), "-o", str(tmp_path / "x.tar")]) == 4
    assert not (tmp_path / "x.tar").exists()


def test_sizes_of_more_than_8_gib_fit_into_a_header() -> None:
    header = archive._header("weights.data", 20 << 30)
    assert len(header) == archive.BLOCK
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == 20 << 30


def test_a_bundle_is_found_in_a_process_of_its_own(bundle: Path, folder: Path) -> None:
    shutil.copytree(bundle, folder / "tiny")
    done = subprocess.run(
        [sys.executable, "-m", "lrs_edge", "models", "verify", "tiny"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


#: Runs a command in a process that cannot write more than 400 bytes into a file.
SHORT_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
from lrs_edge.commands.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["unpack", "pack", "pull"])
def test_a_disk_that_is_full_leaves_nothing(
    command: str, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "tiny.tar"
    pack(bundle, packed)
    arguments = {
        "unpack": ["unpack", str(packed)],
        "pack": ["pack", str(bundle), "-o", str(tmp_path / "new.tar")],
        "pull": ["pull", str(bundle)],
    }[command]
    before = content(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SHORT_FILES, "models", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert content(tmp_path) == before
    assert [path for path in folder.rglob("*") if path.name != ".partial"] == []


def test_a_record_that_cannot_be_read_is_none(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle, folder / "tiny")
    (folder / ".records").mkdir()
    for data in (b"", b"{", b"[1]", b'{"source": 1}', b"\xff"):
        (folder / ".records" / "tiny.json").write_bytes(data)
        assert listed(capsys)["tiny"]["verified"] is None
    assert run(["models", "verify", "tiny"]) == 0
    assert listed(capsys)["tiny"]["verified"]
