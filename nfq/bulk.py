"""The bulk queue: super-packets of encrypted flows, in and out with as few copies as Python allows.

NetfilterQueue binds the queue; messages are read and verdicts written here, because its packet objects cost two more
copies of up to 64 KiB each and an allocation that the C library gives back to the kernel every time. A packet is a view
of one buffer, and a verdict's packet goes to the kernel from where it was built. docs/decisions/0008 has the figures.
Source: include/uapi/linux/netfilter/nfnetlink_queue.h
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Final, NamedTuple

from nfq.core import Result, Verdict
from nfq.marks import Marks
from nfq.queue import LOCAL_OUT, PacketQueue

# The packet; whether it leaves; whether the kernel has still to split it; a view from the packet's first byte to the
# end of the buffer, of which the bytes behind the packet may be overwritten.
Judge = Callable[[memoryview, bool, bool, memoryview], Result]

_PACKET, _VERDICT, _VERDICT_BATCH = 0x0300, 0x0301, 0x0303
_HDR, _VERDICT_HDR, _MARK, _IN, _OUT, _HWADDR, _PAYLOAD, _CAP_LEN, _SKB_INFO = 1, 2, 3, 5, 6, 9, 10, 13, 14
_SKB_GSO: Final = 2
_NF_DROP, _NF_REPEAT = 0, 4
_REQUEST: Final = 1
_LARGEST: Final = 0xFFFF - 4  # what fits an attribute
_BUFFER: Final = (1 << 16) + 4096  # 64 KiB of packet, and the attributes before it

_attribute = struct.Struct("=HH")
_kind = struct.Struct("=H")
_u32 = struct.Struct(">I")


def _native(text: bytes) -> int:
    """Four bytes of a message as `=I` reads them."""
    return int.from_bytes(text, sys.byteorder)


def _head_of(kind: int, length: int) -> int:
    """An attribute's head."""
    return _native(_attribute.pack(length, kind))


# The shapes in which the kernel gives packets without a mark, read at once. From the message's start: length, type;
# head and id, hook; heads of the device, the sender's hardware address (incoming), the packet's state; the payload's.
_leaving = struct.Struct("=IH14xI4s2xBxI4xIIHH")
_arriving = struct.Struct("=IH14xI4s2xBxI4xI12xIIHH")
_piece = struct.Struct("=IH14xI4s2xBxI4xI12xHH")  # arriving, with nothing to say about its state
_HEAD_HDR, _HEAD_IN, _HEAD_OUT = _head_of(_HDR, 11), _head_of(_IN, 8), _head_of(_OUT, 8)
_HEAD_HWADDR, _HEAD_INFO = _head_of(_HWADDR, 16), _head_of(_SKB_INFO, 8)
_GSO: Final = _native(_u32.pack(_SKB_GSO))
_HOOK_AT: Final = 30

# nlmsghdr, nfgenmsg, NFQA_VERDICT_HDR, NFQA_MARK, NFQA_PAYLOAD's own head
_verdict = struct.Struct("=IHHIIBB2sI4s4sI4sHH")
_batch = struct.Struct("=IHHIIBB2sI4s4s")
_BARE: Final = 40  # a verdict without payload
_HEAD_VERDICT, _HEAD_MARK = _head_of(_VERDICT_HDR, 12), _head_of(_MARK, 8)
_REPEAT, _DROP = _u32.pack(_NF_REPEAT), _u32.pack(_NF_DROP)


class _Message(NamedTuple):
    """What a packet message says. `number` as the kernel wants it back; `at`: where the packet begins."""

    number: bytes
    outbound: bool
    mark: int
    gso: bool
    whole: bool
    at: int
    end: int


