"""Control datagrams: what enforcers say to each other on a UDP flow's own 5-tuple. docs/protocol.md, UDP.

Reading one says nothing about who sent it: a candidate becomes a message only by what its body proves.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nfq.handshake import MAX_PAYLOAD
from nfq.noise import TransportKeys

MAGIC: Final = bytes.fromhex("e5c7d81f3a94b62c")  # its first two bits are set, those of a counter never are
VERSION: Final = 1
HEADER: Final = 16
HELLO_SIZE: Final = HEADER + MAX_PAYLOAD
PROOF_SIZE: Final = HEADER + 28
UNKNOWN_SIZE: Final = HEADER + 8

_header = struct.Struct(">8sBBHI")
_NONCE_ACK = bytes(12)


class Kind(IntEnum):
    """Type of a control datagram."""

    HELLO = 1
    ANSWER = 2
    REFUSAL = 3
    RESUME = 4  # and behind it what a program sent, sealed
    RESUMED = 5
    UNKNOWN_SESSION = 6
    PROOF = 7
    PROOF_DATA = 8  # and behind it what a program sent
    ACK = 9
    UNKNOWN = 10


class Control(NamedTuple):
    """A control datagram taken apart; `rest`: the program's datagram behind a proof or RESUME."""

    kind: Kind
    body: bytes
    rest: bytes


def is_candidate(payload: bytes) -> bool:
    """Whether a payload may be a control datagram."""
    return payload.startswith(MAGIC)


def read(payload: bytes) -> Control | None:
    """A payload as a control datagram; None when it is not exactly one of this version."""
    if len(payload) < HEADER or not payload.startswith(MAGIC):
        return None
    _, version, kind, n, zero = _header.unpack_from(payload)
    if version != VERSION or zero or HEADER + n > len(payload):
        return None
    try:
        kind = Kind(kind)
    except ValueError:
        return None
    body, rest = payload[HEADER : HEADER + n], payload[HEADER + n :]
    if kind is Kind.HELLO:
        if len(payload) != HELLO_SIZE or rest.strip(b"\0"):
            return None
        rest = b""
    elif rest and kind not in (Kind.PROOF_DATA, Kind.RESUME):
        return None
    return Control(kind, body, rest)


def write(kind: Kind, body: bytes, rest: bytes = b"") -> bytes:
    """The payload of a control datagram."""
    payload = _header.pack(MAGIC, VERSION, kind, len(body), 0) + body + rest
    return payload.ljust(HELLO_SIZE, b"\0") if kind is Kind.HELLO else payload


def ack(keys: TransportKeys) -> bytes:
    """The payload by which the responder says that it has seen the proof: always the same under the same keys."""
    head = _header.pack(MAGIC, VERSION, Kind.ACK, 16, 0)
    return head + AESGCM(keys.responder_to_initiator).encrypt(_NONCE_ACK, b"", head)


def unknown(payload: bytes) -> bytes:
    """The answer to a datagram of a flow that is not known here."""
    return write(Kind.UNKNOWN, payload[-8:].rjust(8, b"\0"))
