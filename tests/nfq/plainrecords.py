"""Records written out a second time, as docs/protocol.md says them: slow, stateless, sharing no code with nfq."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from tests.nfq.segments import Wire


def record_key(direction_key: bytes, suite: int, epoch: int) -> bytes:
    """The AEAD key of an epoch."""
    info = b"sectool record 1" + bytes([suite])
    secret = HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(direction_key)
    for _ in range(epoch):
        secret = HKDFExpand(hashes.SHA256(), 32, b"next").derive(secret)
    return HKDFExpand(hashes.SHA256(), 32, b"key").derive(secret)


def seal(plain: Wire, key: bytes, suite: int, counter: int, offset: int, epoch_bits: int = 22) -> Wire:
    """`plain` as the record with this counter whose first byte is at this offset of its stream."""
    option = b"\xfd\x1c\x5e\xc7" + (counter % 2**32).to_bytes(4, "big")
    option += (plain.seq % 2**16).to_bytes(2, "big") + len(plain.payload).to_bytes(2, "big")
    aad = option + (offset % 2**64).to_bytes(8, "big") + bytes([plain.flags & 33])
    if plain.flags & 32:
        aad += plain.urgent.to_bytes(2, "big")
    nonce = bytes(4) + counter.to_bytes(8, "big")
    aead_key = record_key(key, suite, counter >> epoch_bits)
    aead = AESGCM(aead_key) if suite == 1 else ChaCha20Poly1305(aead_key)
    sealed = aead.encrypt(nonce, plain.payload, aad)
    size = len(plain.payload)
    return plain.changed(options=plain.options + option + sealed[size:], payload=sealed[:size])
