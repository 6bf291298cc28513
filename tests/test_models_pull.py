"""`lrs-edge models pull` from a server that breaks off, lies and redirects, on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request

import pytest

from lrs_edge.bundle.bundle import default_bundle_path
from lrs_edge.commands.main import run
from lrs_edge.errors import BundleError, LrsEdgeError, UsageError
from lrs_edge.transfer import download
from lrs_edge.transfer.archive import pack
from lrs_edge.transfer.download import Http, check_url
from lrs_edge.transfer.pull import PullOptions, find_remote, pull
from tests.http_server import Served, serving
from tests.test_bundle import write_bundle
from tests.test_models_folder import SHORT_FILES, content

LARGE = "/b/embeddings.safetensors"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "models"
    monkeypatch.setenv("LRS_EDGE_MODELS", str(place))
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "LRS_EDGE_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return place


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def served(bundle: Path) -> Iterator[Served]:
    """A bundle as a folder `/b/` and packed as `/b.tar`."""
    packed = bundle.parent / "b.tar"
    pack(bundle, packed)
    files = {f"/b/{name}": data for name, data in content(bundle).items()}
    with serving(Served({**files, "/b.tar": packed.read_bytes()})) as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(Http.__init__, "__defaults__", (False, "", waited.append))
    return waited


def left(folder: Path) -> list[str]:
    """What of bundles and downloads is left; locks and empty folders are no matter."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


@pytest.mark.parametrize("path", ["/b/", "/b", "/b/manifest.json", "/b.tar"])
def test_pulled_from_an_address(
    path: str, served: Served, bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["models", "pull", served.url + path]) == 0
    captured = capsys.readouterr()
    assert captured.out == "b\n"
    assert content(folder / "b") == content(bundle)
    assert [name for name in left(folder) if ".partial" in name] == []
    asked = len(served.log)
    # It is there already: nothing is asked for again.
    assert run(["models", "pull", served.url + path, "--offline", "-q"]) == 0
    assert len(served.log) == asked
    capsys.readouterr()
    assert run(["models", "list", "--format", "json"]) == 0
    found = {model["name"]: model for model in json.loads(capsys.readouterr().out)}["b"]
    assert found["source"].startswith(f"{served.url}/b")
    assert found["verified"]


