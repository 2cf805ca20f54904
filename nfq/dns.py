"""DNS messages, as far as it takes to learn which addresses a name has: one question, and the answers on its chain.

Strict and bounded: whatever a peer sends, `parse` gives a Message or raises DnsError, after looking at LIMIT_RECORDS
records at most. A compression pointer must point before the place it stands in, so names cannot loop, and a name
has few of them, so that no message makes a name of each record a walk through all of it. Authority and additional
sections are not looked at: nobody asked for what is in them.
Sources: RFC 1035 (messages), RFC 2181 (TTL, one question), RFC 3596 (AAAA), RFC 4343 (case).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

A: Final = 1
CNAME: Final = 5
AAAA: Final = 28
_IN: Final = 1

LIMIT_RECORDS: Final = 256  # answers looked at
LIMIT_CHAIN: Final = 16  # aliases followed
LIMIT_ADDRESSES: Final = 64  # addresses taken from one message
_LIMIT_POINTERS: Final = 32  # in one name; writers of messages need one
_LIMIT_NAME: Final = 255  # octets (RFC 1035, 2.3.4)

_HEADER: Final = struct.Struct(">HHHHHH")
_RECORD: Final = struct.Struct(">HHIH")
_PLAIN: Final = re.compile(rb"[A-Za-z0-9_-]+")


class DnsError(ValueError):
    """Not a DNS message that is understood."""


class Question(NamedTuple):
    """Lower-case name without final dot, and the type asked for."""

    name: str
    kind: int


class Record(NamedTuple):
    """One answer of type A, AAAA (`address`: 4 or 16 bytes) or CNAME (`target`); `ttl` in seconds."""

    name: str
    ttl: int
    address: bytes
    target: str


class Message(NamedTuple):
    """A query, or a response with its answers. `code` 0 is NOERROR."""

    id: int
    response: bool
    truncated: bool
    code: int
    question: Question
    answers: tuple[Record, ...]


class Binding(NamedTuple):
    """`name` has `address` for `ttl` seconds."""

    name: str
    address: bytes
    ttl: int


def parse(data: bytes) -> Message:
    """Read a message of the standard query operation with exactly one question. Raises DnsError."""
    if len(data) < _HEADER.size:
        raise DnsError("shorter than its header")
    number, flags, questions, answers, _, _ = _HEADER.unpack_from(data)
    if flags >> 11 & 0x0F:
        raise DnsError("not a standard query")
    if questions != 1:
        raise DnsError("not exactly one question")
    name, at = _name(data, _HEADER.size)
    if at + 4 > len(data):
        raise DnsError("truncated question")
    kind, cls = struct.unpack_from(">HH", data, at)
    if cls != _IN:
        raise DnsError("not of class IN")
    response, truncated = bool(flags >> 15), bool(flags >> 9 & 1)
    records: list[Record] = []
    if response and not truncated:
        # What follows the first LIMIT_RECORDS is not needed: a name that has more addresses is known by fewer.
        at += 4
        for _ in range(min(answers, LIMIT_RECORDS)):
            at = _answer(data, at, records)
    return Message(number, response, truncated, flags & 0x0F, Question(name, kind), tuple(records))


def _answer(data: bytes, at: int, records: list[Record]) -> int:
    """Read one resource record, keep it if it is of use; where the next one begins."""
    name, at = _name(data, at)
    if at + _RECORD.size > len(data):
        raise DnsError("truncated record")
    kind, cls, ttl, length = _RECORD.unpack_from(data, at)
    at += _RECORD.size
    end: int = at + length
    if end > len(data):
        raise DnsError("record longer than the message")
    if cls != _IN:
        return end
    ttl = 0 if ttl >> 31 else ttl  # RFC 2181, 8
    if kind in (A, AAAA):
        if length != (4 if kind == A else 16):
            raise DnsError("address of a wrong length")
        records.append(Record(name, ttl, data[at:end], ""))
    elif kind == CNAME:
        target, after = _name(data, at)
        if after != end:
            raise DnsError("alias does not fill its record")
        records.append(Record(name, ttl, b"", target))
    return end


def _name(data: bytes, at: int) -> tuple[str, int]:
    """A possibly compressed name as text, and the offset behind it.

    Octets that host names do not have become \\DDD, a dot inside a label too: such a name is equal to no other.
    """
    labels: list[str] = []
    octets = 1
    pointers = 0
    end = 0  # behind the name where it stands; 0 until a pointer was followed
    size = len(data)
    floor = at  # a pointer must point before the part of the name that it ends
    while True:
        if at >= size:
            raise DnsError("name runs out of the message")
        length = data[at]
        if length >= 0xC0:
            if at + 2 > size:
                raise DnsError("truncated pointer")
            target = (length & 0x3F) << 8 | data[at + 1]
            if target >= floor or target < _HEADER.size:
                raise DnsError("pointer that does not point back")
            pointers += 1
            if pointers > _LIMIT_POINTERS:
                raise DnsError("name of too many pieces")
            end = end or at + 2
            at = floor = target
            continue
        if length >= 0x40:
            raise DnsError("label of an unknown kind")
        at += 1
        if not length:
            return ".".join(labels).lower(), end or at
        label = data[at : at + length]
        if len(label) != length:
            raise DnsError("label runs out of the message")
        octets += length + 1
        if octets > _LIMIT_NAME:
            raise DnsError("name longer than 255 octets")
        labels.append(label.decode("ascii") if _PLAIN.fullmatch(label) else _escaped(label))
        at += length


def _escaped(label: bytes) -> str:
    return "".join(chr(c) if _PLAIN.fullmatch(bytes((c,))) else f"\\{c:03}" for c in label)


def bindings(message: Message) -> Iterator[Binding]:
    """What a response says about its question: every name of the alias chain has the addresses at its end.

    A name's time to live is the shortest on the way from it to the address. Records off the chain count for nothing.
    """
    if not message.response or message.truncated or message.code:
        return
    aliases: dict[str, tuple[str, int]] = {}
    addresses: dict[str, dict[bytes, int]] = {}
    for record in message.answers:
        if record.target:
            aliases.setdefault(record.name, (record.target, record.ttl))
        elif record.address:
            known = addresses.setdefault(record.name, {})
            known[record.address] = min(record.ttl, known.get(record.address, record.ttl))
    chain = [
        (message.question.name, 1 << 31)
    ]  # name, and the time to live of the step that leads to the next
    for _ in range(LIMIT_CHAIN):
        name = chain[-1][0]
        if name not in aliases:
            break
        target, ttl = aliases[name]
        chain[-1] = (name, ttl)
        if any(target == seen for seen, _ in chain):
            return  # leads in a circle: no address
        chain.append((target, 1 << 31))
    found = list(addresses.get(chain[-1][0], {}).items())[:LIMIT_ADDRESSES]
    shortest = 1 << 31
    for name, step in reversed(chain):
        shortest = min(shortest, step)
        for address, ttl in found:
            if name:
                yield Binding(name, address, min(ttl, shortest))
