"""Draws a captured handshake as SVG for the protocol document: `python -m labs.figure CAPTURE.pcap FIGURE.svg`.

scapy takes the capture apart; every length and flag in the picture is what was on the wire.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from sectool.errors import UsageError

EXID = b"\x5e\xc7"
_LEFT, _RIGHT, _TOP, _STEP = 120, 840, 70, 92
_COLOURS = {
    "header": "#9aa7b5",
    "option": "#5c8fd6",
    "record": "#3aa17e",
    "hello": "#d9822b",
    "answer": "#b565c9",
    "data": "#cfd6dd",
}


@dataclass(frozen=True, slots=True)
class Shown:
    """One packet: its direction, what to call it, and its parts as (kind, bytes, text)."""

    outward: bool
    at_ms: float
    name: str
    parts: tuple[tuple[str, int, str], ...]


def read(capture: Path) -> list[Shown]:
    """The packets of the first connection in a capture file. Raises UsageError if there is none."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.utils import rdpcap

    shown: list[Shown] = []
    client: tuple[str, int] | None = None
    start = 0.0
    for packet in rdpcap(str(capture)):
        if TCP not in packet:
            continue
        tcp, ip = packet[TCP], packet[IPv6] if IPv6 in packet else packet[IP]
        flags = str(tcp.flags)
        if client is None:
            if flags != "S":
                continue
            client, start = (ip.src, tcp.sport), float(packet.time)
        outward = (ip.src, tcp.sport) == client
        if not outward and (ip.dst, tcp.dport) != client:
            continue
        shown.append(Shown(outward, (float(packet.time) - start) * 1000, *_parts(tcp, flags)))
    if not shown:
        raise UsageError(f"{capture} holds no TCP connection from its SYN on", "capture one with tcpdump")
    return shown


def _parts(tcp: object, flags: str) -> tuple[str, tuple[tuple[str, int, str], ...]]:
    payload = bytes(tcp.payload)  # type: ignore[attr-defined]
    names = {"S": "SYN", "SA": "SYN-ACK", "A": "ACK", "PA": "data", "FA": "FIN", "FPA": "FIN", "R": "RST"}
    parts: list[tuple[str, int, str]] = [("header", 20, "TCP header")]
    plain = 0
    for kind, value in tcp.options:  # type: ignore[attr-defined]
        if kind == 253 and bytes(value)[:2] == EXID:
            size = len(value) + 2
            if size == 28:
                parts.append(("record", 28, "record option: proof"))
            else:
                parts.append(("option", 4, "handshake option"))
        else:
            plain += {"MSS": 4, "SAckOK": 2, "Timestamp": 10, "NOP": 1, "WScale": 3, "EOL": 1}.get(kind, 2)
    if plain:
        parts.insert(1, ("header", plain, "options"))
    if payload and flags == "S":
        parts.append(("hello", len(payload), f"Hello: e, s, credential ({len(payload)} bytes)"))
    elif payload and flags == "SA":
        parts.append(("answer", len(payload), f"Answer: e, encrypted credential ({len(payload)} bytes)"))
    elif payload:
        parts.append(("data", len(payload), f"application data ({len(payload)} bytes)"))
    return names.get(flags, flags), tuple(parts)


def draw(packets: list[Shown]) -> str:
    """The figure as SVG text."""
    height = _TOP + _STEP * len(packets) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="960" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="tip" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#333"/></marker></defs>',
    ]
    for x, label in ((_LEFT, "initiator"), (_RIGHT, "responder")):
        out.append(
            f'<text x="{x}" y="30" text-anchor="middle" font-weight="bold">{label}</text>'
            f'<line x1="{x}" y1="42" x2="{x}" y2="{height - 20}" stroke="#333"/>'
        )
    for i, packet in enumerate(packets):
        out += _row(packet, _TOP + i * _STEP)
    out.append("</svg>\n")
    return "\n".join(out)


def _row(packet: Shown, y: int) -> list[str]:
    begin, end = (_LEFT, _RIGHT) if packet.outward else (_RIGHT, _LEFT)
    side = _LEFT - 10 if packet.outward else _RIGHT + 10
    anchor = "end" if packet.outward else "start"
    out = [
        f'<line x1="{begin}" y1="{y + 52}" x2="{end}" y2="{y + 62}" stroke="#333" stroke-width="1.4"'
        ' marker-end="url(#tip)"/>',
        f'<text x="{side}" y="{y + 54}" text-anchor="{anchor}" fill="#555">{packet.at_ms:.1f} ms</text>',
        f'<text x="{_LEFT + 20}" y="{y + 14}" font-weight="bold">{escape(packet.name)}</text>',
    ]
    x = _LEFT + 90
    for kind, size, text in packet.parts:
        # Not to scale: a label must fit, and a credential must look bigger than an option.
        width = max(40 + 4 * min(size, 90) // 2, 7 * len(text) + 12)
        out.append(
            f'<rect x="{x}" y="{y - 2}" width="{width}" height="24" rx="3" fill="{_COLOURS[kind]}"/>'
            f'<text x="{x + width / 2}" y="{y + 14}" text-anchor="middle" fill="#111">{escape(text)}</text>'
        )
        x += width + 4
    return out


def main(arguments: list[str]) -> int:
    """Draw the first connection of a capture."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m labs.figure CAPTURE.pcap FIGURE.svg\n")
        return 2
    capture, figure = Path(arguments[0]), Path(arguments[1])
    figure.write_text(draw(read(capture)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
