"""What really crosses the wire: tcpdump on a host of the lab, and a look at its file with scapy."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sectool.errors import SectoolError

if TYPE_CHECKING:
    from labs.lab import Node

WINDOW = 24  # bytes of a credential that must not turn up anywhere else


class Capture:
    """tcpdump on one host, from `start` to `stop`."""

    def __init__(self, node: Node, expression: str) -> None:
        self.file = node.folder / f"{node.name}.pcap"
        self._log = node.folder / "tcpdump.log"
        command = ["tcpdump", "-i", "eth0", "-Z", "root", "-U", "--immediate-mode", "-s", "0"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                node.place("tcpdump").argv([*command, "-w", str(self.file), expression]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=node.place().environment(),
                start_new_session=True,
            )
        end = time.monotonic() + 10
        while "listening on" not in self._log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > end:
                raise SectoolError(f"tcpdump did not start: {self._log.read_text(errors='replace').strip()}")
            time.sleep(0.02)

    def stop(self) -> Path:
        """End the capture; the file."""
        self._process.terminate()
        self._process.wait(timeout=10)
        return self.file


@dataclass(frozen=True, slots=True)
class Finding:
    """How identity travelled in a capture. `leaks` names every packet that had no business carrying it."""

    packets: int
    with_data: int  # packets with payload, of established connections
    syn: int  # SYNs that carry a handshake message
    syn_ack: int
    bare: int  # SYN or SYN-ACK without one
    leaks: tuple[str, ...]


def windows(payload: bytes) -> set[bytes]:
    """Pieces of a handshake message by which to know it again, monotonous ones left out."""
    pieces = (payload[i : i + WINDOW] for i in range(0, len(payload) - WINDOW + 1, WINDOW // 2))
    return {piece for piece in pieces if len(set(piece)) > WINDOW // 2}


def examine(packets: Iterable[tuple[int, bytes]]) -> Finding:
    """Judge (TCP flags, payload) pairs: identity may travel in SYN and SYN-ACK, and nowhere else."""
    seen = list(packets)
    carried: set[bytes] = set()
    counts = {"syn": 0, "syn_ack": 0, "bare": 0}
    for flags, payload in seen:
        if flags & 0x02:
            if payload:
                counts["syn_ack" if flags & 0x10 else "syn"] += 1
                carried |= windows(payload)
            else:
                counts["bare"] += 1
    leaks: list[str] = []
    with_data = 0
    for number, (flags, payload) in enumerate(seen, start=1):
        if flags & 0x02 or not payload:
            continue
        with_data += 1
        if b"spiffe://" in payload:
            leaks.append(f"packet {number} carries a SPIFFE ID")
        elif any(piece in payload for piece in carried):
            leaks.append(f"packet {number} carries bytes of a handshake message")
    return Finding(len(seen), with_data, counts["syn"], counts["syn_ack"], counts["bare"], tuple(leaks))


def in_clear(file: Path, needle: bytes) -> dict[int, tuple[int, int]]:
    """By IP version: packets with payload, and how many of them show `needle`."""
    from scapy.layers.inet import TCP
    from scapy.utils import PcapReader

    found: dict[int, tuple[int, int]] = {}
    with PcapReader(str(file)) as reader:
        for packet in reader:
            payload = bytes(packet[TCP].payload) if TCP in packet else b""
            if not payload or packet[TCP].flags.S:
                continue
            with_data, showing = found.get(packet.payload.version, (0, 0))
            found[packet.payload.version] = with_data + 1, showing + (needle in payload)
    return found


def read(file: Path) -> list[tuple[int, bytes]]:
    """(TCP flags, payload) of every TCP packet in a capture file."""
    from scapy.layers.inet import TCP
    from scapy.utils import PcapReader

    with PcapReader(str(file)) as reader:
        return [(int(p[TCP].flags), bytes(p[TCP].payload)) for p in reader if TCP in p]
