"""ctnetlink messages: what is read is right, and garbage never breaks the reader."""

from __future__ import annotations

import errno
import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from nfq import ctnetlink
from nfq.ctnetlink import TCP_STATES, Entry, FlowTuple, parse


def attr(kind: int, content: bytes) -> bytes:
    """A netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def nest(kind: int, *contents: bytes) -> bytes:
    """A nested one."""
    return attr(kind | 0x8000, b"".join(contents))


def tuple_attr(kind: int, t: FlowTuple, *, reorder: bool = False, zone: bool = False) -> bytes:
    """A tuple as the kernel writes it; `reorder` puts everything the other way round."""
    v4 = len(t.src) == 4
    ip = [attr(1 if v4 else 3, t.src), attr(2 if v4 else 4, t.dst)]
    proto = [attr(1, b"\x06"), attr(2, t.sport.to_bytes(2, "big")), attr(3, t.dport.to_bytes(2, "big"))]
    if reorder:
        ip.reverse()
        proto.reverse()
    parts = [nest(1, *ip), nest(2, *proto)]
    if reorder:
        parts.reverse()
    if zone:
        parts.append(attr(3, b"\0\7"))
    return nest(kind, *parts)


def message(kind: int, body: bytes) -> bytes:
    """A netlink message with nfgenmsg."""
    return struct.pack("=IHHII", 20 + len(body), kind, 0, 1, 0) + struct.pack(">BBH", 2, 0, 0) + body


addresses = st.one_of(
    st.tuples(*[st.binary(min_size=4, max_size=4)] * 2), st.tuples(*[st.binary(min_size=16, max_size=16)] * 2)
)
ports = st.integers(0, 65535)
tuples = st.builds(lambda a, s, d: FlowTuple(a[0], a[1], s, d), addresses, ports, ports)
u64 = st.integers(0, 2**64 - 1)


@given(
    flow=tuples,
    reply=tuples,
    counters=st.tuples(u64, u64, u64, u64),
    mark=st.integers(0, 2**32 - 1),
    state=st.integers(0, len(TCP_STATES) - 1),
    times=st.tuples(u64, u64),
    reorder=st.booleans(),
    zone=st.booleans(),
    unknown=st.binary(max_size=40),
)
def test_every_field_is_read_in_whatever_order(
    flow: FlowTuple,
    reply: FlowTuple,
    counters: tuple[int, int, int, int],
    mark: int,
    state: int,
    times: tuple[int, int],
    reorder: bool,
    zone: bool,
    unknown: bytes,
) -> None:
    def pair(kind: int, one: int, two: int) -> bytes:
        parts = [attr(1, struct.pack(">Q", one)), attr(2, struct.pack(">Q", two))]
        return nest(kind, *(reversed(parts) if reorder else parts))

    tcp = [attr(1, bytes((state,))), attr(2, b"\7")]
    body = [
        tuple_attr(1, flow, reorder=reorder, zone=zone),
        tuple_attr(2, reply, reorder=reorder),
        attr(3, struct.pack(">I", 0x10E)),
        pair(9, *counters[:2]),
        pair(10, *counters[2:]),
        nest(4, nest(1, *(reversed(tcp) if reorder else tcp))),
        attr(8, struct.pack(">I", mark)),
        attr(77, unknown),
        pair(20, *times),
    ]
    data = message(0x0102, b"".join(reversed(body) if reorder else body))
    found = parse(data + data)
    assert (found.malformed, found.error, found.done) == (0, None, False)
    assert len(found.entries) == 2
    for e in found.entries:
        assert e.tuple == flow
        assert e.reply == reply
        assert e.family == (socket.AF_INET if len(flow.src) == 4 else socket.AF_INET6)
        assert (e.orig_packets, e.orig_bytes, e.reply_packets, e.reply_bytes) == counters
        assert (e.proto, e.mark, e.status, e.tcp_state) == (6, mark, 0x10E, TCP_STATES[state])
        assert (e.start_ns, e.stop_ns) == times


def _whole(flow: FlowTuple) -> bytes:
    return message(0x0100, tuple_attr(1, flow) + tuple_attr(2, flow.reversed()) + attr(8, bytes(4)))


FLOW = FlowTuple(b"\x0a\0\0\1", b"\x0a\0\0\2", 1000, 80)


@given(st.binary(max_size=600))
def test_garbage_gives_entries_or_is_counted(data: bytes) -> None:
    found = parse(data)
    assert all(isinstance(e, Entry) and len(e.src) == len(e.dst) in (4, 16) for e in found.entries)


@given(data=st.data(), flow=tuples)
def test_a_damaged_message_gives_entries_or_is_counted(data: st.DataObject, flow: FlowTuple) -> None:
    raw = bytearray(_whole(flow))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    found = parse(bytes(raw[:cut]))
    for e in found.entries:
        assert len(e.src) == len(e.dst) in (4, 16)
        assert 0 <= e.sport <= 65535
        assert 0 <= e.dport <= 65535


@given(st.binary(max_size=200))
def test_damage_does_not_hide_what_comes_before(junk: bytes) -> None:
    found = parse(_whole(FLOW) + junk)
    assert found.entries[0].tuple == FLOW


def test_errors_and_ends_are_told() -> None:
    error = struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -errno.ENOENT)
    assert parse(error).error == errno.ENOENT
    assert parse(struct.pack("=IHHIIi", 20, 2, 0, 1, 0, 0)).error == 0
    assert parse(struct.pack("=IHHII", 16, 3, 2, 1, 0)).done
    assert parse(struct.pack("=IHHII", 16, 2, 0, 1, 0)).error == errno.EBADMSG


def test_only_the_messages_asked_for() -> None:
    both = _whole(FLOW) + message(0x0102, tuple_attr(1, FLOW))
    assert len(parse(both).entries) == 2
    assert len(parse(both, 0x0102).entries) == 1
    assert parse(message(0x0A00, tuple_attr(1, FLOW))).entries == [], "not of conntrack"


def test_an_entry_without_addresses_is_malformed() -> None:
    assert parse(message(0x0100, attr(8, bytes(4)))).malformed == 1
    mixed = nest(1, nest(1, attr(1, bytes(4)), attr(4, bytes(16))), nest(2, attr(1, b"\x06")))
    assert parse(message(0x0100, mixed)).malformed == 1


def test_what_is_sent_reads_back() -> None:
    """The requests' tuples are the shape that answers have."""
    for flow in (FLOW, FlowTuple(bytes(15) + b"\1", bytes(15) + b"\2", 1, 2)):
        assert parse(message(0x0100, ctnetlink.tuple_attr(1, flow))).entries[0].tuple == flow
