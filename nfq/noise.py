"""Noise_IX_25519_AESGCM_SHA256 (Noise Protocol Framework, revision 34), written out for this one pattern.

    -> e, s
    <- e, ee, se, s, es

One class a side; each message is one call, so there is no state in which a caller can use it wrongly. A call
that fails leaves nothing behind that later calls use: all results are computed on locals and returned.
Handshake payloads of message 1 travel in clear (IX has no key yet); message 2 is bound to all of message 1.
"""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PROTOCOL = b"Noise_IX_25519_AESGCM_SHA256"
DHLEN = 32
TAGLEN = 16
MESSAGE_1_OVERHEAD = 2 * DHLEN
MESSAGE_2_OVERHEAD = DHLEN + DHLEN + TAGLEN + TAGLEN

_H0 = PROTOCOL.ljust(32, b"\0")  # the name is shorter than HASHLEN: padded, not hashed
_NONCE = bytes(12)  # counter 0: in this pattern every handshake key seals once

_SHA256 = hashes.SHA256()
_from_public = X25519PublicKey.from_public_bytes


class NoiseError(ValueError):
    """A message that is too short, holds an unusable public key, or does not authenticate."""


class TransportKeys(NamedTuple):
    """Result of Split(): 32-byte AES-256 keys, by direction, and the handshake hash.

    `session` is a third output of the same HKDF, from which a session's secrets are derived (nfq.session). Under a
    session there are neither hash nor `session`, but `proof`: the key of the initiator's proof.
    """

    initiator_to_responder: bytes
    responder_to_initiator: bytes
    handshake_hash: bytes
    session: bytes = b""
    proof: bytes = b""

    def __repr__(self) -> str:
        """Nothing: it may end up in a message or a log."""
        return "TransportKeys(...)"


class KeyPair(NamedTuple):
    """An X25519 key with its 32-byte public value, computed once."""

    private: X25519PrivateKey
    public: bytes

    @classmethod
    def generate(cls) -> KeyPair:
        """A fresh key (about 45 µs)."""
        private = X25519PrivateKey.generate()
        return cls(private, private.public_key().public_bytes_raw())

    @classmethod
    def of(cls, raw: bytes) -> KeyPair:
        """The pair of a raw 32-byte private key."""
        private = X25519PrivateKey.from_private_bytes(raw)
        return cls(private, private.public_key().public_bytes_raw())


class EphemeralPool:
    """Ephemeral keys made ahead while there is nothing else to do, each handed out once.

    They cost the same CPU then as later, but a connection does not wait for it. Empty, the pool makes keys on demand.
    """

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._keys: list[KeyPair] = []

    @property
    def full(self) -> bool:
        """Nothing to do."""
        return len(self._keys) >= self.size

    def add(self) -> None:
        """Make one key ahead."""
        self._keys.append(KeyPair.generate())

    def take(self) -> KeyPair:
        """A key nobody has had."""
        return self._keys.pop() if self._keys else KeyPair.generate()


def _dh(private: X25519PrivateKey, public: X25519PublicKey) -> bytes:
    try:
        return private.exchange(public)
    except ValueError as e:  # all-zero result: a low-order point
        raise NoiseError("unusable public key") from e


def _mix_key(ck: bytes, ikm: bytes) -> tuple[bytes, bytes]:
    """HKDF with two outputs: new chaining key, cipher key (section 4.3: RFC 5869 with empty info)."""
    out = HKDF(_SHA256, 64, ck, b"").derive(ikm)
    return out[:32], out[32:]


def _split(ck: bytes, h: bytes) -> TransportKeys:
    out = HKDF(_SHA256, 96, ck, b"").derive(b"")
    return TransportKeys(out[:32], out[32:64], h, out[64:])


class Initiator:
    """The connecting side: send `message`, then `read` each candidate answer until one authenticates.

    `ephemeral` must be fresh. Messages are one packet's payload, far below Noise's 65,535 bytes.
    """

    __slots__ = ("_e", "_h", "_s", "message")

    def __init__(
        self, static: KeyPair, prologue: bytes, payload: bytes, ephemeral: KeyPair | None = None
    ) -> None:
        e = ephemeral or KeyPair.generate()
        h = sha256(_H0 + prologue).digest()
        h = sha256(h + e.public).digest()
        h = sha256(h + static.public).digest()
        self._h = sha256(h + payload).digest()
        self._e = e
        self._s = static
        self.message = e.public + static.public + payload

    def read(self, message: bytes) -> tuple[bytes, bytes, TransportKeys]:
        """Message 2 → (responder's static public key, its payload, keys). Raises NoiseError; may be tried again."""
        if len(message) < MESSAGE_2_OVERHEAD:
            raise NoiseError("message 2 is too short")
        enc_s, enc_payload = message[32:80], message[80:]
        re = _from_public(message[:32])
        h = sha256(self._h + message[:32]).digest()
        ck, _ = _mix_key(_H0, _dh(self._e.private, re))
        ck, k = _mix_key(ck, _dh(self._s.private, re))
        try:
            rs = AESGCM(k).decrypt(_NONCE, enc_s, h)
            h = sha256(h + enc_s).digest()
            ck, k = _mix_key(ck, _dh(self._e.private, _from_public(rs)))
            payload = AESGCM(k).decrypt(_NONCE, enc_payload, h)
        except InvalidTag as e:
            raise NoiseError("message 2 does not authenticate") from e
        return rs, payload, _split(ck, sha256(h + enc_payload).digest())


class Responder:
    """The accepting side. Reading message 1 costs no public-key work; `write` answers it.

    `ephemeral` must be fresh: the same one with another payload would reuse a nonce.
    """

    __slots__ = ("_h", "payload", "remote_ephemeral", "remote_static")

    def __init__(self, prologue: bytes, message: bytes) -> None:
        if len(message) < MESSAGE_1_OVERHEAD:
            raise NoiseError("message 1 is too short")
        self.remote_ephemeral = message[:32]
        self.remote_static = message[32:64]
        self.payload = message[64:]
        h = sha256(_H0 + prologue).digest()
        h = sha256(h + self.remote_ephemeral).digest()
        h = sha256(h + self.remote_static).digest()
        self._h = sha256(h + self.payload).digest()

    def write(
        self, static: KeyPair, payload: bytes, ephemeral: KeyPair | None = None
    ) -> tuple[bytes, TransportKeys]:
        """Message 2 with `payload`, and the keys. Raises NoiseError when the initiator's keys are unusable."""
        e = ephemeral or KeyPair.generate()
        re = _from_public(self.remote_ephemeral)
        h = sha256(self._h + e.public).digest()
        ck, _ = _mix_key(_H0, _dh(e.private, re))
        ck, k = _mix_key(ck, _dh(e.private, _from_public(self.remote_static)))
        enc_s = AESGCM(k).encrypt(_NONCE, static.public, h)
        h = sha256(h + enc_s).digest()
        ck, k = _mix_key(ck, _dh(static.private, re))
        enc_payload = AESGCM(k).encrypt(_NONCE, payload, h)
        h = sha256(h + enc_payload).digest()
        return e.public + enc_s + enc_payload, _split(ck, h)
