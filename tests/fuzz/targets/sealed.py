"""Encrypted datagrams of a UDP flow: `Datagrams.open`.

Only what was sealed is opened, to the bytes it was sealed from, and once; whatever else comes gives a drop reason and
changes nothing.
"""

from __future__ import annotations

from functools import cache

from nfq.suites import ALL
from nfq.udprecord import Datagrams
from sectool.events import DropReason
from tests.fuzz.script import FLIP, Script, change

I2R, R2I = bytes(range(32)), bytes(range(100, 132))
SENT = tuple(bytes((n,)) * (n * 37 % 200) for n in range(20))
_REASONS = (DropReason.RECORD_MISSING, DropReason.RECORD_INVALID, DropReason.RECORD_REPLAYED)


@cache
def _sealed(number: int) -> tuple[bytes, ...]:
    sender = Datagrams(ALL[number], I2R, R2I, initiator=True, epoch_bits=2)
    return tuple(sender.seal(payload) for payload in SENT)


def one(data: bytes) -> None:
    """Which suite in the first byte; then steps: which datagram, and how it was changed or what comes instead."""
    script = Script(data)
    number = script.below(2)
    receiver = Datagrams(ALL[number], I2R, R2I, initiator=False, epoch_bits=2)
    sealed = _sealed(number)
    opened: set[int] = set()
    for _ in range(64):
        if not script:
            break
        which, how = script.below(256) % len(sealed), script.below(3)
        payload = sealed[which] if how == 0 else script.changed(sealed[which]) if how == 1 else script.piece()
        before = receiver.accepted
        found = receiver.open(payload)
        if isinstance(found, DropReason):
            assert found in _REASONS
            assert receiver.accepted == before
            continue
        index = sealed.index(payload)
        assert index not in opened, "a datagram was opened twice"
        assert found == SENT[index]
        opened.add(index)


def seeds() -> dict[str, bytes]:
    """In order, backwards, repeated, changed."""
    total = range(len(SENT))
    out = {
        "in-order": b"\0" + b"".join(bytes((k, 0)) for k in total),
        "backwards": b"\1" + b"".join(bytes((k, 0)) for k in reversed(total)),
        "twice": b"\0" + b"".join(bytes((k, 0, k, 0)) for k in total),
        "raw": b"\0\0\2" + len(_sealed(0)[3]).to_bytes(2, "big") + _sealed(0)[3],
    }
    for at in (0, 1, 7, 8, 30):
        out[f"flip-{at}"] = b"\0\1\1\1" + change(FLIP, at, 0, size=61)
    return out
