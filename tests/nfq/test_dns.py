"""nfq.dns: what real resolvers send is understood, and nothing else makes it do more than raise DnsError."""

from __future__ import annotations

import contextlib
import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scapy.layers.dns import DNS, DNSQR, DNSRR

from nfq.dns import LIMIT_ADDRESSES, LIMIT_CHAIN, A, Binding, DnsError, bindings, parse


def answer(question: str, *records: DNSRR, kind: str = "A", **fields: int) -> bytes:
    """A response as scapy writes it, with some of its header's fields."""
    message = DNS(id=7, qr=1, ra=1, qd=[DNSQR(qname=question, qtype=kind)], an=list(records))
    for field, value in fields.items():
        setattr(message, field, value)
    return bytes(message)


def alias(name: str, target: str, ttl: int) -> DNSRR:
    return DNSRR(rrname=name, type="CNAME", rdata=target, ttl=ttl)


def v4(name: str, address: str, ttl: int) -> DNSRR:
    return DNSRR(rrname=name, type="A", rdata=address, ttl=ttl)


def packed(address: str) -> bytes:
    return (IPv6Address(address) if ":" in address else IPv4Address(address)).packed


def test_a_query() -> None:
    message = parse(bytes(DNS(id=99, rd=1, qd=[DNSQR(qname="Api.Example.COM.")])))
    assert (message.id, message.response, message.question) == (99, False, ("api.example.com", A))


def test_every_name_of_a_chain_has_the_addresses_at_its_end() -> None:
    message = parse(
        answer(
            "www.example.com",
            alias("www.example.com", "edge.cdn.example", 300),
            alias("edge.cdn.example", "pop7.cdn.example", 20),
            v4("pop7.cdn.example", "192.0.2.1", 60),
            v4("pop7.cdn.example", "192.0.2.2", 10),
        )
    )
    one, two = packed("192.0.2.1"), packed("192.0.2.2")
    assert set(bindings(message)) == {
        Binding("www.example.com", one, 20),
        Binding("www.example.com", two, 10),
        Binding("edge.cdn.example", one, 20),
        Binding("edge.cdn.example", two, 10),
        Binding("pop7.cdn.example", one, 60),
        Binding("pop7.cdn.example", two, 10),
    }


def test_ipv6_and_case() -> None:
    record = DNSRR(rrname="aPi.ExAmple.com", type="AAAA", rdata="2001:db8::5", ttl=30)
    message = parse(answer("API.example.com", record, kind="AAAA"))
    assert list(bindings(message)) == [Binding("api.example.com", packed("2001:db8::5"), 30)]


def test_records_nobody_asked_for_count_for_nothing() -> None:
    message = parse(
        answer("a.example", v4("bank.example", "192.0.2.9", 60), v4("a.example", "192.0.2.1", 60))
    )
    assert list(bindings(message)) == [Binding("a.example", packed("192.0.2.1"), 60)]


@pytest.mark.parametrize("fields", [{"rcode": 3}, {"tc": 1}, {"qr": 0}])
def test_what_is_no_good_answer_binds_nothing(fields: dict[str, int]) -> None:
    data = answer("a.example", v4("a.example", "192.0.2.1", 60), kind="A", **fields)
    assert list(bindings(parse(data))) == []


def test_aliases_in_a_circle_bind_nothing() -> None:
    records = (alias("a.example", "b.example", 5), alias("b.example", "a.example", 5))
    assert list(bindings(parse(answer("a.example", *records, v4("a.example", "192.0.2.1", 5))))) == []


def test_a_negative_ttl_is_none() -> None:
    message = parse(answer("a.example", v4("a.example", "192.0.2.1", 0xFFFFFFFF)))
    assert [b.ttl for b in bindings(message)] == [0]


def raw(name: bytes, rest: bytes = b"", answers: int = 0) -> bytes:
    flags = 0x8180 if answers else 0x0100
    return struct.pack(">HHHHHH", 1, flags, 1, answers, 0, 0) + name + struct.pack(">HH", 1, 1) + rest


