"""What the record layer costs a packet, without the kernel: seal, open, and open from pieces, beside the cipher alone.

`super-packet` is 45 segments of 1,448 bytes in one packet, as the bulk queue hands them over; `segment` is one; `piece`
is one of the 45 segments of a super-packet that arrives without GRO, the last of which yields the whole. Raw is
encrypt_into or decrypt_into of the same bytes in the same round. CPU time of this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nfq.packet import ACK, PSH
from nfq.record import Records
from nfq.suites import ALL, TAG_LEN, Suite
from tests.bench.rows import Row, compare, row
from tests.nfq.segments import Wire, segment, split

MSS = 1448
SEGMENTS = 45
SIZES = {"super-packet": MSS * SEGMENTS, "segment": MSS}
REPEAT = {"super-packet": 400, "segment": 4000}


class Cost(NamedTuple):
    """Microseconds for so many bytes of payload."""

    us: float
    bytes: int

    @property
    def gbit(self) -> float:
        """The rate one core would reach with nothing else to do."""
        return self.bytes * 8 / self.us / 1000


def _timed(work: Callable[[], None], times: int, size: int) -> Cost:
    begin = time.process_time_ns()
    work()
    return Cost((time.process_time_ns() - begin) / 1000 / times, size)


def _raw(suite: Suite, size: int, times: int) -> tuple[Cost, Cost]:
    aead = suite.aead(bytes(32))
    nonce, aad = bytearray(12), bytes(21)
    plain, sealed = memoryview(bytearray(size)), memoryview(bytearray(size + TAG_LEN))

    def encrypt() -> None:
        for _ in range(times):
            aead.encrypt_into(nonce, plain, aad, sealed)

    def decrypt() -> None:
        for _ in range(times):
            aead.decrypt_into(nonce, sealed, aad, plain)

    return _timed(encrypt, times, size), _timed(decrypt, times, size)


def _flow(suite: Suite) -> tuple[Records, Records]:
    a = Records(suite, bytes(32), bytes(32), initiator=True, isn_out=1, isn_in=2)
    b = Records(suite, bytes(32), bytes(32), initiator=False, isn_out=2, isn_in=1)
    return a, b


def _packets(size: int, times: int) -> list[Wire]:
    return [segment(2 + i * size, bytes(size), ACK | PSH) for i in range(times)]


def one_round(suite: Suite) -> dict[tuple[str, str], Cost]:
    """Cost by (what, step)."""
    out: dict[tuple[str, str], Cost] = {}
    for what, size in SIZES.items():
        times = REPEAT[what]
        out[what, "raw seal"], out[what, "raw open"] = _raw(suite, size, times)
        a, b = _flow(suite)
        packets = _packets(size, times)
        sealed: list[bytes] = []
        plain = packets[0]
        gso = what == "super-packet"

        def seal(a: Records = a, packets: list[Wire] = packets, plain: Wire = plain, gso: bool = gso) -> None:
            for p in packets:
                a.seal(p.data, plain.tcp_off, plain.data_off, False, gso=gso)

        out[what, "seal"] = _timed(seal, times, size)
        a, b = _flow(suite)
        sealed = [bytes(a.seal(p.data, p.tcp_off, p.data_off, False).packet) for p in packets]
        room = memoryview(bytearray(1 << 17))
        at = plain.data_off + 28

        def received(
            b: Records = b,
            sealed: list[bytes] = sealed,
            plain: Wire = plain,
            at: int = at,
            room: memoryview = room,
        ) -> None:
            for p in sealed:
                n = len(p)
                room[:n] = p  # stands for recv_into; its cost is taken off below
                if b.open(room[:n], plain.tcp_off, at, False, 0, room).packet is None:
                    raise AssertionError("a record was not opened")

        def copying(sealed: list[bytes] = sealed, room: memoryview = room) -> None:
            for p in sealed:
                n = len(p)
                room[:n] = p

        copy = _timed(copying, times, size)
        whole = _timed(received, times, size)
        out[what, "open"] = Cost(whole.us - copy.us, size)
    out["piece", "raw open"] = Cost(out["super-packet", "raw open"].us / SEGMENTS, MSS)
    out["piece", "open"] = _pieces(suite)
    return out


def _pieces(suite: Suite) -> Cost:
    a, b = _flow(suite)
    times = REPEAT["super-packet"] // 4
    pieces: list[Wire] = []
    for p in _packets(SIZES["super-packet"], times):
        record = Wire.unchecked(bytes(a.seal(p.data, p.tcp_off, p.data_off, False, gso=True).packet))
        pieces += split(record, MSS)
    at = pieces[0]
    delivered = 0

    def opening() -> None:
        nonlocal delivered
        for p in pieces:
            if b.open(p.data, at.tcp_off, at.data_off, False, 0).packet is not None:
                delivered += 1

    cost = _timed(opening, len(pieces), MSS)
    if delivered != times:
        raise AssertionError(f"{delivered} of {times} records were delivered")
    return cost


def rows(rounds: int) -> list[Row]:
    """Microseconds and Gbit/s of each step and suite, with the ratio to the cipher alone."""
    out: list[Row] = []
    for suite in ALL:
        one_round(suite)  # caches
        measured = [one_round(suite) for _ in range(rounds)]
        for what, step in measured[0]:
            if step.startswith("raw"):
                continue
            base = row(
                "record",
                f"{suite.name} raw",
                f"{step} {what}",
                "µs",
                [m[what, f"raw {step}"].us for m in measured],
            )
            ours = row("record", suite.name, f"{step} {what}", "µs", [m[what, step].us for m in measured])
            rate = row(
                "record", suite.name, f"{step} {what}", "Gbit/s", [m[what, step].gbit for m in measured]
            )
            out += [base, compare(ours, base), rate]
    return out


assert AESGCM is ALL[0].aead
