"""Packets as they cross this network namespace, copied for evidence: a packet socket, and what a packet belongs to.

The socket (AF_PACKET, SOCK_DGRAM) sees what enters before any firewall and what leaves after it, released flows that
never come to the queue included: encrypted flows are seen encrypted. It delays nobody: when its buffer is full the
kernel drops copies, and counts them. On loopback each packet passes twice; the copy that enters is left out.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sectool.errors import PrivilegeError

_ETH_P_ALL, _ETH_P_IP, _ETH_P_IPV6 = 3, 0x0800, 0x86DD
_PACKET_OUTGOING: Final = 4
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SO_TIMESTAMPNS, _SO_RCVBUFFORCE = 35, 33
_TCP, _UDP, _ICMP, _ICMP6 = 6, 17, 1, 58
_EXTENSIONS: Final = frozenset({0, 43, 60})  # hop-by-hop, routing, destination options (RFC 8200, section 4)
_FRAGMENT: Final = 44
MAX_PACKET: Final = 262_144
BUFFER: Final = 16 << 20

Key = tuple[
    int, bytes, int, bytes, int
]  # protocol, the lesser end, the greater end (addresses in 4 or 16 bytes)


@dataclass(frozen=True, slots=True)
class Seen:
    """A copy of one IP packet. `us`: UTC microseconds; `outbound`: it left through `interface`."""

    us: int
    data: bytes
    interface: str
    outbound: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """What a packet belongs to, and how many of its bytes are headers."""

    key: Key
    headers: int


def key_of(protocol: int, source: bytes, source_port: int, destination: bytes, destination_port: int) -> Key:
    """The same for both directions of a flow. ICMP has no ports: 0."""
    first, second = (source, source_port), (destination, destination_port)
    low, high = (first, second) if first <= second else (second, first)
    return protocol, *low, *high


def key_of_text(protocol: int, source: str, source_port: int, destination: str, destination_port: int) -> Key:
    """The key of a recorded flow, with addresses as text."""
    ends = [ipaddress.ip_address(text).packed for text in (source, destination)]
    if protocol in (_ICMP, _ICMP6):
        source_port = destination_port = 0
    return key_of(protocol, ends[0], source_port, ends[1], destination_port)


def shape_of(data: bytes) -> Shape | None:
    """What `data` belongs to; None for what is no whole IP header or a later fragment. Never raises."""
    if len(data) < 20:
        return None
    if data[0] >> 4 == 4:
        start, protocol = (data[0] & 15) * 4, data[9]
        if start < 20 or struct.unpack_from(">H", data, 6)[0] & 0x1FFF:
            return None
        source, destination = data[12:16], data[16:20]
    elif data[0] >> 4 == 6 and len(data) >= 40:
        source, destination = data[8:24], data[24:40]
        start, protocol = 40, data[6]
        while protocol in _EXTENSIONS or protocol == _FRAGMENT:
            if len(data) < start + 8:
                return None
            if protocol == _FRAGMENT:
                if struct.unpack_from(">H", data, start + 2)[0] & 0xFFF8:
                    return None
                protocol, start = data[start], start + 8
            else:
                protocol, start = data[start], start + (data[start + 1] + 1) * 8
    else:
        return None
    ports, headers = (0, 0), start
    if protocol in (_TCP, _UDP):
        if len(data) < start + 8:
            return None
        ports = struct.unpack_from(">HH", data, start)
        headers = start + 8
        if protocol == _TCP and len(data) >= start + 20:
            headers = start + max(20, (data[start + 12] >> 4) * 4)
    elif protocol in (_ICMP, _ICMP6):
        headers = start + 8
    return Shape(key_of(protocol, source, ports[0], destination, ports[1]), min(headers, len(data)))


class Tap:
    """The packet socket of the present network namespace."""

    def __init__(self) -> None:
        """Raises PrivilegeError without CAP_NET_RAW."""
        try:
            self._socket = socket.socket(
                socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.htons(_ETH_P_ALL)
            )
        except PermissionError:
            raise PrivilegeError("capturing packets needs CAP_NET_RAW", "run it with sudo") from None
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        with contextlib.suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER)
        self.dropped = 0

    def packets(self, wait_s: float) -> Iterator[Seen]:
        """What has come, after waiting for at most `wait_s` seconds for the first."""
        self._socket.settimeout(wait_s)
        while True:
            try:
                data, ancillary, _, address = self._socket.recvmsg(MAX_PACKET, 64)
            except (TimeoutError, BlockingIOError):
                return
            except OSError as error:  # an interface went down; the socket stays good
                if error.errno == 100:  # ENETDOWN
                    continue
                raise
            self._socket.settimeout(0)
            interface, protocol, kind = address[0], address[1], address[2]
            outbound = kind == _PACKET_OUTGOING
            if protocol not in (_ETH_P_IP, _ETH_P_IPV6) or (interface == "lo" and not outbound):
                continue
            yield Seen(_when(ancillary), data, interface, outbound)

    def count_dropped(self) -> int:
        """Copies the kernel had no room for, so far."""
        raw = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        self.dropped += struct.unpack("II", raw)[1]
        return self.dropped

    def close(self) -> None:
        """No more copies."""
        self._socket.close()


def _when(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(data) >= 16:
            seconds, nanoseconds = struct.unpack_from("qq", data)
            return int(seconds) * 1_000_000 + int(nanoseconds) // 1000
    import time

    return time.time_ns() // 1000
