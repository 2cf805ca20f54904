"""Two questions to the kernel's routing: is this a broadcast address, and how large may a packet to there be?

Straight over rtnetlink, one message each way. What the kernel does not tell is answered with the cautious value.
Source: include/uapi/linux/rtnetlink.h (RTM_GETROUTE, RTM_GETLINK)
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final

_NETLINK_ROUTE: Final = 0
_GETLINK, _GETROUTE = 18, 26
_NEWLINK, _NEWROUTE = 16, 24
_REQUEST: Final = 1
_message = struct.Struct("=IHHII")
_rtmsg = struct.Struct("=BBBBBBBBI")  # family, dst len, src len, tos, table, protocol, scope, type, flags
_ifinfo = struct.Struct("=BxHiII")
_attribute = struct.Struct("=HH")
_RTA_DST, _RTA_OIF, _RTA_METRICS, _RTAX_MTU = 1, 4, 8, 2
_IFLA_MTU: Final = 4
_BROADCAST: Final = 3  # RTN_BROADCAST
_TYPE: Final = 16 + 7  # where an answer says what kind of destination it is
CAUTIOUS: Final = 1280


class Routes:
    """One netlink socket of the present network namespace. For one thread; never raises once it is open."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
        self._sock.bind((0, 0))
        self._sock.settimeout(0.25)
        self._seq = 0

    def close(self) -> None:
        """Close the netlink socket."""
        self._sock.close()

    def _ask(self, kind: int, expected: int, body: bytes) -> bytes:
        """The answer's bytes from its netlink header on; b'' when there is none."""
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        try:
            self._sock.send(_message.pack(16 + len(body), kind, _REQUEST, seq, 0) + body)
            while True:
                data = self._sock.recv(32_768)
                if len(data) >= 16 and int.from_bytes(data[8:12], sys.byteorder) == seq:
                    break
        except OSError:
            return b""
        length = int.from_bytes(data[:4], sys.byteorder)
        good = int.from_bytes(data[4:6], sys.byteorder) == expected and length <= len(data)
        return data[:length] if good else b""

    def _route(self, destination: bytes) -> bytes:
        family = socket.AF_INET if len(destination) == 4 else socket.AF_INET6
        head = _rtmsg.pack(family, 8 * len(destination), 0, 0, 0, 0, 0, 0, 0)
        return self._ask(
            _GETROUTE,
            _NEWROUTE,
            head + _attribute.pack(4 + len(destination), _RTA_DST) + destination,
        )

    def is_broadcast(self, address: bytes) -> bool:
        """Whether an IPv4 address is a broadcast address of one of this host's networks."""
        answer = self._route(address)
        return len(answer) > _TYPE and answer[_TYPE] == _BROADCAST

    def mtu(self, destination: bytes, device: int = 0) -> int:
        """How large a packet to `destination` may be: what the route says, which path MTU discovery has taught, or else
        the device's MTU. `device`: the one it leaves by, if that is known.
        """
        answer = self._route(destination)
        known = 0
        for kind, at, end in _walk(answer, 16 + _rtmsg.size):
            if kind == _RTA_OIF and not device:
                device = int.from_bytes(answer[at:end], sys.byteorder)
            elif kind == _RTA_METRICS:
                for inner, a, b in _walk(answer[:end], at):
                    if inner == _RTAX_MTU:
                        known = int.from_bytes(answer[a:b], sys.byteorder)
        return known or self._device_mtu(device) or CAUTIOUS

    def _device_mtu(self, device: int) -> int:
        answer = self._ask(_GETLINK, _NEWLINK, _ifinfo.pack(socket.AF_UNSPEC, 0, device, 0, 0))
        for kind, at, end in _walk(answer, 16 + _ifinfo.size):
            if kind == _IFLA_MTU:
                return int.from_bytes(answer[at:end], sys.byteorder)
        return 0


def _walk(data: bytes, off: int) -> list[tuple[int, int, int]]:
    """(type, start, end) of each attribute; stops at one that does not hold."""
    out = []
    while off + 4 <= len(data):
        length, kind = _attribute.unpack_from(data, off)
        if length < 4 or off + length > len(data):
            break
        out.append((kind & 0x3FFF, off + 4, off + length))
        off += (length + 3) & ~3
    return out
