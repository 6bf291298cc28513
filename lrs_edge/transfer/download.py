"""Fetching over HTTP: https alone, resumed where it broke off, never more bytes than are wanted.

Nothing that a server says is trusted: what arrives is bounded in size here, and checked by its hash
by those who call. A redirect may lead to another host, as hubs do, but not from https to anything
else; a token goes to the host that it is for.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, urlsplit

from lrs_edge import __version__
from lrs_edge.bundle.bundle import MANIFEST_NAME
from lrs_edge.errors import BundleError, LrsEdgeError, UsageError
from lrs_edge.transfer.writing import not_written, require_space

#: Seconds without a byte after which a connection counts as broken.
TIMEOUT = 30.0

#: Connections in a row that bring nothing, and connections for one file, before it is given up.
RETRIES, MAX_CONNECTIONS = 3, 100

_PIECE = 1 << 18
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_NOT_SATISFIABLE = 416


class _BrokenOffError(Exception):
    """A connection that failed in a way that another may not."""


def check_url(url: str, *, insecure: bool = False) -> SplitResult:
    """Parts of an address from which may be fetched.

    Args:
        url: As the user or a redirect names it.
        insecure: Takes http from any host; otherwise only from this machine.

    Raises:
        UsageError: It is no address, holds a password, or its scheme is refused.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{url[:200]!r} is not an address ({error})") from error
    if not url.isascii() or not url.isprintable() or " " in url or not host:
        raise UsageError(f"{url[:200]!r} is not an address")
    if parts.username is not None or parts.password is not None:
        raise UsageError("an address with a name or a password in it is refused; use HF_TOKEN")
    if parts.scheme == "https" or (parts.scheme == "http" and (insecure or _is_loopback(host))):
        return parts
    raise UsageError(
        f"{parts.scheme}://{host} is refused: only https is taken, and http of this machine"
        + (" (--insecure-http takes any)" if parts.scheme == "http" else "")
    )


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows few redirects, to addresses that could have been named in the first place."""

    max_redirections = _MAX_REDIRECTS
    # Python 3.10 does not know it.
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302

    def __init__(self, *, insecure: bool) -> None:
        self._insecure = insecure

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,  # noqa: ARG002
        headers: http.client.HTTPMessage,  # noqa: ARG002
        newurl: str,
    ) -> urllib.request.Request | None:
        """The next request. Raises LrsEdgeError where the address is refused."""
        if code not in _REDIRECTS:
            return None
        # urllib would read the body of a redirect into memory, however long it is.
        fp.close()
        old = urlsplit(req.full_url)
        try:
            new = check_url(newurl, insecure=self._insecure)
        except UsageError as error:
            raise LrsEdgeError(f"{old.hostname} redirects elsewhere: {error}") from error
        if (old.scheme, new.scheme) == ("https", "http"):
            raise LrsEdgeError(f"{old.hostname} redirects from https to http, which is refused")
        kept = dict(req.header_items())
        # Both are of the request before, and are made again.
        kept.pop("Host", None)
        kept.pop("Proxy-authorization", None)
        if (old.scheme, old.netloc) != (new.scheme, new.netloc):
            kept.pop("Authorization", None)
        return urllib.request.Request(newurl, headers=kept)  # noqa: S310


@dataclass
class Http:
    """Fetches from one server, and from where it redirects.

    Attributes:
        insecure: Takes http from other machines, too.
        token: Sent to the server that is asked, and to none that it redirects to.
        wait: Waits so many seconds before the next try.
    """

    insecure: bool = False
    token: str = field(default="", repr=False)
    wait: Callable[[float], None] = time.sleep

    def read(self, url: str, limit: int) -> bytes:
        """A small file, whole.

        Raises:
            BundleError: It has more than `limit` bytes.
            LrsEdgeError: It cannot be fetched.
        """
        for failures in range(RETRIES + 1):
            try:
                with self._open(url, 0) as response:
                    length, data = _length(response), b""
                    # One byte more than the limit tells that there are more.
                    wanted = limit + 1 if length is None else min(length, limit + 1)
                    while piece := self._piece(response, wanted - len(data)):
                        data += piece
            except _BrokenOffError as error:
                self._pause(url, failures, error)
                continue
            if len(data) > limit:
                raise BundleError(f"{_shown(url)} is larger than {limit} bytes")
            if length is None or length == len(data):
                return data
            self._pause(url, failures, _BrokenOffError("the connection ended early"))
        raise AssertionError("the last pause raises")

    def save(self, url: str, target: Path, limit: int, size: int | None = None) -> None:
        """A file, going on where `target` ends.

        What has arrived stays in `target` when this fails, for the next try. That the beginning is
        of the same file has to be seen from the hash of the whole.

        Args:
            url: Address.
            target: Holds nothing, or the beginning.
            limit: Most bytes that are taken.
            size: Bytes that the file must have, where that is known.

        Raises:
            BundleError: It is larger than `limit`, or of another size than `size`.
            LrsEdgeError: It cannot be fetched, or not be written.
        """
        failures = 0
        for _ in range(MAX_CONNECTIONS):
            have = target.stat().st_size if target.exists() else 0
            if have > (limit if size is None else size):
                target.unlink()
                have = 0
            if size is not None and have == size:
                target.touch()
                return
            try:
                if self._go_on(url, target, have, limit, size):
                    return
                problem = _BrokenOffError("the connection ended early")
            except _BrokenOffError as error:
                problem = error
            now = target.stat().st_size if target.exists() else 0
            failures = 0 if now > have else failures + 1
            if failures:
                self._pause(url, failures - 1, problem)
        raise _given_up(url, _BrokenOffError(f"{MAX_CONNECTIONS} connections broke off"))

    def _go_on(self, url: str, target: Path, have: int, limit: int, size: int | None) -> bool:
        """One connection; whether the file is whole now."""
        with self._open(url, have) as response:
            if response.status == _NOT_SATISFIABLE:
                # There is nothing behind what is here: either it is all, or it is another file.
                whole = _total(response) == have
                if not whole:
                    target.unlink()
                return whole
            start = _start(response)
            if start not in (0, have):
                raise _BrokenOffError("the server answers with another part than was asked for")
            length = _length(response)
            end = None if length is None else start + length
            if end is not None and end > limit:
                raise BundleError(f"{_shown(url)} has {end} bytes, more than the {limit} allowed")
            if size is not None and end is not None and end != size:
                raise BundleError(f"{_shown(url)} has {end} bytes, the manifest says {size}")
            require_space(target.parent, (end or size or start) - start)
            got = self._append(response, url, target, start, limit, end)
        if size is None:
            return end is None or got == end
        return got == size

    def _append(
        self, response: Any, url: str, target: Path, start: int, limit: int, end: int | None
    ) -> int:
        """Write what comes behind `start`, as far as `end`; bytes that the file has then."""
        got = start
        try:
            with target.open("r+b" if start else "wb") as file:
                file.seek(start)
                while piece := self._piece(
                    response, _PIECE if end is None else min(_PIECE, end - got)
                ):
                    got += len(piece)
                    if got > limit:
                        raise BundleError(f"{_shown(url)} has more than {limit} bytes")
                    file.write(piece)
        except OSError as error:
            raise not_written(target, error) from error
        return got

    @staticmethod
    def _piece(response: Any, count: int) -> bytes:
        """The next bytes, as soon as there are any, at most `count`. Raises _BrokenOffError."""
        try:
            # Not `read`, which waits for all of them, and loses those that came before a fault.
            data: bytes = response.read1(count) if count else b""
        except (OSError, http.client.HTTPException) as error:
            raise _BrokenOffError(str(error) or type(error).__name__) from error
        return data

    def _open(self, url: str, start: int) -> Any:
        """A response of status 200, 206, or 416 where a part was asked for."""
        parts = check_url(url, insecure=self.insecure)
        headers = {"User-Agent": f"lrs-edge/{__version__}", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        opener = urllib.request.OpenerDirector()
        # No handlers of files, data and FTP. Proxies are for what is not on this machine.
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=ssl.create_default_context()),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            _Redirects(insecure=self.insecure),
        ]
        if not _is_loopback(parts.hostname or ""):
            handlers.append(urllib.request.ProxyHandler())
        for handler in handlers:
            opener.add_handler(handler)
        try:
            return opener.open(
                urllib.request.Request(url, headers=headers),  # noqa: S310
                timeout=TIMEOUT,
            )
        except urllib.error.HTTPError as error:
            if error.code == _NOT_SATISFIABLE and start:
                return error
            error.close()
            raise _refused(url, error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _failed(url, error) from error

    def _pause(self, url: str, failures: int, problem: _BrokenOffError) -> None:
        """Wait before the next try. Raises LrsEdgeError after too many."""
        if failures >= RETRIES:
            raise _given_up(url, problem)
        self.wait(float(1 << failures))


def _refused(url: str, error: urllib.error.HTTPError) -> Exception:
    """The error for a status; one of those that pass is worth another try."""
    said = f"HTTP {error.code} {error.reason}"
    if error.code in _RETRIED:
        return _BrokenOffError(said)
    advice = "check the address"
    if error.code in (401, 403):
        advice += ", and set HF_TOKEN where the repository is private"
    elif url.endswith(f"/{MANIFEST_NAME}"):
        advice = "no bundle is there; `lrs-edge export` makes one of a checkpoint"
    return LrsEdgeError(f"{_shown(url)} cannot be fetched: {said}; {advice}")


def _failed(url: str, error: Exception) -> Exception:
    """The error for a connection that failed; some failures are worth another try."""
    reason = getattr(error, "reason", error)
    said = str(reason) or type(reason).__name__
    if isinstance(reason, (ssl.SSLCertVerificationError, socket.gaierror, ValueError)):
        return LrsEdgeError(f"{_shown(url)} cannot be fetched: {said}")
    return _BrokenOffError(said)


def _given_up(url: str, problem: _BrokenOffError) -> LrsEdgeError:
    return LrsEdgeError(
        f"{_shown(url)} cannot be fetched: {problem}; run the command again: what has arrived is "
        "kept"
    )


def _shown(url: str) -> str:
    """An address without its query, which may be a secret."""
    return url.partition("?")[0]


def _length(response: Any) -> int | None:
    """Bytes of the response's body as its header says; None where it does not."""
    value = response.headers.get("Content-Length", "")
    if response.headers.get("Transfer-Encoding") or not re.fullmatch(r"[0-9]{1,1000}", value):
        return None
    return int(value)


def _start(response: Any) -> int:
    """Where in the file the body begins; -1 where a part is given that cannot be understood."""
    if response.status != http.client.PARTIAL_CONTENT:
        return 0
    value = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes ([0-9]{1,1000})-[0-9]{1,1000}/(?:[0-9]{1,1000}|\*)", value)
    return int(found[1]) if found else -1


def _total(response: Any) -> int | None:
    """Bytes of the whole file, as a refusal of a part says."""
    found = re.fullmatch(r"bytes \*/([0-9]{1,1000})", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None