def test_the_embedded_model_travels_and_answers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"/m/{name}": data for name, data in content(default_bundle_path()).items()}
    image = str(Path(__file__).parent.parent / "examples" / "coast.tif")
    with serving(Served(files, cut={"/m/llm.onnx.data": [9_000_000]})) as server:
        assert pull(f"{server.url}/m/", PullOptions(name="far")) == folder / "far"
        assert server.asked("/m/llm.onnx.data")[1:] == ["bytes=9000000-"]
    assert run(["ask", image, "Is there a ship?", "-m", "far", "--max-tiles", "2", "-q"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_connection_that_breaks_off_goes_on(
    served: Served, bundle: Path, folder: Path, waits: list[float]
) -> None:
    served.cut = {LARGE: [100, 200], "/b.tar": [1000, 0, 500]}
    pull(f"{served.url}/b/", PullOptions())
    assert served.asked(LARGE) == [None, "bytes=100-", "bytes=300-"]
    pull(f"{served.url}/b.tar", PullOptions(name="packed"))
    assert served.asked("/b.tar") == [None, "bytes=1000-", "bytes=1000-", "bytes=1500-"]
    # Only a connection that brought nothing is waited after.
    assert waits == [1.0]
    assert content(folder / "b") == content(folder / "packed") == content(bundle)


@pytest.mark.parametrize(("path", "large"), [("/b/", LARGE), ("/b.tar", "/b.tar")])
def test_a_pull_that_is_killed_goes_on(
    path: str, large: str, tmp_path: Path, bundle: Path, folder: Path
) -> None:
    # More than what is kept in buffers on the way.
    (bundle / "MODEL_CARD.md").write_bytes(b"x" * 300_000)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["files"]["MODEL_CARD.md"] = {
        "role": "card",
        "size": 300_000,
        "sha256": hashlib.sha256(b"x" * 300_000).hexdigest(),
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    pack(bundle, tmp_path / "b.tar")
    files = {f"/b/{name}": data for name, data in content(bundle).items()}
    large = "/b/MODEL_CARD.md" if path == "/b/" else large
    files["/b.tar"] = (tmp_path / "b.tar").read_bytes()
    with serving(Served(files, held={large: 200_000})) as server:
        command = [sys.executable, "-m", "lrs_edge", "models", "pull", server.url + path]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            assert server.standing.wait(60)
            partial = folder / ".partial"
            while not any(p.stat().st_size > 100_000 for p in partial.rglob("*") if p.is_file()):
                assert process.poll() is None
            process.kill()
        assert not (folder / "b").exists()
        server.log.clear()
        assert run(["models", "pull", server.url + path]) == 0
        (asked,) = server.asked(large)
    assert asked is not None
    assert int(asked.removeprefix("bytes=").rstrip("-")) > 100_000
    assert content(folder / "b") == content(bundle)


def test_a_server_without_ranges(served: Served, bundle: Path, folder: Path) -> None:
    served.ranges = False
    served.cut = {LARGE: [100], "/b.tar": [1000]}
    pull(f"{served.url}/b/", PullOptions())
    pull(f"{served.url}/b.tar", PullOptions(name="packed"))
    assert served.asked(LARGE) == [None, "bytes=100-"]
    assert content(folder / "b") == content(folder / "packed") == content(bundle)


@pytest.mark.parametrize(("path", "large"), [("/b/", LARGE), ("/b.tar", "/b.tar")])
def test_what_has_arrived_is_kept_for_the_next_pull(
    path: str, large: str, served: Served, bundle: Path, folder: Path, waits: list[float]
) -> None:
    served.cut = {large: [300, 0, 0, 0, 0]}
    with pytest.raises(LrsEdgeError, match="run the command again"):
        pull(served.url + path, PullOptions())
    assert waits == [1.0, 2.0, 4.0]
    assert not (folder / "b").exists()
    served.log.clear()
    served.cut.clear()
    pull(served.url + path, PullOptions())
    assert served.asked(large) == ["bytes=300-"]
    # Files that were whole are not asked for again.
    if path == "/b/":
        assert served.asked("/b/manifest.json") == [None]
        assert len(served.log) < len(content(bundle))
    assert content(folder / "b") == content(bundle)


@pytest.mark.parametrize(("path", "large"), [("/b/", LARGE), ("/b.tar", "/b.tar")])
def test_a_beginning_of_another_file_is_fetched_again(
    path: str, large: str, served: Served, bundle: Path, folder: Path, waits: list[float]
) -> None:
    whole = served.files[large]
    served.files[large] = bytes(len(whole))
    served.cut = {large: [300, 0, 0, 0, 0]}
    with pytest.raises(LrsEdgeError, match="run the command again"):
        pull(served.url + path, PullOptions())
    assert waits
    served.files[large] = whole
    served.cut.clear()
    pull(served.url + path, PullOptions())
    assert content(folder / "b") == content(bundle)


def test_a_packed_file_that_was_whole_is_not_fetched_again(
    served: Served, folder: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lrs_edge.transfer.pull.unpack", killed)
        with pytest.raises(KeyboardInterrupt):
            pull(f"{served.url}/b.tar", PullOptions())
    pull(f"{served.url}/b.tar", PullOptions())
    assert served.asked("/b.tar") == [None, f"bytes={len(served.files['/b.tar'])}-"]
    assert content(folder / "b") == content(bundle)


@pytest.mark.parametrize("size", ["same", "longer", "shorter", "endless"])
def test_wrong_bytes_leave_nothing(size: str, served: Served, folder: Path) -> None:
    data = served.files[LARGE]
    served.files[LARGE] = {
        "same": bytes(len(data)),
        "longer": data + b"x",
        "shorter": data[:-1],
        "endless": data + bytes(1 << 22),
    }[size]
    if size == "endless":
        served.lengths[LARGE] = None
    assert run(["models", "pull", f"{served.url}/b/", "-q"]) == 4
    assert not (folder / "b").exists()
    assert not any(name.endswith("embeddings.safetensors") for name in left(folder)) or (
        size == "endless"
    )
    # Not one byte more than the manifest says is kept.
    assert all((folder / name).stat().st_size <= len(data) + (1 << 16) for name in left(folder))


def test_wrong_bytes_in_a_packed_file(served: Served, folder: Path) -> None:
    data = bytearray(served.files["/b.tar"])
    data[len(data) // 2] ^= 1
    served.files["/b.tar"] = bytes(data)
    assert run(["models", "pull", f"{served.url}/b.tar", "-q"]) == 4
    assert left(folder) == []


def test_a_manifest_that_is_too_long_or_names_what_it_may_not(
    served: Served, folder: Path, tmp_path: Path
) -> None:
    good = served.files["/b/manifest.json"]
    for name in ("../../x", "/tmp/lrs-edge-x", "LLM.onnx", "a\\b"):
        manifest = json.loads(good)
        manifest["files"][name] = {"role": "x", "size": 1, "sha256": "0" * 64}
        served.files["/b/manifest.json"] = json.dumps(manifest).encode()
        served.log.clear()
        assert run(["models", "pull", f"{served.url}/b/", "-q"]) == 4, name
        assert {path for path, _, _ in served.log} == {"/b/manifest.json"}
    manifest = json.loads(good)
    manifest["files"]["llm.onnx"]["size"] = 1 << 60
    served.files["/b/manifest.json"] = json.dumps(manifest).encode()
    assert run(["models", "pull", f"{served.url}/b/", "-q"]) == 4
    served.files["/b/manifest.json"] = b" " * (2 << 20)
    assert run(["models", "pull", f"{served.url}/b/", "-q"]) == 4
    served.lengths["/b/manifest.json"] = None
    assert run(["models", "pull", f"{served.url}/b/", "-q"]) == 4
    assert not (tmp_path / "x").exists()
    assert not (folder / "b").exists()


def test_huge_sizes_are_refused_before_they_arrive(served: Served, folder: Path) -> None:
    served.lengths["/b.tar"] = 1 << 60
    assert run(["models", "pull", f"{served.url}/b.tar", "-q"]) == 4
    assert left(folder) == []


def test_the_manifest_that_is_wanted(served: Served, folder: Path) -> None:
    for path in ("/b/", "/b.tar"):
        line = ["models", "pull", served.url + path, "-q", "--manifest-sha256"]
        assert run([*line, "0" * 64]) == 4
        asked = len(served.log)
        assert run([*line, "zz"]) == 2
        assert len(served.log) == asked
    assert not (folder / "b").exists()


def test_redirects(served: Served, folder: Path, waits: list[float], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    data = served.files.pop(LARGE)
    with serving(Served({"/elsewhere": data})) as other:
        served.redirects[LARGE] = f"{other.url}/elsewhere"
        pull(f"{served.url}/b/", PullOptions(), http=Http(token="s3cret"))
        # The token is for the server that was asked.
        assert {token for _, _, token in served.log} == {"Bearer s3cret"}
        assert [token for _, _, token in other.log] == [None]
    shutil.rmtree(folder)
    for target in (
        f"file://{secret}",
        "ftp://127.0.0.1/x",
        "data:,x",
        "http://example.org/x",
        "http://10.0.0.1/x",
        "http://me:pw@127.0.0.1/x",
        f"{served.url}{LARGE}",
    ):
        served.redirects[LARGE] = target
        with pytest.raises(LrsEdgeError):
            pull(f"{served.url}/b/", PullOptions())
        assert not (folder / "b").exists()
    assert waits == []


def test_https_does_not_lead_to_http() -> None:
    handler = download._Redirects(insecure=True)
    request = Request("https://example.org/a", headers={"Range": "bytes=1-"})

    class Body:
        def close(self) -> None:
            """The body of a redirect is not read."""

    def follow(url: str) -> Request | None:
        return handler.redirect_request(request, Body(), 302, "", None, url)  # type: ignore[arg-type]

    with pytest.raises(LrsEdgeError, match="https to http"):
        follow("http://127.0.0.1/a")
    followed = follow("https://cdn.example.org/a")
    assert followed is not None
    assert followed.header_items() == [("Range", "bytes=1-")]


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_is_asked_again(
    status: int, served: Served, waits: list[float]
) -> None:
    served.statuses = {"/b/manifest.json": [status], LARGE: [status, status]}
    pull(f"{served.url}/b/", PullOptions())
    assert waits == [1.0, 1.0, 2.0]


def test_a_pull_goes_on_where_the_disk_was_full(served: Served, bundle: Path, folder: Path) -> None:
    line = [sys.executable, "-c", SHORT_FILES, "models", "pull", "-q"]
    done = subprocess.run(
        [*line, f"{served.url}/b.tar"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr
    assert not (folder / "b").exists()
    assert run(["models", "pull", f"{served.url}/b.tar", "-q"]) == 0
    assert served.asked("/b.tar")[-1] == "bytes=400-"
    assert content(folder / "b") == content(bundle)


def test_what_is_not_there(
    served: Served, waits: list[float], capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert run(["models", "pull", f"{served.url}/none/"]) == 1
    assert "no bundle is there" in capsys.readouterr().err
    assert run(["models", "pull", f"{served.url}/none.tar"]) == 1
    served.files.pop("/b/llm.onnx")
    assert run(["models", "pull", f"{served.url}/b/", "-q"]) == 1
    assert waits == []
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 2
    assert "bug" not in captured.err
    url = served.url
    served.url = ""
    assert not (folder / "b").exists()
    assert run(["models", "pull", f"{url}/b/", "-q"]) == 1


def test_a_repository_of_the_hub(
    served: Served, bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in content(bundle).items():
        served.files[f"/org/model/resolve/main/{name}"] = data
        served.files[f"/org/model/resolve/refs/pr/1/{name}"] = data
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    assert run(["models", "pull", "org/model", "-q"]) == 0
    assert run(["models", "pull", "org/model@refs/pr/1", "-q", "--name", "pr"]) == 0
    assert content(folder / "model") == content(folder / "pr") == content(bundle)
    assert {token for _, _, token in served.log} == {"Bearer s3cret"}
    remote = find_remote("org/model@v1", insecure=False)
    assert remote.url == f"{served.url}/org/model/resolve/v1/"
    assert "s3cret" not in repr(Http(token="s3cret"))


def test_pulled_from_this_machine(bundle: Path, folder: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "packed.tar")
    assert run(["models", "pull", str(bundle), "--offline"]) == 0
    assert run(["models", "pull", str(tmp_path / "packed.tar"), "--offline"]) == 0
    assert content(folder / "bundle") == content(folder / "packed") == content(bundle)
    (bundle / "llm.onnx").write_bytes(b"x")
    assert run(["models", "pull", str(bundle), "--name", "bad"]) == 4
    assert not (folder / "bad").exists()


@pytest.mark.parametrize("source", ["https://127.0.0.1:9/b/", "org/model", "org/model@main"])
def test_offline_looks_nowhere(source: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def looked(*_: object, **__: object) -> None:
        raise AssertionError("something was looked for")

    monkeypatch.setattr("socket.socket.connect", looked)
    monkeypatch.setattr("socket.getaddrinfo", looked)
    assert run(["models", "pull", source, "--offline"]) == 2
    for variable in ("LRS_EDGE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, "1")
        assert run(["models", "pull", source]) == 2
        monkeypatch.delenv(variable)
    assert not folder.exists()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/b/",
        "http://10.0.0.1/b/",
        "http://127.0.0.1.example.org/b/",
        "ftp://127.0.0.1/b/",
        "file:///etc/",
        "https://me:pw@example.org/b/",
        "https:///b/",
        "https://[::1/b/",
        "https://example.org:99999/b/",
        "https://example.org/a b/",
        "https://example.org/b/?x=1",
        "org",
        "a/b/c",
        "../x",
    ],
)
def test_sources_that_are_refused(url: str, folder: Path) -> None:
    assert run(["models", "pull", url]) == 2
    assert not folder.exists()


def test_addresses_that_are_taken() -> None:
    for url in (
        "https://example.org/b/",
        "http://127.0.0.1:8/b",
        "http://[::1]/b",
        "http://localhost",
    ):
        check_url(url)
    check_url("http://example.org/b/", insecure=True)
    with pytest.raises(UsageError):
        check_url("ftp://example.org/b/", insecure=True)
    remote = find_remote("https://example.org/x/m%31.tar?token=s3cret", insecure=False)
    assert (remote.name, remote.shown) == ("m1", "https://example.org/x/m%31.tar")
    assert remote.url.endswith("?token=s3cret")


def test_two_pulls_of_one_source_at_once(served: Served, folder: Path) -> None:
    pytest.importorskip("fcntl")

    class Meanwhile(Http):
        def read(self, url: str, limit: int) -> bytes:
            with pytest.raises(LrsEdgeError, match="another process"):
                pull(f"{served.url}/b/", PullOptions())
            return super().read(url, limit)

    assert pull(f"{served.url}/b/", PullOptions(), http=Meanwhile()) == folder / "b"


def test_a_file_system_without_locks_is_no_other_process(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert pull(f"{served.url}/b/", PullOptions()) == folder / "b"


def test_a_bundle_that_is_hostile_inside_is_not_taken(served: Served, folder: Path) -> None:
    # Hashes say that nobody changed it; what stands in it is looked at all the same.
    data = b'{"model": {"type": "Unigram"}}'
    manifest = json.loads(served.files["/b/manifest.json"])
    manifest["files"]["tokenizer.json"] |= {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    served.files["/b/manifest.json"] = json.dumps(manifest).encode()
    served.files["/b/tokenizer.json"] = data
    with pytest.raises(BundleError):
        pull(f"{served.url}/b/", PullOptions())
    assert left(folder) == []
