"""What the kernel needs to turn a flood of connection attempts away before it reaches a queue.

Packets that open connections cost the worker up to a millisecond each, and a full queue drops whatever comes: whoever
sends the most wins. So the rules (nfq.rules, SECTOOL-NEW) let strangers in at a bounded rate, in all and by source
prefix, and hosts that have proven themselves lately past that bound. This module has what these rules refer to:

    sets      one per IP version: addresses from which somebody has proven an identity, for KNOWN_S each time
    a counter packets turned away, read and set to zero by the worker, which makes one record of them each second

Both are objects of the network namespace: they outlive the worker, and go with the rules. Netlink messages are made
here, for the ipset and nfacct programs need not be there.
Source: include/uapi/linux/netfilter/ipset/ip_set.h, nfnetlink_acct.h
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections import OrderedDict
from typing import Final

from nfq.ctnetlink import attr, nest, u32
from sectool.errors import PrivilegeError, SectoolError

KNOWN_S: Final = 3600
KNOWN_MOST: Final = 65_536  # addresses in a set; then any gives way
AGAIN_US: Final = 600_000_000  # an address that was told this lately is not told again
COUNTER: Final = "sectool-shed"

_REQUEST, _ACK = 1, 4
_CREATE, _EXCL = 0x400, 0x200
_SET_CREATE, _SET_DESTROY, _SET_ADD = 0x0602, 0x0603, 0x0609
_ACCT_NEW, _ACCT_GET_ZERO, _ACCT_DEL = 0x0700, 0x0702, 0x0703
_PROTOCOL, _NAME, _TYPE, _REVISION, _FAMILY, _DATA = 1, 2, 3, 4, 5, 7
_IP, _TIMEOUT, _FLAGS, _HASH_SIZE, _MAX = 1, 6, 8, 18, 19
_BIG_ENDIAN: Final = 0x4000
_FORCE_ADD: Final = 1 << 5
_ACCT_NAME, _ACCT_PACKETS = 1, 2
_message = struct.Struct("=IHHIIBBH")
_attribute = struct.Struct("=HH")


def set_name(v6: bool) -> str:
    """What the rules of one IP version call its set."""
    return "sectool-known6" if v6 else "sectool-known4"


class Shed:
    """One netlink socket of the present network namespace. For one thread."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 12)
        self._sock.bind((0, 0))
        self._sock.settimeout(1.0)
        self._seq = 0
        self._told: OrderedDict[bytes, int] = OrderedDict()

    def close(self) -> None:
        """Close the netlink socket."""
        self._sock.close()

    def _ask(self, kind: int, flags: int, family: int, body: bytes) -> tuple[int, bytes]:
        """(positive error code, the first message that answers)."""
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        head = _message.pack(_message.size + len(body), kind, _REQUEST | _ACK | flags, seq, 0, family, 0, 0)
        self._sock.send(head + body)
        answer = b""
        while True:
            data = self._sock.recv(8192)
            if len(data) < 20 or int.from_bytes(data[8:12], sys.byteorder) != seq:
                continue
            if data[4:6] == b"\2\0" or data[4:6] == b"\0\2":  # NLMSG_ERROR
                return -int.from_bytes(data[16:20], sys.byteorder, signed=True), answer
            answer = data

    def prepare(self) -> None:
        """Make sets and counter unless they are there. Raises SectoolError."""
        for v6 in (False, True):
            data = attr(_TIMEOUT | _BIG_ENDIAN, u32(KNOWN_S)) + attr(_MAX | _BIG_ENDIAN, u32(KNOWN_MOST))
            data += attr(_HASH_SIZE | _BIG_ENDIAN, u32(1024)) + attr(_FLAGS | _BIG_ENDIAN, u32(_FORCE_ADD))
            body = _set(v6) + attr(_TYPE, b"hash:ip\0") + attr(_REVISION, b"\4")
            body += attr(_FAMILY, bytes((socket.AF_INET6 if v6 else socket.AF_INET,))) + nest(_DATA, data)
            self._made(*self._ask(_SET_CREATE, _CREATE | _EXCL, socket.AF_INET, body))
        name = attr(_ACCT_NAME, COUNTER.encode() + b"\0")
        self._made(*self._ask(_ACCT_NEW, _CREATE | _EXCL, socket.AF_UNSPEC, name))

    @staticmethod
    def _made(error: int, _answer: bytes) -> None:
        if error in (0, errno.EEXIST):
            return
        if error == errno.EPERM:
            raise PrivilegeError("sets of addresses: not permitted", "run as root (CAP_NET_ADMIN)")
        raise SectoolError(
            f"cannot make what the rules against floods refer to: {os.strerror(error)}",
            "the kernel needs ip_set_hash_ip, xt_set, xt_nfacct and xt_hashlimit (`modprobe -a` these);"
            " or set `stranger_rate: 0` in sectool.yaml to do without",
        )

    def remove(self) -> None:
        """Take away what `prepare` made. The rules must be gone; what still has a user stays."""
        for v6 in (False, True):
            self._ask(_SET_DESTROY, 0, socket.AF_INET, _set(v6))
        self._ask(_ACCT_DEL, 0, socket.AF_UNSPEC, attr(_ACCT_NAME, COUNTER.encode() + b"\0"))

    def known(self, address: bytes, now_us: int) -> None:
        """Somebody at this address (4 or 16 bytes) has proven an identity. Best effort."""
        told = self._told.get(address)
        if told is not None and 0 <= now_us - told < AGAIN_US:
            return
        self._told[address] = now_us
        self._told.move_to_end(address)
        if len(self._told) > KNOWN_MOST:
            self._told.popitem(last=False)
        v6 = len(address) == 16
        inner = nest(_IP, attr((2 if v6 else 1) | _BIG_ENDIAN, address))
        self._ask(_SET_ADD, 0, socket.AF_INET, _set(v6) + nest(_DATA, inner))

    def turned_away(self) -> int:
        """Packets turned away since this was asked last; 0 when there is no counter."""
        name = attr(_ACCT_NAME, COUNTER.encode() + b"\0")
        return packets_of(self._ask(_ACCT_GET_ZERO, 0, socket.AF_UNSPEC, name)[1])


def packets_of(answer: bytes) -> int:
    """The number of packets in a counter's message; 0 where there is none to be read."""
    at = _message.size
    while at + 4 <= len(answer):
        length, kind = _attribute.unpack_from(answer, at)
        if length < 4 or at + length > len(answer):
            break
        if kind & 0x3FFF == _ACCT_PACKETS and length == 12:
            return int.from_bytes(answer[at + 4 : at + 12], "big")
        at += (length + 3) & ~3
    return 0


def _set(v6: bool) -> bytes:
    return attr(_PROTOCOL, b"\6") + attr(_NAME, set_name(v6).encode() + b"\0")
