"""The credential blob: what a workload shows of itself inside a SYN or SYN-ACK.

    byte 0          version, 1
    bytes 1..33     X25519 public key (RFC 7748 encoding)
    bytes 33..41    not_after of the delegation, u64 big endian, UTC seconds, inclusive
    bytes 41..105   the leaf key's signature over the delegation
    bytes 105..     raw deflate stream (RFC 1951), preset dictionary of sectool.identity.dictionary, of
                        u16 big endian   length of the leaf
                        leaf certificate, DER
                        host CA certificate, DER

The signature covers `DELEGATION_CONTEXT || X25519 public key || not_after || SHA-256(deflate stream)`.
Deflate has many encodings of one text; signing the stream as sent means that nobody but the leaf's own key
can make a second valid blob of a credential, so a listener cannot fill a verifier's cache with variants of
what it overheard.

P-256 signatures are 64 bytes, r || s big endian, with s in the lower half of the group order (else (r, n-s)
would be a second valid signature); Ed25519 signatures are 64 bytes as RFC 8032 has them.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.dictionary import DICTIONARY

BLOB_VERSION = 1
MAX_BLOB = 1040  # bytes; with 120 bytes of handshake around it a SYN's payload stays within 1,180
MAX_INFLATED = 8192  # bytes of certificates we are willing to decompress

DELEGATION_CONTEXT = b"sectool delegation v1\x00"

SigningKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
VerifyingKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

_HEAD = struct.Struct(">B32sQ64s")
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_ECDSA_SHA256 = ec.ECDSA(SHA256())


def _malformed(message: str) -> CredentialError:
    return CredentialError(DropReason.CREDENTIAL_MALFORMED, message)


@dataclass(frozen=True, slots=True)
class Delegation:
    """A leaf key's word: this X25519 key speaks for my SVID until `not_after_s` (UTC seconds, inclusive)."""

    x25519: bytes
    not_after_s: int
    signature: bytes

    @staticmethod
    def _signed(x25519: bytes, not_after_s: int, stream: bytes) -> bytes:
        return DELEGATION_CONTEXT + x25519 + not_after_s.to_bytes(8, "big") + hashlib.sha256(stream).digest()

    @classmethod
    def sign(cls, key: SigningKey, x25519: bytes, not_after_s: int, stream: bytes) -> Delegation:
        """Delegate to `x25519` with the leaf's key; `stream` is the blob's deflate stream."""
        message = cls._signed(x25519, not_after_s, stream)
        if isinstance(key, ed25519.Ed25519PrivateKey):
            return cls(x25519, not_after_s, key.sign(message))
        r, s = decode_dss_signature(key.sign(message, _ECDSA_SHA256))
        s = min(s, P256_ORDER - s)
        return cls(x25519, not_after_s, r.to_bytes(32, "big") + s.to_bytes(32, "big"))

    def verify(self, key: VerifyingKey, stream: bytes) -> None:
        """Raise CredentialError(DELEGATION_INVALID) unless `key` signed this; looks at no clock."""
        message = self._signed(self.x25519, self.not_after_s, stream)
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(self.signature, message)
                return
            r = int.from_bytes(self.signature[:32], "big")
            s = int.from_bytes(self.signature[32:], "big")
            if s > P256_ORDER // 2:
                raise InvalidSignature
            key.verify(encode_dss_signature(r, s), message, _ECDSA_SHA256)
        except InvalidSignature:
            raise CredentialError(
                DropReason.DELEGATION_INVALID, "the leaf's key did not sign this delegation"
            ) from None


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob taken apart, nothing verified. `stream` is the deflate stream as it came."""

    delegation: Delegation
    stream: bytes
    leaf_der: bytes
    host_der: bytes


def compress(leaf_der: bytes, host_der: bytes) -> bytes:
    """The deflate stream of a leaf and its host CA."""
    plain = len(leaf_der).to_bytes(2, "big") + leaf_der + host_der
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    return deflate.compress(plain) + deflate.flush()


def pack(delegation: Delegation, stream: bytes) -> bytes:
    """The blob of a delegation over `stream`."""
    head = _HEAD.pack(BLOB_VERSION, delegation.x25519, delegation.not_after_s, delegation.signature)
    return head + stream


def size_with(stream: bytes) -> int:
    """How long the blob over `stream` will be, in bytes."""
    return _HEAD.size + len(stream)


def unpack(blob: bytes) -> Blob:
    """Take a blob apart; any bytes give a Blob or CredentialError (CREDENTIAL_OVERSIZED,
    CREDENTIAL_MALFORMED).

    Work and memory are bounded: at most MAX_BLOB bytes in, MAX_INFLATED bytes out.
    """
    if len(blob) > MAX_BLOB:
        raise CredentialError(
            DropReason.CREDENTIAL_OVERSIZED, f"the credential has {len(blob)} bytes, more than {MAX_BLOB}"
        )
    if len(blob) <= _HEAD.size:
        raise _malformed(f"the credential has only {len(blob)} bytes")
    version, x25519, not_after_s, signature = _HEAD.unpack_from(blob)
    if version != BLOB_VERSION:
        raise _malformed(f"credential version {version} is not known here")
    stream = blob[_HEAD.size :]
    inflate = zlib.decompressobj(-15, zdict=DICTIONARY)
    try:
        plain = inflate.decompress(stream, MAX_INFLATED)
    except zlib.error:
        raise _malformed("the credential does not decompress") from None
    if not inflate.eof:
        if len(plain) >= MAX_INFLATED:
            raise CredentialError(
                DropReason.CREDENTIAL_OVERSIZED,
                f"the credential decompresses to more than {MAX_INFLATED} bytes",
            )
        raise _malformed("the credential is cut short")
    if inflate.unused_data or inflate.unconsumed_tail:
        raise _malformed("the credential has bytes behind its end")
    leaf_end = 2 + int.from_bytes(plain[:2], "big")
    if not 2 < leaf_end < len(plain):
        raise _malformed("the credential's certificates do not fill it")
    return Blob(Delegation(x25519, not_after_s, signature), stream, plain[2:leaf_end], plain[leaf_end:])
