"""IP and TCP headers as the packet path needs them: parse once, rewrite options and payload, checksum.

All functions take and give whole packets starting at the IP header, as NFQUEUE delivers them. Anything that
cannot be understood completely raises PacketError, and the caller drops it (fail closed).
Sources: RFC 791, RFC 8200, RFC 9293, RFC 6994 (shared option kinds), RFC 7413 (TFO), RFC 8684 (MPTCP).
"""

from __future__ import annotations

import re
import struct

FIN, SYN, RST, PSH, ACK, URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
SYN_ACK = SYN | ACK

TCP = 6

OPT_MSS = 2
OPT_TIMESTAMPS = 8
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
# An IPv4 header without options, an IPv6 header without extensions, and the TCP header behind them: addresses, ports,
# sequence and acknowledgement number, data offset, flags; in front of them what must hold.
_V4_TCP = struct.Struct(">xxHxxHxBxx4s4s4sIIBB")  # total length, fragment, protocol
_V6_TCP = struct.Struct(">xxxxHBx16s16s4sIIBB")  # payload length, next header

# Options as stacks order them, checked in one step; whatever does not match is looked at option by option.
_USUAL = rb"(?:\x01|\x04\x02|\x03\x03.|\x08\x0a.{8})*"
_SYN_OPTIONS = re.compile(
    rb"(%s)(\x02\x04..)?(%s)(%s)?\x00*" % (_USUAL, _USUAL, re.escape(HANDSHAKE_OPTION)), re.DOTALL
)
_TIMESTAMPS = rb"(?:\x01|\x08\x0a.{8})*"
_SEGMENT_OPTIONS = re.compile(
    rb"(%s)(%s.{24})?(%s)\x00*" % (_TIMESTAMPS, re.escape(_RECORD_PREFIX), _TIMESTAMPS), re.DOTALL
)


class PacketError(ValueError):
    """The packet is malformed or of a shape that is not let through."""


class Segment:
    """A parsed TCP segment. Offsets are into `data`; `key`: local, remote address, local, remote port."""

    __slots__ = (
        "ack",
        "data",
        "data_off",
        "device",
        "flags",
        "key",
        "options",
        "outbound",
        "seq",
        "tcp_off",
        "v6",
    )

    data: bytes | memoryview
    v6: bool
    outbound: bool
    tcp_off: int
    data_off: int
    flags: int
    seq: int
    ack: int
    key: bytes
    options: bytes  # raw TCP options, 0 to 40 bytes
    device: int  # interface index, set by who knows it

    @property
    def payload(self) -> bytes:
        """TCP payload."""
        return bytes(self.data[self.data_off :])

    @property
    def source(self) -> bytes:
        """Source address, 4 or 16 bytes."""
        n = 16 if self.v6 else 4
        return self.key[:n] if self.outbound else self.key[n : 2 * n]

    @property
    def destination(self) -> bytes:
        """Destination address, 4 or 16 bytes."""
        n = 16 if self.v6 else 4
        return self.key[n : 2 * n] if self.outbound else self.key[:n]

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
    if data[0] == 0x45:
        off = 20
        total, fragment, protocol, src, dst, ports, seq, ack, doff, flags = _V4_TCP.unpack_from(data)
        if total != size:
            raise PacketError("IPv4 lengths do not hold")
        if fragment & 0x3FFF:  # more-fragments or an offset: conntrack should have reassembled it
            raise PacketError("IPv4 fragment")
        if protocol != TCP:
            raise PacketError("not TCP")
    elif version == 6 and data[6] == TCP and size >= 60:
        off = 40
        total, _, src, dst, ports, seq, ack, doff, flags = _V6_TCP.unpack_from(data)
        if total + 40 != size:
            raise PacketError("IPv6 payload length does not hold")
    else:
        off, src, dst = _ip(data, size, version)
        if off + 20 > size:
            raise PacketError("truncated TCP header")
        ports = bytes(data[off : off + 4])
        _, _, seq, ack, doff, flags, _ = _ports_seq_ack.unpack_from(data, off)
    data_off = off + (doff >> 4) * 4
    if data_off < off + 20 or data_off > size:
        raise PacketError("TCP data offset does not hold")
    s = Segment()
    s.device = 0
    s.data, s.v6, s.outbound, s.tcp_off, s.data_off = data, version == 6, outbound, off, data_off
    s.flags, s.seq, s.ack = flags & 0x3F, seq, ack
    s.options = bytes(data[off + 20 : data_off])
    s.key = src + dst + ports if outbound else dst + src + ports[2:] + ports[:2]
    return s


def _ip(data: bytes | memoryview, size: int, version: int) -> tuple[int, bytes, bytes]:
    """Where TCP begins behind an IP header with options or extension headers, and the addresses."""
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
        return off, bytes(data[12:16]), bytes(data[16:20])
    if version == 6:
        if int.from_bytes(data[4:6], "big") + 40 != size:
            raise PacketError("IPv6 payload length does not hold")
        return _ipv6_upper(data, size), bytes(data[8:24]), bytes(data[24:40])
    raise PacketError("neither IPv4 nor IPv6")


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
    options = seg.options
    if HANDSHAKE_OPTION not in options:
        return False
    usual = _SYN_OPTIONS.fullmatch(options)
    if usual is not None:
        return usual[4] is not None
    return any(opt == HANDSHAKE_OPTION for _, opt in iter_options(options))


