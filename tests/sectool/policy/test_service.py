"""Services: spelling, meaning, refusals."""

from __future__ import annotations

import pytest

from sectool.errors import DocumentError
from sectool.policy.service import ICMP6_NAMES, ICMP_NAMES, Service, describe, parse_services
from sectool.policy.tokens import Reader
from sectool.policy.yamlpos import Scalar


def parse(text: str) -> tuple[Service, ...]:
    reader = Reader(Scalar.whole(text, "s"))
    services = parse_services(reader)
    assert reader.token.kind == "end"
    return services


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("tcp", Service(6, 0, 65535)),
        ("tcp/443", Service(6, 443, 443)),
        ("udp/53", Service(17, 53, 53)),
        ("tcp/8000-8099", Service(6, 8000, 8099)),
        ("tcp/1-65535", Service(6, 1, 65535)),
        ("icmp", Service(1, 0, 255)),
        ("icmp/echo-request", Service(1, 8, 8)),
        ("icmp/port-unreachable", Service(1, 3, 3, 3)),
        ("icmp/42", Service(1, 42, 42)),
        ("icmp/5/1", Service(1, 5, 5, 1)),
        ("icmp6/neighbour-solicitation", Service(58, 135, 135)),
    ],
)
def test_one(text: str, service: Service) -> None:
    assert parse(text) == (service,)
    assert str(service) == text


def test_lists_and_names() -> None:
    assert parse("tcp/1, udp/2 ,icmp") == (Service(6, 1, 1), Service(17, 2, 2), Service(1, 0, 255))
    for family, names in (("icmp", ICMP_NAMES), ("icmp6", ICMP6_NAMES)):
        for name in names:
            assert str(parse(f"{family}/{name}")[0]) == f"{family}/{name}"


@pytest.mark.parametrize(
    ("service", "packet", "matches"),
    [
        ("tcp/80", (6, 80, 0), True),
        ("tcp/80", (17, 80, 0), False),
        ("tcp/80", (6, 81, 0), False),
        ("tcp/80-90", (6, 80, 0), True),
        ("tcp/80-90", (6, 90, 0), True),
        ("tcp/80-90", (6, 91, 0), False),
        ("icmp/3", (1, 3, 7), True),
        ("icmp/3/7", (1, 3, 7), True),
        ("icmp/3/7", (1, 3, 6), False),
        ("icmp", (1, 255, 255), True),
        ("icmp6", (1, 0, 0), False),
    ],
)
def test_matches(service: str, packet: tuple[int, int, int], matches: bool) -> None:
    assert parse(service)[0].matches(*packet) == matches


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        ("", 1, "expected a service", "tcp/443"),
        ("443", 1, "'443' is not a protocol", "tcp/443"),
        ("tpc/443", 1, "'tpc' is not a protocol", "did you mean 'tcp'?"),
        ("TCP/443", 1, "'TCP' is not a protocol", "did you mean 'tcp'?"),
        ("sctp9/1", 1, "is not a protocol", ""),
        ("icmpv6/1", 1, "'icmpv6'", "did you mean 'icmp6'?"),
        ("tcp/", 5, "'' is not a port", "1 to 65535"),
        ("tcp/0", 5, "'0' is not a port", ""),
        ("tcp/080", 5, "'080' is not a port", ""),
        ("tcp/65536", 5, "'65536' is not a port", ""),
        ("tcp/http", 5, "'http' is not a port", ""),
        ("tcp/1-", 7, "'' is not a port", ""),
        ("tcp/-1", 5, "'' is not a port", ""),
        ("tcp/10-70000", 8, "'70000' is not a port", ""),
        ("tcp/90-80", 5, "runs backwards", "tcp/80-90"),
        ("tcp/80-80", 5, "is one port", "tcp/80"),
        ("icmp/ping", 6, "'ping' is not an icmp message", "echo-request"),
        ("icmp/echo-reqest", 6, "is not an icmp message", "did you mean 'echo-request'?"),
        ("icmp/256", 6, "is not an icmp message", ""),
        ("icmp/1/2/3", 6, "is not an icmp message", ""),
        ("icmp6/", 7, "'' is not an icmp6 message", ""),
        ("tcp/1,", 7, "expected a service", ""),
        ("tcp/1,tcp/1", 7, "given twice", ""),
        ("tcp/1,6", 7, "'6' is not a protocol", ""),
        (",".join(f"tcp/{i}" for i in range(1, 130)), 917, "more than 128", ""),
    ],
)
def test_refusals(text: str, column: int, message: str, hint: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(text)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.where == f"s:1:{column}"


@pytest.mark.parametrize(
    ("packet", "text"),
    [
        ((6, 443, 0), "tcp/443"),
        ((1, 8, 0), "icmp/echo-request"),
        ((1, 3, 3), "icmp/port-unreachable"),
        ((1, 3, 9), "icmp/destination-unreachable"),
        ((58, 200, 1), "icmp6/200/1"),
        ((47, 0, 0), "protocol 47"),
    ],
)
def test_describe(packet: tuple[int, int, int], text: str) -> None:
    assert describe(*packet) == text
