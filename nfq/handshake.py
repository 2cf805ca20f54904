"""Handshake messages, sans-I/O: bytes and `now` in, bytes and outcomes out. docs/protocol.md is its contract.

    initiator                                   responder
    ---------                                   ---------
    Hello ──── SYN: message 1, credential ────► Greeting        (claimed, CA-signed; nothing proven)
                                                  │ policy: ingress
    Hello.read ◄── SYN-ACK: message 2 ────────── accept()       (proves the responder)
            ◄── RST: message 2, refused ──────── refuse()
      │ policy: egress
    proof_option ── ACK: empty record ────────► check_proof     (proves the initiator)
    seal_refusal ── RST: sealed reason ───────► open_refusal

Everything that fails raises HandshakeError with the drop reason; a failed call changes nothing.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2s
from typing import NamedTuple, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nfq.noise import (
    MESSAGE_1_OVERHEAD,
    MESSAGE_2_OVERHEAD,
    Initiator,
    KeyPair,
    NoiseError,
    Responder,
    TransportKeys,
)
from nfq.packet import EXID, OPT_EXP, RECORD_OPTION_LEN
from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.verify import PeerIdentity

VERSION = 1
MAX_PAYLOAD = 1180  # fits a 1,280-byte path with 60 bytes of IPv6 and TCP headers and 40 of options
CLOCK_WINDOW_S = 120  # how far the initiator's clock may be from ours, either way

_PROLOGUE = b"sectool handshake 1\0"
_SYN_HEADER = struct.Struct(">BBBBIHH")  # version, type, flags, suites, unix seconds, blob length, 0
_ANSWER = struct.Struct(">BBHIqH")  # decision, suite, reason, policy revision, rule id, blob length
_GRANT = struct.Struct(">HBB")  # session: lifetime in seconds, worker, workers
_REFUSAL = struct.Struct(">HIq")  # reason, policy revision, rule id
_ANSWER_HEADER = struct.Struct(">BB")  # version, type

MIN_SYN = _SYN_HEADER.size + MESSAGE_1_OVERHEAD
MAX_BLOB = MAX_PAYLOAD - _ANSWER_HEADER.size - MESSAGE_2_OVERHEAD - _ANSWER.size - _GRANT.size

_PROOF_HEAD = bytes((OPT_EXP, RECORD_OPTION_LEN)) + EXID + bytes(4)  # counter 0, which no record has
_PROOF_AAD_REST = bytes(9)  # stream offset 0, no FIN
_NONCE_PROOF = bytes(12)
_NONCE_REFUSAL = bytes(4) + (2**64 - 1).to_bytes(8, "big")  # never reached by a record counter


class MessageType(IntEnum):
    """Second byte of every handshake payload."""

    HELLO = 1  # SYN
    ANSWER = 2  # SYN-ACK, or RST when it refuses
    REFUSAL = 3  # RST from an initiator whose policy denies


class EncryptWish(IntEnum):
    """What a side can and wants, in the flags of its message."""

    NEVER = 0
    ALLOWED = 1
    REQUIRED = 2


class Decision(IntEnum):
    """The responder's decision inside message 2.

    PLAIN with a suite: not asked for here, and possible with this suite. ENCRYPT: asked for here, with this suite.
    """

    PLAIN = 0
    ENCRYPT = 1
    REFUSE = 2


# Members by number: an enum's own call costs ten times as much.
_DECISIONS = {int(one): one for one in Decision}
_REASONS = {int(one): one for one in DropReason}


class HandshakeError(ValueError):
    """A handshake payload is refused. `reason` is the drop reason to record."""

    def __init__(self, reason: DropReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Verifier(Protocol):
    """What checks a credential blob (sectool.identity.verify.Verifier)."""

    def verify(self, blob: bytes, now_us: int) -> PeerIdentity:
        """The identity, or CredentialError with a drop reason."""


class Grant(NamedTuple):
    """The session (nfq.session) that a full handshake leaves. Lifetime 0: none.

    A session is known to one packet worker: to connections whose addresses lead to `worker` of `workers`.
    """

    lifetime_s: int
    worker: int = 0
    workers: int = 1

    def pack(self) -> bytes:
        """Four bytes."""
        return _GRANT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Grant:
        """Of exactly four bytes; a worker that there cannot be means that there is no session."""
        grant = cls(*_GRANT.unpack(data))
        return grant if grant.worker < grant.workers else NO_SESSION


NO_SESSION = Grant(0)


class Answer(NamedTuple):
    """The responder's answer, authenticated: its identity and what it decided."""

    peer: PeerIdentity
    decision: Decision
    suite: int
    reason: DropReason
    revision: int
    rule: int
    keys: TransportKeys
    grant: Grant = NO_SESSION


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the other enforcer refuses: its drop reason, policy revision and rule id (0: default or none)."""

    reason: DropReason
    revision: int
    rule: int


def _peer(verifier: Verifier, blob: bytes, static: bytes, now_us: int) -> PeerIdentity:
    try:
        peer = verifier.verify(blob, now_us)
    except CredentialError as e:
        raise HandshakeError(DropReason(e.reason), e.message) from e
    if not hmac.compare_digest(peer.x25519, static):
        raise HandshakeError(DropReason.DELEGATION_INVALID, "the Noise static key is not the delegated one")
    return peer


def decided(decision: int, suite: int, reason: int, offered: int) -> tuple[Decision, DropReason]:
    """What a responder's answer says, if it is possible with the suites `offered` (a mask). Raises HandshakeError."""
    try:
        said = _DECISIONS[decision], _REASONS[reason]
    except KeyError as e:
        raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, f"no such decision or reason: {e}") from e
    if suite and not (suite < 9 and offered >> suite - 1 & 1):
        raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, f"suite {suite} was not offered")
    if said[0] is Decision.ENCRYPT and not suite:
        raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, "encryption without a suite")
    return said


