"""IP and TCP headers as the packet path needs them: parse once, rewrite options and payload, checksum.

All functions take and give whole packets starting at the IP header, as NFQUEUE delivers them. Anything that
cannot be understood completely raises PacketError, and the caller drops it (fail closed).
Sources: RFC 791, RFC 8200, RFC 9293, RFC 6994 (shared option kinds), RFC 7413 (TFO), RFC 8684 (MPTCP).
"""

from __future__ import annotations

import struct

FIN, SYN, RST, PSH, ACK, URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
SYN_ACK = SYN | ACK

TCP = 6

OPT_MSS = 2
OPT_TFO = 34
OPT_MPTCP = 30
OPT_EXP = 253  # RFC 6994: shared experimental kind, told apart by a 16-bit ExID
EXID = b"\x5e\xc7"
EXID_TFO = b"\xf9\x89"  # experimental TFO, RFC 7413 appendix; never let through
HANDSHAKE_OPTION = bytes((OPT_EXP, 4)) + EXID
RECORD_OPTION_LEN = 28
_RECORD_PREFIX = bytes((OPT_EXP, RECORD_OPTION_LEN)) + EXID

MSS_RESERVE = RECORD_OPTION_LEN
MAX_OPTIONS = 40

_EXTENSION_HEADERS = frozenset((0, 43, 60))  # hop-by-hop, routing, destination options
_MAX_EXTENSIONS = 8
_SOURCE_ROUTES = frozenset((131, 137))  # IPv4 options: loose, strict

_ports_seq_ack = struct.Struct(">HHIIBBH")
_seq_ack = struct.Struct(">II")


class PacketError(ValueError):
    """The packet is malformed or of a shape that is not let through."""


class Segment:
    """A parsed TCP segment. Offsets are into `data`; `key`: local, remote address, local, remote port."""

    __slots__ = ("ack", "data", "data_off", "device", "flags", "key", "outbound", "seq", "tcp_off", "v6")

    data: bytes | memoryview
    v6: bool
    outbound: bool
    tcp_off: int
    data_off: int
    flags: int
    seq: int
    ack: int
    key: bytes
    device: int  # interface index, set by who knows it

    @property
    def options(self) -> bytes:
        """Raw TCP options, 0 to 40 bytes."""
        return bytes(self.data[self.tcp_off + 20 : self.data_off])

    @property
    def payload(self) -> bytes:
        """TCP payload."""
        return bytes(self.data[self.data_off :])

    @property
    def source(self) -> bytes:
        """Source address, 4 or 16 bytes."""
        return bytes(self.data[8:24] if self.v6 else self.data[12:16])

    @property
    def destination(self) -> bytes:
        """Destination address, 4 or 16 bytes."""
        return bytes(self.data[24:40] if self.v6 else self.data[16:20])

    @property
    def source_port(self) -> int:
        """Source port."""
        return int.from_bytes(self.data[self.tcp_off : self.tcp_off + 2], "big")

    @property
    def destination_port(self) -> int:
        """Destination port."""
        return int.from_bytes(self.data[self.tcp_off + 2 : self.tcp_off + 4], "big")


def parse(data: bytes | memoryview, outbound: bool) -> Segment:
    """Parse an IPv4 or IPv6 packet that carries TCP. Raises PacketError."""
    size = len(data)
    if size < 40:
        raise PacketError("shorter than IP and TCP headers")
    version = data[0] >> 4
    if version == 4:
        off = (data[0] & 0x0F) * 4
        total = int.from_bytes(data[2:4], "big")
        if off < 20 or total != size or off + 20 > size:
            raise PacketError("IPv4 lengths do not hold")
        if data[6] & 0x3F or data[7]:  # more-fragments or an offset: conntrack should have reassembled it
            raise PacketError("IPv4 fragment")
        if data[9] != TCP:
            raise PacketError("not TCP")
        if off > 20:
            refuse_source_route(bytes(data[20:off]))
        src, dst = bytes(data[12:16]), bytes(data[16:20])
    elif version == 6:
        if int.from_bytes(data[4:6], "big") + 40 != size:
            raise PacketError("IPv6 payload length does not hold")
        off = _ipv6_upper(data, size)
        src, dst = bytes(data[8:24]), bytes(data[24:40])
    else:
        raise PacketError("neither IPv4 nor IPv6")
    if off + 20 > size:
        raise PacketError("truncated TCP header")
    _, _, seq, ack, doff, flags, _ = _ports_seq_ack.unpack_from(data, off)
    data_off = off + (doff >> 4) * 4
    if data_off < off + 20 or data_off > size:
        raise PacketError("TCP data offset does not hold")
    s = Segment()
    s.device = 0
    s.data, s.v6, s.outbound, s.tcp_off, s.data_off = data, version == 6, outbound, off, data_off
    s.flags, s.seq, s.ack = flags & 0x3F, seq, ack
    if outbound:
        s.key = src + dst + bytes(data[off : off + 4])
    else:
        s.key = dst + src + bytes(data[off + 2 : off + 4]) + bytes(data[off : off + 2])
    return s


