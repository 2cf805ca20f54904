"""The rules' programs, run by the kernel's own classic BPF: a socket's filter takes the same code as xt_bpf."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterator
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.packet import Raw

from nfq import bpf
from nfq.steering import worker_of
from nfq.udpcontrol import MAGIC, Kind, is_candidate, write

_SO_ATTACH_FILTER = 26
XT_BPF_MAX = 64  # instructions (include/uapi/linux/netfilter/xt_bpf.h)
FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
LENGTHS = st.integers(0, 3)


class Filter:
    """A pair of sockets, one of which takes only what the program matches."""

    def __init__(self, text: str) -> None:
        count, *lines = text.split(",")
        assert int(count) == len(lines) <= XT_BPF_MAX
        code = b"".join(struct.pack("=HBBI", *map(int, line.split())) for line in lines)
        self._code = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("@HP", len(lines), ctypes.addressof(self._code))
        self._in, self._out = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._out.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def matches(self, packet: bytes) -> bool:
        """Whether the program matches a packet that begins with its IP header."""
        self._in.send(packet)
        try:
            self._out.recv(1)
        except BlockingIOError:  # the filter has thrown it away
            return False
        return True


@lru_cache(maxsize=64)
def steered(worker: int, workers: int, v6: bool) -> Filter:
    """One of the programs that pick a worker."""
    return Filter(bpf.steered_to(worker, workers, v6))


@lru_cache(maxsize=2)
def carrying(v6: bool) -> Filter:
    """The program that knows segments that carry something."""
    return Filter(bpf.carries(v6))


def tcp(
    sport: int = 1000, dport: int = 2000, *, options: int = 0, payload: bytes = b"", flags: int = 0x10
) -> bytes:
    """A segment with that many option bytes (a multiple of 4)."""
    head = struct.pack(">HHIIBBHHH", sport, dport, 1, 2, (20 + options) << 2, flags, 65535, 0, 0)
    return head + bytes([1]) * options + payload


def v4(body: bytes, protocol: int = 6, *, source: bytes = b"\x0a\x4d\x00\x01", target: bytes = b"\x0a\x4d\x00\x02",
       options: int = 0, total: int | None = None) -> bytes:  # fmt: skip
    """An IPv4 packet."""
    size = 20 + options + len(body) if total is None else total
    head = struct.pack(">BBHHHBBH", 0x45 + options // 4, 0, size, 7, 0, 64, protocol, 0)
    return head + source + target + bytes([1]) * options + body


def v6(body: bytes, protocol: int = 6, *, source: bytes = bytes(15) + b"\1", target: bytes = bytes(15) + b"\2",
       extensions: tuple[tuple[int, int], ...] = (), size: int | None = None) -> bytes:  # fmt: skip
    """An IPv6 packet; `extensions`: header number and length in 8 octets beyond the first 8."""
    kinds = [kind for kind, _ in extensions] + [protocol]
    chain = b"".join(
        bytes((kinds[n + 1], length)) + bytes([1, 4, 0, 0, 0, 0]) + bytes(8 * length)
        for n, (_, length) in enumerate(extensions)
    )
    length = len(chain) + len(body) if size is None else size
    return struct.pack(">IHBB", 6 << 28, length, kinds[0], 64) + source + target + chain + body


# -- payload or FIN -------------------------------------------------------------------------------------------------

SEGMENTS = [
    pytest.param(tcp(), False, id="bare ACK"),
    pytest.param(tcp(options=12), False, id="ACK with timestamps"),
    pytest.param(tcp(options=24), False, id="ACK with timestamps and SACK"),
    pytest.param(tcp(options=40), False, id="ACK with all options"),
    pytest.param(tcp(flags=0x04), False, id="RST"),
    pytest.param(tcp(flags=0x14, options=12), False, id="RST with an ACK"),
    pytest.param(tcp(flags=0x11), True, id="FIN"),
    pytest.param(tcp(flags=0x11, options=40), True, id="FIN with options"),
    pytest.param(tcp(flags=0x30), True, id="urgent pointer alone"),
    pytest.param(tcp(payload=b"x"), True, id="keepalive or one byte"),
    pytest.param(tcp(payload=b"x", options=12), True, id="one byte with timestamps"),
    pytest.param(tcp(payload=b"x" * 1448, options=12), True, id="full segment"),
    pytest.param(tcp(payload=b"x" * 64_000, options=12), True, id="super-packet"),
    pytest.param(tcp(payload=b"x", flags=0x14), True, id="RST with payload"),
]


@FAMILIES
@pytest.mark.parametrize(("segment", "carries"), SEGMENTS)
def test_what_carries_something_is_told_from_what_does_not(v6: bool, segment: bytes, carries: bool) -> None:
    packet = globals()["v6" if v6 else "v4"](segment)
    assert carrying(v6).matches(packet) is carries


@pytest.mark.parametrize(("segment", "carries"), SEGMENTS)
@pytest.mark.parametrize("options", [4, 12, 40])
def test_ipv4_options_do_not_count_as_payload(segment: bytes, carries: bool, options: int) -> None:
    assert carrying(False).matches(v4(segment, options=options)) is carries


@pytest.mark.parametrize("kind", [0, 43, 44, 60])
def test_behind_extension_headers_everything_counts_as_carrying(kind: int) -> None:
    assert carrying(True).matches(v6(tcp(), extensions=((kind, 0),)))


def test_packets_too_large_for_their_length_field_carry_something() -> None:
    segment = tcp(payload=bytes(90_000), options=12)
    assert carrying(False).matches(v4(segment, total=0))
    assert carrying(True).matches(v6(segment, size=0))


@given(six=st.booleans(), options=st.integers(0, 10), flags=st.integers(0, 255), payload=st.integers(0, 40))
def test_any_segment(six: bool, options: int, flags: int, payload: int) -> None:
    segment = tcp(options=4 * options, flags=flags, payload=bytes(payload))
    assert carrying(six).matches(v6(segment) if six else v4(segment)) is (bool(flags & 0x21) or payload > 0)


# -- which worker ---------------------------------------------------------------------------------------------------

WORKERS = st.integers(2, 5)
PORT = st.integers(0, 65_535)
ADDRESS = {False: st.binary(min_size=4, max_size=4), True: st.binary(min_size=16, max_size=16)}


@st.composite
def flows(draw: st.DrawFn) -> tuple[bytes, bytes, int, int, int]:
    """Two addresses of one family, two ports, a number of workers."""
    address = ADDRESS[draw(st.booleans())]
    return draw(address), draw(address), draw(PORT), draw(PORT), draw(WORKERS)


def key(local: bytes, remote: bytes, lport: int, rport: int) -> bytes:
    """A flow key as nfq.packet makes it."""
    return local + remote + struct.pack(">HH", lport, rport)


def picked(packet: bytes, workers: int) -> set[int]:
    """All workers that the kernel's programs give a packet to."""
    return {w for w in range(workers) if steered(w, workers, packet[0] >> 4 == 6).matches(packet)}


