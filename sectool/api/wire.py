"""Framing of the local API: `u32 big-endian header length, JSON header, payload`.

The header is one JSON object; its field `payload` is the number of payload bytes that follow (absent: none).
`Decoder` is sans-I/O: bytes in, frames out; `read` and `read_async` are its thin adapters to a blocking socket
and an asyncio stream. A peer can make any of them raise `WireError`, and nothing else.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sectool.errors import SectoolError

if TYPE_CHECKING:  # packet workers and store read blocking sockets, and start sooner without it
    import asyncio

MAX_HEADER = 1 << 20  # bytes
MAX_PAYLOAD = 256 << 20  # bytes
_LENGTH = struct.Struct(">I")


class WireError(SectoolError):
    """The peer sent bytes that are no frame. What follows them cannot be understood: hang up."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"not a message of the local API: {message}",
            "client and daemon may differ in version; see `sectool --version` and restart the daemon",
        )


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. `header` has no `payload` length any more: that is `len(payload)`."""

    header: dict[str, Any]
    payload: bytes = b""


def encode(header: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """One message as bytes. Raises WireError when header or payload exceed what a peer would take."""
    fields = {key: value for key, value in header.items() if key != "payload"}
    if payload:
        fields["payload"] = len(payload)
    try:
        text = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"header cannot be written as JSON ({error})") from None
    if len(text) > MAX_HEADER:
        raise WireError(f"header of {len(text)} bytes; at most {MAX_HEADER} are allowed")
    if len(payload) > MAX_PAYLOAD:
        raise WireError(f"payload of {len(payload)} bytes; at most {MAX_PAYLOAD} are allowed")
    return b"".join((_LENGTH.pack(len(text)), text, payload))


def header_length(prefix: bytes) -> int:
    """Header bytes announced by the first four bytes of a message."""
    (length,) = _LENGTH.unpack(prefix)
    if not 2 <= length <= MAX_HEADER:
        raise WireError(f"a header of {length} bytes is announced")
    return int(length)


def parse_header(text: bytes, max_payload: int = MAX_PAYLOAD) -> tuple[dict[str, Any], int]:
    """The header's fields and the number of payload bytes that follow it."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise WireError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise WireError("its header is not a JSON object")
    length = header.pop("payload", 0)
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise WireError("its payload length is not a number")
    if length > max_payload:
        raise WireError(f"a payload of {length} bytes is announced; at most {max_payload} are allowed")
    return header, length


class Decoder:
    """Cuts a byte stream into frames. After a WireError it takes nothing more."""

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._max_payload = max_payload
        self._buffer = bytearray()
        self._header: dict[str, Any] | None = None
        self._need = _LENGTH.size
        self._stage = 0  # what `_need` bytes are: 0 length, 1 header, 2 payload

    @property
    def torn(self) -> bool:
        """Whether the stream, should it end now, ends inside a message."""
        return bool(self._buffer) or self._stage != 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take more bytes; yields every frame they complete. Consume the iterator before feeding again."""
        self._buffer += data
        while len(self._buffer) >= self._need:
            part = bytes(memoryview(self._buffer)[: self._need])
            del self._buffer[: self._need]
            if self._stage == 0:
                self._need, self._stage = header_length(part), 1
                continue
            if self._stage == 1:
                self._header, self._need = parse_header(part, self._max_payload)
                self._stage = 2
                if self._need:
                    continue
                part = b""
            assert self._header is not None
            frame = Frame(self._header, part)
            self._header, self._need, self._stage = None, _LENGTH.size, 0
            yield frame


def read(sock: socket.socket, max_payload: int = MAX_PAYLOAD) -> Frame | None:
    """The next frame of a blocking socket; None when the peer hung up between two.

    Raises EOFError when it hung up inside one, WireError for bytes that are no frame, OSError as the socket does.
    """
    prefix = _exactly(sock, _LENGTH.size, at_boundary=True)
    if prefix is None:
        return None
    text = _exactly(sock, header_length(prefix))
    assert text is not None
    header, length = parse_header(text, max_payload)
    payload = _exactly(sock, length)
    assert payload is not None
    return Frame(header, payload)


def _exactly(sock: socket.socket, size: int, *, at_boundary: bool = False) -> bytes | None:
    buffer = bytearray(size)
    view = memoryview(buffer)
    got = 0
    while got < size:
        n = sock.recv_into(view[got:])
        if n == 0:
            if at_boundary and got == 0:
                return None
            raise EOFError("the connection ended inside a message")
        got += n
    return bytes(buffer)


async def read_async(reader: asyncio.StreamReader, max_payload: int = MAX_PAYLOAD) -> Frame | None:
    """The next frame of an asyncio stream; results and errors as those of `read`."""
    from asyncio import IncompleteReadError

    try:
        prefix = await reader.readexactly(_LENGTH.size)
    except IncompleteReadError as error:
        if error.partial:
            raise EOFError("the connection ended inside a message") from None
        return None
    try:
        header, length = parse_header(await reader.readexactly(header_length(prefix)), max_payload)
        payload = await reader.readexactly(length) if length else b""
    except IncompleteReadError:
        raise EOFError("the connection ended inside a message") from None
    return Frame(header, payload)


def as_key(value: Any) -> Hashable:
    """A JSON value with its lists as tuples again, so that it can be looked up."""
    return tuple(as_key(v) for v in value) if isinstance(value, list) else value
