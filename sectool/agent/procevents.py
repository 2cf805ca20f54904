"""News of processes from the kernel: forks, execs, changes of user, ends (proc connector, NETLINK_CONNECTOR).

    nlmsghdr (16 bytes) | cn_msg (20) | proc_event: what u32, cpu u32, timestamp u64, then by kind
        fork  parent pid, parent tgid, child pid, child tgid      exec, exit, uid  pid, tgid, …

Source: include/uapi/linux/cn_proc.h, drivers/connector/cn_proc.c. The kernel tells only listeners in its first network,
process and user namespaces, so the socket is made in the network namespace of the kernel threads. Whoever is elsewhere
hears nothing, not even the acknowledgement, and has to look at /proc by itself. A socket filter drops what threads do.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import sys
from dataclasses import dataclass, field
from typing import Final

from nfq import netns
from sectool.errors import SectoolError

_CONNECTOR: Final = 11  # NETLINK_CONNECTOR
_FIRST: Final = 2  # kthreadd: like process 1 in the first network namespace, and nobody may hide it
_PROC: Final = 1  # CN_IDX_PROC, CN_VAL_PROC
_LISTEN: Final = 1  # PROC_CN_MCAST_LISTEN
_DONE: Final = 3  # NLMSG_DONE
_HEADER: Final = struct.Struct("=IHHIIIIIIHH")  # nlmsghdr, cn_msg
_WHAT, _DATA = 36, 52
NONE, FORK, EXEC, UID, EXIT = 0, 1, 2, 4, 0x80000000
_PAIR: Final = struct.Struct("=II")
_SO_ATTACH_FILTER: Final = 26
_SO_RCVBUFFORCE: Final = 33
_BUFFER: Final = 4 << 20  # bytes of news kept for us; beyond it the kernel says that some were lost
_MOST: Final = 4096  # messages in one go


@dataclass(slots=True)
class News:
    """Process ids that something happened to, those that ended, and whether news were lost."""

    changed: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    lost: bool = False
    more: bool = False  # read again: there were too many for one go


class ProcEvents:
    """The kernel's news. `heard`: it has answered, so news will come."""

    def __init__(self) -> None:
        """Raises SectoolError when this kernel has no such news, or tells them only to root."""
        try:
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(SectoolError):
                    stack.enter_context(netns.enter(_FIRST))
                kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
                self._sock = socket.socket(socket.AF_NETLINK, kind, _CONNECTOR)
        except OSError as error:
            raise SectoolError(f"the kernel tells no news of processes: {error.strerror}") from None
        self.heard = False
        try:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            self._filter()
            self._sock.bind((0, _PROC))
            order = struct.pack("=I", _LISTEN)
            size = _HEADER.size + len(order)
            self._sock.send(
                _HEADER.pack(size, _DONE, 0, 0, os.getpid(), _PROC, _PROC, 0, 0, len(order), 0) + order
            )
        except OSError as error:
            self._sock.close()
            raise SectoolError(f"the kernel tells no news of processes: {error.strerror}") from None

    def _filter(self) -> None:
        """Let through acknowledgements, execs, changes of user, and forks and ends of whole processes."""
        accept, drop = 14, 15
        load, tax, back = 0x20, 0x07, 0x06  # BPF_LD|W|ABS, BPF_MISC|TAX, BPF_RET
        equal, equal_x = 0x15, 0x1D  # BPF_JMP|BPF_JEQ with a constant, with X

        def test(at: int, kind: int, then: int, other: int, value: int = 0) -> tuple[int, int, int, int]:
            return kind, then - at - 1, other - at - 1, socket.htonl(value)

        code = [
            (load, 0, 0, _WHAT),
            test(1, equal, accept, 2, NONE),
            test(2, equal, accept, 3, EXEC),
            test(3, equal, accept, 4, UID),
            test(4, equal, 6, 5, EXIT),
            test(5, equal, 10, drop, FORK),
            (load, 0, 0, _DATA),
            (tax, 0, 0, 0),
            (load, 0, 0, _DATA + 4),
            test(9, equal_x, accept, drop),
            (load, 0, 0, _DATA + 8),
            (tax, 0, 0, 0),
            (load, 0, 0, _DATA + 12),
            test(13, equal_x, accept, drop),
            (back, 0, 0, 0xFFFF),
            (back, 0, 0, 0),
        ]
        program = b"".join(struct.pack("=HBBI", *line) for line in code)
        buffer = ctypes.create_string_buffer(program, len(program))
        self._sock.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(code), ctypes.addressof(buffer))
        )

    @property
    def fd(self) -> int:
        """Readable when there are news."""
        return self._sock.fileno()

    def read(self) -> News:
        """What there is, up to a bound. Never blocks."""
        news = News()
        for _ in range(_MOST):
            try:
                data = self._sock.recv(4096)
            except BlockingIOError:
                return news
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                news.lost = True
                continue
            self.heard = True
            note(data, news)
        news.more = True
        return news

    def close(self) -> None:
        """Hear no more."""
        self._sock.close()


def note(data: bytes, news: News) -> None:
    """Enter one message into `news`; what is no event of a whole process leaves it as it is."""
    if len(data) < _DATA + 8:
        return
    what = int.from_bytes(data[_WHAT : _WHAT + 4], sys.byteorder)
    pid, group = _PAIR.unpack_from(data, _DATA)
    if what == FORK and len(data) >= _DATA + 16:
        pid, group = _PAIR.unpack_from(data, _DATA + 8)
    if what == EXIT:
        if pid == group:
            news.ended.add(group)
    elif what in (EXEC, UID) or (what == FORK and pid == group):
        news.changed.add(group)
        news.ended.discard(group)
