"""As much of gRPC as the Workload API needs: one request, one answer or a stream of them, over a unix socket.

    message     00 (not compressed), length (4, big-endian), protobuf
    request     :method POST, :path /Service/Method, content-type application/grpc, te trailers, metadata
    answer      :status 200, content-type; messages; trailers grpc-status and grpc-message

Source: gRPC over HTTP/2 (grpc/grpc, doc/PROTOCOL-HTTP2.md). HTTP/2 itself, with its flow control, is the library h2's;
here are asyncio and the bounds: on streams, on what a request may hold, on how long somebody may say nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final, Generic, TypeVar
from urllib.parse import quote, unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes

from sectool.errors import SectoolError

log = logging.getLogger("sectool.spiffe")

C = TypeVar("C")

MAX_REQUEST: Final = 4096  # bytes of a request message
MAX_ANSWER: Final = 4 << 20  # bytes of a message that we are willing to receive as a client
MAX_HEADERS: Final = 8192
MAX_STREAMS: Final = 8  # at once, of a connection
MAX_CALLS: Final = 1000  # of a connection in all; then a new one has to be made
IDLE_S: Final = 60.0  # without any call
_READ: Final = 1 << 16
_PREFIX: Final = struct.Struct(">BI")


class Status(IntEnum):
    """Status codes (grpc/grpc, doc/statuscodes.md), those used here."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class GrpcError(SectoolError):
    """A call ends with a status other than OK."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


Method = Callable[[C, bytes], AsyncIterator[bytes]]


def framed(message: bytes) -> bytes:
    """A message as it goes over the wire."""
    return _PREFIX.pack(0, len(message)) + message


def unframed(body: bytes | bytearray, limit: int) -> tuple[list[bytes], int]:
    """The whole messages that `body` begins with, and how many bytes they take. Raises GrpcError."""
    out: list[bytes] = []
    at = 0
    while len(body) - at >= _PREFIX.size:
        compressed, length = _PREFIX.unpack_from(body, at)
        if compressed:
            raise GrpcError(Status.UNIMPLEMENTED, "compressed messages are not supported")
        if length > limit:
            raise GrpcError(
                Status.RESOURCE_EXHAUSTED, f"a message of {length} bytes; at most {limit} are read"
            )
        end = at + _PREFIX.size + length
        if len(body) < end:
            break
        out.append(bytes(body[at + _PREFIX.size : end]))
        at = end
    return out, at


@dataclass(slots=True)
class _Call:
    """One stream of a connection."""

    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)
    task: asyncio.Task[None] | None = None
    room: asyncio.Event = field(default_factory=asyncio.Event)
    answered: bool = False


class ServerConnection(Generic[C]):
    """One client of ours. `caller` is what every method is told of who asks."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        methods: Mapping[str, Method[C]],
        caller: C,
        required: tuple[str, str],
    ) -> None:
        """`required`: metadata without which no call is answered."""
        self._reader, self._writer = reader, writer
        self._methods, self._caller, self._required = methods, caller, required
        self._calls: dict[int, _Call] = {}
        self._made = 0
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self._h2.local_settings.update(
            {SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS, SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADERS}
        )

    async def run(self) -> None:
        """Serve until the client goes, breaks the protocol, or has asked nothing for long."""
        self._h2.initiate_connection()
        try:
            await self._flush()
            while data := await asyncio.wait_for(self._reader.read(_READ), None if self._calls else IDLE_S):
                for event in self._h2.receive_data(data):
                    self._hear(event)
                await self._flush()
        except (ProtocolError, UnicodeDecodeError, ValueError) as error:
            log.debug("a client of the Workload API breaks HTTP/2: %s", type(error).__name__)
            with contextlib.suppress(OSError):
                await self._flush()
        except (OSError, TimeoutError):
            log.debug("a client of the Workload API went away")
        finally:
            tasks = [call.task for call in self._calls.values() if call.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._writer.close()

    def _hear(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            assert event.stream_id is not None
            self._made += 1
            if self._made > MAX_CALLS:
                self._h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
                raise ProtocolError("too many calls on one connection")
            self._calls[event.stream_id] = _Call({str(k): str(v) for k, v in event.headers or ()})
        elif isinstance(event, DataReceived):
            self._h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            call = self._calls.get(event.stream_id or 0)
            if call is not None and len(call.body) <= MAX_REQUEST + _PREFIX.size:
                call.body += event.data or b""
        elif isinstance(event, StreamEnded):
            call = self._calls.get(event.stream_id or 0)
            if call is not None and call.task is None:
                call.task = asyncio.create_task(self._serve(event.stream_id or 0, call))
        elif isinstance(event, StreamReset):
            call = self._calls.pop(event.stream_id or 0, None)
            if call is not None and call.task is not None:
                call.task.cancel()
        elif isinstance(event, WindowUpdated):
            for call in self._calls.values():
                call.room.set()
        elif isinstance(event, ConnectionTerminated):
            raise ConnectionResetError

    async def _serve(self, stream: int, call: _Call) -> None:
        status, message = Status.OK, ""
        try:
            method, request = self._asked(call)
            async for answer in method(self._caller, request):
                if not call.answered:
                    call.answered = True
                    headers = [(":status", "200"), ("content-type", "application/grpc")]
                    self._h2.send_headers(stream, headers)
                await self._send(stream, call, framed(answer))
        except GrpcError as error:
            status, message = Status(error.status), error.message
        except (ProtocolError, OSError):
            self._calls.pop(stream, None)
            return  # the stream or the connection is gone
        except Exception:  # a defect in one call must not end the others
            log.exception("a call of the Workload API failed")
            status, message = Status.INTERNAL, "a defect in sectool; see agent.log"
        with contextlib.suppress(ProtocolError, OSError):
            self._end(stream, call, status, message)
            await self._flush()
        self._calls.pop(stream, None)

    def _asked(self, call: _Call) -> tuple[Method[C], bytes]:
        name, value = self._required
        if call.headers.get(name) != value:
            raise GrpcError(Status.INVALID_ARGUMENT, f"the metadata {name}: {value} is missing")
        kind = call.headers.get("content-type", "")
        if call.headers.get(":method") != "POST" or not kind.startswith("application/grpc"):
            raise GrpcError(Status.INVALID_ARGUMENT, "that is no gRPC call")
        method = self._methods.get(call.headers.get(":path", ""))
        if method is None:
            raise GrpcError(Status.UNIMPLEMENTED, "there is no such method here")
        messages, taken = unframed(call.body, MAX_REQUEST)
        if len(messages) != 1 or taken != len(call.body):
            raise GrpcError(Status.INVALID_ARGUMENT, "a call has exactly one request message")
        return method, messages[0]

    async def _send(self, stream: int, call: _Call, data: bytes) -> None:
        """All of `data`, as fast as the client takes it."""
        view = memoryview(data)
        while view:
            window = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if window <= 0:
                call.room.clear()
                await call.room.wait()
                continue
            self._h2.send_data(stream, bytes(view[:window]))
            view = view[window:]
            await self._flush()

    def _end(self, stream: int, call: _Call, status: Status, message: str) -> None:
        trailers = [("grpc-status", str(int(status)))]
        if message:
            trailers.append(("grpc-message", quote(message, safe=" /:;,.()'=<>")))
        if not call.answered:  # headers and trailers in one
            trailers = [(":status", "200"), ("content-type", "application/grpc"), *trailers]
        self._h2.send_headers(stream, trailers, end_stream=True)

    async def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._writer.write(data)
            await self._writer.drain()


async def call(
    socket: Path, path: str, request: bytes, metadata: Mapping[str, str], *, connect_s: float = 5.0
) -> AsyncIterator[bytes]:
    """Call a streaming method of a server at a unix socket; its messages as they come.

    Ends when the server ends the stream with OK. Raises GrpcError with its status otherwise; UNAVAILABLE when it cannot
    be reached or breaks off.
    """
    try:
        async with asyncio.timeout(connect_s):
            reader, writer = await asyncio.open_unix_connection(str(socket))
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", None) or "no answer"
        raise GrpcError(Status.UNAVAILABLE, f"nobody serves at {socket}: {why}") from None
    h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    body, headers = bytearray(), dict[str, str]()
    try:
        h2.initiate_connection()
        h2.send_headers(
            1,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", "localhost"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                *metadata.items(),
            ],
        )
        h2.send_data(1, framed(request), end_stream=True)
        ended = False
        while not ended:
            writer.write(h2.data_to_send())
            await writer.drain()
            data = await reader.read(_READ)
            if not data:
                raise GrpcError(Status.UNAVAILABLE, f"the server at {socket} has closed the connection")
            for event in h2.receive_data(data):
                if isinstance(event, ResponseReceived | TrailersReceived):
                    headers.update({str(k): str(v) for k, v in event.headers or ()})
                elif isinstance(event, DataReceived):
                    body += event.data or b""
                    h2.acknowledge_received_data(event.flow_controlled_length or 0, 1)
                elif isinstance(event, StreamEnded):
                    ended = True
                elif isinstance(event, StreamReset | ConnectionTerminated):
                    raise GrpcError(Status.UNAVAILABLE, f"the server at {socket} has ended the call")
            messages, taken = unframed(body, MAX_ANSWER)
            del body[:taken]
            for message in messages:
                yield message
    except ProtocolError as error:
        raise GrpcError(
            Status.INTERNAL, f"the server at {socket} breaks HTTP/2: {type(error).__name__}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise GrpcError(
            Status.UNAVAILABLE, f"the server at {socket} is gone: {type(error).__name__}"
        ) from None
    finally:
        writer.transport.abort()  # nothing is left to be said; waiting for the server to read could take for ever
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    _check_status(headers, socket)


_STATUS = re.compile(r"[0-9]{1,4}")


def _check_status(headers: Mapping[str, str], socket: Path) -> None:
    text = headers.get("grpc-status", "")
    if headers.get(":status") != "200" or not _STATUS.fullmatch(text):
        raise GrpcError(Status.UNKNOWN, f"the server at {socket} does not answer as gRPC does")
    if int(text) != Status.OK:
        raise GrpcError(int(text), unquote(headers.get("grpc-message", ""))[:500] or f"status {text}")
