"""Packets of every kind the packet path meets, built by scapy as stacks would send them."""

from __future__ import annotations

from functools import cache
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
)
from scapy.packet import Packet, Raw

from nfq.handshake import proof_option
from tests.fuzz.world import shaken

EXID = b"\x5e\xc7"
STACK = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
STAMPS = [("NOP", None), ("NOP", None), ("Timestamp", (3, 2))]
A, B = ("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")


def ip(v6: bool, reverse: bool = False) -> Packet:
    """An IP header from a to b, or back."""
    source, destination = (B if v6 else A)[:: -1 if reverse else 1]
    return (IPv6 if v6 else IP)(src=source, dst=destination)


def tcp(
    v6: bool,
    flags: str,
    payload: bytes = b"",
    options: Any = STAMPS,
    *,
    reverse: bool = False,
    **fields: Any,
) -> bytes:
    """A segment between port 40,000 at a and 5,432 at b."""
    sport, dport = (5432, 40_000) if reverse else (40_000, 5432)
    layer = TCP(sport=sport, dport=dport, flags=flags, options=options, **fields)
    return bytes(ip(v6, reverse) / layer / Raw(payload))


@cache
def segments() -> dict[str, bytes]:
    """TCP of all sorts."""
    shake = shaken()
    proof = (253, proof_option(shake.keys, 1)[2:])
    out: dict[str, bytes] = {}
    for v6 in (False, True):
        six = "6" if v6 else "4"
        out |= {
            f"syn-{six}": tcp(v6, "S", options=STACK, seq=1000),
            f"hello-{six}": tcp(v6, "S", shake.syn, [*STACK, (253, EXID)], seq=1000),
            f"synack-{six}": tcp(v6, "SA", options=STACK, reverse=True, seq=9000, ack=1001),
            f"answer-{six}": tcp(
                v6, "SA", shake.answer, [*STACK, (253, EXID)], reverse=True, seq=9000, ack=1001
            ),
            f"ack-{six}": tcp(v6, "A", seq=1001, ack=9001),
            f"proof-{six}": tcp(v6, "A", b"", [proof], seq=1001, ack=9001),
            f"data-{six}": tcp(v6, "PA", b"select 1", seq=1001, ack=9001),
            f"sack-{six}": tcp(v6, "A", b"", [*STAMPS, ("SAck", (1, 2, 3, 4))], seq=1001, ack=9001),
            f"fin-{six}": tcp(v6, "FA", b"bye", seq=1009, ack=9001),
            f"reset-{six}": tcp(v6, "R", options=[], seq=1001),
            f"tfo-{six}": tcp(v6, "S", b"early", [("MSS", 1460), ("TFO", (1, 2))], seq=1000),
            f"mptcp-{six}": tcp(v6, "S", b"", [("MSS", 9000), (30, b"\0\1" + bytes(8))], seq=1000),
        }
    options = IP(src=A[0], dst=A[1], options=[])
    options.options = b"\x94\x04\0\0"
    out["router-alert"] = bytes(options / TCP(sport=1, dport=2, flags="S"))
    extended = IPv6(src=B[0], dst=B[1]) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt()
    out["extensions"] = bytes(extended / TCP(sport=1, dport=2, flags="A") / Raw(b"x" * 9))
    return out


@cache
def datagrams() -> dict[str, bytes]:
    """UDP and ICMP of all sorts."""
    out: dict[str, bytes] = {}
    for v6 in (False, True):
        six = "6" if v6 else "4"
        out[f"datagram-{six}"] = bytes(ip(v6) / UDP(sport=40_000, dport=5432) / Raw(b"hello"))
        out[f"empty-{six}"] = bytes(ip(v6) / UDP(sport=40_000, dport=5432))
        out[f"back-{six}"] = bytes(ip(v6, True) / UDP(sport=5432, dport=40_000) / Raw(b"hi"))
    quoted = IP(src=A[0], dst=A[1]) / TCP(sport=40_000, dport=5432, seq=1001, flags="A")
    quoted6 = IPv6(src=B[0], dst=B[1]) / TCP(sport=40_000, dport=5432, seq=1001, flags="A")
    out["echo"] = bytes(ip(False) / ICMP(id=7, seq=1) / Raw(b"ping"))
    out["too-big"] = bytes(IP(src="10.0.0.9", dst=A[0]) / ICMP(type=3, code=4, nexthopmtu=1400) / quoted)
    out["unreachable"] = bytes(ip(False, True) / ICMP(type=3, code=3) / quoted)
    out["echo6"] = bytes(ip(True) / ICMPv6EchoRequest(id=7, data=b"ping"))
    out["too-big6"] = bytes(IPv6(src="fd00::9", dst=B[0]) / ICMPv6PacketTooBig(mtu=1280) / quoted6)
    out["unreachable6"] = bytes(ip(True, True) / ICMPv6DestUnreach(code=4) / quoted6)
    return out
