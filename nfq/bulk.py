"""The bulk queue: super-packets of encrypted flows, in and out with as few copies as Python allows.

NetfilterQueue binds the queue; messages are read and verdicts written here, because its packet objects cost two more
copies of up to 64 KiB each and an allocation that the C library gives back to the kernel every time. A packet is a view
of one buffer, and a verdict's packet goes to the kernel from where it was built.
Source: include/uapi/linux/netfilter/nfnetlink_queue.h
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from nfq.core import Result, Verdict
from nfq.marks import Marks
from nfq.queue import LOCAL_OUT, PacketQueue

Judge = Callable[[memoryview, bool, bool], Result]  # packet, outbound, gso

_PACKET, _VERDICT, _VERDICT_BATCH = 0x0300, 0x0301, 0x0303
_HDR, _VERDICT_HDR, _MARK, _PAYLOAD, _CAP_LEN, _SKB_INFO = 1, 2, 3, 10, 13, 14
_SKB_GSO: Final = 2
_NF_DROP, _NF_REPEAT = 0, 4
_LARGEST: Final = 0xFFFF - 4  # what fits an attribute
_BUFFER: Final = (1 << 16) + 4096  # 64 KiB of packet, and the attributes before it

_head = struct.Struct("=IHH8x")  # length, type
_attribute = struct.Struct("=HH")
_packet_hdr = struct.Struct(">IHB")  # id, hardware protocol, hook
_u32 = struct.Struct(">I")
# nlmsghdr, nfgenmsg, NFQA_VERDICT_HDR, NFQA_MARK, NFQA_PAYLOAD's own head
_verdict = struct.Struct("=IHHIIBB2sHH8sHH4sHH")
_batch = struct.Struct("=IHHIIBB2sHH8s")
_ids = struct.Struct(">II")


class BulkQueue:
    """A bound queue whose packets are judged one by one; pieces that are only copied are let go together."""

    def __init__(self, number: int, judge: Judge, mask: int, *, length: int = 4096) -> None:
        """Bind with segmentation left to the kernel. Raises as nfq.queue.PacketQueue does."""
        self._queue = PacketQueue(number, _never, gso=True, length=length, buffer_bytes=64 << 20)
        self.fd = self._queue.fd
        self._judge = judge
        self._mask = mask
        marks = Marks(mask)
        self._marks = {
            Verdict.ACCEPT: marks.passing,
            Verdict.RELEASE: marks.allowed,
            Verdict.ENCRYPT: marks.encrypted,
            Verdict.SMALL: marks.small,
            Verdict.REQUEUE: marks.requeue,
        }
        self._number = struct.pack(">H", number)
        self._socket = socket.socket(fileno=os.dup(self.fd))
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self.packets = 0

    def drain(self, limit: int = 64) -> None:
        """Judge the packets that wait, at most `limit`; never blocks."""
        view, receive = self._view, self._socket.recv_into
        dropped = 0
        for _ in range(limit):
            try:
                size = receive(view)
            except BlockingIOError:
                break
            if self._buffer[4] | self._buffer[5] << 8 == _PACKET:
                dropped = self._one(size) or dropped
        if dropped:
            self._drop_up_to(dropped)

    def _one(self, size: int) -> int:
        """Judge one packet message; its id if it is to be dropped."""
        view = self._view
        number = mark = info = 0
        hook, payload, whole = 0, view[:0], True
        at = 20
        while at + 4 <= size:
            length, kind = _attribute.unpack_from(view, at)
            if kind == _PAYLOAD:
                payload = view[at + 4 : at + length]
            elif kind == _HDR:
                number, _, hook = _packet_hdr.unpack_from(view, at + 4)
            elif kind == _MARK:
                (mark,) = _u32.unpack_from(view, at + 4)
            elif kind == _SKB_INFO:
                (info,) = _u32.unpack_from(view, at + 4)
            elif kind == _CAP_LEN:
                whole = False
            if length < 4:
                break
            at += (length + 3) & ~3
        self.packets += 1
        if not whole:
            self._pass(number, mark, self._marks[Verdict.REQUEUE], None)
            return 0
        result = self._judge(payload, hook == LOCAL_OUT, bool(info & _SKB_GSO))
        ours = self._marks.get(result.verdict)
        if ours is None:
            return number
        self._pass(number, mark, ours, result.packet)
        return 0

    def _pass(self, number: int, mark: int, ours: int, packet: bytes | memoryview | None) -> None:
        """Send a packet through its chain again with our mark, replaced by `packet` if given."""
        size = 0 if packet is None else len(packet)
        if size > _LARGEST:
            packet, size, ours = None, 0, self._marks[Verdict.REQUEUE]
        head = _verdict.pack(
            40 if packet is None else 44 + size,
            _VERDICT,
            1,  # a request
            0,
            0,
            0,
            0,
            self._number,
            12,
            _VERDICT_HDR,
            _ids.pack(_NF_REPEAT, number),
            8,
            _MARK,
            _u32.pack(mark & ~self._mask | ours),
            4 + size,
            _PAYLOAD,
        )
        if packet is None:
            self._socket.send(head[:40])
        else:
            self._socket.sendmsg((head, packet))

    def _drop_up_to(self, number: int) -> None:
        """Drop every packet of this queue without a verdict up to this one: all others of the round have theirs."""
        self._socket.send(
            _batch.pack(
                32, _VERDICT_BATCH, 1, 0, 0, 0, 0, self._number, 12, _VERDICT_HDR, _ids.pack(_NF_DROP, number)
            )
        )

    def counters(self) -> dict[str, int]:
        """As nfq.queue.PacketQueue.counters."""
        return self._queue.counters()

    def close(self) -> None:
        """Unbind. Packets still waiting are dropped by the kernel."""
        with contextlib.suppress(OSError):
            self._socket.close()
        self._queue.close()


def _never(_packet: object) -> None:
    raise AssertionError("the bulk queue reads its own messages")
