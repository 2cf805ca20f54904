"""Sends packets made by the enforcer itself: resets and refusals.

The output chain knows their socket by the file system group id it was opened with (xt_owner looks at the socket
file's credentials), which no account has: taking it on needs CAP_SETGID in the initial user namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
from collections.abc import Iterator
from typing import Final

from nfq.rules import RAW_GROUP

_IPV6_HDRINCL: Final = 36
_libc = ctypes.CDLL(None)


@contextlib.contextmanager
def _group() -> Iterator[None]:
    """Have the worker's file system group id for a moment (setfsgid(2), this thread only)."""
    before = _libc.setfsgid(RAW_GROUP)
    try:
        yield
    finally:
        _libc.setfsgid(before)


class RawSender:
    """One raw socket for each IP version; packets are whole, IP header included."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with _group():
            self._v4 = socket.socket(socket.AF_INET, kind, socket.IPPROTO_RAW)
            self._v6 = socket.socket(socket.AF_INET6, kind, socket.IPPROTO_RAW)
        self._v6.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)

    def send(self, packet: bytes) -> None:
        """Send one packet; OSError when there is no way to its destination."""
        if packet[0] >> 4 == 4:
            self._v4.sendto(packet, socket.MSG_DONTWAIT, (socket.inet_ntop(socket.AF_INET, packet[16:20]), 0))
        else:
            self._v6.sendto(
                packet, socket.MSG_DONTWAIT, (socket.inet_ntop(socket.AF_INET6, packet[24:40]), 0)
            )

    def close(self) -> None:
        """Close both sockets."""
        self._v4.close()
        self._v6.close()
