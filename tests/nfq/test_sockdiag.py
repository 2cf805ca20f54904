"""sock_diag answers: garbage never breaks the reader."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from nfq.sockdiag import Socket, parse


def answer(family: int, src: bytes, dst: bytes, attributes: bytes = b"") -> bytes:
    """nlmsghdr, inet_diag_msg, attributes."""
    body = struct.pack("=BBBB", family, 10, 0, 0) + b"\x00\x50\x1f\x90"
    body += src.ljust(16, b"\0") + dst.ljust(16, b"\0") + struct.pack("=IQ", 0, 77)
    body += struct.pack("=IIIII", 0, 1, 2, 1000, 4242)
    return struct.pack("=IHHII", 16 + len(body) + len(attributes), 20, 0, 1, 0) + body + attributes


CGROUP = struct.pack("=HHQ", 12, 21, 0x1234567890)
OTHER = struct.pack("=HHB3x", 5, 8, 1)


def test_every_field_is_read() -> None:
    data = answer(socket.AF_INET, b"\x0a\0\0\1", b"\x0a\0\0\2", OTHER + CGROUP)
    assert parse(data, 0, len(data)) == Socket(
        1000, 4242, 0x1234567890, 77, 10, b"\x0a\0\0\1", 80, b"\x0a\0\0\2", 8080
    )


def test_mapped_addresses_are_ipv4() -> None:
    mapped = bytes(10) + b"\xff\xff"
    data = answer(socket.AF_INET6, mapped + b"\x0a\0\0\1", mapped + b"\x0a\0\0\2")
    found = parse(data, 0, len(data))
    assert found is not None
    assert (found.local, found.remote, found.cgroup_id) == (b"\x0a\0\0\1", b"\x0a\0\0\2", 0)
    data = answer(socket.AF_INET6, bytes(16), mapped + b"\x0a\0\0\2")
    found = parse(data, 0, len(data))
    assert found is not None
    assert len(found.local) == len(found.remote) == 16


@given(st.binary(max_size=300), st.integers(0, 20))
def test_garbage_gives_a_socket_or_nothing(data: bytes, off: int) -> None:
    found = parse(data, off, len(data))
    assert found is None or len(found.local) == len(found.remote) in (4, 16)


@given(st.binary(max_size=60))
def test_garbage_behind_the_answer_does_not_matter(junk: bytes) -> None:
    data = answer(socket.AF_INET, b"\x0a\0\0\1", b"\x0a\0\0\2", CGROUP) + junk
    found = parse(data, 0, len(data))
    assert found is not None
    assert (found.inode, found.cgroup_id) == (4242, 0x1234567890)
