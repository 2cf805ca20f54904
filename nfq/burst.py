"""The normal queue: what waits is read, then judged, then all verdicts go to the kernel in one message.

A connection costs half a dozen packets, and their way through the kernel and through Python displace each other from
the processor's caches: done in turns of up to BURST packets each finds its own still there. Measured with 32
connections at once, reading and verdicts cost a third less than one packet at a time through NetfilterQueue, which
binds the queue here too.
Source: include/uapi/linux/netfilter/nfnetlink_queue.h
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from nfq.queue import LOCAL_OUT, PacketQueue

BURST: Final = 16
_ROOM: Final = (1 << 16) + 4096  # 64 KiB of packet, and the attributes before it
_MOST: Final = 1 << 16  # bytes of verdicts in one message: the socket's send buffer is larger

_PACKET, _VERDICT = 0x0300, 0x0301
_HDR, _MARK, _INDEV, _OUTDEV, _PAYLOAD = 1, 3, 5, 6, 10
_DROP, _REPEAT = bytes(4), (4).to_bytes(4, "big")
_attribute = struct.Struct("=HH")
# nlmsghdr, nfgenmsg, NFQA_VERDICT_HDR (verdict, id), NFQA_MARK, head of NFQA_PAYLOAD
_verdict = struct.Struct("=IHHIIBB2sHH4s4sHH4sHH")
_BARE: Final = 40  # without a payload
_SMALL: Final = 1600
_PENDING_MOST: Final = 64  # so that as many of them, and _MOST bytes besides, are less than the send buffer
_PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")


class Packet:
    """A packet that waits in the kernel for its verdict, to be given once and whenever."""

    __slots__ = ("_id", "_mark", "_queue", "data", "device", "outbound")

    def __init__(
        self, queue: BurstQueue, number: bytes, mark: int, data: bytes, outbound: bool, device: int
    ) -> None:
        self._queue = queue
        self._id = number
        self._mark = mark
        self.data = data  # from the IP header on
        self.outbound = outbound
        self.device = device  # interface index, 0 unknown

    def drop(self) -> None:
        """Gone."""
        self._queue.give(self._id, _DROP, self._mark, None)

    def send_on(self, ours: int, replaced: bytes | memoryview | None = None) -> None:
        """Let it through its base chain again, as `replaced` if given, with our bits of its mark set to `ours`."""
        queue = self._queue
        if replaced is None or len(replaced) > _SMALL:
            queue.give(self._id, _REPEAT, self._mark & ~queue.mask | ours, replaced)
            return
        # As `give` does it, for what nearly all packets are.
        size = len(replaced)
        head = _verdict.pack(
            *(44 + size, _VERDICT, 1, 0, 0, 0, 0, queue.number, 12, 2, _REPEAT, self._id, 8, _MARK),
            *((self._mark & ~queue.mask | ours).to_bytes(4, "big"), 4 + size, _PAYLOAD),
        )
        queue.pending.append(b"".join((head, replaced, _PADDING[size & 3])))
        if len(queue.pending) > _PENDING_MOST:
            queue.flush()


class BurstQueue:
    """A bound queue. `callback` gets each packet; verdicts leave with the next `flush`, which `drain` ends with."""

    def __init__(
        self, number: int, callback: Callable[[Packet], None], mask: int, *, length: int = 8192
    ) -> None:
        """Bind. `mask`: our bits of packet marks. Otherwise, and raises, as nfq.queue.PacketQueue."""
        self._queue = PacketQueue(number, _never, length=length)
        self.fd = self._queue.fd
        self.mask = mask
        self._callback = callback
        self.number = struct.pack(">H", number)
        self._socket = socket.socket(fileno=os.dup(self.fd))
        self._view = memoryview(bytearray(_ROOM))
        self.pending: list[bytes | memoryview] = []  # verdicts that the next `flush` gives
        self._size = 0
        self._expected = 1

    def drain(self, limit: int = 0) -> None:
        """Judge the packets that wait, at most `limit`; never blocks.

        Without `limit` as many as lately were there: looking in vain for one more costs as much as a packet does.
        """
        packets: list[Packet] = []
        receive, view = self._socket.recv_into, self._view
        expected = limit or self._expected
        for _ in range(expected):
            try:
                size = receive(view)
            except BlockingIOError:
                self._expected = len(packets) or 1
                break
            if view[4] | view[5] << 8 == _PACKET:
                packets.append(self._read(size))
        else:
            self._expected = min(2 * expected, BURST)
        for packet in packets:
            self._callback(packet)
        if self.pending:
            self.flush()

    def _read(self, size: int) -> Packet:
        view = self._view
        number = data = b""
        mark = indev = outdev = hook = 0
        at = 20
        while at + 4 <= size:
            length, kind = _attribute.unpack_from(view, at)
            if length < 4 or at + length > size:
                break
            if kind == _PAYLOAD:
                data = bytes(view[at + 4 : at + length])
            elif kind == _HDR:
                number, hook = bytes(view[at + 4 : at + 8]), view[at + 10]
            elif kind == _INDEV:
                indev = int.from_bytes(view[at + 4 : at + 8], "big")
            elif kind == _OUTDEV:
                outdev = int.from_bytes(view[at + 4 : at + 8], "big")
            elif kind == _MARK:
                mark = int.from_bytes(view[at + 4 : at + 8], "big")
            at += (length + 3) & ~3
        outbound = hook == LOCAL_OUT
        return Packet(self, number, mark, data, outbound, outdev if outbound else indev)

    def give(self, number: bytes, verdict: bytes, mark: int, packet: bytes | memoryview | None) -> None:
        """Note a verdict for the next flush."""
        size = 0 if packet is None else len(packet)
        head = _verdict.pack(
            _BARE if packet is None else 44 + size,
            _VERDICT,
            1,  # a request
            0,
            0,
            0,
            0,
            self.number,
            12,
            2,  # NFQA_VERDICT_HDR
            verdict,
            number,
            8,
            _MARK,
            mark.to_bytes(4, "big"),
            4 + size,
            _PAYLOAD,
        )
        if packet is None:
            self.pending.append(head[:_BARE])
        else:
            self.pending.append(head)
            self.pending.append(bytes(packet))  # it may be a view of a buffer that the next packet overwrites
            if size & 3:
                self.pending.append(bytes(-size & 3))
        self._size += 48 + size
        if self._size > _MOST:
            self.flush()

    def flush(self) -> None:
        """Give the kernel the verdicts noted."""
        if self.pending:
            message = b"".join(self.pending)
            self.pending.clear()
            self._size = 0
            self._socket.send(message)

    def counters(self) -> dict[str, int]:
        """As nfq.queue.PacketQueue.counters."""
        return self._queue.counters()

    def close(self) -> None:
        """Unbind. Packets still waiting are dropped by the kernel."""
        self._socket.close()
        self._queue.close()


def _never(_packet: object) -> None:
    raise AssertionError("this queue reads its own messages")
