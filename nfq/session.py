"""Sessions: connections without public-key work, sans-I/O: bytes and `now` in, bytes and keys out.

A full handshake (nfq.handshake) leaves a session on both sides; docs/protocol.md, "Sessions", is the contract.

    initiator                                     responder
    ---------                                     ---------
    Held           ◄── Answer: grant ───────────── Issued        (usable once the initiator's proof was seen)
    Held.attempt   ─── SYN: id, number, tag ─────► Sessions.open  (the tag holds, the number is new)
                                                     │ policy: ingress
    Attempt.read   ◄── SYN-ACK: nonce, decision ── Resume.answer
      │ policy: egress
    proof and records as after a full handshake
    Attempt.unknown ◄─ RST: hint ───────────────── unknown()      (no such session here: start a full handshake now)

`Sessions` (nfq.sessions) is the table of both kinds. Nothing here knows TCP or addresses. Whatever fails raises
HandshakeError with the drop reason; a failed call changes nothing.
"""

from __future__ import annotations

import hmac
import os
import struct
from enum import IntEnum
from hashlib import blake2b, blake2s
from typing import NamedTuple

from nfq.handshake import VERSION, Answer, Decision, EncryptWish, HandshakeError, decided
from nfq.noise import TransportKeys
from nfq.packet import TCP
from nfq.replay import Window
from sectool.events import DropReason
from sectool.identity.verify import PeerIdentity

LIFETIME_S = 120
EARLY_S = 2  # an initiator lets go of a session this long before its responder does
ROTATION_PATIENCE_US = (
    3_000_000  # after this a rotation that has led to nothing is tried by another connection
)
CLOCK_SLACK_US = (
    2_000_000  # a clock set back further than this ends a session: its age cannot be told any more
)

ID_SIZE = 16
TAG_SIZE = 16
SYN_SIZE = 52
ANSWER_SIZE = 50
UNKNOWN_SIZE = 18

_SYN = struct.Struct(">BBBB16sQ8s")  # version, type, wish, suites, session id, connection number, nonce
_HEADER = struct.Struct(">BB")  # version, type
_WISHES = tuple(EncryptWish)
_ANSWER = struct.Struct(">BBHIq")  # decision, suite, reason, policy revision, rule id
_NONCE_SIZE = 16  # the responder's
_ANSWER_HEAD = _HEADER.size + _NONCE_SIZE
_SECRETS = b"sectool session 1"
# What a keyed BLAKE2 is for (its `person`); the key is the session's or the connection's
_TAG, _ANSWERED = b"st tag", b"st answr"
_FLOW, _MORE = b"st flow keys", b"st answer, proof"


class SessionMessage(IntEnum):
    """Second byte of a session's payloads; goes on from nfq.handshake.MessageType."""

    RESUME = 4  # SYN
    RESUMED = 5  # SYN-ACK, or RST when it refuses
    UNKNOWN = 6  # RST: no such session; proves nothing