def packed(body: bytes, protocol: int, source: bytes, target: bytes) -> bytes:
    """A packet of either family."""
    make = v4 if len(source) == 4 else v6
    return make(body, protocol, source=source, target=target)


@given(flows())
def test_both_directions_belong_to_one_worker_and_the_kernel_agrees(
    flow: tuple[bytes, bytes, int, int, int],
) -> None:
    a, b, aport, bport, workers = flow
    mine = worker_of(key(a, b, aport, bport), workers)
    assert mine == worker_of(key(b, a, bport, aport), workers)
    assert picked(packed(tcp(aport, bport), 6, a, b), workers) == {mine}
    assert picked(packed(tcp(bport, aport, payload=b"x"), 6, b, a), workers) == {mine}
    assert picked(packed(struct.pack(">HHHH", bport, aport, 8, 0), 17, b, a), workers) == {mine}


@given(flows())
def test_errors_about_a_flow_come_to_its_worker(flow: tuple[bytes, bytes, int, int, int]) -> None:
    """From a router on the way, or from the other host."""
    a, b, aport, bport, workers = flow
    mine = worker_of(key(a, b, aport, bport), workers)
    quoted = packed(tcp(aport, bport), 6, a, b)[: 28 if len(a) == 4 else 48]
    router = bytes(len(a) - 1) + b"\x07"
    for kind in (3, 4, 5, 11, 12) if len(a) == 4 else (1, 2, 3, 4):
        error = bytes((kind, 0, 0, 0, 0, 0, 5, 120)) + quoted
        for sender in (b, router):
            assert picked(packed(error, 1 if len(a) == 4 else 58, sender, a), workers) == {mine}


@given(flows())
def test_what_has_no_ports_goes_by_its_addresses(flow: tuple[bytes, bytes, int, int, int]) -> None:
    a, b, _, _, workers = flow
    mine = worker_of(a + b, workers)
    assert mine == worker_of(b + a, workers)
    six = len(a) == 16
    echo = bytes((128 if six else 8, 0, 0, 0, 0, 1, 0, 1))
    assert picked(packed(echo, 58 if six else 1, a, b), workers) == {mine}
    assert picked(packed(bytes(8), 89, b, a), workers) == {mine}


