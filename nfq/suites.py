"""Cipher suites of encrypted records: the one place that knows which there are and which a host prefers.

Both take a 32-byte key, a 12-byte nonce and give a 16-byte tag (RFC 5116, RFC 8439).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.utils import Buffer

from sectool.errors import SectoolError
from sectool.events import Cipher

KEY_LEN = 32
TAG_LEN = 16


class Aead(Protocol):
    """What records need of a cipher: both write into `buf`, whose length must be exactly right."""

    def encrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer) -> int:
        """Ciphertext and tag."""

    def decrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer) -> int:
        """Plaintext; raises cryptography.exceptions.InvalidTag, after which `buf` must not be used."""


@dataclass(frozen=True, slots=True)
class Suite:
    """A cipher suite. `name` is what settings and reports call it, `cipher` its number on the wire and in events."""

    cipher: Cipher
    name: str
    aead: Callable[[bytes], Aead]

    @property
    def bit(self) -> int:
        """Its bit in the suites byte of Hello."""
        return 1 << (self.cipher - 1)


AES_256_GCM = Suite(Cipher.AES_256_GCM, "aes-256-gcm", AESGCM)
CHACHA20_POLY1305 = Suite(Cipher.CHACHA20_POLY1305, "chacha20-poly1305", ChaCha20Poly1305)
ALL = (AES_256_GCM, CHACHA20_POLY1305)

_BY_NUMBER = {int(s.cipher): s for s in ALL}
_BY_NAME = {s.name: s for s in ALL}


def by_number(number: int) -> Suite | None:
    """The suite with this wire number; None if this version has none."""
    return _BY_NUMBER.get(number)


def preference(names: Iterable[str] | None = None, *, aes: bool | None = None) -> tuple[Suite, ...]:
    """Suites this host is willing to use, best first.

    `names`: the setting, in its own order (empty: no encryption). None: all, AES first where the processor has
    instructions for it (`aes` overrides the look at the processor), ChaCha20 first where not.
    Raises SectoolError for a name there is not.
    """
    if names is None:
        if aes is None:
            aes = has_aes_instructions()
        return ALL if aes else ALL[::-1]
    chosen: dict[str, Suite] = {}
    for name in names:
        suite = _BY_NAME.get(name.lower())
        if suite is None:
            raise SectoolError(
                f"there is no cipher suite {name!r}", f"choose from {', '.join(s.name for s in ALL)}"
            )
        chosen[suite.name] = suite
    return tuple(chosen.values())


def mask(suites: Iterable[Suite]) -> int:
    """Suites as the bits of Hello's suites byte."""
    bits = 0
    for suite in suites:
        bits |= suite.bit
    return bits


def choose(offered_mask: int, preference: Sequence[Suite]) -> Suite | None:
    """The first of our preference that the other side offers; None without a common one."""
    for suite in preference:
        if offered_mask & suite.bit:
            return suite
    return None


def has_aes_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor computes AES in hardware. Unknown counts as yes: the servers of today all do."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, ARM
            return "aes" in value.split()
    return True
