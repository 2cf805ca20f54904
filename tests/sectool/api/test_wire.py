"""Framing: what is encoded comes back, however it is cut; anything else gives WireError or EOFError."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.api import wire

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.dictionaries(st.text(max_size=8).filter(lambda k: k != "payload"), JSON, max_size=5)
FRAMES = st.lists(st.tuples(HEADERS, st.binary(max_size=200)), max_size=5)


def from_socket(data: bytes) -> list[wire.Frame]:
    """Everything `read` makes of a connection that carries `data` and ends."""
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def send() -> None:
            with contextlib.suppress(OSError):  # the other end may hang up over what it reads
                theirs.sendall(data)
                theirs.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        frames = []
        try:
            while (frame := wire.read(ours)) is not None:
                frames.append(frame)
        finally:
            ours.close()
            sender.join()
    return frames


async def from_stream(data: bytes) -> list[wire.Frame]:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    frames = []
    while (frame := await wire.read_async(reader)) is not None:
        frames.append(frame)
    return frames


@given(frames=FRAMES, cuts=st.lists(st.integers(1, 50), max_size=30))
def test_frames_survive_any_cutting(frames: list[tuple[dict[str, Any], bytes]], cuts: list[int]) -> None:
    data = b"".join(wire.encode(header, payload) for header, payload in frames)
    want = [wire.Frame(header, payload) for header, payload in frames]
    decoder, got, at = wire.Decoder(), [], 0
    for cut in [*cuts, len(data)]:
        got += list(decoder.feed(data[at : at + cut]))
        at += cut
    got += list(decoder.feed(data[at:]))
    assert got == want
    assert not decoder.torn
    assert asyncio.run(from_stream(data)) == want


@given(data=st.binary(max_size=300) | st.binary(max_size=100).map(lambda b: b"\0\0\0" + b))
def test_garbage_gives_frames_or_a_named_error(data: bytes) -> None:
    """Invariant: nothing but WireError (or EOFError at the end of a stream) comes out of the parsers."""
    decoder = wire.Decoder()
    try:
        frames = list(decoder.feed(data))
    except wire.WireError as error:
        assert error.hint
        frames = None
    try:
        streamed = asyncio.run(from_stream(data))
    except (wire.WireError, EOFError):
        assert frames is None or decoder.torn
    else:
        assert streamed == frames
        assert not decoder.torn


def test_sockets() -> None:
    frames = [wire.Frame({"op": "a"}, b"x" * 300_000), wire.Frame({"op": "b"})]
    data = b"".join(wire.encode(f.header, f.payload) for f in frames)
    assert from_socket(data) == frames
    assert from_socket(b"") == []
    for cut in (1, 3, 5, len(data) - 3):
        with pytest.raises(EOFError):
            from_socket(data[:cut])


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\0",
        b"\0\0\0\x01{",
        b"\xff\xff\xff\xff{}",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\x02[]",
        b"\0\0\0\x04null",
        b'\0\0\0\x0e{"payload":-1}',
        b'\0\0\0\x10{"payload":true}',
        b'\0\0\0\x0f{"payload":"x"}',
        b'\0\0\0\x16{"payload":9999999999}',
        b"\0\0\x27\x10" + b"[" * 10_000,
    ],
)
def test_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        list(wire.Decoder().feed(data))
    with pytest.raises(wire.WireError):
        asyncio.run(from_stream(data))
    with pytest.raises(wire.WireError):
        from_socket(data)


def test_a_receiver_bounds_what_it_takes() -> None:
    data = wire.encode({}, b"x" * 100)
    with pytest.raises(wire.WireError, match="at most 99"):
        list(wire.Decoder(max_payload=99).feed(data))
    with pytest.raises(wire.WireError, match="header of"):
        wire.encode({"x": "y" * wire.MAX_HEADER})
    with pytest.raises(wire.WireError, match="JSON"):
        wire.encode({"x": object()})
    with pytest.raises(wire.WireError, match="JSON"):
        wire.encode({"x": float("nan")})


def test_the_payload_length_is_the_codec_s_own() -> None:
    (frame,) = wire.Decoder().feed(wire.encode({"payload": 12345, "a": 1}, b"abc"))
    assert frame == wire.Frame({"a": 1}, b"abc")
