"""Bounds of what waits for its other pieces: bytes of a flow, of all flows, and time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq import reassembly
from nfq.packet import parse
from nfq.reassembly import EARLY_BYTES, FLOW_BYTES, MAX_AGE_US, Partial, Pieces, Pool
from nfq.record import Records
from nfq.suites import AES_256_GCM
from tests.nfq.segments import Wire, segment, split

SIZE = 60_000


def key(number: int) -> bytes:
    return number.to_bytes(8, "big") + bytes(16)


def begin(
    pieces: Pieces, number: int, now_us: int = 0, *, size: int = SIZE, early: bool = False
) -> Partial | None:
    return pieces.begin(key(number), number, 0, size, now_us, early=early)


@given(st.integers(1, 300), st.data())
def test_a_record_is_complete_when_every_byte_has_come(length: int, data: st.DataObject) -> None:
    part = Partial(Pieces(Pool()), bytes(24), 1, 0, length, 0)
    content = bytes(i * 13 & 255 for i in range(length))
    here: set[int] = set()
    for _ in range(data.draw(st.integers(1, 30))):
        at = data.draw(st.integers(0, length - 1))
        size = data.draw(st.integers(1, length - at))
        here.update(range(at, at + size))
        complete = part.add(at, content[at : at + size], size)
        assert complete is (len(here) == length)
        if complete:
            assert bytes(part.view[:length]) == content
            return
    assert bytes(part.view[length:]) == bytes(16)


def test_a_flow_s_oldest_gives_way_to_its_newest() -> None:
    pool = Pool()
    pieces = Pieces(pool)
    fit = FLOW_BYTES // SIZE
    for n in range(fit + 3):
        assert begin(pieces, n) is not None
        assert pieces.bytes <= FLOW_BYTES
    assert list(pieces.parts) == [key(n) for n in range(3, fit + 3)]
    assert pieces.given_up == pool.given_up == 3
    assert pool.bytes == pieces.bytes == fit * SIZE


def test_all_flows_share_one_bound_and_the_oldest_gives_way() -> None:
    pool = Pool(limit=5 * SIZE)
    flows = [Pieces(pool) for _ in range(4)]
    for n in range(8):
        assert begin(flows[n % 4], n) is not None
        assert pool.bytes <= pool.limit
    assert [list(flow.parts) for flow in flows] == [[key(4)], [key(5)], [key(6)], [key(3), key(7)]]
    assert [flow.given_up for flow in flows] == [1, 1, 1, 0]


def test_a_flow_that_has_proven_nothing_gets_little_and_takes_nobody_s_room() -> None:
    pool = Pool(limit=3 * SIZE)
    stranger, other = Pieces(pool), Pieces(pool)
    for n in range(5):
        assert begin(stranger, n, early=True) is not None
    assert stranger.bytes <= EARLY_BYTES
    assert begin(other, 10) is not None
    assert begin(Pieces(pool), 11, early=True) is None
    assert list(other.parts) == [key(10)]
    assert pool.given_up == 3 + 1
    assert begin(other, 12) is not None  # a proven one takes the stranger's
    assert len(stranger.parts) == 1


def test_what_is_larger_than_the_room_is_refused() -> None:
    pieces = Pieces(Pool(limit=100))
    assert begin(pieces, 1, size=101) is None
    assert pieces.given_up == 1
    assert begin(pieces, 2, size=100) is not None


def test_time_ends_what_has_lost_a_piece() -> None:
    pool = Pool()
    one, two = Pieces(pool), Pieces(pool)
    for n, flow in enumerate((one, two, one, two)):
        begin(flow, n, now_us=n * 1000)
    assert pool.expire(MAX_AGE_US) == 0
    assert pool.expire(MAX_AGE_US + 1) == 1
    assert one.expire(MAX_AGE_US + 10_000) == 1
    assert (list(one.parts), list(two.parts)) == ([], [key(1), key(3)])
    assert pool.expire(MAX_AGE_US + 10_000) == 2
    assert (pool.bytes, len(pool), pool.given_up, one.given_up, two.given_up) == (0, 0, 4, 2, 2)


@pytest.fixture
def ends() -> tuple[Records, Records, Pool]:
    pool = Pool()
    a = Records(AES_256_GCM, bytes(32), bytes(32), initiator=True, isn_out=0, isn_in=0, pool=pool)
    b = Records(AES_256_GCM, bytes(32), bytes(32), initiator=False, isn_out=0, isn_in=0, pool=pool)
    return a, b, pool


def sealed(records: Records, offset: int, size: int) -> Wire:
    plain = segment(1 + offset, bytes(size), 0x10)
    return Wire.of(bytes(records.seal(plain.data, plain.tcp_off, plain.data_off, False).packet))


def opens(records: Records, wire: Wire, now_us: int = 0) -> bool:
    seg = parse(wire.data, False)
    return records.open(seg.data, seg.tcp_off, seg.data_off, False, now_us).packet is not None


def test_a_whole_copy_frees_what_had_come_in_pieces(ends: tuple[Records, Records, Pool]) -> None:
    a, b, pool = ends
    wire = sealed(a, 0, 3000)
    pieces = split(wire, 1000)
    assert not opens(b, pieces[0])
    assert pool.bytes == 3000
    assert opens(b, wire)
    assert (pool.bytes, b.given_up) == (0, 0)
    assert not any(opens(b, piece) for piece in pieces)
    assert pool.bytes == 0


def test_records_expire_by_the_flow_or_all_together(ends: tuple[Records, Records, Pool]) -> None:
    a, b, pool = ends
    for n in range(3):
        opens(b, split(sealed(a, n * 3000, 3000), 1000)[n], now_us=n)
    assert b.expire(MAX_AGE_US + 1) == 1
    assert pool.expire(MAX_AGE_US * 2) == 2
    assert (b.given_up, pool.bytes) == (3, 0)


def test_a_piece_is_held_no_longer_than_its_record_is_wanted(ends: tuple[Records, Records, Pool]) -> None:
    a, b, _ = ends
    first, last = split(sealed(a, 0, 2000), 1000)
    assert not opens(b, first)
    assert b.expire(MAX_AGE_US + 1) == 1
    assert not opens(b, last, MAX_AGE_US + 2)
    assert opens(b, sealed(a, 0, 2000), MAX_AGE_US + 3)


def test_the_shared_pool_has_the_stated_bounds() -> None:
    assert reassembly.POOL.limit == reassembly.POOL_BYTES >= 8 * FLOW_BYTES
    assert reassembly.POOL.max_age_us == MAX_AGE_US
