"""The little of DER (X.690) that we write ourselves."""

from __future__ import annotations

from datetime import datetime
from typing import Final

SEQUENCE: Final = 0x30
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
EXTENSIONS: Final = 0xA3  # [3] of a TBSCertificate
URI: Final = 0x86  # [6] of a GeneralName
_TRUE: Final = bytes.fromhex("0101ff")


def element(tag: int, body: bytes) -> bytes:
    """One element of less than 64 KiB, in definite form with the shortest length (8.1.3, 10.1)."""
    n = len(body)
    length = bytes((n,)) if n < 0x80 else bytes((0x81, n)) if n < 0x100 else b"\x82" + n.to_bytes(2, "big")
    return bytes((tag,)) + length + body


def oid(dotted: str) -> bytes:
    """An object identifier (8.19)."""
    first, second, *rest = (int(part) for part in dotted.split("."))
    body = bytearray()
    for arc in (first * 40 + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | (arc & 0x7F))
        body += bytes(reversed(groups))
    return bytes((0x06, len(body))) + bytes(body)


def time(moment: datetime) -> bytes:
    """A Time of a certificate, whole seconds: UTCTime to 2049, GeneralizedTime from then on (RFC 5280, 4.1.2.5)."""
    if moment.year < 2050:
        return b"\x17\x0d" + f"{moment:%y%m%d%H%M%S}Z".encode()
    return b"\x18\x0f" + f"{moment:%Y%m%d%H%M%S}Z".encode()


def extension(identifier: bytes, value: bytes, *, critical: bool) -> bytes:
    """An Extension of a certificate; `identifier` is its OID in DER (RFC 5280, 4.1)."""
    return element(SEQUENCE, identifier + (_TRUE if critical else b"") + element(OCTET_STRING, value))