class Hello:
    """The initiator's side of one connection attempt. `payload` goes behind every (re)transmission of its SYN."""

    __slots__ = ("_noise", "_suites", "payload")

    def __init__(
        self,
        static: KeyPair,
        blob: bytes,
        now_us: int,
        suites: int = 0,
        ephemeral: KeyPair | None = None,
        *,
        protocol: int = 0,
    ) -> None:
        """`suites`: offered cipher suites as a mask (nfq.suites); 0: this side cannot encrypt.

        `protocol`: IP protocol of the flow unless it is TCP. Part of the prologue, so a message serves one protocol.
        """
        wish = EncryptWish.ALLOWED if suites else EncryptWish.NEVER
        header = _SYN_HEADER.pack(
            VERSION, MessageType.HELLO, wish, suites, now_us // 1_000_000 & 0xFFFFFFFF, len(blob), protocol
        )
        self._suites = suites
        self._noise = Initiator(static, _PROLOGUE + header, blob, ephemeral)
        self.payload = header + self._noise.message

    def read(self, payload: bytes, verifier: Verifier, now_us: int) -> Answer:
        """Authenticate the responder's message 2 from a SYN-ACK or RST. May be tried again after a failure."""
        if len(payload) < _ANSWER_HEADER.size + MESSAGE_2_OVERHEAD + _ANSWER.size + _GRANT.size:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, "answer is too short")
        version, kind = _ANSWER_HEADER.unpack_from(payload)
        if version != VERSION:
            raise HandshakeError(DropReason.VERSION_UNSUPPORTED, f"answer of version {version}")
        if kind != MessageType.ANSWER:
            raise HandshakeError(
                DropReason.HANDSHAKE_MALFORMED, f"message type {kind} where an answer belongs"
            )
        try:
            static, inner, keys = self._noise.read(payload[_ANSWER_HEADER.size :])
        except NoiseError as e:
            raise HandshakeError(DropReason.HANDSHAKE_FORGED, str(e)) from e
        if len(inner) < _ANSWER.size + _GRANT.size:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, "answer holds no decision")
        decision, suite, reason, revision, rule, blob_len = _ANSWER.unpack_from(inner)
        if len(inner) != _ANSWER.size + _GRANT.size + blob_len:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, "answer length does not hold")
        decision, reason = decided(decision, suite, reason, self._suites)
        grant = Grant.unpack(inner[_ANSWER.size : _ANSWER.size + _GRANT.size])
        peer = _peer(verifier, inner[_ANSWER.size + _GRANT.size :], static, now_us)
        return Answer(peer, decision, suite, reason, revision, rule, keys, grant)