def lifetime_s(now_us: int, *not_after_us: int) -> int:
    """How long a session may live that starts now between credentials that end then."""
    return max(0, min(LIFETIME_S, *((end - now_us) // 1_000_000 for end in not_after_us)))


class _Secrets(NamedTuple):
    """Of one session: its id, the key of SYN tags, and what flow keys come from."""

    id: bytes
    tag: bytes
    flow: bytes

    def __repr__(self) -> str:
        """Nothing: it may end up in a message or a log."""
        return "_Secrets(...)"

    def vouch(self, head: bytes, protocol: int) -> bytes:
        """The tag of a SYN payload. A SYN made for one IP protocol is worth nothing in another."""
        return blake2s(bytes((protocol,)) + head, key=self.tag, digest_size=TAG_SIZE, person=_TAG).digest()

    def keys(self, syn: bytes, nonce: bytes) -> tuple[TransportKeys, bytes]:
        """Keys of one connection, and the 32 bytes that seal its answer: from all that both sides have said."""
        said = syn + nonce
        flow = blake2b(said, key=self.flow, person=_FLOW).digest()
        more = blake2b(said, key=self.flow, person=_MORE).digest()
        return TransportKeys(flow[:32], flow[32:], b"", b"", more[32:]), more[:32]


def _sealed(pad: bytes, body: bytes) -> bytes:
    """One block that is sealed once, or opened: its pad is used for nothing else."""
    return (int.from_bytes(pad, "big") ^ int.from_bytes(body, "big")).to_bytes(len(body), "big")


def _answer_tag(key: bytes, head: bytes, sealed: bytes) -> bytes:
    return blake2s(head + sealed, key=key, digest_size=TAG_SIZE, person=_ANSWERED).digest()


def _secrets(keys: TransportKeys) -> _Secrets:
    """HKDF-SHA512 (RFC 5869) of the handshake's own session output, bound to the whole handshake by its hash."""
    prk = hmac.digest(keys.handshake_hash, keys.session, "sha512")
    first = hmac.digest(prk, _SECRETS + b"\x01", "sha512")
    second = hmac.digest(prk, first + _SECRETS + b"\x02", "sha512")
    return _Secrets(first[:ID_SIZE], first[32:], second)


class Held:
    """The initiator's end of a session."""

    __slots__ = (
        "_number",
        "_rotating_until_us",
        "_rotation_us",
        "_secrets",
        "_span",
        "ended",
        "local",
        "peer",
        "retired",
    )

    def __init__(
        self, local: int, peer: PeerIdentity, keys: TransportKeys, lifetime: int, now_us: int
    ) -> None:
        """`local` and `peer`: ids of the local identity, and the identity, that the handshake proved."""
        self.local = local
        self.peer = peer
        self.ended = False  # nothing that was begun under it counts any more either
        self.retired = False  # no further connections
        self._secrets = _secrets(keys)
        self._number = 0
        life_us = max(0, min(lifetime, LIFETIME_S) - EARLY_S) * 1_000_000
        self._span = now_us - CLOCK_SLACK_US, min(now_us + life_us, peer.not_after_us)
        self._rotation_us = now_us + life_us * 3 // 4
        self._rotating_until_us = 0

    def alive(self, now_us: int) -> bool:
        """Neither ended nor expired."""
        return not self.ended and self._span[0] <= now_us < self._span[1]

    def due(self, now_us: int) -> bool:
        """Whether this very connection shall make the session's successor. Says so once in a while."""
        if now_us < self._rotation_us or now_us < self._rotating_until_us:
            return False
        self._rotating_until_us = now_us + ROTATION_PATIENCE_US
        return True

    def attempt(self, suites: int, protocol: int = TCP, *, required: bool = False) -> Attempt:
        """A connection under this session, with a number never used before. `suites`: offered ones as a mask."""
        self._number += 1
        wish = EncryptWish.ALLOWED if suites else EncryptWish.NEVER
        if required:
            wish = EncryptWish.REQUIRED
        head = _SYN.pack(
            VERSION, SessionMessage.RESUME, wish, suites, self._secrets.id, self._number, os.urandom(8)
        )
        return Attempt(self, head + self._secrets.vouch(head, protocol))

    def keys(self, syn: bytes, nonce: bytes) -> tuple[TransportKeys, bytes]:
        """Of the connection whose SYN payload and responder's nonce these are; and what seals its answer."""
        return self._secrets.keys(syn, nonce)


class Attempt:
    """The initiator's side of one connection under a session. `payload` goes behind its SYN's first transmission."""

    __slots__ = ("payload", "session")

    def __init__(self, session: Held, payload: bytes) -> None:
        self.session = session
        self.payload = payload

    def read(self, payload: bytes, now_us: int) -> Answer:
        """Authenticate the responder's answer from a SYN-ACK or RST. May be tried again after a failure."""
        if len(payload) != ANSWER_SIZE:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, f"answer of {len(payload)} bytes")
        version, kind = _HEADER.unpack_from(payload)
        if version != VERSION:
            raise HandshakeError(DropReason.VERSION_UNSUPPORTED, f"answer of version {version}")
        if kind != SessionMessage.RESUMED:
            raise HandshakeError(
                DropReason.HANDSHAKE_MALFORMED, f"message type {kind} where an answer belongs"
            )
        if not self.session.alive(now_us):
            raise HandshakeError(DropReason.SESSION_UNKNOWN, "the session has ended meanwhile")
        head = payload[:_ANSWER_HEAD]
        keys, seal = self.session.keys(self.payload, head[_HEADER.size :])
        sealed, tag = payload[_ANSWER_HEAD:-TAG_SIZE], payload[-TAG_SIZE:]
        if not hmac.compare_digest(_answer_tag(seal[16:], head, sealed), tag):
            raise HandshakeError(DropReason.SESSION_FORGED, "answer does not authenticate")
        decision, suite, reason, revision, rule = _ANSWER.unpack(_sealed(seal[:16], sealed))
        decision, reason = decided(decision, suite, reason, self.payload[3])
        return Answer(self.session.peer, decision, suite, reason, revision, rule, keys)

    def unknown(self, payload: bytes) -> bool:
        """Whether a RST payload is the hint that the responder does not know the session.

        Who sends it has seen the SYN, no more: it may only make the initiator do what losing the SYN would.
        """
        return is_unknown(payload) and hmac.compare_digest(payload[_HEADER.size :], self.payload[-TAG_SIZE:])


class Issued:
    """The responder's end of a session. Not to be found by anybody before `Sessions.issue`."""

    __slots__ = ("_secrets", "_span", "ended", "local", "peer", "window")

    def __init__(
        self, local: int, peer: PeerIdentity, keys: TransportKeys, lifetime: int, now_us: int
    ) -> None:
        """`local` and `peer`: ids of the local identity, and the identity, that the handshake proved."""
        self.local = local
        self.peer = peer
        self.ended = False
        self.window = Window()
        self._secrets = _secrets(keys)
        self._span = now_us - CLOCK_SLACK_US, min(now_us + lifetime * 1_000_000, peer.not_after_us)

    @property
    def id(self) -> bytes:
        """16 bytes that nobody can guess; both ends derive them from the handshake."""
        return self._secrets.id

    def alive(self, now_us: int) -> bool:
        """Neither ended nor expired."""
        return not self.ended and self._span[0] <= now_us < self._span[1]

    def vouches(self, syn: bytes, protocol: int) -> bool:
        """Whether the tag of a SYN payload is this session's, for this IP protocol."""
        return hmac.compare_digest(self._secrets.vouch(syn[:-TAG_SIZE], protocol), syn[-TAG_SIZE:])

    def keys(self, syn: bytes, nonce: bytes) -> tuple[TransportKeys, bytes]:
        """Of the connection whose SYN payload and responder's nonce these are; and what seals its answer."""
        return self._secrets.keys(syn, nonce)


class Request(NamedTuple):
    """A SYN payload under a session, taken apart. Nothing in it is authentic yet."""

    payload: bytes
    session_id: bytes
    number: int
    wish: int
    suites: int

    @classmethod
    def parse(cls, payload: bytes) -> Request:
        """Raises HandshakeError."""
        if len(payload) != SYN_SIZE:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, f"SYN payload of {len(payload)} bytes")
        version, kind, wish, suites, name, number, _ = _SYN.unpack_from(payload)
        if version != VERSION:
            raise HandshakeError(DropReason.VERSION_UNSUPPORTED, f"SYN of version {version}")
        if kind != SessionMessage.RESUME:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, f"message type {kind} in a SYN")
        return cls(payload, name, number, wish, suites)


