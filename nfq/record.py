"""The record layer of an encrypted TCP flow: segments in, segments out, encrypted in place. docs/protocol.md, Records.

Sans-I/O. A record is one packet as the sending stack gave it to the queue, up to 64 KiB; the kernel may cut it into
segments afterwards, each with a copy of the record's option. What fails changes nothing: a tag is checked before any
counter, window, key or buffer that a later packet relies on moves.

Packets given back are views of one buffer of this process, valid until the next `seal` or `open` of any flow.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag

from nfq.frame import (
    CE,
    CWR,
    MAX_PACKET,
    OUT,
    RECORD_HEAD,
    kept_options,
    set_checksum,
    set_congestion,
    set_length,
    split_options,
)
from nfq.packet import FIN, MAX_OPTIONS, PSH, RECORD_OPTION_LEN, RST, SYN, URG, PacketError
from nfq.ratchet import EPOCH_BITS, Ratchet, first_secret
from nfq.reassembly import POOL, Partial, Pieces, Pool
from nfq.recordstate import (
    ACCEPTED,
    RECV_HIGH,
    RECV_SECRETS,
    SEND_HIGH,
    SEND_SECRETS,
    SENT,
    STATE_SIZE,
    Saved,
    StateError,
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

__all__ = ("LEAP", "STATE_SIZE", "Opened", "OversizedError", "Records", "Sealed", "StateError")

LEAP: Final = 1 << 16  # counters skipped after a restart

_BOUND: Final = FIN | URG  # flags that change what a program reads
_M32: Final = 0xFFFFFFFF
_M64: Final = 0xFFFFFFFFFFFFFFFF
_HALF: Final = 1 << 31
_TIMESTAMPS: Final = 0x0101080A  # NOP, NOP, timestamps: how Linux begins the options of every segment
_timestamps_head = _TIMESTAMPS.to_bytes(4, "big")

# From the TCP header on. Sent: sequence number, flags, checksum.
_sent = struct.Struct(">4xI5xB2xH")
# Received, with timestamps and without: the same, then timestamps' head, record's head, counter, start, length.
_with_timestamps = struct.Struct(">4xI5xB2xH2xI8xIIHH")
_without = struct.Struct(">4xI5xB2xH2xIIHH")
_counter_start_length = struct.Struct(">IHH")
_aad = struct.Struct(">IIHHQB")  # the option's first 12 bytes, unwrapped offset, FIN and URG
_u32 = struct.Struct(">I")
_u64 = struct.Struct(">Q")

_AAD: Final = bytearray(_aad.size)
_AAD_OPTION: Final = memoryview(_AAD)[:12]
_NONCE: Final = bytearray(12)
_IN: Final = memoryview(bytearray(MAX_PACKET + TAG_LEN))  # ciphertext and tag side by side


class OversizedError(PacketError):
    """With its option the packet would be larger than a verdict can carry (65,531 bytes).

    Have the kernel split it first: the queue without GSO.
    """


class Sealed(NamedTuple):
    """An encrypted packet. `again`: its bytes had been sent before, a sign of loss."""

    packet: memoryview
    again: bool


class Opened(NamedTuple):
    """A packet to deliver; or none, because it was kept as a piece (`reason` NONE) or is to be dropped."""

    packet: memoryview | bytes | None
    reason: DropReason


_KEPT: Final = Opened(None, DropReason.NONE)
_INVALID: Final = Opened(None, DropReason.RECORD_INVALID)
_REPLAYED: Final = Opened(None, DropReason.RECORD_REPLAYED)
_MISSING: Final = Opened(None, DropReason.RECORD_MISSING)
_NONE: Final = DropReason.NONE


class Records:
    """One encrypted TCP flow, both directions.

    `i2r`, `r2i`: the handshake's or session's keys by direction. `isn_out`, `isn_in`: sequence numbers of the SYN this
    host sent and of the one it got (the first byte of a stream follows it). `state`: STATE_SIZE bytes of the journal,
    8-aligned, kept current before each packet is given back.
    """

    __slots__ = (
        "_bits",
        "_first_in",
        "_first_out",
        "_parts",
        "_pieces",
        "_recv",
        "_recv_high",
        "_recv_next",
        "_recv_prev",
        "_send",
        "_send_end",
        "_send_high",
        "_sent",
        "_state",
        "_window",
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
        first_out, first_in = (isn_out + 1) & _M32, (isn_in + 1) & _M32
        secrets = first_secret(out, suite), first_secret(into, suite)
        self._begin(Saved(suite, epoch_bits, first_out, first_in, 0, 0, secrets[0], 0, 0, secrets[1]), pool)
        if state is not None:
            self.attach(state)

    def _begin(self, saved: Saved, pool: Pool) -> None:
        self.suite = saved.suite
        self._bits = bits = saved.epoch_bits
        self._first_out, self._first_in = saved.first_out, saved.first_in
        self._sent, self._send_high = saved.sent, saved.send_high
        self._send = Ratchet(saved.suite, saved.send_secret, saved.sent >> bits)
        self._send_end = self._send.epoch + 1 << bits
        self._window = Window(saved.accepted)
        self._recv_high = saved.recv_high
        self._recv = Ratchet(saved.suite, saved.recv_secret, saved.accepted >> bits)
        self._recv_prev: Ratchet | None = None  # for what was overtaken on the way
        self._recv_next: Ratchet | None = None  # made when something claims to be of it
        self._pieces = Pieces(pool)
        self._parts = self._pieces.parts
        self._state: memoryview | None = None

    def attach(self, state: memoryview) -> None:
        """Write everything into this slot (STATE_SIZE bytes, 8-aligned) and keep it current from now on."""
        words = words_of(state)
        write(
            words,
            Saved(
                self.suite,
                self._bits,
                self._first_out,
                self._first_in,
                self._sent,
                self._send_high,
                self._send.secret,
                self._window.highest,
                self._recv_high,
                self._recv.secret,
            ),
        )
        self._state = words

    @classmethod
    def restore(cls, state: memoryview, *, leap: int = LEAP, pool: Pool = POOL) -> Records:
        """The flow as a worker that has died left it in its slot, which is kept current from now on.

        The send counter leaps ahead, unless nothing was sealed since the last leap (so that restarts alone never move
        it out of the receiver's reach); every counter up to the highest accepted is a replay. Raises StateError.
        """
        words = words_of(state)
        saved = read(words)
        self = cls.__new__(cls)
        self._begin(saved, pool)
        self._state = words
        if not saved.unused:
            self._leap(saved.sent + leap)
            leapt(words, self._sent)
        return self

    def close(self) -> None:
        """The flow is over: free its buffers, and its keys in the journal."""
        self._pieces.clear()
        if self._state is not None:
            erase(self._state)
            self._state = None

    @property
    def sent(self) -> int:
        """Highest counter used so far; 0: none."""
        return self._sent

    @property
    def end(self) -> int:
        """Offset behind the last byte that was ever sent."""
        return self._send_high

    @property
    def accepted(self) -> int:
        """Highest counter verified so far; 0: none, so the other side has not proven anything by records."""
        return self._window.highest

    @property
    def given_up(self) -> int:
        """Records of which some pieces came but not all."""
        return self._pieces.given_up

    def expire(self, now_us: int) -> int:
        """Give up partial records that are too old. Returns how many. (`reassembly.POOL.expire`: all flows.)"""
        return self._pieces.expire(now_us)

    # sending

    def _leap(self, counter: int) -> None:
        """Move the send counter ahead to `counter` or the next that may be used, ratcheting as often as that needs."""
        if not counter & _M32:
            counter += 1
        state = self._state
        while self._send.epoch < counter >> self._bits:
            after = self._send.following()
            if state is not None:
                put_secret(state, SEND_SECRETS, after.epoch, after.secret)
                state[SENT] = after.epoch << self._bits  # from here on a restart takes the new secret
                forget_secret(state, SEND_SECRETS, self._send.epoch)
            self._send = after
            self._send_end = after.epoch + 1 << self._bits
        self._sent = counter
        if state is not None:
            state[SENT] = counter

    def seal(
        self, data: bytes | memoryview, tcp_off: int, data_off: int, v6: bool, *, gso: bool = False
    ) -> Sealed:
        """Encrypt an outgoing packet under the next counter. `gso`: the kernel will split it and make its checksums.

        Raises OversizedError when it does not fit a verdict with its option, PacketError when it is not a segment
        that belongs to a record. After either the flow is as it was.
        """
        seq, flags, checksum = _sent.unpack_from(data, tcp_off)
        if flags & (SYN | RST):
            raise PacketError("not a segment of an established connection")
        options = tcp_off + 20
        kept = None
        head = data_off
        if data_off != options and (
            data_off != options + 12 or data[options : options + 4] != _timestamps_head
        ):
            kept = kept_options(bytes(data[options:data_off]), MAX_OPTIONS - RECORD_OPTION_LEN)
            head = options + len(kept)
        length = len(data) - data_off
        total = head + RECORD_OPTION_LEN + length
        if total > MAX_PACKET:
            raise OversizedError(f"{length} bytes of payload and a record option do not fit one packet")

        counter = self._sent + 1
        state = self._state
        if counter >= self._send_end:
            self._leap(counter)
            counter = self._sent
        else:
            self._sent = counter
            if state is not None:
                state[SENT] = counter
        high = self._send_high
        offset = high + ((seq - self._first_out - high + _HALF & _M32) - _HALF)
        fin = flags & FIN
        # Probes of an idle connection or a closed window repeat a byte or none, and mean no loss.
        again = offset < high and length > 1
        end = offset + length + fin
        if end > high:
            self._send_high = end
            if state is not None:
                state[SEND_HIGH] = end

        body = head + RECORD_OPTION_LEN
        _aad.pack_into(
            _AAD, 0, RECORD_HEAD, counter & _M32, seq & 0xFFFF, length, offset & _M64, flags & _BOUND
        )
        _u64.pack_into(_NONCE, 4, counter)
        bound = _AAD + data[tcp_off + 18 : tcp_off + 20] if flags & URG else _AAD
        plain = (data if type(data) is memoryview else memoryview(data))[data_off:]
        self._send.aead.encrypt_into(_NONCE, plain, bound, OUT[body : total + TAG_LEN])
        if kept is None:
            OUT[:head] = data[:head]
        else:
            OUT[:options] = data[:options]
            OUT[options:head] = kept
        OUT[head : head + 12] = _AAD_OPTION
        OUT[head + 12 : body] = OUT[total : total + TAG_LEN]
        OUT[tcp_off + 12] = (body - tcp_off) << 2 | (OUT[tcp_off + 12] & 0x0F)
        set_length(total, v6)
        if not gso:
            set_checksum(tcp_off, total, v6, tcp_off == (40 if v6 else 20), checksum)
        return Sealed(OUT[:total], again)

    # receiving

    def open(
        self,
        data: bytes | memoryview,
        tcp_off: int,
        data_off: int,
        v6: bool,
        now_us: int,
        room: memoryview | None = None,
    ) -> Opened:
        """Verify and decrypt an incoming packet, or keep it until the rest of its record is there.

        `room`: a writable view of what `data` is a view of, from the same byte on and at least 16 bytes longer than the
        packet; the bytes behind the packet are overwritten. It saves copying the payload.
        Raises PacketError when its options or flags do not belong on a segment of an encrypted flow.
        """
        total = len(data)
        if total > MAX_PACKET:
            raise OversizedError(f"a packet of {total} bytes holds no record")
        view = data if type(data) is memoryview else memoryview(data)
        kept = None
        option = data_off - RECORD_OPTION_LEN
        before = option - tcp_off - 20
        stamps = head = 0
        if before == 12:
            seq, flags, checksum, stamps, head, low, start, length = _with_timestamps.unpack_from(
                view, tcp_off
            )
        elif not before:
            seq, flags, checksum, head, low, start, length = _without.unpack_from(view, tcp_off)
            stamps = _TIMESTAMPS
        if head == RECORD_HEAD and stamps == _TIMESTAMPS:
            tail: bytes | memoryview = view[option + 4 : data_off]
        else:
            seq, flags, checksum = _sent.unpack_from(view, tcp_off)
            record, kept = split_options(bytes(view[tcp_off + 20 : data_off]))
            if record is None:
                return _MISSING if flags & FIN or total > data_off else Opened(data, _NONE)
            tail = record[4:]
            low, start, length = _counter_start_length.unpack_from(tail)
            option = tcp_off + 20 + len(kept)
        size = total - data_off
        fin = flags & FIN
        at = seq - start & 0xFFFF
        if flags & SYN or (flags & RST and (size or fin)):
            raise PacketError("not a segment of an established connection")
        if not low:
            # The handshake's proof, which is no record: on a bare ACK it is merely taken off.
            return _INVALID if size or fin else self._delivered(view, tcp_off, option, kept, 0, v6, checksum)
        if (
            at + size > length
            or (fin and at + size != length)
            or (not size and length)
            or option + length > MAX_PACKET
        ):
            return _INVALID

        window = self._window
        part: Partial | None = None
        if size == length:
            accepted = window.highest
            counter = accepted + ((low - accepted + _HALF & _M32) - _HALF)
            if not window.fresh(counter):
                return _REPLAYED
            high = self._recv_high
            offset = high + ((seq - self._first_in - high + _HALF & _M32) - _HALF)
            if room is None:
                sealed = _IN[: size + TAG_LEN]
                sealed[:size] = view[data_off:]
                sealed[size:] = tail[8:]
            else:
                room[total : total + TAG_LEN] = tail[8:]
                sealed = room[data_off : total + TAG_LEN]
        else:
            key = bytes(tail)
            seq = seq - at & _M32
            part = self._parts.get(key)
            if part is None:
                accepted = window.highest
                counter = accepted + ((low - accepted + _HALF & _M32) - _HALF)
                if not window.fresh(counter):
                    return _REPLAYED
                if counter >> self._bits > self._recv.epoch + 1:
                    return _INVALID
                part = self._pieces.begin(key, counter, seq, length, now_us, early=not accepted)
                if part is None:
                    return _KEPT
            elif part.seq != seq:
                return _INVALID
            if view[1] >> 4 & CE == CE if v6 else view[1] & CE == CE:
                part.ce = True
            if at + size == length:
                part.flags |= flags & (FIN | PSH)
            if not at:
                part.flags |= flags & URG  # a stack that splits leaves flag and pointer as they are
                part.urgent = bytes(view[tcp_off + 18 : tcp_off + 20])
            part.flags |= flags & CWR
            if not part.add(at, view[data_off:], size):
                return _KEPT
            self._pieces.remove(part)
            counter = part.counter
            if not window.fresh(counter):
                return _REPLAYED
            high = self._recv_high
            offset = high + ((seq - self._first_in - high + _HALF & _M32) - _HALF)
            flags = flags & ~(FIN | PSH | CWR | URG) | part.flags
            fin = flags & FIN
            sealed = part.view

        _aad.pack_into(_AAD, 0, RECORD_HEAD, low, start, length, offset & _M64, flags & _BOUND)
        _u64.pack_into(_NONCE, 4, counter)
        bound = _AAD
        if flags & URG:
            bound = _AAD + (view[tcp_off + 18 : tcp_off + 20] if part is None else part.urgent)
        if not self._verified(counter, sealed, bound, OUT[option : option + length]):
            return _INVALID
        end = offset + length + fin
        if end > high:
            self._recv_high = end
            if self._state is not None:
                self._state[RECV_HIGH] = end

        if part is None:
            if self._parts:
                self._pieces.came_whole(bytes(tail))
            return self._delivered(view, tcp_off, option, kept, length, v6, checksum)
        return self._delivered(view, tcp_off, option, kept, length, v6, checksum, part, flags)

    @staticmethod
    def _delivered(
        view: memoryview,
        tcp_off: int,
        head: int,
        kept: bytes | None,
        length: int,
        v6: bool,
        checksum: int,
        part: Partial | None = None,
        flags: int = 0,
    ) -> Opened:
        """The packet around a verified payload that lies in OUT already; `part`: it stands for that record's pieces."""
        options, total = tcp_off + 20, head + length
        if kept is None:
            OUT[:head] = view[:head]
        else:
            OUT[:options] = view[:options]
            OUT[options:head] = kept
        OUT[tcp_off + 12] = (head - tcp_off) << 2 | (OUT[tcp_off + 12] & 0x0F)
        if part is not None:
            _u32.pack_into(OUT, tcp_off + 4, part.seq)
            OUT[tcp_off + 13] = flags
            OUT[tcp_off + 18 : tcp_off + 20] = part.urgent
            if part.ce:
                set_congestion(v6)
        set_length(total, v6)
        set_checksum(tcp_off, total, v6, tcp_off == (40 if v6 else 20), checksum)
        return Opened(OUT[:total], _NONE)

    def _verified(self, counter: int, sealed: memoryview, bound: bytearray, into: memoryview) -> bool:
        """Decrypt under the counter's epoch; only if the tag holds move the window, and the key if it is the next."""
        recv: Ratchet | None = self._recv
        ahead = (counter >> self._bits) - self._recv.epoch
        if ahead == 1:
            recv = self._recv_next = self._recv_next or self._recv.following()
        elif ahead:
            recv = self._recv_prev if ahead == -1 else None
        if recv is None:
            return False
        try:
            recv.aead.decrypt_into(_NONCE, sealed, bound, into)
        except InvalidTag:
            return False
        window, state = self._window, self._state
        if state is not None and counter > window.highest:
            if ahead == 1:
                put_secret(state, RECV_SECRETS, recv.epoch, recv.secret)
            state[ACCEPTED] = counter  # from here on a restart takes the secret of its epoch
            if ahead == 1:
                forget_secret(state, RECV_SECRETS, self._recv.epoch)
        if ahead == 1:
            self._recv_prev, self._recv, self._recv_next = self._recv, recv, None
        window.accept(counter)
        return True