@given(
    flow=flows().filter(lambda f: len(f[0]) == 16),
    extensions=st.lists(st.tuples(st.sampled_from((0, 60)), LENGTHS), max_size=2),
)
def test_extension_headers_do_not_change_the_worker(
    flow: tuple[bytes, bytes, int, int, int], extensions: list[tuple[int, int]]
) -> None:
    a, b, aport, bport, workers = flow
    mine = worker_of(key(a, b, aport, bport), workers)
    packet = v6(tcp(aport, bport), source=a, target=b, extensions=tuple(extensions))
    assert picked(packet, workers) == {mine}
    error = bytes((2, 0, 0, 0, 0, 0, 5, 120)) + packet[:112]
    assert picked(v6(error, 58, source=bytes(15) + b"\x07", target=a), workers) == {mine}


@given(st.lists(st.integers(0, 15), max_size=10))
def test_ipv4_options_do_not_change_the_worker(words: list[int]) -> None:
    flow = (b"\x0a\0\0\1", b"\x0a\0\0\2", 40_000 + len(words), 443)
    packet = v4(tcp(*flow[2:]), source=flow[0], target=flow[1], options=4 * len(words))
    assert picked(packet, 3) == {worker_of(key(*flow), 3)}


@given(st.binary(max_size=120), st.booleans(), WORKERS)
def test_no_packet_has_two_workers(rest: bytes, six: bool, workers: int) -> None:
    packet = bytes((0x60 if six else 0x45,)) + rest
    assert len(picked(packet, workers)) <= 1


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
@pytest.mark.parametrize("step", [1, 2])  # Linux takes every second port for connect(2) as long as it can
def test_connections_between_two_hosts_spread_over_all_workers(workers: int, step: int) -> None:
    counts = [0] * workers
    for n in range(1000):
        counts[worker_of(key(b"\x0a\0\0\1", b"\x0a\0\0\2", 32_768 + step * n, 443), workers)] += 1
    assert min(counts) > 0.8 * 1000 / workers


@pytest.fixture(scope="module", autouse=True)
def filters() -> Iterator[None]:
    """Programs are attached once for all examples."""
    yield
    steered.cache_clear()
    carrying.cache_clear()


# -- control datagrams -------------------------------------------------------------------------------------------


def datagram(v6: bool, payload: bytes, options: int = 0) -> bytes:
    head = IPv6(src="fd00::1", dst="fd00::2") if v6 else IP(src="10.0.0.1", dst="10.0.0.2")
    if options and not v6:
        head.options = [IPOption_NOP() for _ in range(4 * options)]
    return bytes(head / UDP(sport=1, dport=2) / Raw(payload))


@FAMILIES
def test_control_datagrams_are_told_from_data(v6: bool) -> None:
    ordinary, greets = Filter(bpf.ordinary(v6)), Filter(bpf.greets(v6))
    for kind in Kind:
        control = datagram(v6, write(kind, bytes(28)))
        assert not ordinary.matches(control)
        assert greets.matches(control) == (kind is Kind.HELLO)
    for payload in (b"", b"x", MAGIC[:7], b"x" + MAGIC, MAGIC[:7] + b"x", bytes(100)):
        assert ordinary.matches(datagram(v6, payload))
        assert not greets.matches(datagram(v6, payload))
    assert not ordinary.matches(datagram(v6, MAGIC)), "a candidate, no more"
    assert not greets.matches(datagram(v6, MAGIC))


@given(payload=st.binary(max_size=40), v6=st.booleans(), options=st.integers(0, 3), magic=st.booleans())
def test_any_datagram(payload: bytes, v6: bool, options: int, magic: bool) -> None:
    payload = MAGIC + payload if magic else payload
    packet = datagram(v6, payload, options)
    assert Filter(bpf.ordinary(v6)).matches(packet) != is_candidate(payload)
    expected = is_candidate(payload) and payload[9:10] == bytes((Kind.HELLO,))
    assert Filter(bpf.greets(v6)).matches(packet) == expected


def test_behind_extension_headers_datagrams_are_not_released() -> None:
    packet = bytes(IPv6(dst="fd00::2") / IPv6ExtHdrDestOpt() / UDP(sport=1, dport=2) / Raw(b"data"))
    assert not Filter(bpf.ordinary(True)).matches(packet)