class Resume:
    """The responder's view of an authentic SYN payload under a session."""

    __slots__ = ("number", "payload", "session", "suites", "wish")

    def __init__(self, session: Issued, request: Request) -> None:
        """Raises HandshakeError when the wish is none there is."""
        if request.wish > EncryptWish.REQUIRED:
            raise HandshakeError(DropReason.HANDSHAKE_MALFORMED, f"no such wish: {request.wish}")
        self.wish = _WISHES[request.wish]
        self.session = session
        self.payload = request.payload
        self.number = request.number
        self.suites = request.suites if self.wish is not EncryptWish.NEVER else 0  # offered, as a mask

    def take(self) -> None:
        """Use up its number: from now on the same SYN is a replay."""
        self.session.window.accept(self.number)

    def answer(
        self,
        decision: Decision,
        *,
        suite: int = 0,
        reason: DropReason = DropReason.NONE,
        revision: int = 0,
        rule: int = 0,
    ) -> tuple[bytes, TransportKeys]:
        """SYN-ACK or RST payload, and the connection's keys. Fresh ones each time."""
        head = _HEADER.pack(VERSION, SessionMessage.RESUMED) + os.urandom(_NONCE_SIZE)
        keys, seal = self.session.keys(self.payload, head[_HEADER.size :])
        sealed = _sealed(seal[:16], _ANSWER.pack(decision, suite, reason, revision, rule))
        return head + sealed + _answer_tag(seal[16:], head, sealed), keys


def is_resume(payload: bytes) -> bool:
    """Whether a SYN payload asks for a session (it may be none all the same)."""
    return payload[1:2] == b"\x04"


def is_resumed(payload: bytes) -> bool:
    """Whether the payload of a SYN-ACK answers a session's SYN (it may be forged all the same)."""
    return payload[1:2] == b"\x05"


def is_unknown(payload: bytes) -> bool:
    """Whether a RST payload has the shape of the hint that a session is not known."""
    return len(payload) == UNKNOWN_SIZE and payload[:2] == bytes((VERSION, SessionMessage.UNKNOWN))


def unknown(payload: bytes) -> bytes:
    """The hint for a SYN whose session is not known: smaller than the SYN, and of use only to who sent that."""
    return _HEADER.pack(VERSION, SessionMessage.UNKNOWN) + payload[-TAG_SIZE:]