def refuse_source_route(options: bytes) -> None:
    """Raise PacketError when IPv4 options hold a source route, or cannot be read."""
    at, n = 0, len(options)
    while at < n and options[at]:
        kind = options[at]
        if kind == 1:
            at += 1
            continue
        if at + 1 >= n or options[at + 1] < 2 or at + options[at + 1] > n:
            raise PacketError("IPv4 option length does not hold")
        if kind in _SOURCE_ROUTES:
            raise PacketError("IPv4 source routing")
        at += options[at + 1]


def _ipv6_upper(data: bytes | memoryview, size: int) -> int:
    """Offset of the TCP header behind a bounded chain of IPv6 extension headers."""
    nxt, off = data[6], 40
    for _ in range(_MAX_EXTENSIONS):
        if nxt == TCP:
            return off
        if nxt not in _EXTENSION_HEADERS or off + 8 > size:
            raise PacketError("IPv6 extension header that is not let through")
        if nxt == 43 and data[off + 3]:  # segments left: the destination is not the one in the header
            raise PacketError("IPv6 source routing")
        nxt, off = data[off], off + (data[off + 1] + 1) * 8
    if nxt == TCP:
        return off
    raise PacketError("too many IPv6 extension headers")


def carries(seg: Segment) -> bool:
    """Whether the segment belongs into a record: it has payload, or ends the stream."""
    return seg.data_off < len(seg.data) or bool(seg.flags & FIN)


def iter_options(options: bytes) -> list[tuple[int, bytes]]:
    """(kind, whole option) in order, without NOPs and end-of-list. Raises PacketError on a bad length."""
    out: list[tuple[int, bytes]] = []
    i, n = 0, len(options)
    while i < n:
        kind = options[i]
        if kind == 0:
            break
        if kind == 1:
            i += 1
            continue
        if i + 1 >= n:
            raise PacketError("truncated TCP option")
        length = options[i + 1]
        if length < 2 or i + length > n:
            raise PacketError("TCP option length does not hold")
        out.append((kind, options[i : i + length]))
        i += length
    return out


def has_handshake(seg: Segment) -> bool:
    """Whether the handshake option is among the segment's options. Raises PacketError on malformed options."""
    # The cheap containment test first: most segments have nothing of the kind.
    return HANDSHAKE_OPTION in seg.options and any(
        opt == HANDSHAKE_OPTION for _, opt in iter_options(seg.options)
    )


def record_option(seg: Segment) -> bytes | None:
    """The 28-byte record option, or None. Raises PacketError when it stands there twice."""
    if _RECORD_PREFIX not in seg.options:
        return None
    found = [opt for _, opt in iter_options(seg.options) if opt[:4] == _RECORD_PREFIX]
    if len(found) > 1:
        raise PacketError("two record options")
    return found[0] if found else None


def is_ours(option: bytes) -> bool:
    """Whether a TCP option belongs to this protocol."""
    return option[0] == OPT_EXP and option[2:4] == EXID


def mss_of(options: bytes) -> int:
    """The maximum segment size that a SYN or SYN-ACK tells; 0: none."""
    return next(
        (int.from_bytes(opt[2:4], "big") for kind, opt in iter_options(options) if kind == OPT_MSS), 0
    )


def syn_options(options: bytes, *, lower_mss: bool, most: int = 0, add: bytes = b"") -> bytes:
    """Options of a SYN or SYN-ACK rewritten: ours, TFO and MPTCP go, MSS is lowered by MSS_RESERVE, `add` comes last.

    The MSS is at most `most` then, unless that is 0.

    Relative order and NOP alignment of what stays are not kept: no stack depends on them (RFC 9293, 3.2).
    """
    out = bytearray()
    for kind, opt in iter_options(options):
        if kind in (OPT_TFO, OPT_MPTCP) or (kind == OPT_EXP and opt[2:4] in (EXID, EXID_TFO)):
            continue
        if kind == OPT_MSS and lower_mss:
            if len(opt) != 4:
                raise PacketError("MSS option of a wrong length")
            mss = int.from_bytes(opt[2:4], "big")
            # 536 is what a peer may send when no MSS is given at all (RFC 9293, 3.7.1): never go below 88,
            # the floor Linux itself uses (TCP_MIN_MSS).
            opt = opt[:2] + max(mss - MSS_RESERVE, min(mss, 88)).to_bytes(2, "big")
        if kind == OPT_MSS and most:
            opt = opt[:2] + min(int.from_bytes(opt[2:4], "big"), most).to_bytes(2, "big")
        if kind == 8:
            out += b"\x01\x01"  # keeps timestamps 4-aligned, where stacks expect them
        out += opt
    out += add
    if len(out) > MAX_OPTIONS:
        raise PacketError("no room for the options")
    return bytes(out)


