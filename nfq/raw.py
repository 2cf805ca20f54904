"""Crafted packets, sent as they are: refusals and RSTs to a remote peer, RSTs to the local stack.

A raw socket with IP_HDRINCL (IPV6_HDRINCL) sends whole packets. They leave through OUTPUT like any other, where rule 4
of nfq.rules lets them pass: the socket was opened under a file system group id that no program runs with, which the
kernel keeps with the socket (xt_owner). No mark is needed, and none is trusted from outside.

A packet whose destination is a local address goes round the loopback device and is delivered with the route it left
with, so its source may be a remote address: a RST that seems to come from the peer makes a local connect() fail at
once.
Whoever has CAP_NET_RAW in this network namespace can send frames past all of netfilter (AF_PACKET) anyway.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import Final

from nfq.rules import RAW_GROUP
from sectool.errors import PrivilegeError, SectoolError

_IPV6_HDRINCL: Final = 36
_IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_WANT = 23, 1
_SO_SNDBUFFORCE: Final = 32
_libc = ctypes.CDLL(None, use_errno=True)


def _open(family: int) -> socket.socket:
    sock = socket.socket(
        family, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW
    )
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
    sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 4 << 20)
    return sock


class RawSender:
    """Raw sockets of the present network namespace, one per family."""

    def __init__(self, group: int = RAW_GROUP) -> None:
        """Raises PrivilegeError without CAP_NET_RAW and CAP_SETGID, SectoolError when raw sockets do not exist."""
        before = _libc.setfsgid(ctypes.c_uint(group))  # of this thread, until the sockets are open
        try:
            if (
                _libc.setfsgid(ctypes.c_uint(0xFFFFFFFF)) & 0xFFFFFFFF != group
            ):  # -1 changes nothing and tells
                raise PrivilegeError("cannot open the raw socket's group", "run as root (CAP_SETGID)")
            self._v4 = _open(socket.AF_INET)
            self._v6: socket.socket | None = None
            self._udp6: socket.socket | None = None
            try:
                self._v6 = _open(socket.AF_INET6)
                self._udp6 = _open(socket.AF_INET6)
                self._udp6.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 0)
                self._udp6.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_WANT)
            except OSError:
                self._v6 = None  # a kernel without IPv6: nothing will ask for it
        except PermissionError:
            raise PrivilegeError("raw sockets are not permitted", "run as root (CAP_NET_RAW)") from None
        except OSError as e:
            raise SectoolError(f"cannot open a raw socket: {e.strerror}") from None
        finally:
            _libc.setfsgid(ctypes.c_uint(before))

    def send(self, packet: bytes) -> None:
        """Send an IPv4 or IPv6 packet by its own header. Raises OSError when there is no route or no room."""
        if packet[0] >> 4 == 4:
            self._v4.sendto(packet, (socket.inet_ntop(socket.AF_INET, packet[16:20]), 0))
        elif self._v6 is not None:
            self._v6.sendto(packet, (socket.inet_ntop(socket.AF_INET6, packet[24:40]), 0))

    def send_large(self, packet: bytes) -> None:
        """Send a UDP packet that may be larger than its path carries: in fragments, if need be.

        With IPv4 and DF clear the kernel does it. An IPv6 packet with a header of its own it refuses, so another socket
        sends what is behind the header, which must be UDP, and the kernel makes a new one.
        """
        if packet[0] >> 4 == 4:
            self.send(packet)
        elif self._udp6 is not None:
            source, destination = packet[8:24], socket.inet_ntop(socket.AF_INET6, packet[24:40])
            info = source + bytes(4)
            traffic = struct.pack("=i", int.from_bytes(packet[:2], "big") >> 4 & 0xFF)
            ancillary = [
                (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info),
                (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT, struct.pack("=i", packet[7])),
                (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, traffic),
            ]
            self._udp6.sendmsg([packet[40:]], ancillary, 0, (destination, socket.IPPROTO_UDP))

    def close(self) -> None:
        """Close the sockets."""
        self._v4.close()
        for sock in (self._v6, self._udp6):
            if sock is not None:
                sock.close()