class Greeting:
    """The responder's view of a SYN payload. Parsing it does no public-key work and keeps nothing but bytes."""

    __slots__ = ("_noise", "blob", "suites", "time_s", "wish")

    def __init__(self, payload: bytes, now_us: int, *, protocol: int = 0) -> None:
        if len(payload) < MIN_SYN:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, "SYN payload is too short")
        if len(payload) > MAX_PAYLOAD:
            raise HandshakeError(DropReason.CREDENTIAL_OVERSIZED, "SYN payload is too long")
        version, kind, wish, suites, self.time_s, blob_len, meant_for = _SYN_HEADER.unpack_from(payload)
        if version != VERSION:
            raise HandshakeError(DropReason.VERSION_UNSUPPORTED, f"SYN of version {version}")
        if kind != MessageType.HELLO or meant_for != protocol or len(payload) != MIN_SYN + blob_len:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, "SYN header does not hold")
        try:
            self.wish = EncryptWish(wish)
        except ValueError as e:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, str(e)) from e
        self.suites = suites if self.wish is not EncryptWish.NEVER else 0
        if abs(now_us // 1_000_000 - self.time_s) > CLOCK_WINDOW_S:
            raise HandshakeError(
                DropReason.HANDSHAKE_STALE, f"SYN is from {self.time_s}, outside the clock window"
            )
        header = payload[: _SYN_HEADER.size]
        self._noise = Responder(_PROLOGUE + header, payload[_SYN_HEADER.size :])
        self.blob = self._noise.payload

    @property
    def ephemeral(self) -> bytes:
        """The initiator's 32-byte ephemeral public key: unique to one attempt, so it identifies replays."""
        return self._noise.remote_ephemeral

    def peer(self, verifier: Verifier, now_us: int) -> PeerIdentity:
        """The claimed identity: signed by its CA, possession of its key not proven yet."""
        return _peer(verifier, self.blob, self._noise.remote_static, now_us)

    def answer(
        self,
        static: KeyPair,
        blob: bytes,
        decision: Decision,
        *,
        suite: int = 0,
        reason: DropReason = DropReason.NONE,
        revision: int = 0,
        rule: int = 0,
        grant: Grant = NO_SESSION,
        ephemeral: KeyPair | None = None,
    ) -> tuple[bytes, TransportKeys]:
        """Message 2 as SYN-ACK or RST payload, and the flow's keys (three X25519 exchanges, about 200 µs)."""
        inner = _ANSWER.pack(decision, suite, reason, revision, rule, len(blob)) + grant.pack() + blob
        try:
            message, keys = self._noise.write(static, inner, ephemeral)
        except NoiseError as e:
            raise HandshakeError(DropReason.HANDSHAKE_FORGED, str(e)) from e
        return _ANSWER_HEADER.pack(VERSION, MessageType.ANSWER) + message, keys


def proof_option(keys: TransportKeys, suite: int = 0) -> bytes:
    """The initiator's proof and final word: the flow is encrypted with `suite`, or plain (0).

    A record option with counter 0 and the suite where a record's start stands, the same on every segment: repeating it
    repeats nonce, plaintext and associated data alike, which reveals nothing.
    """
    head = _PROOF_HEAD + suite.to_bytes(2, "big") + b"\0\0"
    if keys.proof:
        return head + _session_proof(keys.proof, head)
    return head + AESGCM(keys.initiator_to_responder).encrypt(_NONCE_PROOF, b"", head + _PROOF_AAD_REST)


def _session_proof(key: bytes, head: bytes) -> bytes:
    """Tag of a proof under a session: no cipher is set up for one tag (docs/decisions/0010)."""
    return blake2s(head, key=key, digest_size=16, person=b"st proof").digest()


def is_proof(option: bytes) -> bool:
    """Whether a record option claims to be a proof and not a record."""
    return option[4:8] == b"\0\0\0\0"


def check_proof(keys: TransportKeys, option: bytes) -> int | None:
    """The suite (0: plain) that `option` (28 bytes) proves under these keys; None when it proves nothing."""
    head = option[:12]
    if head[:8] != _PROOF_HEAD or head[10:] != b"\0\0":
        return None
    suite = int.from_bytes(head[8:10], "big")
    if keys.proof:
        return suite if hmac.compare_digest(_session_proof(keys.proof, head), option[12:]) else None
    try:
        AESGCM(keys.initiator_to_responder).decrypt(_NONCE_PROOF, option[12:], head + _PROOF_AAD_REST)
    except InvalidTag:
        return None
    return suite


def seal_refusal(keys: TransportKeys, refusal: Refusal) -> bytes:
    """RST payload by which an initiator tells the responder that its policy denies."""
    head = _ANSWER_HEADER.pack(VERSION, MessageType.REFUSAL)
    body = _REFUSAL.pack(refusal.reason, refusal.revision, refusal.rule)
    return head + AESGCM(keys.initiator_to_responder).encrypt(_NONCE_REFUSAL, body, head)


def open_refusal(keys: TransportKeys, payload: bytes) -> Refusal:
    """Authenticate and read a refusal. Raises HandshakeError."""
    head = payload[: _ANSWER_HEADER.size]
    if head != _ANSWER_HEADER.pack(VERSION, MessageType.REFUSAL):
        raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, "not a refusal")
    try:
        body = AESGCM(keys.initiator_to_responder).decrypt(
            _NONCE_REFUSAL, payload[_ANSWER_HEADER.size :], head
        )
        reason, revision, rule = _REFUSAL.unpack(body)
        return Refusal(DropReason(reason), revision, rule)
    except InvalidTag as e:
        raise HandshakeError(DropReason.HANDSHAKE_FORGED, "refusal does not authenticate") from e
    except (struct.error, ValueError) as e:
        raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, "refusal does not hold") from e