class BulkQueue:
    """A bound queue whose packets are judged one by one; pieces that are only copied are let go together."""

    def __init__(self, number: int, judge: Judge, mask: int, *, length: int = 4096) -> None:
        """Bind with segmentation left to the kernel. Raises as nfq.queue.PacketQueue does."""
        self._queue = PacketQueue(number, _never, gso=True, length=length, buffer_bytes=64 << 20)
        self.fd = self._queue.fd
        self._judge = judge
        self._mask = mask
        marks = Marks(mask)
        # By verdict: our mark of a packet that goes on. None: it is dropped.
        self._marks: list[int | None] = [None] * (max(Verdict) + 1)
        self._marks[Verdict.ACCEPT] = marks.passing
        self._marks[Verdict.RELEASE] = marks.allowed
        self._marks[Verdict.ENCRYPT] = marks.encrypted
        self._marks[Verdict.SMALL] = marks.small
        self._marks[Verdict.REQUEUE] = marks.requeue
        self._plain = [None if ours is None else _u32.pack(ours) for ours in self._marks]
        self._number = struct.pack(">H", number)
        self._socket = socket.socket(fileno=os.dup(self.fd))
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._head = bytearray(_verdict.size)
        self._bare = memoryview(self._head)[:_BARE]
        self.packets = 0

    def drain(self, limit: int = 64) -> None:
        """Judge the packets that wait, at most `limit`; never blocks."""
        view, receive, one = self._view, self._socket.recv_into, self._one
        dropped = b""
        try:
            for _ in range(limit):
                dropped = one(receive(view)) or dropped
        except BlockingIOError:
            pass
        finally:
            if dropped:
                self._drop_up_to(dropped)

    def _one(self, size: int) -> bytes:
        """Judge one packet message; its id if it is to be dropped."""
        view = self._view
        # The usual shapes first. A packet that is marked, or was cut to the copy range, has another.
        if view[_HOOK_AT] == LOCAL_OUT:
            total, kind, h1, number, _, h2, h3, info, length, last = _leaving.unpack_from(view)
            at, outbound = _leaving.size, True
            usual = h2 == _HEAD_OUT and h3 == _HEAD_INFO
        else:
            total, kind, h1, number, _, h2, h3, h4, info, length, last = _arriving.unpack_from(view)
            at, outbound = _arriving.size, False
            usual = h2 == _HEAD_IN and h3 == _HEAD_HWADDR
            if usual and h4 != _HEAD_INFO:
                at, info = _piece.size, 0
                *_, length, last = _piece.unpack_from(view)
        if (
            usual
            and h1 == _HEAD_HDR
            and kind == _PACKET
            and last == _PAYLOAD
            and total == size
            and at - 4 + length == size
        ):
            mark, gso = 0, info & _GSO != 0
        else:
            message = self._read(size)
            if message is None:
                return b""
            number, outbound, mark, gso, whole, at, size = message
            if not whole:
                self.packets += 1
                self._pass(number, mark, Verdict.REQUEUE, None)
                return b""
        self.packets += 1
        verdict, packet, _ = self._judge(view[at:size], outbound, gso, view[at:])
        if self._marks[verdict] is None:
            return bytes(number)
        self._pass(number, mark, verdict, packet)
        return b""

    def _read(self, size: int) -> _Message | None:
        """A packet message of any shape; None for other messages."""
        view = self._view
        if size < 20 or _kind.unpack_from(view, 4)[0] != _PACKET:
            return None
        number, outbound, mark, info, whole, begin, end = b"", False, 0, 0, True, 0, 0
        at = 20
        while at + 4 <= size:
            length, kind = _attribute.unpack_from(view, at)
            if length < 4 or at + length > size:
                break
            if kind == _PAYLOAD:
                begin, end = at + 4, at + length
            elif kind == _HDR:
                number, outbound = bytes(view[at + 4 : at + 8]), view[at + 10] == LOCAL_OUT
            elif kind == _MARK:
                (mark,) = _u32.unpack_from(view, at + 4)
            elif kind == _SKB_INFO:
                (info,) = _u32.unpack_from(view, at + 4)
            elif kind == _CAP_LEN:
                whole = False
            at += (length + 3) & ~3
        if not number:
            return None
        return _Message(number, outbound, mark, bool(info & _SKB_GSO), whole, begin, end)

    def _pass(self, number: bytes, mark: int, verdict: Verdict, packet: bytes | memoryview | None) -> None:
        """Send a packet through its chain again with our mark, replaced by `packet` if given."""
        size = 0 if packet is None else len(packet)
        if size > _LARGEST:
            packet, size, verdict = None, 0, Verdict.REQUEUE
        said = (
            self._plain[verdict] if not mark else _u32.pack(mark & ~self._mask | (self._marks[verdict] or 0))
        )
        _verdict.pack_into(
            self._head,
            0,
            _BARE if packet is None else _BARE + 4 + size,
            _VERDICT,
            _REQUEST,
            0,
            0,
            0,
            0,
            self._number,
            _HEAD_VERDICT,
            _REPEAT,
            number,
            _HEAD_MARK,
            said,
            4 + size,
            _PAYLOAD,
        )
        if packet is None:
            self._socket.send(self._bare)
        else:
            self._socket.sendmsg((self._head, packet))

    def _drop_up_to(self, number: bytes) -> None:
        """Drop every packet of this queue without a verdict up to this one: all others of the round have theirs."""
        self._socket.send(
            _batch.pack(32, _VERDICT_BATCH, _REQUEST, 0, 0, 0, 0, self._number, _HEAD_VERDICT, _DROP, number)
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
