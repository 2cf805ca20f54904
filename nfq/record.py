"""The record layer of an encrypted TCP flow: segments in, segments out, encrypted in place. docs/protocol.md, Records.

Sans-I/O. A record is one packet as the sending stack gave it to the queue, up to 64 KiB; the kernel may cut it into
segments afterwards, each with a copy of the record's option. Whatever fails changes nothing: a tag is checked before
any counter, window, key or buffer that a later packet relies on moves.

Packets given back are views of a buffer of this module, valid until the next `seal` or `open` of any flow.
"""

from __future__ import annotations

import hmac
import struct
from hashlib import sha256
from typing import Final, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag

from nfq.packet import (
    FIN,
    MAX_OPTIONS,
    OPT_EXP,
    PSH,
    RECORD_OPTION_LEN,
    RST,
    SYN,
    TCP,
    PacketError,
    iter_options,
)
from nfq.reassembly import POOL, Partial, Pieces, Pool
from nfq.suites import KEY_LEN, TAG_LEN, Aead, Suite, by_number
from sectool.events import DropReason

EPOCH_BITS: Final = 22  # a key seals 2^22 records
LEAP: Final = 1 << 16  # counters skipped after a restart
WINDOW: Final = 4096  # counters below the highest accepted in which an unseen one is still taken

CWR: Final = 0x80
_CE: Final = 0x03  # ECN bits: congestion experienced
_NONE: Final = DropReason.NONE
_INVALID: Final = DropReason.RECORD_INVALID
_REPLAYED: Final = DropReason.RECORD_REPLAYED
_MISSING: Final = DropReason.RECORD_MISSING

_M32: Final = 0xFFFFFFFF
_M64: Final = 0xFFFFFFFFFFFFFFFF
_HALF: Final = 1 << 31
_HEAD: Final = 0xFD1C5EC7  # kind 253, length 28, ExID: see packet.OPT_EXP, RECORD_OPTION_LEN, EXID
_HEAD_BYTES: Final = _HEAD.to_bytes(4, "big")
_TIMESTAMPS: Final = (
    b"\x01\x01\x08\x0a"  # NOP, NOP, timestamps: how Linux begins the options of every segment
)
_MAX_PACKET: Final = 0xFFFF

_option = struct.Struct(">IIHH")  # head, counter, start, length
_aad = struct.Struct(">IIHHQB")  # the same, unwrapped offset, FIN
_counter_start_length = struct.Struct(">IHH")
_u16 = struct.Struct(">H")
_u32 = struct.Struct(">I")
_u64 = struct.Struct(">Q")

# Words of the state, each a native, aligned 64-bit store: one that a killed process leaves half done does not exist.
_MAGIC, _ISNS, _SENT, _SEND_HIGH, _ACCEPTED, _RECV_HIGH, _LEAPT = range(7)
_SEND_SECRETS, _RECV_SECRETS = 8, 16  # each two secrets of 4 words, by the parity of their epoch
STATE_SIZE: Final = 24 * 8
_MAGIC_VALUE: Final = 0x5EC7_0001  # high half of the first word


class OversizedError(PacketError):
    """With its option the packet would not fit 65,535 bytes: have the kernel split it first (queue without GSO)."""


class StateError(ValueError):
    """A journal slot holds no record state that this version wrote."""


class Sealed(NamedTuple):
    """An encrypted packet. `again`: its bytes had been sent before, a sign of loss."""

    packet: memoryview
    again: bool


class Opened(NamedTuple):
    """A packet to deliver; or none, because it was kept as a piece (`reason` NONE) or is to be dropped."""

    packet: memoryview | bytes | None
    reason: DropReason


def _expand(secret: bytes, label: bytes) -> bytes:
    """HKDF-Expand (RFC 5869) of one block."""
    return hmac.digest(secret, label + b"\x01", "sha256")


def first_secret(key: bytes, suite: Suite) -> bytes:
    """Record secret of epoch 0 of the direction with this key: HKDF-SHA256 without salt."""
    return _expand(
        hmac.digest(bytes(sha256().digest_size), key, "sha256"), b"sectool record 1" + bytes((suite.cipher,))
    )


def key_of(secret: bytes) -> bytes:
    """The epoch's AEAD key."""
    return _expand(secret, b"key")