def with_option(options: bytes, add: bytes) -> bytes | None:
    """`options` and `add`, dropping padding and SACK blocks if needed; None when they do not fit."""
    kept = bytearray()
    for kind, opt in iter_options(options):
        if kind == OPT_EXP and is_ours(opt):
            continue
        if kind == 8:
            kept += b"\x01\x01"
        if kind == 5 and len(kept) + len(opt) + len(add) > MAX_OPTIONS:
            continue
        kept += opt
    kept += add
    return bytes(kept) if len(kept) <= MAX_OPTIONS else None


def without_ours(options: bytes) -> bytes:
    """`options` without any of this protocol's."""
    out = bytearray()
    for kind, opt in iter_options(options):
        if not is_ours(opt):
            if kind == 8:
                out += b"\x01\x01"
            out += opt
    return bytes(out)


def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071) of `data`: the big-endian number modulo 0xffff is the ones' complement sum."""
    if len(data) & 1:
        data += b"\0"
    return 0xFFFF - int.from_bytes(data, "big") % 0xFFFF


def require_checksum(seg: Segment) -> None:
    """Raise PacketError unless the TCP checksum holds: a packet that is rebuilt would otherwise be made whole."""
    data, off = bytes(seg.data), seg.tcp_off
    n = len(data) - off
    addresses = data[8:40] if seg.v6 else data[12:20]
    if checksum(addresses + struct.pack(">II", n, TCP) + data[off:]) != 0xFFFF:
        raise PacketError("TCP checksum does not hold")


def rebuild(seg: Segment, options: bytes, payload: bytes, flags: int | None = None) -> bytes:
    """The packet with other options and payload (and flags), all lengths and checksums made right.

    The IP header (and IPv6 extension headers) stay as they are. Options are padded with end-of-list to 4 bytes.
    """
    options += b"\0" * (-len(options) % 4)
    data, off = bytes(seg.data), seg.tcp_off
    tcp = bytearray(data[off : off + 20])
    tcp[12] = (5 + len(options) // 4) << 4 | (tcp[12] & 0x0F)
    if flags is not None:
        tcp[13] = flags
    tcp[16:18] = b"\0\0"
    body = bytes(tcp) + options + payload
    return _finish(data[:off], seg.v6, body)


def _finish(ip_header: bytes, v6: bool, body: bytes) -> bytes:
    ip = bytearray(ip_header)
    n = len(body)
    if v6:
        ip[4:6] = (len(ip) - 40 + n).to_bytes(2, "big")
        pseudo = bytes(ip[8:40]) + struct.pack(">II", n, TCP)
    else:
        ip[2:4] = (len(ip) + n).to_bytes(2, "big")
        ip[10:12] = b"\0\0"
        ip[10:12] = checksum(bytes(ip)).to_bytes(2, "big")
        pseudo = bytes(ip[12:20]) + struct.pack(">HH", TCP, n)
    total = checksum(pseudo + body)
    return bytes(ip) + body[:16] + total.to_bytes(2, "big") + body[18:]


def as_reset(seg: Segment) -> bytes:
    """The segment turned into a RST travelling the same way, acceptable to a receiver that would take the segment.

    A SYN-ACK becomes RST|ACK acknowledging what the SYN-ACK did (the only RST that SYN-SENT takes, RFC 9293
    3.10.7.3); any other keeps its sequence number (exact match resets at once, RFC 5961 section 3).
    """
    return rebuild(seg, b"", b"", flags=RST | (seg.flags & ACK))


def reply_reset(seg: Segment, *, options: bytes = b"", payload: bytes = b"") -> bytes:
    """A RST answering `seg` from its destination (RFC 9293 3.5.3), optionally carrying options and payload."""
    data, off = bytes(seg.data), seg.tcp_off
    # Data on a SYN does not count: it is the handshake, or was never accepted (no TFO here).
    length = 1 if seg.flags & SYN else len(data) - seg.data_off + bool(seg.flags & FIN)
    if seg.flags & ACK:
        seq, ack, flags = seg.ack, 0, RST
    else:
        seq, ack, flags = 0, (seg.seq + length) & 0xFFFFFFFF, RST | ACK
    options += b"\0" * (-len(options) % 4)
    tcp = struct.pack(
        ">HHIIBBHHH",
        int.from_bytes(data[off + 2 : off + 4], "big"),
        int.from_bytes(data[off : off + 2], "big"),
        seq,
        ack,
        (5 + len(options) // 4) << 4,
        flags,
        0,
        0,
        0,
    )
    if seg.v6:
        ip = b"\x60\0\0\0\0\0" + bytes((TCP, 64)) + data[24:40] + data[8:24]
    else:
        ip = b"\x45\0\0\0\0\0\x40\0" + bytes((64, TCP)) + b"\0\0" + data[16:20] + data[12:16]
    return _finish(ip, seg.v6, tcp + options + payload)
