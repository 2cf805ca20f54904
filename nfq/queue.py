"""One netfilter queue: binding, settings the binding library does not know, draining, counters.

NetfilterQueue 1.1.0 is the binding. Its `Packet` is what the callback gets; of its verdicts these are used:

    set_mark(m), repeat()   the packet goes through its base chain again, carrying mark m (see nfq.rules): ALLOWED
                            releases the connection, PASS this packet only. m replaces the whole mark: `release` keeps
                            the bits of others
    set_payload(b)          the packet goes on as these bytes; checksums are the caller's business. b'' changes nothing
    drop()                  gone
    accept()                the packet goes on behind this table: mangle rules of others do not see it
    retain()                copies the payload, so that the verdict can be given after the callback, from anywhere;
                            the kernel goes on with other packets meanwhile, in any order

The library receives into 4,096 bytes and sets no queue flags. `run_socket` takes anything with `recv`, so larger
packets pass through it untouched; the settings go out as messages of our own on its netlink socket.
Source: include/uapi/linux/netfilter/nfnetlink_queue.h
"""

from __future__ import annotations

import os
import socket
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias, cast

import netfilterqueue

from sectool.errors import PrivilegeError, SectoolError

QueuedPacket: TypeAlias = netfilterqueue.Packet

# Netfilter hooks, `QueuedPacket.hook` (include/uapi/linux/netfilter.h)
LOCAL_IN: Final = 1
LOCAL_OUT: Final = 3

_SOL_NETLINK, _NETLINK_NO_ENOBUFS = 270, 5
_SO_RCVBUFFORCE = 33
_CONFIG = 0x0302  # subsystem NFNL_SUBSYS_QUEUE, message NFQNL_MSG_CONFIG
_CFG_PARAMS, _CFG_QUEUE_MAXLEN, _CFG_MASK, _CFG_FLAGS = 2, 3, 4, 5
_FLAG_FAIL_OPEN, _FLAG_GSO = 1, 4
_COPY_PACKET = 2
_PROC = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
_PACKET_BYTES = 1 << 17  # 64 KiB of packet, plus attributes


def release(packet: QueuedPacket, mark: int, mask: int) -> None:
    """Send the packet through its chain again, marked `mark` in the bits of `mask`: others' bits stay.

    With the ALLOWED mark its connection is released, with the PASS mark (the rest of the mask) only this packet passes.
    """
    packet.set_mark(packet.mark & ~mask | mark)
    packet.repeat()


class _Reader:
    """Stands where run_socket wants a socket: at most `budget` packets, then 'try again'."""

    __slots__ = ("_fd", "left")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.left = 0

    def recv(self, _size: int) -> bytes:
        """One netlink message."""
        if self.left <= 0:
            raise BlockingIOError(11, "enough for now")
        self.left -= 1
        return os.read(self._fd, _PACKET_BYTES)


class PacketQueue:
    """A bound queue. `callback` gets each packet and must give it a verdict, at once or (after retain) later."""

    def __init__(
        self,
        number: int,
        callback: Callable[[QueuedPacket], None],
        *,
        gso: bool = False,
        length: int = 8192,
        buffer_bytes: int = 32 << 20,
    ) -> None:
        """Bind. `length`: packets the kernel holds for us; more are dropped (and counted).

        Raises PrivilegeError without CAP_NET_ADMIN, SectoolError when the number is taken or the kernel has no queues.
        """
        self.number = number
        self._callback = callback
        try:
            self._queue = netfilterqueue.NetfilterQueue()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the receive buffer, which is set below
                self._queue.bind(number, self._guarded, max_len=length)
        except OSError as e:  # the library does not always say why
            if not _may_administer():
                raise PrivilegeError(
                    f"queue {number}: not permitted", "run as root (CAP_NET_ADMIN)"
                ) from None
            raise _cannot_bind(number, e) from None
        self.fd: int = self._queue.get_fd()
        os.set_blocking(self.fd, False)
        with socket.socket(fileno=os.dup(self.fd)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)
            # Without it a full buffer would make every later recv fail once; the kernel counts what it drops anyway.
            sock.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
        wanted = _FLAG_GSO if gso else 0
        self._configure(
            _attribute(_CFG_PARAMS, struct.pack(">IB", 0xFFFF, _COPY_PACKET))
            + _attribute(_CFG_MASK, struct.pack(">I", _FLAG_GSO | _FLAG_FAIL_OPEN))
            + _attribute(_CFG_FLAGS, struct.pack(">I", wanted))
        )
        self._reader = _Reader(self.fd)
        self._failure: BaseException | None = None

    def _configure(self, attributes: bytes) -> None:
        """A configuration message for this queue, unacknowledged: a refusal would turn up among the packets."""
        body = struct.pack(">BBH", socket.AF_UNSPEC, 0, self.number) + attributes
        message = struct.pack("=IHHII", 16 + len(body), _CONFIG, 1, 0, 0) + body
        os.write(self.fd, message)

    def _guarded(self, packet: QueuedPacket) -> None:
        # An exception would be lost inside the library's C callback, after which it stops for good: carry it out.
        try:
            self._callback(packet)
        except BaseException as e:
            self._failure = e
            self._reader.left = 0

    def drain(self, limit: int = 256) -> None:
        """Handle the packets that wait, at most `limit`; never blocks. Raises what the callback raised."""
        self._reader.left = limit
        self._queue.run_socket(cast("socket.socket", self._reader))
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def counters(self) -> dict[str, int]:
        """Kernel counters: packets waiting, dropped (queue full), user_dropped (our buffer full), seen."""
        return counters().get(self.number, {"waiting": 0, "dropped": 0, "user_dropped": 0, "seen": 0})

    def close(self) -> None:
        """Unbind. Packets still waiting are dropped by the kernel."""
        self._queue.unbind()


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def _may_administer() -> bool:
    """Whether this thread has CAP_NET_ADMIN (bit 12 of its effective capabilities)."""
    status = Path("/proc/thread-self/status").read_text(encoding="utf-8", errors="replace")
    return any(
        int(line.split()[1], 16) & 1 << 12 for line in status.splitlines() if line.startswith("CapEff:")
    )


def _cannot_bind(number: int, error: OSError) -> SectoolError:
    holder = bound_by(number)
    if holder is not None:
        return SectoolError(
            f"netfilter queue {number} is taken by another program (netlink port {holder})",
            "set `queue:` in sectool.yaml to a free number, or stop the other program",
        )
    return SectoolError(
        f"cannot bind netfilter queue {number}: {error}",
        "the kernel needs nfnetlink_queue (`modprobe nfnetlink_queue`)",
    )


def _rows() -> list[list[int]]:
    try:
        text = _PROC.read_text(encoding="ascii")
    except OSError:
        return []
    return [[int(field) for field in line.split()] for line in text.splitlines()]


def bound_by(number: int) -> int | None:
    """Netlink port (often the process id) of the program bound to a queue of this namespace; None if there is none."""
    return next((row[1] for row in _rows() if row[0] == number), None)


def counters() -> dict[int, dict[str, int]]:
    """Kernel counters of all queues of this namespace, by queue number."""
    # number, port, waiting, copy mode, copy range, dropped, user dropped, last packet id, 1
    return {
        row[0]: {"waiting": row[2], "dropped": row[5], "user_dropped": row[6], "seen": row[7]}
        for row in _rows()
        if len(row) >= 8
    }
