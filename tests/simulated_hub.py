"""A hub on this machine: the few requests that the hub's client makes, answered from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

#: All repositories have one commit, which every branch and tag but `gone` names.
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class SimulatedHub:
    """What was asked of the hub, and how it behaves.

    Attributes:
        root: Folders `owner/model`.
        fetched: Paths of files of which bytes were sent, `owner/model/file`.
        resumed: Those that were asked for from some byte on.
        breaks: Paths whose first answer breaks off in the middle.
        tokens: Values of `Authorization` seen.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        self.resumed: list[str] = []
        self.breaks: set[str] = set()
        self.tokens: set[str | None] = set()

    @contextmanager
    def served(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[SimulatedHub]:
        """Serve, and point the hub's client here; its cache is a new one."""
        from huggingface_hub import constants

        server = _Server(self)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: SimulatedHub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        self.server.hub.tokens.add(self.headers.get("Authorization"))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._send_file("/".join([*parts[:2], *parts[4:]]))
        else:
            self._refuse("EntryNotFound")

    def _describe(self, name: str, what: list[str]) -> None:
        folder = self.server.hub.root / name
        if not folder.is_dir():
            return self._refuse("RepoNotFound")
        if what[1:] == ["gone"]:
            return self._refuse("RevisionNotFound")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}
        found: object = [
            {"type": "file", "path": path, "size": size, "oid": "0" * 40}
            for path, size in sizes.items()
        ]
        if what[:1] != ["tree"]:
            siblings = [{"rfilename": path, "size": size} for path, size in sizes.items()]
            found = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
        return self._send(200, json.dumps(found).encode(), {})

    def _send_file(self, name: str) -> None:
        hub = self.server.hub
        if not (hub.root / name).is_file():
            return self._refuse("EntryNotFound")
        data = (hub.root / name).read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self._send(200, data, headers)
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        hub.fetched.append(name)
        if start:
            hub.resumed.append(name)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        sent = data[start:]
        if name not in hub.breaks:
            return self._send(206 if start else 200, sent, headers)
        hub.breaks.remove(name)
        self.close_connection = True
        return self._send(200, sent, headers, len(sent) // 2)

    def _refuse(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code})

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], most: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:most])
