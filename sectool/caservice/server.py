"""The CA service's sockets: TLS 1.3, HTTP/1.1 by h11, bounded in connections, bytes, time and tries.

TLS shows a certificate for spiffe://<trust domain>/ca that the root has issued to this process, anew at half its life.
A client may show a certificate; what it is worth is judged by sectool.caservice.service, not by TLS alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import h11
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.caservice.service import Answer, RefusedError, Service
from sectool.clock import SECOND
from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.identity import rollover
from sectool.identity.authority import RootAuthority, encode_key

log = logging.getLogger("sectool.caservice")

MAX_CONNECTIONS: Final = 1024
MAX_HEAD: Final = 8192
MAX_BODY: Final = {"/v1/enroll": 32 * 1024, "/v1/sync": 2 << 20}
REQUEST_S: Final = 10.0  # to shake hands and to say a request, however slowly
WAIT_S: Final = 20.0  # how long `sync` waits for news
LOOK_S: Final = 0.25
TRIES: Final = 10.0  # enrolments an address may try at once; one more every TRY_S
TRY_S: Final = 6.0
FOLLOW_S: Final = 1.0
ADDRESSES: Final = 4096


class Tries:
    """A token bucket for each of the addresses seen last."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str, now_s: float) -> bool:
        """Whether the address may try now."""
        left, since = self._left.pop(address, (TRIES, now_s))
        left = min(TRIES, left + (now_s - since) / TRY_S)
        allowed = left >= 1
        self._left[address] = (left - 1 if allowed else left, now_s)
        if len(self._left) > ADDRESSES:
            self._left.popitem(last=False)
        return allowed


class Server:
    """One listening service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._tries = Tries()
        self._open = 0
        self._renew_at_us = 0
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_3
        self._tls.verify_mode = ssl.CERT_OPTIONAL
        self._tls.load_verify_locations(cadata=rollover.bundle(service.ca_dir).to_pem())

    def renew(self, now: int) -> None:
        """Take a fresh certificate if it is time; trust what the CA has for roots now."""
        if now < self._renew_at_us:
            return
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.service.root.issue_service(key.public_key(), now)
        fd = os.memfd_create("ca", os.MFD_CLOEXEC)  # ssl takes keys from files alone
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(certificate.public_bytes(Encoding.PEM) + encode_key(key))
            self._tls.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        self._renew_at_us = now + 12 * 3600 * SECOND

    def follow(self, load: Callable[[], RootAuthority]) -> None:
        """Go by the root that the folder has now: a rollover may have gone a step further."""
        current = rollover.status(self.service.ca_dir, now_us()).roots[0].certificate
        if current != self.service.root.certificate:
            self.service.root, self._renew_at_us = load(), 0
            self._tls.load_verify_locations(cadata=rollover.bundle(self.service.ca_dir).to_pem())
        self.renew(now_us())

    async def listen(self, address: str, port: int) -> asyncio.Server:
        """Begin to serve; SectoolError when the address cannot be had."""
        self.renew(now_us())
        try:
            return await asyncio.start_server(
                self._accept,
                address,
                port,
                ssl=self._tls,
                ssl_handshake_timeout=REQUEST_S,
                limit=MAX_HEAD * 8,
            )
        except OSError as error:
            raise SectoolError(f"cannot listen on {address} port {port}: {error.strerror or error}") from None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
                while await self._one(connection, reader, writer):
                    connection.start_next_cycle()
        except (OSError, TimeoutError, h11.ProtocolError, ssl.SSLError) as error:
            log.debug("a client went away: %s", type(error).__name__)
        except Exception:  # a defect must not end the service
            log.exception("a request could not be answered")
        finally:
            self._open -= 1
            with contextlib.suppress(OSError):
                writer.close()

    async def _one(
        self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """One request and its answer; whether there may be another."""
        answer: Answer | None = None
        try:
            async with asyncio.timeout(REQUEST_S):
                request, body = await self._read(connection, reader)
            if request is None:
                return False
            answer = await self._answer(request, body, writer)
        except RefusedError as refused:
            answer = Answer(refused.status, refused.message.encode() + b"\n")
        except h11.RemoteProtocolError as error:
            answer = Answer(error.error_status_hint, b"that is no request\n")
        except SectoolError as error:
            log.error("a request could not be answered: %s", error.message)
            answer = Answer(500, b"the CA cannot answer now\n")
        headers = [("Content-Type", answer.kind), ("Content-Length", str(len(answer.body)))]
        again = answer.status == 200
        if not again:
            headers.append(("Connection", "close"))
        for event in (h11.Response(status_code=answer.status, headers=headers), h11.Data(data=answer.body)):
            writer.write(connection.send(event) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        async with asyncio.timeout(REQUEST_S):
            await writer.drain()
        return again and connection.our_state is h11.DONE and connection.their_state is h11.DONE

    @staticmethod
    async def _read(
        connection: h11.Connection, reader: asyncio.StreamReader
    ) -> tuple[h11.Request | None, bytes]:
        request: h11.Request | None = None
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65_536))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
                path = request.target.decode("ascii", "replace") if request else ""
                if len(body) > MAX_BODY.get(path, 0):
                    raise RefusedError(413, "the body is too large")
            elif isinstance(event, h11.EndOfMessage):
                return request, bytes(body)
            else:  # closed, or paused, which a server that answers one by one is not
                return None, b""

    async def _answer(self, request: h11.Request, body: bytes, writer: asyncio.StreamWriter) -> Answer:
        what = request.method.decode("ascii", "replace"), request.target.decode("ascii", "replace")
        address = str((writer.get_extra_info("peername") or ("?",))[0])
        service = self.service
        if what == ("GET", "/v1/roots"):
            return Answer(200, rollover.bundle(service.ca_dir).to_pem().encode(), "application/x-pem-file")
        if what == ("POST", "/v1/enroll"):
            if not self._tries.take(address, time.monotonic()):
                raise RefusedError(429, "too many tries from this address; wait a minute")
            return service.enroll(body, now_us())
        if what == ("POST", "/v1/sync"):
            shown = writer.get_extra_info("ssl_object").getpeercert(True)
            if not shown:
                raise RefusedError(401, "show the certificate of an enrolled host")
            made, known = service.sync(shown, body, now_us())
            end = time.monotonic() + WAIT_S
            while not made and known and time.monotonic() < end:
                if service.digest_now(now_us(), time.monotonic()) != known:
                    break
                await asyncio.sleep(LOOK_S)
            return service.news(made, now_us())
        raise RefusedError(404, "there is nothing here")


async def serve(
    server: Server,
    address: str,
    port: int,
    ready: asyncio.Event | None = None,
    load: Callable[[], RootAuthority] | None = None,
) -> None:
    """Serve until cancelled. `load` gives the root anew when a rollover has replaced it."""
    load = load or (lambda: RootAuthority.load(server.service.ca_dir))
    async with await server.listen(address, port):
        if ready is not None:
            ready.set()
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                server.follow(load)
            except SectoolError as error:  # the old root's word is still good; it is said until somebody acts
                log.error(
                    "the root that was switched to cannot be used: %s; restart `sectool ca serve`",
                    error.message,
                )
