"""Packet messages of the kernel in both queues: `BulkQueue.drain`, `BurstQueue.drain`.

Any message makes at most one packet, which gets exactly one verdict; it lies within its message: bytes of an earlier
message, which are still in the buffer behind it, are never read.
"""

from __future__ import annotations

import socket
import struct
from functools import cache
from types import ModuleType, SimpleNamespace

from nfq import bulk, burst
from nfq.core import DROP, Result, Verdict
from nfq.marks import MASK
from tests.fuzz.packets import segments

STALE = bytes((0xA5,)) * 60_000
_VERDICTS = (0x0301, 0x0303)
_LARGEST = 60_000


class _Side:
    """A queue, and the end of its socket that the kernel has otherwise."""

    def __init__(self, module: ModuleType) -> None:
        self.kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.kernel, ours):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.judged: list[bytes] = []
        self.how = 0
        bound = module.PacketQueue
        module.PacketQueue = lambda *_, **__: SimpleNamespace(fd=ours.fileno())  # type: ignore[attr-defined]
        try:
            self.queue: bulk.BulkQueue | burst.BurstQueue = (
                bulk.BulkQueue(5301, self._judge, MASK)
                if module is bulk
                else burst.BurstQueue(5300, self._callback, MASK)
            )
        finally:
            module.PacketQueue = bound  # type: ignore[attr-defined]
        ours.detach()  # the queue has a copy of it; this one has to stay open as the kernel's would

    def _judge(self, packet: memoryview, *_: object) -> Result:
        self.judged.append(bytes(packet))
        return DROP if self.how & 1 else Result(Verdict.ENCRYPT, bytes(40) if self.how & 2 else None)

    def _callback(self, packet: burst.Packet) -> None:
        self.judged.append(packet.data)
        if self.how & 1:
            packet.drop()
        else:
            packet.send_on(1, bytes(40) if self.how & 2 else None)

    def drain(self, message: bytes) -> list[bytes]:
        """What the kernel is told when it has sent a message."""
        self.kernel.send(message)
        self.queue.drain()
        told = []
        while True:
            try:
                told.append(self.kernel.recv(1 << 17))
            except BlockingIOError:
                return told


@cache
def _sides() -> tuple[_Side, _Side]:
    return _Side(bulk), _Side(burst)


def one(data: bytes) -> None:
    """How to judge in the first byte, then the message."""
    message = data[1:_LARGEST]
    if not message:
        return
    for side in _sides():
        side.how = data[0]
        assert side.drain(STALE) == [], "no packet message"
        side.judged.clear()
        told = side.drain(message)
        assert len(side.judged) <= 1
        assert len(told) <= 1
        assert len(told) >= len(side.judged)
        for packet in side.judged:
            assert packet in message, "read behind the message"
        for verdict in told:
            length, kind = struct.unpack_from("=IH", verdict)
            assert length == len(verdict)
            assert kind in _VERDICTS


def _attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def _message(packet: bytes, *before: bytes, hook: int = 1) -> bytes:
    body = _attribute(1, struct.pack(">IHB", 7, 0x0800, hook)) + b"".join(before) + _attribute(10, packet)
    body = body[: len(body) - (-len(packet) % 4)]
    return struct.pack("=IHHII", 20 + len(body), 0x0300, 0, 0, 0) + b"\2\0\x14\xb5" + body


def seeds() -> dict[str, bytes]:
    """Packets in and out in the kernel's usual shapes, one with a mark, one too large to be copied whole."""
    packet = segments()["data-4"]
    device, info = struct.pack(">I", 2), _attribute(14, struct.pack(">I", 2))
    arriving = _attribute(5, device) + _attribute(9, struct.pack(">HH8s", 6, 0, bytes(8)))
    mark, capped = _attribute(3, struct.pack(">I", 1)), _attribute(13, struct.pack(">I", 70_000))
    out = {}
    for how in range(3):
        kind = bytes((how,))
        out[f"in-{how}"] = kind + _message(packet, arriving, info)
        out[f"piece-{how}"] = kind + _message(packet, arriving)
        out[f"out-{how}"] = kind + _message(packet, _attribute(6, device), info, hook=3)
        out[f"marked-{how}"] = kind + _message(packet, mark, arriving, info)
        out[f"capped-{how}"] = kind + _message(packet, arriving, capped)
    return out
