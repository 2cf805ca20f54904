"""Encrypted datagrams of one flow: counter, ciphertext, tag. docs/protocol.md, "Encrypted datagrams".

Sans-I/O. A failed `open` changes nothing. Keys ratchet as those of records do; the whole counter is on the wire, so
loss and reordering need nothing but the replay window and the key of the epoch before.
"""

from __future__ import annotations

import hmac
from typing import Final

from cryptography.exceptions import InvalidTag

from nfq.ratchet import EPOCH_BITS, Ratchet
from nfq.recordstate import (
    ACCEPTED,
    RECV_SECRETS,
    SEND_SECRETS,
    SENT,
    Saved,
    erase,
    forget_secret,
    leapt,
    put_secret,
    read,
    words_of,
    write,
)
from nfq.replay import Window
from nfq.suites import TAG_LEN, Suite
from sectool.events import DropReason

OVERHEAD: Final = 8 + TAG_LEN
LEAP: Final = 1 << 16  # counters skipped after a restart

_LABEL: Final = b"sectool datagram 1"
_NO_SALT: Final = bytes(32)
_PAD: Final = bytes(4)
_LIMIT: Final = 1 << 62  # of counters: the upper bits tell a sealed datagram from a control datagram


def _first_secret(key: bytes, suite: Suite) -> bytes:
    """HKDF-SHA256 (RFC 5869) without salt, info = label and suite number."""
    prk = hmac.digest(_NO_SALT, key, "sha256")
    return hmac.digest(prk, _LABEL + bytes((suite.cipher, 1)), "sha256")


class Datagrams:
    """Both directions of a flow. `i2r`, `r2i`: the handshake's keys by direction."""

    __slots__ = ("_bits", "_recv", "_recv_next", "_recv_prev", "_send", "_sent", "_state", "_window", "suite")

    def __init__(
        self, suite: Suite, i2r: bytes, r2i: bytes, *, initiator: bool, epoch_bits: int = EPOCH_BITS
    ) -> None:
        out, into = (i2r, r2i) if initiator else (r2i, i2r)
        secrets = _first_secret(out, suite), _first_secret(into, suite)
        self._begin(Saved(suite, epoch_bits, 0, 0, 0, 0, secrets[0], 0, 0, secrets[1], False))

    def _begin(self, saved: Saved) -> None:
        self.suite = saved.suite
        self._bits = bits = saved.epoch_bits
        self._sent = saved.sent
        self._send = Ratchet(saved.suite, saved.send_secret, saved.sent >> bits)
        self._window = Window(saved.accepted)
        self._recv = Ratchet(saved.suite, saved.recv_secret, saved.accepted >> bits)
        self._recv_prev: Ratchet | None = None
        self._recv_next: Ratchet | None = None  # made when a datagram claims to be of it
        self._state: memoryview | None = None

    def attach(self, state: memoryview) -> None:
        """Write everything into this slot (nfq.recordstate) and keep it current from now on."""
        words = words_of(state)
        saved = Saved(
            self.suite,
            self._bits,
            0,
            0,
            self._sent,
            0,
            self._send.secret,
            self._window.highest,
            0,
            self._recv.secret,
            False,
        )
        write(words, saved)
        self._state = words

    @classmethod
    def restore(cls, state: memoryview, *, leap: int = LEAP) -> Datagrams:
        """As a worker that has died left it: the send counter leaps ahead, everything accepted is a replay.

        Raises nfq.recordstate.StateError.
        """
        words = words_of(state)
        saved = read(words)
        self = cls.__new__(cls)
        self._begin(saved)
        self._state = words
        if not saved.unused:
            self._move_to(saved.sent + leap)
            leapt(words, self._sent)
        return self

    def close(self) -> None:
        """The flow is over: erase its keys from the slot."""
        if self._state is not None:
            erase(self._state)
            self._state = None

    @property
    def sent(self) -> int:
        """Highest counter used so far; 0: none."""
        return self._sent

    @property
    def accepted(self) -> int:
        """Highest counter accepted so far; 0: none."""
        return self._window.highest

    def _move_to(self, counter: int) -> None:
        """Use up the counter, ratcheting as often as that needs."""
        state, bits = self._state, self._bits
        while self._send.epoch < counter >> bits:
            after = self._send.following()
            if state is not None:
                put_secret(state, SEND_SECRETS, after.epoch, after.secret)
                state[SENT] = after.epoch << bits  # from here on a restart takes the new secret
                forget_secret(state, SEND_SECRETS, self._send.epoch)
            self._send = after
        self._sent = counter
        if state is not None:
            state[SENT] = counter

    def seal(self, payload: bytes) -> bytes:
        """What goes on the wire instead of `payload`; OVERHEAD bytes longer."""
        counter = self._sent + 1
        if counter >= _LIMIT:
            raise OverflowError("a flow's counters are used up")
        self._move_to(counter)
        head = counter.to_bytes(8, "big")
        sealed = bytearray(len(payload) + OVERHEAD)
        sealed[:8] = head
        self._send.aead.encrypt_into(_PAD + head, payload, head, memoryview(sealed)[8:])
        return bytes(sealed)

    def open(self, payload: bytes) -> bytes | DropReason:
        """What was sealed, once; or why it is dropped."""
        if len(payload) < OVERHEAD:
            return DropReason.RECORD_MISSING
        head = payload[:8]
        counter = int.from_bytes(head, "big")
        if counter >= _LIMIT or not counter:
            return DropReason.RECORD_MISSING
        if not self._window.fresh(counter):
            return DropReason.RECORD_REPLAYED
        epoch, current = counter >> self._bits, self._recv
        ratchet: Ratchet | None
        if epoch == current.epoch:
            ratchet = current
        elif epoch == current.epoch + 1:
            ratchet = self._recv_next = self._recv_next or current.following()
        elif epoch == current.epoch - 1:
            ratchet = self._recv_prev
        else:
            ratchet = None
        if ratchet is None:
            return DropReason.RECORD_INVALID
        plain = bytearray(len(payload) - OVERHEAD)
        try:
            ratchet.aead.decrypt_into(_PAD + head, payload[8:], head, plain)
        except InvalidTag:
            return DropReason.RECORD_INVALID
        self._accept(counter, ratchet)
        return bytes(plain)

    def _accept(self, counter: int, ratchet: Ratchet) -> None:
        state = self._state
        if ratchet is self._recv_next:
            before = self._recv
            if state is not None:
                put_secret(state, RECV_SECRETS, ratchet.epoch, ratchet.secret)
            self._recv_prev, self._recv, self._recv_next = before, ratchet, None
            self._window.accept(counter)
            if state is not None:
                state[ACCEPTED] = counter
                forget_secret(state, RECV_SECRETS, before.epoch)
            return
        self._window.accept(counter)
        if state is not None:
            state[ACCEPTED] = self._window.highest
