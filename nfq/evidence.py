"""From copies of packets to a capture file: those of chosen flows, each with a comment that says whose it is.

    packet ──► flow known and chosen? ── yes ─► written
                     │ not known yet
                     ▼
               held for HOLD_US, HOLD_BYTES at most ──► its flow is told of meanwhile: written, in order of time

A verdict is told of after the packets that led to it: without holding, every capture would lack the handshake.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from nfq.capture import Key, Seen, shape_of

HOLD_US: Final = 3_000_000
HOLD_BYTES: Final = 16 << 20
LINKTYPE_RAW: Final = 101


class Sink(Protocol):
    """Where packets go."""

    def write(self, seen: Seen, kept: int, comment: str) -> None:
        """Write the first `kept` bytes of a packet."""


@dataclass
class Evidence:
    """What is written of the packets that are offered. Bounds: packets and bytes written."""

    sink: Sink
    payload: bool
    max_packets: int
    max_bytes: int
    chosen: dict[Key, str] = field(default_factory=dict)
    written: int = 0
    size: int = 0
    _held: deque[tuple[Seen, Key, int]] = field(default_factory=deque)
    _held_bytes: int = 0

    @property
    def full(self) -> bool:
        """Whether a bound is reached."""
        return self.written >= self.max_packets or self.size >= self.max_bytes

    def choose(self, key: Key, comment: str) -> None:
        """Packets of this flow are wanted, those that are held too."""
        self.chosen[key] = comment
        kept: deque[tuple[Seen, Key, int]] = deque()
        for seen, of, headers in self._held:
            if of == key:
                self._held_bytes -= len(seen.data)
                self._write(seen, headers, comment)
            else:
                kept.append((seen, of, headers))
        self._held = kept

    def offer(self, seen: Seen) -> None:
        """A packet came by."""
        shape = shape_of(seen.data)
        if shape is None:
            return
        comment = self.chosen.get(shape.key)
        if comment is not None:
            self._write(seen, shape.headers, comment)
            return
        self._held.append((seen, shape.key, shape.headers))
        self._held_bytes += len(seen.data)
        while self._held and (self._held_bytes > HOLD_BYTES or seen.us - self._held[0][0].us > HOLD_US):
            self._held_bytes -= len(self._held.popleft()[0].data)

    def _write(self, seen: Seen, headers: int, comment: str) -> None:
        if self.full:
            return
        kept = len(seen.data) if self.payload else headers
        self.sink.write(seen, kept, comment)
        self.written += 1
        self.size += kept


class PcapNg:
    """A pcapng file (scapy's writer), readable for its owner alone. It has to be a new one."""

    def __init__(self, path: Path) -> None:
        """Raises FileExistsError."""
        from scapy.packet import Raw  # a second: only when packets are written
        from scapy.utils import PcapNgWriter

        path.touch(mode=0o600, exist_ok=False)
        self._writer: Any = PcapNgWriter(str(path))
        self._raw: Any = Raw
        self._writer.linktype = LINKTYPE_RAW
        self._writer.write_header(None)

    def write(self, seen: Seen, kept: int, comment: str) -> None:
        """Write the first `kept` bytes of a packet with its direction and a comment."""
        packet = self._raw(seen.data[:kept])
        # The interface stands in the comment: libpcap refuses files with several interfaces of raw IP.
        packet.comments = [f"{seen.interface} {'out' if seen.outbound else 'in'}: {comment}".encode()]
        packet.direction = 2 if seen.outbound else 1
        self._writer.write_packet(packet, sec=(seen.us + 0.5) / 1e6, wirelen=len(seen.data))

    def close(self) -> None:
        """Write everything out."""
        self._writer.close()
