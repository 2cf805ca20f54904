"""What a packet belongs to, whatever its bytes; what is written of packets that come before their verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.packet import Packet, Raw
from scapy.utils import rdpcap

from nfq import evidence
from nfq.capture import Seen, key_of_text, shape_of
from nfq.evidence import Evidence, PcapNg

BODY = Raw(b"x" * 100)


@pytest.mark.parametrize(
    ("packet", "flow", "headers"),
    [
        (
            IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=5, dport=443) / BODY,
            (6, "10.0.0.1", 5, "10.0.0.2", 443),
            40,
        ),
        (
            IP(src="10.0.0.2", dst="10.0.0.1") / TCP(sport=443, dport=5, options=[("MSS", 9)]) / BODY,
            (6, "10.0.0.1", 5, "10.0.0.2", 443),
            44,
        ),
        (
            IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=5, dport=53) / BODY,
            (17, "10.0.0.1", 5, "10.0.0.2", 53),
            28,
        ),
        (IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=8) / BODY, (1, "10.0.0.1", 8, "10.0.0.2", 0), 28),
        (
            IPv6(src="2001:db8::1", dst="2001:db8::2") / IPv6ExtHdrDestOpt() / TCP(sport=5, dport=443) / BODY,
            (6, "2001:db8::1", 5, "2001:db8::2", 443),
            68,
        ),
        (
            IPv6(src="2001:db8::1", dst="2001:db8::2")
            / IPv6ExtHdrFragment(m=1)
            / UDP(sport=5, dport=53)
            / BODY,
            (17, "2001:db8::1", 5, "2001:db8::2", 53),
            56,
        ),
    ],
)
def test_a_packet_belongs_to_its_flow(
    packet: Packet, flow: tuple[int, str, int, str, int], headers: int
) -> None:
    shape = shape_of(bytes(packet))
    assert shape is not None
    assert shape.key == key_of_text(*flow)
    assert shape.headers == headers


def test_later_fragments_belong_to_nobody() -> None:
    assert shape_of(bytes(IP(frag=3) / BODY)) is None
    assert shape_of(bytes(IPv6() / IPv6ExtHdrFragment(offset=3) / BODY)) is None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120), st.sampled_from([b"", b"\x45", b"\x4f", b"\x60"]))
def test_any_bytes_have_a_shape_or_none(data: bytes, begin: bytes) -> None:
    shape = shape_of(begin + data)
    assert shape is None or 0 < shape.headers <= len(begin + data)


def _seen(us: int, packet: Packet) -> Seen:
    return Seen(us, bytes(packet), "eth0", us % 2 == 0)


def test_the_handshake_is_in_the_file_though_the_verdict_came_later(tmp_path: Path) -> None:
    file = tmp_path / "a.pcapng"
    sink = PcapNg(file)
    found = Evidence(sink, payload=False, max_packets=5, max_bytes=10_000)
    mine = IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=5, dport=443) / BODY
    other = IP(src="10.0.0.9", dst="10.0.0.2") / TCP(sport=5, dport=443) / BODY
    begin = 1_772_330_584_000_000
    for step in range(3):
        found.offer(_seen(begin + step * 2, mine))
        found.offer(_seen(begin + step * 2 + 1, other))
    assert found.written == 0
    found.choose(key_of_text(6, "10.0.0.1", 5, "10.0.0.2", 443), "web -> db: allow")
    assert found.written == 3
    for step in range(10, 20):
        found.offer(_seen(begin + step, mine))
    assert found.full
    sink.close()
    assert file.stat().st_mode & 0o777 == 0o600
    packets = rdpcap(str(file))
    assert [round(float(p.time) * 1_000_000) - begin for p in packets] == [0, 2, 4, 10, 11]
    assert all(len(bytes(p)) == 40 and p.wirelen == 140 for p in packets)
    assert packets[0].comments == [b"eth0 out: web -> db: allow"]
    assert packets[4].comments == [b"eth0 in: web -> db: allow"]
    with pytest.raises(FileExistsError):
        PcapNg(file)


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "HOLD_BYTES", 500)

    class Nowhere:
        def write(self, seen: Seen, kept: int, comment: str) -> None:
            raise AssertionError

    found = Evidence(Nowhere(), payload=True, max_packets=5, max_bytes=10_000)
    for step in range(50):
        found.offer(_seen(step, IP(src="10.0.0.9", dst="10.0.0.2") / TCP(sport=step, dport=443) / BODY))
    assert len(found._held) == 3
    found.offer(_seen(10_000_000, IP() / UDP() / BODY))
    assert len(found._held) == 1
