"""Keys of one direction of an encrypted flow: a secret per epoch, the cipher made from it, and the step to the next.

The counter's upper bits are its epoch. Stepping on forgets the secret before, so a key taken later opens nothing
that was sent earlier.
"""

from __future__ import annotations

import hmac
from typing import Final

from nfq.suites import Aead, Suite

EPOCH_BITS: Final = 22  # a key seals 2^22 records

_LABEL: Final = b"sectool record 1"
_NO_SALT: Final = bytes(32)


def _expand(secret: bytes, info: bytes) -> bytes:
    """HKDF-Expand (RFC 5869) to one block of SHA-256."""
    return hmac.digest(secret, info + b"\x01", "sha256")


def first_secret(key: bytes, suite: Suite) -> bytes:
    """Secret of epoch 0 from the direction's key: HKDF-SHA256 without salt, info = label and suite number."""
    return _expand(hmac.digest(_NO_SALT, key, "sha256"), _LABEL + bytes((suite.cipher,)))


def key_of(secret: bytes) -> bytes:
    """The AEAD key of an epoch's secret."""
    return _expand(secret, b"key")


def next_secret(secret: bytes) -> bytes:
    """The secret of the epoch that follows."""
    return _expand(secret, b"next")


class Ratchet:
    """The current epoch of a direction. `aead` is what its records are sealed with."""

    __slots__ = ("aead", "epoch", "secret", "suite")

    def __init__(self, suite: Suite, secret: bytes, epoch: int = 0) -> None:
        self.suite = suite
        self.secret = secret
        self.epoch = epoch
        self.aead: Aead = suite.aead(key_of(secret))

    def following(self) -> Ratchet:
        """The next epoch's; this one stays as it is."""
        return Ratchet(self.suite, next_secret(self.secret), self.epoch + 1)