def next_secret(secret: bytes) -> bytes:
    """The following epoch's secret."""
    return _expand(secret, b"next")


# Buffers of this process. The packet being built lies at _V4 or _V6 of _OUT, so that what its checksum covers
# (addresses, TCP header, payload) begins 8-aligned; behind it there is room for a tag and padding.
_OUT_BYTES = bytearray(_MAX_PACKET + 129)
_OUT = memoryview(_OUT_BYTES)
_OUT_WORDS = np.frombuffer(_OUT_BYTES, dtype=np.uint32)
_IN_BYTES = bytearray(_MAX_PACKET + 129)
_IN = memoryview(_IN_BYTES)
_V4 = 4
_V6 = 0
_ZEROS = bytes(8)

_NONCE = bytearray(12)
_AAD = bytearray(_aad.size)


def _tcp_checksum(base: int, tcp_off: int, end: int, v6: bool) -> None:
    """Write the TCP checksum of the packet at `base` of _OUT; its checksum field must be 0."""
    _OUT[end : end + 8] = _ZEROS
    tcp = base + tcp_off
    begin = tcp - 32 if v6 else tcp - 8
    if tcp_off == (40 if v6 else 20):  # addresses and TCP header are neighbours
        total = int(np.add.reduce(_OUT_WORDS[begin >> 2 : (end + 3) >> 2], dtype=np.uint64))
    else:
        addresses = _OUT[base + 8 : base + 40] if v6 else _OUT[base + 12 : base + 20]
        total = int.from_bytes(addresses, "little") + int(
            np.add.reduce(_OUT_WORDS[tcp >> 2 : (end + 3) >> 2], dtype=np.uint64)
        )
    total %= 0xFFFF
    total = (total >> 8 | (total & 0xFF) << 8) + TCP + end - tcp
    _u16.pack_into(_OUT, tcp + 16, 0xFFFF - total % 0xFFFF)


def _set_total(base: int, total: int, v6: bool) -> None:
    """Write the packet's length, and an IPv4 header's checksum changed by as much (RFC 1624)."""
    if v6:
        _u16.pack_into(_OUT, base + 4, total - 40)
        return
    (old,) = _u16.unpack_from(_OUT, base + 2)
    (check,) = _u16.unpack_from(_OUT, base + 10)
    changed = (0xFFFF - check) + (0xFFFF - old) + total
    _u16.pack_into(_OUT, base + 10, 0xFFFF - ((changed - 1) % 0xFFFF + 1))
    _u16.pack_into(_OUT, base + 2, total)


def _set_ce(base: int, v6: bool) -> None:
    """Mark the packet as having met congestion."""
    if v6:
        _OUT[base + 1] |= _CE << 4
        return
    (old,) = _u16.unpack_from(_OUT, base)
    (check,) = _u16.unpack_from(_OUT, base + 10)
    changed = (0xFFFF - check) + (0xFFFF - old) + (old | _CE)
    _u16.pack_into(_OUT, base + 10, 0xFFFF - ((changed - 1) % 0xFFFF + 1))
    _u16.pack_into(_OUT, base, old | _CE)


def _kept_options(options: bytes, room: int) -> bytes:
    """Timestamps, and SACK blocks where there is room; padded. Raises PacketError on any other option."""
    timestamps = sack = b""
    for kind, opt in iter_options(options):
        if kind == 8 and len(opt) == 10 and not timestamps:
            timestamps = b"\x01\x01" + opt
        elif kind == 5 and not sack:
            sack = b"\x01\x01" + opt
        else:
            raise PacketError(f"TCP option {kind} on a segment of an encrypted flow")
    kept = timestamps + sack
    if len(kept) > room:
        kept = timestamps
    return kept + b"\0" * (-len(kept) % 4)


def _split_options(options: bytes) -> tuple[bytes | None, bytes]:
    """(record option or None, the others). Raises PacketError on what does not belong there."""
    record: bytes | None = None
    others = b""
    for kind, opt in iter_options(options):
        if kind == OPT_EXP and opt[:4] == _HEAD_BYTES:
            if record is not None:
                raise PacketError("two record options")
            record = opt
        else:
            others += opt
    return record, _kept_options(others, MAX_OPTIONS)


