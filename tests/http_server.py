"""A server on this machine that serves bytes, and misbehaves as a test asks."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Served:
    """What a server serves, and how.

    Attributes:
        files: Content by path, each path beginning with a slash.
        ranges: Whether parts are given where they are asked for.
        cut: Bytes of a body after which the connection ends, once per entry, by path.
        statuses: Statuses that are answered first, by path.
        redirects: Where a path leads to.
        lengths: What Content-Length says, by path, in place of the truth; None for nothing.
        held: Bytes of a body after which the connection stands still, once, by path.
        standing: Set when a connection stands still; it ends when the server does.
        log: Path, Range and Authorization of every request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    cut: dict[str, list[int]] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int | None] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    standing: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    log: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    url: str = ""

    def asked(self, path: str) -> list[str | None]:
        """Ranges that were asked for, of one path."""
        return [part for name, part, _ in self.log if name == path]


class Handler(BaseHTTPRequestHandler):
    served: Served

    def log_message(self, *_: object) -> None:
        """Nothing is written."""

    def do_GET(self) -> None:
        served = self.served
        path = unquote(self.path)
        part = self.headers.get("Range")
        served.log.append((path, part, self.headers.get("Authorization")))
        if served.statuses.get(path):
            self.send_error(served.statuses[path].pop(0))
        elif path in served.redirects:
            self.redirect(served.redirects[path])
        elif path not in served.files:
            self.send_error(404)
        else:
            self.answer(path, served.files[path], part)

    def redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def answer(self, path: str, data: bytes, part: str | None) -> None:
        served = self.served
        found = re.fullmatch(r"bytes=(\d+)-", part or "")
        start = int(found[1]) if found and served.ranges else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        length = served.lengths.get(path, len(data) - start)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        body = data[start:]
        if served.cut.get(path):
            body = body[: served.cut[path].pop(0)]
        held = served.held.pop(path, None)
        try:
            self.wfile.write(body[:held])
        except OSError:
            return
        if held is not None:
            served.standing.set()
            served.ended.wait()


@contextmanager
def serving(served: Served) -> Iterator[Served]:
    """Serve in a thread while the block runs."""
    handler = type("Serving", (Handler,), {"served": served})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield served
        finally:
            served.ended.set()
            server.shutdown()
            thread.join()
