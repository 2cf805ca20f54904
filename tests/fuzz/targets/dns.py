"""DNS messages: `nfq.dns.parse` and `bindings`.

Any bytes raise DnsError or are a message with a bounded number of records and names of bounded length; what it binds
are addresses of 4 or 16 bytes with a time to live that fits 31 bits, at most as many as the limits say.
"""

from __future__ import annotations

from typing import Any

from scapy.layers.dns import DNS, DNSQR, DNSRR

from nfq.dns import LIMIT_ADDRESSES, LIMIT_CHAIN, LIMIT_RECORDS, DnsError, bindings, parse


def one(data: bytes) -> None:
    """The message."""
    try:
        message = parse(data)
    except DnsError:
        return
    assert len(message.answers) <= LIMIT_RECORDS
    assert len(message.question.name) <= 4 * 255
    for record in message.answers:
        assert len(record.address) in (0, 4, 16)
        assert bool(record.address) or len(record.target) <= 4 * 255
    found = list(bindings(message))
    assert len(found) <= LIMIT_ADDRESSES * (LIMIT_CHAIN + 1)
    for binding in found:
        assert len(binding.address) in (4, 16)
        assert 0 <= binding.ttl < 1 << 31
        assert binding.name


def seeds() -> dict[str, bytes]:
    """A query, and answers with chains, addresses of both kinds, compression, a loop."""
    asked = DNSQR(qname="www.example.com", qtype="A")
    alias = DNSRR(rrname="www.example.com", type="CNAME", rdata="web.example.net", ttl=60)
    four = DNSRR(rrname="web.example.net", type="A", rdata="192.0.2.1", ttl=300)
    six = DNSRR(rrname="web.example.net", type="AAAA", rdata="2001:db8::1", ttl=300)
    back = DNSRR(rrname="web.example.net", type="CNAME", rdata="www.example.com", ttl=60)

    def answer(*records: DNSRR, **fields: Any) -> bytes:
        return bytes(DNS(id=1, qr=1, qd=[asked], an=list(records), **fields))

    loop = bytes.fromhex("000181800001000000000000") + b"\xc0\x0c\0\1\0\1"
    packed = (
        answer(alias)[:12] + b"\3www\7example\3com\0\0\1\0\1" + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\1"
    )
    return {
        "query": bytes(DNS(id=1, qd=[asked])),
        "chain": answer(alias, four, six),
        "circle": answer(alias, back),
        "truncated": answer(alias, tc=1),
        "nxdomain": answer(rcode=3),
        "loop": loop,
        "packed": packed,
        "many": answer(*[four] * 70),
    }
