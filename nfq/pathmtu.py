"""Paths that are narrower than the device: what is known of them, and how an encrypted flow fits into one.

The stack makes segments for the path's MTU, and a record option makes them 28 octets longer. Telling the stack a
smaller MTU does not help: its own output then refuses what is larger than that (measured: it tells itself a smaller
MTU again and again, down to 552), and IPv6 knows none below 1,280 anyway. So the stack is told the truth, and what it
makes is cut: each piece leaves as a packet and a record of its own. See docs/decisions/0007.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from nfq.flow import Flow
from nfq.packet import FIN, PSH, RECORD_OPTION_LEN, URG, PacketError, checksum
from sectool.clock import SECOND

LIFE_US: Final = 600 * SECOND  # as long as Linux remembers a path's MTU (net.ipv4.route.mtu_expires)
_LEAST: Final = {4: 552, 16: 1280}  # net.ipv4.route.min_pmtu; RFC 8200, 5
_LIMIT: Final = 4096
_CWR: Final = 0x80


class Paths:
    """MTU by remote address, bounded. `version` changes whenever any of them does."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self.version = 0

    def learn(self, remote: bytes, mtu: int, now_us: int) -> None:
        """A packet towards `remote` was larger than `mtu`."""
        mtu = max(mtu, _LEAST[len(remote)])
        before = self._known.pop(remote, None)
        self._known[remote] = (mtu, now_us + LIFE_US)
        if before is None or before[0] != mtu:
            self.version += 1
        if len(self._known) > _LIMIT:
            self._known.popitem(last=False)

    def mtu(self, remote: bytes) -> int:
        """The MTU of the path to `remote`; 0: as large as the device's, as far as is known."""
        return self._known.get(remote, (0, 0))[0]

    def expire(self, now_us: int) -> None:
        """Forget what was learnt long ago: the path may have become wider."""
        while self._known:
            remote, (_, until) = next(iter(self._known.items()))
            if until > now_us:
                return
            del self._known[remote]
            self.version += 1


def most(paths: Paths, remote: bytes) -> int:
    """The MSS with which what our stack sends to `remote` fits its path with a record option; 0: any."""
    mtu = paths.mtu(remote)
    return mtu - (60 if len(remote) == 16 else 40) - RECORD_OPTION_LEN if mtu else 0


def look(paths: Paths, flow: Flow) -> None:
    """Note in an encrypted flow what its packets may have on its path, if the stack makes larger ones."""
    flow.path_seen = paths.version
    mtu = paths.mtu(flow.remote_address)
    headers = (60 if flow.v6 else 40) + RECORD_OPTION_LEN
    flow.path_mtu = 0 if flow.mss and flow.mss + headers <= mtu else mtu


def pieces(data: bytes | memoryview, tcp_off: int, data_off: int, v6: bool, mtu: int) -> list[bytes]:
    """A TCP segment cut so that each piece, with a record option, has at most `mtu` octets.

    Together they say what the segment says. Lengths, sequence numbers and IPv4 header checksums are right; TCP
    checksums are left to who seals them. Raises PacketError when a piece would have no room for any payload.
    """
    room = mtu - data_off - RECORD_OPTION_LEN
    size = len(data) - data_off
    if room < 8:
        raise PacketError("path too narrow for a record")
    flags = data[tcp_off + 13]
    urgent = int.from_bytes(data[tcp_off + 18 : tcp_off + 20], "big") if flags & URG else 0
    count = -(-size // room)
    seq = int.from_bytes(data[tcp_off + 4 : tcp_off + 8], "big")
    number = int.from_bytes(data[4:6], "big")
    out = []
    for n in range(count):
        at = n * room
        piece = bytearray(data[:data_off])
        piece += data[data_off + at : data_off + min(at + room, size)]
        if v6:
            piece[4:6] = (len(piece) - 40).to_bytes(2, "big")
        else:
            piece[2:4] = len(piece).to_bytes(2, "big")
            piece[4:6] = ((number + n) & 0xFFFF).to_bytes(2, "big")
            piece[10:12] = b"\0\0"
            piece[10:12] = checksum(bytes(piece[:tcp_off])).to_bytes(2, "big")
        piece[tcp_off + 4 : tcp_off + 8] = ((seq + at) & 0xFFFFFFFF).to_bytes(4, "big")
        # As a device does that splits a super-packet: the end belongs to the last piece, CWR to the first.
        mine = flags
        if n < count - 1:
            mine &= ~(FIN | PSH)
        if n:
            mine &= ~_CWR
        if urgent:  # the pointer counts from the piece's own beginning; behind what it names there is none
            mine = mine | URG if urgent > at else mine & ~URG
            piece[tcp_off + 18 : tcp_off + 20] = max(urgent - at, 0).to_bytes(2, "big")
        piece[tcp_off + 13] = mine
        out.append(bytes(piece))
    return out
