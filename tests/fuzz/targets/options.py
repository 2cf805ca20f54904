"""TCP options: everything that looks for ours, takes ours away, adds ours, or lowers the MSS.

Any at most 40 bytes raise PacketError or are read; what is written has at most 40 bytes, reads without an error, has
none of this protocol's options but those added, and none of those that never pass (Fast Open, MPTCP).
"""

from __future__ import annotations

from contextlib import suppress

from nfq.frame import kept_options, split_options
from nfq.packet import (
    HANDSHAKE_OPTION,
    MAX_OPTIONS,
    OPT_MPTCP,
    OPT_TFO,
    PacketError,
    Segment,
    has_handshake,
    is_ours,
    iter_options,
    mss_of,
    parse,
    record_option,
    syn_options,
    with_option,
    without_ours,
)
from tests.fuzz.packets import segments
from tests.fuzz.script import Script


def one(data: bytes) -> None:
    """How to rewrite in two bytes, then the options."""
    script = Script(data)
    how, most = script.below(256), 1200 * script.below(2)
    options = script.take(MAX_OPTIONS)
    options += bytes(-len(options) % 4)
    seg = _segment(options)
    with suppress(PacketError):
        found = has_handshake(seg)
        assert found == any(opt == HANDSHAKE_OPTION for _, opt in iter_options(options))
    with suppress(PacketError):
        record = record_option(seg)
        assert record is None or (len(record) == 28 and record in options)
    with suppress(PacketError):
        assert 0 <= mss_of(options) <= 0xFFFF
    with suppress(PacketError):
        add = HANDSHAKE_OPTION if how & 1 else b""
        out = syn_options(options, lower_mss=bool(how & 2), most=most, add=add)
        assert len(out) <= MAX_OPTIONS
        kinds = iter_options(out)
        assert [opt for kind, opt in kinds if kind == 253 and is_ours(opt)] == ([add] if add else [])
        assert not {kind for kind, _ in kinds} & {OPT_TFO, OPT_MPTCP}
        if most:
            assert mss_of(out) <= most
    with suppress(PacketError):
        bare = without_ours(options)
        assert not any(kind == 253 and is_ours(opt) for kind, opt in iter_options(bare))
    proof = bytes((253, 28)) + HANDSHAKE_OPTION[2:] + bytes(24)
    with suppress(PacketError):
        proving = with_option(options, proof)
        if proving is not None:
            assert len(proving) <= MAX_OPTIONS
            mine = [opt for kind, opt in iter_options(proving) if kind == 253 and is_ours(opt)]
            assert mine == [proof]
    with suppress(PacketError):
        kept = kept_options(options, 12)
        assert len(kept) <= 12
        assert not len(kept) % 4
        assert {kind for kind, _ in iter_options(kept)} <= {8, 5}
    with suppress(PacketError):
        split_record, others = split_options(options)
        assert split_record is None or len(split_record) >= 4
        assert {kind for kind, _ in iter_options(others)} <= {8, 5}


def _segment(options: bytes) -> Segment:
    size = 40 + len(options)
    ip = b"\x45\0" + size.to_bytes(2, "big") + bytes((0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2))
    tcp = bytes(12) + bytes(((20 + len(options)) << 2, 0x10)) + bytes(6)
    return parse(ip + tcp + options, True)


def seeds() -> dict[str, bytes]:
    """Options as they stand in segments."""
    out = {}
    for name, packet in segments().items():
        seg = parse(packet, True)
        if seg.options and not seg.v6:
            out[name] = bytes((3, len(name) & 1)) + seg.options
    return out