def record_option(seg: Segment) -> bytes | None:
    """The 28-byte record option, or None. Raises PacketError when it stands there twice."""
    options = seg.options
    if _RECORD_PREFIX not in options:
        return None
    usual = _SEGMENT_OPTIONS.fullmatch(options)
    if usual is not None:
        return usual[2]
    found = [opt for _, opt in iter_options(options) if opt[:4] == _RECORD_PREFIX]
    if len(found) > 1:
        raise PacketError("two record options")
    return found[0] if found else None


def is_ours(option: bytes) -> bool:
    """Whether a TCP option belongs to this protocol."""
    return option[0] == OPT_EXP and option[2:4] == EXID


def mss_of(options: bytes) -> int:
    """The maximum segment size that a SYN or SYN-ACK tells; 0: none."""
    usual = _SYN_OPTIONS.fullmatch(options)
    if usual is not None:
        return int.from_bytes((usual[2] or b"")[2:], "big")
    return next(
        (int.from_bytes(opt[2:4], "big") for kind, opt in iter_options(options) if kind == OPT_MSS), 0
    )


def syn_options(
    options: bytes, *, lower_mss: bool, most: int = 0, add: bytes = b"", timestamps: bool = True
) -> bytes:
    """Options of a SYN or SYN-ACK rewritten: ours, TFO and MPTCP go, MSS is lowered by MSS_RESERVE, `add` comes last.

    The MSS is at most `most` then, unless that is 0. Without `timestamps` these go, too.

    Relative order and NOP alignment of what stays are not kept where something unusual is among them: no stack depends
    on them (RFC 9293, 3.2).
    """
    usual = _SYN_OPTIONS.fullmatch(options) if timestamps else None
    if usual is not None:
        before, mss, after, _ = usual.groups(b"")
        if mss and (lower_mss or most):
            mss = _mss(mss, lower_mss, most)
        out = before + mss + after + add
        if len(out) <= MAX_OPTIONS:
            return out
    return _unusual_syn_options(options, lower_mss, most, add, timestamps)


def _mss(option: bytes, lower: bool, most: int) -> bytes:
    mss = int.from_bytes(option[2:4], "big")
    if lower:
        # 536 is what a peer may send when no MSS is given at all (RFC 9293, 3.7.1): never go below 88,
        # the floor Linux itself uses (TCP_MIN_MSS).
        mss = max(mss - MSS_RESERVE, min(mss, 88))
    return option[:2] + (min(mss, most) if most else mss).to_bytes(2, "big")


def _unusual_syn_options(
    options: bytes, lower_mss: bool, most: int, add: bytes, timestamps: bool = True
) -> bytes:
    out = bytearray()
    for kind, opt in iter_options(options):
        if kind in (OPT_TFO, OPT_MPTCP) or (kind == OPT_EXP and opt[2:4] in (EXID, EXID_TFO)):
            continue
        if kind == OPT_MSS:
            if len(opt) != 4:
                raise PacketError("MSS option of a wrong length")
            opt = _mss(opt, lower_mss, most)
        if kind == OPT_TIMESTAMPS:
            if not timestamps:
                continue
            out += b"\x01\x01"  # keeps timestamps 4-aligned, where stacks expect them
        out += opt
    out += add
    if len(out) > MAX_OPTIONS:
        raise PacketError("no room for the options")
    return bytes(out)


def with_option(options: bytes, add: bytes) -> bytes | None:
    """`options` and `add`, dropping padding and SACK blocks if needed; None when they do not fit."""
    usual = _SEGMENT_OPTIONS.fullmatch(options)
    if usual is not None:
        out = usual[1] + usual[3] + add
        if len(out) <= MAX_OPTIONS:
            return out
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
    usual = _SEGMENT_OPTIONS.fullmatch(options)
    if usual is not None:
        return usual[1] + usual[3]
    out = bytearray()
    for kind, opt in iter_options(options):
        if not is_ours(opt):
            if kind == 8:
                out += b"\x01\x01"
            out += opt
    return bytes(out)