def test_a_dot_inside_a_label_makes_no_other_name() -> None:
    assert parse(raw(b"\x0bapi.example\x03com\0")).question.name == "api\\046example.com"
    assert parse(raw(b"\x03a\\b\0")).question.name == "a\\092b"


# From offset 31 on: pointers that lead back to the question, each by way of the one before.
CHAIN = b"\xc0\x0c" + b"".join(struct.pack(">H", 0xC000 | 31 + 2 * i) for i in range(63))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0" * 11,
        b"\0" * 12,  # no question
        struct.pack(">HHHHHH", 1, 0x0100, 2, 0, 0, 0) + b"\0\0\1\0\1" * 2,  # two
        struct.pack(">HHHHHH", 1, 0x2800, 1, 0, 0, 0) + b"\0\0\1\0\1",  # an update
        raw(b"\xc0\x0c"),  # points to itself
        raw(b"\xc0\x0d\0"),  # forward
        raw(b"\x01a\xc0\x0c"),  # to the beginning of itself
        raw(b"\xc0\x02"),  # into the header
        raw(b"\x40a\0"),
        raw(b"\1a\0", b"\xc0\x0c\0\x10\0\1\0\0\0\0\0\x80" + CHAIN + b"\xc0\x9d\0", 2),  # 64 pointers
        raw((b"\x3f" + b"a" * 63) * 4 + b"\0"),  # 257 octets
        raw(b"\x05abc"),
        raw(b"\x01a\0")[:-1],
        raw(b"\x01a\0", b"\xc0\x0c\0\1\0\1\0\0\0\5\0\5\1\2\3\4\5", 1),  # five octets of address
        raw(b"\x01a\0", b"\xc0\x0c\0\5\0\1\0\0\0\5\0\3\xc0\x0c\0", 1),  # an alias and something behind it
        raw(b"\x01a\0", b"\xc0\x0c\0\1\0\1\0\0\0\5\0\x09\1\2\3\4", 1),
    ],
)
def test_malformed(message: bytes) -> None:
    with pytest.raises(DnsError):
        parse(message)


def test_pointers_that_chain_backwards_are_followed() -> None:
    records = b"\xc0\x0c\0\5\0\1\0\0\0\5\0\4\x01b\xc0\x0c" + b"\xc0\x1f\0\1\0\1\0\0\0\6\0\4\1\2\3\4"
    message = parse(raw(b"\x01a\0", records, 2))
    assert list(bindings(message)) == [Binding("b.a", b"\1\2\3\4", 6), Binding("a", b"\1\2\3\4", 5)]


@given(st.binary(max_size=600))
@example(raw(b"\x01a\0", b"\xc0\x0c" * 200, 500))
def test_nothing_but_its_error(data: bytes) -> None:
    """Invariant: any octets give a message or DnsError; a message gives at most a bounded number of bindings."""
    with contextlib.suppress(DnsError):
        assert len(list(bindings(parse(data)))) <= (LIMIT_CHAIN + 1) * LIMIT_ADDRESSES


@given(st.integers(0, 1 << 64), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8))
def test_nothing_but_its_error_near_a_true_answer(size: int, flips: list[tuple[int, int]]) -> None:
    """As above, for messages that were right before somebody changed some octets or cut them off."""
    records = [alias(f"n{i}.example", f"n{i + 1}.example", i) for i in range(5)]
    data = bytearray(answer("n0.example", *records, v4("n5.example", "192.0.2.1", 9)))
    for at, value in flips:
        data[at % len(data)] = value
    with contextlib.suppress(DnsError):
        assert (
            len(list(bindings(parse(bytes(data[: size % (len(data) + 1)])))))
            <= (LIMIT_CHAIN + 1) * LIMIT_ADDRESSES
        )