class Records:
    """One encrypted TCP flow, both directions.

    `i2r`, `r2i`: the handshake's or session's keys by direction. `isn_out`, `isn_in`: sequence numbers of the SYN this
    host sent and of the one it got (the first byte of a stream follows it). `state`: STATE_SIZE bytes of the journal,
    8-aligned, kept current before each packet is given back.
    """

    __slots__ = (
        "_accepted",
        "_base",
        "_bits",
        "_first_in",
        "_first_out",
        "_missing",
        "_pieces",
        "_recv",
        "_recv_epoch",
        "_recv_high",
        "_recv_next",
        "_recv_prev",
        "_recv_secret",
        "_send",
        "_send_epoch",
        "_send_high",
        "_send_secret",
        "_sent",
        "_state",
        "suite",
    )

    def __init__(
        self,
        suite: Suite,
        i2r: bytes,
        r2i: bytes,
        *,
        initiator: bool,
        isn_out: int,
        isn_in: int,
        state: memoryview | None = None,
        epoch_bits: int = EPOCH_BITS,
        pool: Pool = POOL,
    ) -> None:
        out, into = (i2r, r2i) if initiator else (r2i, i2r)
        self.suite = suite
        self._bits = epoch_bits
        self._first_out = (isn_out + 1) & _M32
        self._first_in = (isn_in + 1) & _M32
        self._pieces = Pieces(pool)
        self._sent = self._send_high = self._send_epoch = 0
        self._accepted = self._recv_high = self._recv_epoch = 0
        # Counters below `_accepted` that have not come: bit i for counter _base + i.
        self._base = self._missing = 0
        self._send_secret = first_secret(out, suite)
        self._recv_secret = first_secret(into, suite)
        self._send: Aead = suite.aead(key_of(self._send_secret))
        self._recv: Aead = suite.aead(key_of(self._recv_secret))
        self._recv_prev: Aead | None = None
        self._recv_next: tuple[bytes, Aead] | None = None
        self._state: memoryview | None = None
        if state is not None:
            self.attach(state)

    def attach(self, state: memoryview) -> None:
        """Write everything into this slot (STATE_SIZE bytes) and keep it current from now on."""
        if len(state) != STATE_SIZE:
            raise StateError(f"a state slot has {STATE_SIZE} bytes, not {len(state)}")
        words = state.cast("B").cast("Q")
        state[:] = bytes(STATE_SIZE)
        _put_secret(words, _SEND_SECRETS, self._send_epoch, self._send_secret)
        _put_secret(words, _RECV_SECRETS, self._recv_epoch, self._recv_secret)
        words[_ISNS] = (self._first_out << 32) | self._first_in
        words[_SENT], words[_SEND_HIGH] = self._sent, self._send_high
        words[_ACCEPTED], words[_RECV_HIGH] = self._accepted, self._recv_high
        words[_LEAPT] = self._sent
        words[_MAGIC] = (
            _MAGIC_VALUE << 32 | self._bits << 8 | self.suite.cipher
        )  # last: before it, no state is there
        self._state = words

    @classmethod
    def restore(cls, state: memoryview, *, leap: int = LEAP, pool: Pool = POOL) -> Records:
        """The flow as a worker that has died left it in its slot, which is kept current from now on.

        The send counter leaps ahead, unless nothing was sealed since the last leap; every counter up to the highest
        accepted is a replay. Raises StateError.
        """
        if len(state) != STATE_SIZE:
            raise StateError(f"a state slot has {STATE_SIZE} bytes, not {len(state)}")
        words = state.cast("B").cast("Q")
        magic = words[_MAGIC]
        suite = by_number(magic & 0xFF)
        bits = magic >> 8 & 0xFF
        if magic >> 32 != _MAGIC_VALUE or suite is None or not 1 <= bits <= EPOCH_BITS:
            raise StateError("the slot holds no record state")
        self = cls.__new__(cls)
        self.suite = suite
        self._bits = bits
        self._first_out, self._first_in = words[_ISNS] >> 32, words[_ISNS] & _M32
        self._pieces = Pieces(pool)
        self._sent, self._send_high = words[_SENT], words[_SEND_HIGH]
        self._accepted, self._recv_high = words[_ACCEPTED], words[_RECV_HIGH]
        self._base = self._missing = 0
        self._send_epoch = self._sent >> bits
        self._recv_epoch = self._accepted >> bits
        self._send_secret = _get_secret(words, _SEND_SECRETS, self._send_epoch)
        self._recv_secret = _get_secret(words, _RECV_SECRETS, self._recv_epoch)
        self._send = suite.aead(key_of(self._send_secret))
        self._recv = suite.aead(key_of(self._recv_secret))
        self._recv_prev = self._recv_next = None
        self._state = words
        if self._sent != words[_LEAPT]:
            self._advance(self._sent + leap)
            words[_SENT] = self._sent
            words[_LEAPT] = self._sent
        return self

    def close(self) -> None:
        """The flow is over: free its buffers and forget its keys, also in the journal."""
        self._pieces.clear()
        if self._state is not None:
            self._state[_MAGIC] = 0
            for i in range(_SEND_SECRETS, STATE_SIZE // 8):
                self._state[i] = 0
            self._state = None

    @property
    def sent(self) -> int:
        """Highest counter used so far; 0: none."""
        return self._sent

    @property
    def accepted(self) -> int:
        """Highest counter verified so far; 0: none (the other side has not proven anything by records)."""
        return self._accepted

    @property
    def given_up(self) -> int:
        """Records of which some pieces came but not all."""
        return self._pieces.given_up

    def expire(self, now_us: int) -> int:
        """Give up partial records that are too old. Returns how many. (`reassembly.POOL.expire`: all flows.)"""
        return self._pieces.expire(now_us)

    # sending

    def _advance(self, counter: int) -> None:
        """Move the send counter to `counter`, ratcheting the key as often as that needs."""
        if not counter & _M32:
            counter += 1  # 0 on the wire is the handshake's proof
        epoch = counter >> self._bits
        if epoch != self._send_epoch:
            secret = self._send_secret
            for _ in range(epoch - self._send_epoch):
                secret = next_secret(secret)
            aead = self.suite.aead(key_of(secret))
            state = self._state
            if state is not None:
                old = self._send_epoch
                _put_secret(state, _SEND_SECRETS, epoch, secret)
                state[_SENT] = counter  # from here on a restart takes the new secret
                if (old ^ epoch) & 1:
                    _put_secret(state, _SEND_SECRETS, old, bytes(KEY_LEN))
            self._send_secret, self._send, self._send_epoch = secret, aead, epoch
        self._sent = counter

    def seal(
        self, data: bytes | memoryview, tcp_off: int, data_off: int, v6: bool, *, gso: bool = False
    ) -> Sealed:
        """Encrypt an outgoing packet under the next counter. `gso`: the kernel will split it and checksum the parts.

        Raises OversizedError when it does not fit 65,535 bytes with its option, PacketError when it is not a segment
        that belongs to a record.
        """
        size = len(data)
        flags = data[tcp_off + 13]
        if flags & (SYN | RST):
            raise PacketError("not a segment of an established connection")
        options = data_off - tcp_off - 20
        if not options or (options == 12 and data[tcp_off + 20 : tcp_off + 24] == _TIMESTAMPS):
            head = data_off
            kept = None
        else:
            kept = _kept_options(bytes(data[tcp_off + 20 : data_off]), MAX_OPTIONS - RECORD_OPTION_LEN)
            head = tcp_off + 20 + len(kept)
        length = size - data_off
        total = head + RECORD_OPTION_LEN + length
        if total > _MAX_PACKET:
            raise OversizedError(f"{length} bytes of payload and a record option do not fit one packet")
        (seq,) = _u32.unpack_from(data, tcp_off + 4)
        fin = flags & FIN
        high = self._send_high
        offset = high + ((seq - self._first_out - high + _HALF & _M32) - _HALF)
        counter = self._sent + 1
        if counter >> self._bits != self._send_epoch or not counter & _M32:
            self._advance(counter)
            counter = self._sent
        else:
            self._sent = counter
        state = self._state
        if state is not None:
            state[_SENT] = counter
        end = offset + length + fin
        again = (
            offset < high and length > 1
        )  # probes of an idle or closed connection repeat a byte and mean no loss
        if end > high:
            self._send_high = end
            if state is not None:
                state[_SEND_HIGH] = end

        base = _V6 if v6 else _V4
        out = _OUT
        if kept is None:
            out[base : base + head] = data[:head]
        else:
            out[base : base + tcp_off + 20] = data[: tcp_off + 20]
            out[base + tcp_off + 20 : base + head] = kept
        at = base + head
        _aad.pack_into(_AAD, 0, _HEAD, counter & _M32, seq & 0xFFFF, length, offset & _M64, fin)
        _u64.pack_into(_NONCE, 4, counter)
        body = at + RECORD_OPTION_LEN
        stop = body + length
        self._send.encrypt_into(_NONCE, data[data_off:], _AAD, out[body : stop + TAG_LEN])
        out[at : at + 12] = _AAD[:12]
        out[at + 12 : body] = out[stop : stop + TAG_LEN]
        tcp = base + tcp_off
        out[tcp + 12] = (body - tcp) << 2 | (out[tcp + 12] & 0x0F)
        _u16.pack_into(out, tcp + 16, 0)
        _set_total(base, total, v6)
        if not gso:
            _tcp_checksum(base, tcp_off, stop, v6)
        return Sealed(out[base:stop], again)

    # receiving

    def open(self, data: bytes | memoryview, tcp_off: int, data_off: int, v6: bool, now_us: int) -> Opened:
        """Verify and decrypt an incoming packet, or keep it until the rest of its record is there.

        Raises PacketError when its options or flags do not belong on a segment of an encrypted flow.
        """
        flags = data[tcp_off + 13]
        size = len(data) - data_off
        fin = flags & FIN
        if flags & (SYN | RST) and (size or flags & SYN):
            raise PacketError("not a segment of an established connection")
        record, kept = _split_options(bytes(data[tcp_off + 20 : data_off]))
        if record is None:
            if size or fin:
                return Opened(None, _MISSING)
            return Opened(data if isinstance(data, bytes) else data[:], _NONE)
        low, start, length = _counter_start_length.unpack_from(record, 4)
        (seq,) = _u32.unpack_from(data, tcp_off + 4)
        if not low:
            if size or fin:
                return Opened(None, _INVALID)
            return self._bare(data, tcp_off, kept, v6)
        rel = (seq - start) & 0xFFFF
        if rel + size > length or (not size and length) or (fin and rel + size != length):
            return Opened(None, _INVALID)

        accepted = self._accepted
        counter = accepted + ((low - accepted + _HALF & _M32) - _HALF)
        if counter <= accepted and not self._unseen(counter):
            return Opened(None, _REPLAYED)
        if counter >> self._bits > self._recv_epoch + 1:
            return Opened(None, _INVALID)
        high = self._recv_high
        offset = high + ((seq - rel - self._first_in - high + _HALF & _M32) - _HALF)
        part: Partial | None = None
        if size != length:
            key = record[4:]
            part = self._pieces.parts.get(key)
            if part is None:
                part = self._pieces.begin(key, length, offset, now_us, not accepted)
                if part is None:
                    return Opened(None, _NONE)
            elif part.offset != offset:
                return Opened(None, _INVALID)
            if rel + size == length:
                part.flags |= flags & (FIN | PSH)
            part.flags |= flags & CWR
            if data[1] >> 4 & _CE == _CE if v6 else data[1] & _CE == _CE:
                part.ce = True
            if not part.add(rel, data[data_off:], size):
                return Opened(None, _NONE)
            self._pieces.remove(part)
            flags = flags & ~(FIN | PSH | CWR) | part.flags
            fin = flags & FIN
            sealed = part.view
        else:
            sealed = _IN[: length + TAG_LEN]
            sealed[:length] = data[data_off:]
            sealed[length:] = record[12:]

        base = _V6 if v6 else _V4
        body = base + tcp_off + 20 + len(kept)
        stop = body + length
        if stop - base > _MAX_PACKET:
            return Opened(None, _INVALID)
        _AAD[:12] = record[:12]
        _aad.pack_into(_AAD, 0, _HEAD, low, start, length, offset & _M64, fin)
        _u64.pack_into(_NONCE, 4, counter)
        if not self._decrypt(counter, sealed, _OUT[body:stop]):
            return Opened(None, _INVALID)
        if offset + length + fin > high:
            self._recv_high = offset + length + fin
            if self._state is not None:
                self._state[_RECV_HIGH] = self._recv_high

        _OUT[base : base + tcp_off + 20] = data[: tcp_off + 20]
        _OUT[base + tcp_off + 20 : body] = kept
        tcp = base + tcp_off
        if part is not None:
            _u32.pack_into(_OUT, tcp + 4, (seq - rel) & _M32)
            _OUT[tcp + 13] = flags
            if part.ce:
                _set_ce(base, v6)
        return self._finish(base, tcp_off, body, stop, v6)

    def _bare(self, data: bytes | memoryview, tcp_off: int, kept: bytes, v6: bool) -> Opened:
        """A segment without payload whose option is the handshake's proof: take that off."""
        base = _V6 if v6 else _V4
        body = base + tcp_off + 20 + len(kept)
        _OUT[base : base + tcp_off + 20] = data[: tcp_off + 20]
        _OUT[base + tcp_off + 20 : body] = kept
        return self._finish(base, tcp_off, body, body, v6)

    @staticmethod
    def _finish(base: int, tcp_off: int, body: int, stop: int, v6: bool) -> Opened:
        """Lengths and checksums of the packet in _OUT."""
        tcp = base + tcp_off
        _OUT[tcp + 12] = (body - tcp) << 2 | (_OUT[tcp + 12] & 0x0F)
        _u16.pack_into(_OUT, tcp + 16, 0)
        _set_total(base, stop - base, v6)
        _tcp_checksum(base, tcp_off, stop, v6)
        return Opened(_OUT[base:stop], _NONE)

    def _unseen(self, counter: int) -> bool:
        """Whether a counter at or below the highest accepted is inside the window and has not come yet."""
        i = counter - self._base
        return i >= 0 and counter > self._accepted - WINDOW and self._missing >> i & 1 == 1

    def _decrypt(self, counter: int, sealed: memoryview, into: memoryview) -> bool:
        """Verify under the counter's epoch; only if that holds move the window, and the keys if it is the next."""
        epoch = counter >> self._bits
        ahead = epoch - self._recv_epoch
        if not ahead:
            aead = self._recv
        elif ahead == 1:
            if self._recv_next is None:
                secret = next_secret(self._recv_secret)
                self._recv_next = secret, self.suite.aead(key_of(secret))
            aead = self._recv_next[1]
        elif ahead == -1 and self._recv_prev is not None:
            aead = self._recv_prev
        else:
            return False
        try:
            aead.decrypt_into(_NONCE, sealed, _AAD, into)
        except InvalidTag:
            return False
        accepted = self._accepted
        if counter < accepted:
            self._missing ^= 1 << (counter - self._base)
            return True
        if counter != accepted + 1:
            self._skip(accepted + 1, counter)
        state = self._state
        if ahead:
            old, epoch = self._recv_epoch, self._recv_epoch + 1
            assert self._recv_next is not None
            self._recv_prev = self._recv
            self._recv_secret, self._recv = self._recv_next
            self._recv_epoch, self._recv_next = epoch, None
            if state is not None:
                _put_secret(state, _RECV_SECRETS, epoch, self._recv_secret)
                state[_ACCEPTED] = counter  # from here on a restart takes the new secret
                _put_secret(state, _RECV_SECRETS, old, bytes(KEY_LEN))
        elif state is not None:
            state[_ACCEPTED] = counter
        self._accepted = counter
        return True

    def _skip(self, first: int, counter: int) -> None:
        """Counters first to counter - 1 have been jumped over: they may still come, inside the window."""
        lowest = max(counter - WINDOW + 1, 1)
        if first < lowest:
            first = lowest
        if not self._missing or lowest - self._base > WINDOW:
            shift = lowest - self._base
            self._missing = self._missing >> shift if shift > 0 else self._missing << -shift
            self._base = lowest
        if first < counter:
            self._missing |= ((1 << (counter - first)) - 1) << (first - self._base)


def _put_secret(words: memoryview, at: int, epoch: int, secret: bytes) -> None:
    at += (epoch & 1) * 4
    words[at : at + 4] = memoryview(secret).cast("Q")


def _get_secret(words: memoryview, at: int, epoch: int) -> bytes:
    at += (epoch & 1) * 4
    return bytes(words[at : at + 4])
