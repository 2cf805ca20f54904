"""One HTTP GET (or PUT without a body) with bounds on everything: time in all, bytes, headers. No proxies, no cookies.

http.client of the standard library does the parsing. What it does not have is added here: a deadline for the whole
exchange, whoever answers drop by drop, and a bound on the body.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from sectool.errors import SectoolError


@dataclass(frozen=True, slots=True)
class Response:
    """What came back; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def fetch(
    url: str,
    *,
    timeout_s: float,
    limit: int,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
    check: Callable[[ssl.SSLSocket], None] | None = None,
) -> Response:
    """Ask once, following nothing; at most `timeout_s` seconds in all and `limit` bytes of body.

    `tls` is needed for https; `check` looks at the connection after its handshake, before anything is asked. Raises
    SectoolError for whatever goes wrong; a status other than 200 is not an error here.
    """
    end = time.monotonic() + timeout_s
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    host = parts.hostname or ""
    port = parts.port or (443 if secure else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if parts.scheme not in ("http", "https") or not host or (secure and tls is None):
        raise SectoolError(f"{url[:200]!r} cannot be fetched", "write https://HOST[:PORT]/PATH")
    try:
        sock = _connect(host, port, end)
        with sock, sock.dup() as same:  # TLS takes the descriptor away from the first
            cut_off = threading.Timer(max(0.0, end - time.monotonic()), _shut, [same])
            cut_off.daemon = True
            cut_off.start()
            try:
                return _exchange(sock, host, port, target, method, dict(headers or {}), limit, tls, check)
            finally:
                cut_off.cancel()
    except ssl.SSLCertVerificationError as error:
        raise SectoolError(f"{host}:{port} is not who it should be: {error.verify_message}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= end:
            raise SectoolError(f"{host}:{port} has not answered within {timeout_s:g} s") from None
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SectoolError(f"{host}:{port} cannot be asked: {why}") from None


def _connect(host: str, port: int, end: float) -> socket.socket:
    """To the first address that takes the connection before the end."""
    last: OSError = OSError("no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(left)
            sock.connect(address)
        except OSError as error:
            sock.close()
            last = error
            continue
        return sock
    raise last


def _shut(sock: socket.socket) -> None:
    """Whoever reads or writes there gets an error at once."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended by itself


def _exchange(
    sock: socket.socket,
    host: str,
    port: int,
    target: str,
    method: str,
    headers: dict[str, str],
    limit: int,
    tls: ssl.SSLContext | None,
    check: Callable[[ssl.SSLSocket], None] | None,
) -> Response:
    if tls is not None:
        wrapped = tls.wrap_socket(sock, server_hostname=host)
        sock = wrapped
        if check is not None:
            check(wrapped)
    connection = http.client.HTTPConnection(host, port)
    connection.sock = sock
    try:
        connection.request(
            method, target, headers={"User-Agent": "sectool", "Connection": "close", **headers}
        )
        answer = connection.getresponse()
        body = answer.read(limit + 1)
        if len(body) > limit:
            raise SectoolError(f"{host}:{port} answers with more than {limit} bytes")
        return Response(answer.status, {k.lower(): v for k, v in answer.getheaders()}, body)
    finally:
        connection.close()
