"""Publishing our own bundle at an HTTPS endpoint (SPIFFE Federation, 5.2.1.3 and 5.2.2.3).

One document, to whoever asks with GET, without asking who that is. TLS shows an SVID of this host (https_spiffe), made
anew at half its life, or a certificate that the operator has (https_web). The parsing is h11's; connections are bounded
in number, bytes and time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

import h11
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import SectoolError, UsageError
from sectool.events import now_us
from sectool.identity.authority import HostAuthority, encode_key
from sectool.labels import LabelSet

log = logging.getLogger("sectool.spiffe")

MAX_CONNECTIONS: Final = 64
MAX_HEAD: Final = 8192  # bytes of a request
TIMEOUT_S: Final = 10.0  # for a connection, from its handshake to its end


def endpoint_path(host: str) -> str:
    """SPIFFE path of the identity that the endpoint of a host shows."""
    return f"/host/{host}/bundle-endpoint"


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def web_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS with a certificate chain and key from files, PEM. Raises UsageError."""
    context = _context()
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"{certificate} and {key} cannot be used for TLS: {error}", "both have to be PEM"
        ) from None
    return context


class SvidContext:
    """TLS with SVIDs of this host; `context` takes a new one whenever `renew` finds the one before half over."""

    def __init__(self, authority: HostAuthority) -> None:
        self._authority = authority
        self._renew_at_us = 0
        self.context = _context()
        self.spiffe_id = ""

    def renew(self, now: int) -> None:
        """Take a fresh SVID if it is time. Raises CredentialError when this host's CA cannot issue it."""
        if now < self._renew_at_us:
            return
        credential = self._authority.issue(endpoint_path(self._authority.host_name), LabelSet(), now)
        assert credential.leaf_key is not None
        chain = b"".join(
            x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
            for der in (credential.leaf_der, credential.host_der)
        )
        # ssl takes keys from files alone; this one is in memory and has no name.
        fd = os.memfd_create("svid", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(chain + encode_key(credential.leaf_key))
            self.context.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        self._renew_at_us, self.spiffe_id = credential.renew_at_us, credential.peer.spiffe_id


class Publisher:
    """Serves `document()` at every path."""

    def __init__(self, document: Callable[[], str], tls: ssl.SSLContext) -> None:
        """`document` is asked for each answer, so that it is always the present one."""
        self._document = document
        self._tls = tls
        self._open = 0

    async def listen(self, address: str, port: int) -> asyncio.Server:
        """Begin to serve. Raises SectoolError when the address cannot be had."""
        try:
            return await asyncio.start_server(
                self._accept, address, port, ssl=self._tls, ssl_handshake_timeout=TIMEOUT_S, limit=MAX_HEAD
            )
        except OSError as error:
            raise SectoolError(f"cannot listen on {address} port {port}: {error.strerror or error}") from None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                async with asyncio.timeout(TIMEOUT_S):
                    await self._answer(reader, writer)
        except (OSError, TimeoutError, h11.ProtocolError, ssl.SSLError) as error:
            log.debug("a client of the bundle endpoint went away: %s", type(error).__name__)
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        try:
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await reader.read(4096))
        except h11.RemoteProtocolError as error:
            self._send(connection, writer, error.error_status_hint, b"that is no request\n", "text/plain")
            await writer.drain()
            return
        if not isinstance(event, h11.Request):
            return
        if event.method == b"GET":
            self._send(connection, writer, 200, self._document().encode("utf-8"), "application/json")
        else:
            self._send(connection, writer, 405, b"only GET\n", "text/plain")
        await writer.drain()

    @staticmethod
    def _send(
        connection: h11.Connection, writer: asyncio.StreamWriter, status: int, body: bytes, kind: str
    ) -> None:
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            writer.write(connection.send(event) or b"")


async def publish(
    document: Callable[[], str],
    address: str,
    port: int,
    svids: SvidContext | None,
    web: ssl.SSLContext | None,
    ready: Callable[[str], None],
) -> None:
    """Serve until cancelled, with `svids` or with a `web` certificate; `ready` hears the endpoint's SPIFFE ID or ''."""
    if svids is not None:
        svids.renew(now_us())
    tls = svids.context if svids is not None else web
    assert tls is not None
    async with await Publisher(document, tls).listen(address, port):
        ready(svids.spiffe_id if svids is not None else "")
        while True:
            await asyncio.sleep(30.0)
            if svids is not None:
                svids.renew(now_us())
