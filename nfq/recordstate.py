"""What of an encrypted flow outlives its worker: keys, counters and offsets in a slot of a root-only tmpfs file.

The slot is words of 64 bits, each written by one aligned store, so a process that is killed leaves each either old or
new. What belongs together is ordered so that every prefix of the stores is a state to go on from: a secret is
written before the counter whose epoch calls for it, in the place of the parity of its epoch.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from nfq.suites import KEY_LEN, Suite, by_number

STATE_SIZE: Final = 192

# Words that the record layer stores at each packet
SENT: Final = 2  # highest counter used
SEND_HIGH: Final = 3  # stream offset after the last byte sent
ACCEPTED: Final = 4  # highest counter accepted
RECV_HIGH: Final = 5  # stream offset after the last byte accepted

_HEAD, _FIRST = 0, 1
_LEAPT = 6  # what SENT was when the slot was taken over: equal to it, nothing has been sealed since
SEND_SECRETS: Final = 8
RECV_SECRETS: Final = 16
_MAGIC = 0x5EC7_0001
_KEY_WORDS = KEY_LEN // 8


class StateError(ValueError):
    """The slot holds no record state that this version wrote."""


class Saved(NamedTuple):
    """What a slot holds."""

    suite: Suite
    epoch_bits: int
    first_out: int
    first_in: int
    sent: int
    send_high: int
    send_secret: bytes
    accepted: int
    recv_high: int
    recv_secret: bytes
    unused: bool = True  # nothing was sealed since the slot was taken over

    def __repr__(self) -> str:
        """Counters without secrets: it may end up in a message or a log."""
        return f"Saved(suite={self.suite.name}, sent={self.sent}, accepted={self.accepted})"


def words_of(slot: memoryview) -> memoryview:
    """The slot as its 64-bit words. Raises StateError when its size is not STATE_SIZE."""
    if slot.nbytes != STATE_SIZE:
        raise StateError(f"a slot has {STATE_SIZE} bytes, not {slot.nbytes}")
    return slot.cast("B").cast("Q")


def write(words: memoryview, saved: Saved) -> None:
    """Fill a slot. Until the last store it holds nothing."""
    erase(words)
    put_secret(words, SEND_SECRETS, saved.sent >> saved.epoch_bits, saved.send_secret)
    put_secret(words, RECV_SECRETS, saved.accepted >> saved.epoch_bits, saved.recv_secret)
    words[_FIRST] = saved.first_out << 32 | saved.first_in
    words[SENT], words[SEND_HIGH] = saved.sent, saved.send_high
    words[ACCEPTED], words[RECV_HIGH] = saved.accepted, saved.recv_high
    words[_LEAPT] = saved.sent
    words[_HEAD] = _MAGIC << 32 | saved.epoch_bits << 8 | saved.suite.cipher


def read(words: memoryview) -> Saved:
    """What a slot holds. Raises StateError."""
    head = words[_HEAD]
    suite, bits = by_number(head & 0xFF), head >> 8 & 0xFFFFFF
    if head >> 32 != _MAGIC or suite is None or not 1 <= bits <= 32:
        raise StateError("the slot holds no record state")
    sent, accepted = words[SENT], words[ACCEPTED]
    return Saved(
        suite,
        bits,
        words[_FIRST] >> 32,
        words[_FIRST] & 0xFFFFFFFF,
        sent,
        words[SEND_HIGH],
        _secret(words, SEND_SECRETS, sent >> bits),
        accepted,
        words[RECV_HIGH],
        _secret(words, RECV_SECRETS, accepted >> bits),
        sent == words[_LEAPT],
    )


def leapt(words: memoryview, counter: int) -> None:
    """The send counter has been moved ahead to `counter`, which is in SENT already."""
    words[_LEAPT] = counter


def put_secret(words: memoryview, where: int, epoch: int, secret: bytes) -> None:
    """Write the secret of an epoch (SEND_SECRETS or RECV_SECRETS); the epoch before keeps its own place."""
    at = where + (epoch & 1) * _KEY_WORDS
    words[at : at + _KEY_WORDS] = memoryview(secret).cast("Q")


def forget_secret(words: memoryview, where: int, epoch: int) -> None:
    """Overwrite the secret of an epoch that is over."""
    put_secret(words, where, epoch, bytes(KEY_LEN))


def erase(words: memoryview) -> None:
    """Overwrite everything; in order, so the head goes first and no half of it is taken for a state."""
    for i in range(STATE_SIZE // 8):
        words[i] = 0


def _secret(words: memoryview, where: int, epoch: int) -> bytes:
    at = where + (epoch & 1) * _KEY_WORDS
    return bytes(words[at : at + _KEY_WORDS])