def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071) of `data`, 0 to 0xfffe: 0 for data whose checksum holds.

    The big-endian number modulo 0xffff is the ones' complement sum; of its two zeros, other stacks write 0 too.
    """
    if len(data) & 1:
        data += b"\0"
    return -int.from_bytes(data, "big") % 0xFFFF


def require_checksum(seg: Segment) -> None:
    """Raise PacketError unless the TCP checksum holds: a packet that is rebuilt would otherwise be made whole."""
    data, off = bytes(seg.data), seg.tcp_off
    if _sum(data[8:40] if seg.v6 else data[12:20], data[off:]) != 0:
        raise PacketError("TCP checksum does not hold")


def rebuild(seg: Segment, options: bytes, payload: bytes, flags: int | None = None) -> bytes:
    """The packet with other options and payload (and flags), all lengths and checksums made right.

    The IP header (and IPv6 extension headers) stay as they are. Options are padded with end-of-list to 4 bytes.
    """
    if len(options) & 3:
        options += b"\0" * (-len(options) % 4)
    data, off = bytes(seg.data), seg.tcp_off
    second = (5 + len(options) // 4) << 4 | data[off + 12] & 0x0F, data[off + 13] if flags is None else flags
    head = data[off : off + 12] + bytes(second) + data[off + 14 : off + 16]  # up to the checksum
    rest = data[off + 18 : off + 20] + options + payload
    if off != 20 or seg.v6:
        return _finish(data[:off], seg.v6, head, rest)
    # As _finish does it, for what nearly all packets are.
    n = 18 + len(rest)
    first, last = data[:2] + (20 + n).to_bytes(2, "big") + data[4:10], data[12:20]
    addresses = int.from_bytes(last, "big")
    ip = -(int.from_bytes(first, "big") * 0x10000 + addresses) % 0xFFFF
    body = int.from_bytes(head + b"\0\0" + rest, "big")
    tcp = -(addresses + TCP + n + (body << 8 if n & 1 else body)) % 0xFFFF
    return b"".join((first, ip.to_bytes(2, "big"), last, head, tcp.to_bytes(2, "big"), rest))


def _sum(addresses: bytes, tcp: bytes) -> int:
    """Pseudo header and TCP, modulo 0xffff: 2^16 is 1 there, so parts add up wherever they stand."""
    n = len(tcp)
    body = int.from_bytes(tcp, "big")
    return (int.from_bytes(addresses, "big") + TCP + n + (body << 8 if n & 1 else body)) % 0xFFFF


def _finish(ip: bytes, v6: bool, head: bytes, rest: bytes) -> bytes:
    """IP header and TCP on both sides of its checksum, with lengths and checksums made right."""
    n = len(head) + 2 + len(rest)
    if v6:
        ip = ip[:4] + (len(ip) - 40 + n).to_bytes(2, "big") + ip[6:]
        addresses = ip[8:40]
    else:
        first, last = ip[:2] + (len(ip) + n).to_bytes(2, "big") + ip[4:10], ip[12:]
        ip = first + checksum(first + b"\0\0" + last).to_bytes(2, "big") + last
        addresses = ip[12:20]
    total = -_sum(addresses, head + b"\0\0" + rest) % 0xFFFF
    return b"".join((ip, head, total.to_bytes(2, "big"), rest))


def as_reset(seg: Segment) -> bytes:
    """The segment turned into a RST travelling the same way, acceptable to a receiver that would take the segment.

    A SYN-ACK becomes RST|ACK acknowledging what the SYN-ACK did (the only RST that SYN-SENT takes, RFC 9293
    3.10.7.3); any other keeps its sequence number (exact match resets at once, RFC 5961 section 3).
    """
    return rebuild(seg, b"", b"", flags=RST | (seg.flags & ACK))


def reply_reset(seg: Segment, *, options: bytes = b"", payload: bytes = b"") -> bytes:
    """A RST answering `seg` from its destination (RFC 9293 3.5.3), optionally carrying options and payload."""
    # Data on a SYN does not count: it is the handshake, or was never accepted (no TFO here).
    length = 1 if seg.flags & SYN else len(seg.data) - seg.data_off + bool(seg.flags & FIN)
    if seg.flags & ACK:
        seq, ack, flags = seg.ack, 0, RST
    else:
        seq, ack, flags = 0, (seg.seq + length) & 0xFFFFFFFF, RST | ACK
    return _reply(seg, seq, ack, flags, 0, options, payload)


def reply_ack(seg: Segment, option: bytes) -> bytes:
    """An ACK that answers a SYN-ACK, with a record option: what the stack would send, and has sent, with a proof."""
    stamps = b""
    for kind, opt in iter_options(seg.options):
        if kind == OPT_TIMESTAMPS and len(opt) == 10:
            stamps = b"\x01\x01" + opt[:2] + opt[6:] + opt[2:6]
    # The window is in units of the scale agreed on: about what Linux begins with.
    return _reply(seg, seg.ack, (seg.seq + 1) & 0xFFFFFFFF, ACK, 500, stamps + option, b"")


def _reply(
    seg: Segment, seq: int, ack: int, flags: int, window: int, options: bytes, payload: bytes
) -> bytes:
    """A segment back to where `seg` comes from."""
    data, off = bytes(seg.data), seg.tcp_off
    options += b"\0" * (-len(options) % 4)
    tcp = struct.pack(
        ">HHIIBBH",
        int.from_bytes(data[off + 2 : off + 4], "big"),
        int.from_bytes(data[off : off + 2], "big"),
        seq,
        ack,
        (5 + len(options) // 4) << 4,
        flags,
        window,
    )
    if seg.v6:
        ip = b"\x60\0\0\0\0\0" + bytes((TCP, 64)) + data[24:40] + data[8:24]
    else:
        ip = b"\x45\0\0\0\0\0\x40\0" + bytes((64, TCP)) + b"\0\0" + data[16:20] + data[12:16]
    return _finish(ip, seg.v6, tcp, b"\0\0" + options + payload)
