"""`/metrics` over HTTP/1.1, read-only, to whoever reaches the address: on loopback unless told otherwise.

h11 parses; connections are bounded in number, bytes and time. On loopback a request has to name the address or
`localhost`: a page in a browser on this host may not read it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Callable
from typing import Final

import h11

from sectool.errors import SectoolError, UsageError
from sectool.metrics.exposition import CONTENT_TYPE

log = logging.getLogger("sectool.metrics")

DEFAULT_PORT: Final = 9464
MAX_CONNECTIONS: Final = 16
MAX_HEAD: Final = 8192  # bytes of a request
TIMEOUT_S: Final = 20.0  # for a connection, all together
_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<v4>[0-9.]+))(?::(?P<port>[0-9]{1,5}))?")

Address = tuple[str, int]


def parse_address(text: str, *, remote: bool) -> Address:
    """`127.0.0.1:9464`, `[::1]:9464`, the port may be left out. Beyond loopback only if `remote`. Raises UsageError."""
    found = _ADDRESS.fullmatch(
        text.replace("localhost", "127.0.0.1", 1) if text.startswith("localhost") else text
    )
    try:
        if found is None:
            raise ValueError
        address = ipaddress.ip_address(found["v6"] or found["v4"])
        port = int(found["port"] or DEFAULT_PORT)
        if port > 65535:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{text!r} is not an address to listen on",
            f"write 127.0.0.1:{DEFAULT_PORT} or [::1]:{DEFAULT_PORT}",
        ) from None
    if not address.is_loopback and not remote:
        raise UsageError(
            f"{address} can be reached from other hosts, and the metrics are not protected",
            "listen on 127.0.0.1, or say --allow-remote and let policy say who may connect",
        )
    return str(address), port


class Endpoint:
    """Serves what `metrics()` gives (called in a thread) at /metrics."""

    def __init__(self, metrics: Callable[[], str], *, local: bool) -> None:
        """`local`: only requests that name a loopback address or localhost are answered."""
        self._metrics = metrics
        self._local = local
        self._open = 0

    async def listen(self, address: Address) -> asyncio.Server:
        """Begin to serve. Raises SectoolError when the address cannot be had."""
        try:
            return await asyncio.start_server(self._accept, *address, limit=MAX_HEAD)
        except OSError as error:
            raise SectoolError(
                f"cannot listen on {address[0]} port {address[1]}: {error.strerror or error}",
                "choose another port",
            ) from None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                async with asyncio.timeout(TIMEOUT_S):
                    await self._converse(reader, writer)
        except (OSError, TimeoutError, h11.ProtocolError) as error:
            log.debug("a client went away: %s", type(error).__name__)
        finally:
            self._open -= 1
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        try:
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await reader.read(4096))
        except h11.RemoteProtocolError as error:
            await _send(connection, writer, error.error_status_hint, "that is no request\n")
            return
        if isinstance(event, h11.Request):
            status, body = await self._answer(event)
            await _send(connection, writer, status, body)

    async def _answer(self, request: h11.Request) -> tuple[int, str]:
        if self._local and not _names_loopback(request):
            return 421, "this endpoint is known as 127.0.0.1 or localhost alone\n"
        if request.method != b"GET":
            return 405, "only GET\n"
        if request.target.partition(b"?")[0] != b"/metrics":
            return 404, "the metrics are at /metrics\n"
        try:
            return 200, await asyncio.to_thread(self._metrics)
        except SectoolError as error:
            log.warning("the metrics cannot be told: %s", error.message)
            return 503, f"{error.message}\n"


def _names_loopback(request: h11.Request) -> bool:
    """Whether the Host header (RFC 9110, 7.2) is an address of loopback or `localhost`, with any port."""
    host = next((value for name, value in request.headers if name == b"host"), b"").decode("ascii", "replace")
    name = re.sub(r":[0-9]+$", "", host)
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


async def _send(connection: h11.Connection, writer: asyncio.StreamWriter, status: int, body: str) -> None:
    data = body.encode()
    headers = [
        ("Content-Type", CONTENT_TYPE if status == 200 else "text/plain; charset=utf-8"),
        ("Content-Length", str(len(data))),
        ("Connection", "close"),
    ]
    for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=data), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()


async def serve(metrics: Callable[[], str], address: Address, *, ready: Callable[[int], None]) -> None:
    """Serve until cancelled; `ready` hears the port."""
    local = ipaddress.ip_address(address[0]).is_loopback
    async with await Endpoint(metrics, local=local).listen(address) as server:
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()
