"""What a rule opens: protocols with ports or ICMP messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sectool.policy.tokens import Reader, Token
from sectool.policy.yamlpos import closest

TCP: Final = 6
UDP: Final = 17
ICMP: Final = 1
ICMP6: Final = 58

PROTOCOLS: Final = {"tcp": TCP, "udp": UDP, "icmp": ICMP, "icmp6": ICMP6}
PROTOCOL_NAMES: Final = {number: name for name, number in PROTOCOLS.items()}
MAX_SERVICES: Final = 128

# name -> (type, code or None for all codes); IANA registries "ICMP Parameters" and "ICMPv6 Parameters"
ICMP_NAMES: Final[dict[str, tuple[int, int | None]]] = {
    "echo-reply": (0, None),
    "destination-unreachable": (3, None),
    "network-unreachable": (3, 0),
    "host-unreachable": (3, 1),
    "protocol-unreachable": (3, 2),
    "port-unreachable": (3, 3),
    "fragmentation-needed": (3, 4),
    "redirect": (5, None),
    "echo-request": (8, None),
    "router-advertisement": (9, None),
    "router-solicitation": (10, None),
    "time-exceeded": (11, None),
    "parameter-problem": (12, None),
    "timestamp-request": (13, None),
    "timestamp-reply": (14, None),
}
ICMP6_NAMES: Final[dict[str, tuple[int, int | None]]] = {
    "destination-unreachable": (1, None),
    "no-route": (1, 0),
    "administratively-prohibited": (1, 1),
    "address-unreachable": (1, 3),
    "port-unreachable": (1, 4),
    "packet-too-big": (2, None),
    "time-exceeded": (3, None),
    "parameter-problem": (4, None),
    "echo-request": (128, None),
    "echo-reply": (129, None),
    "mld-query": (130, None),
    "mld-report": (131, None),
    "mld-done": (132, None),
    "router-solicitation": (133, None),
    "router-advertisement": (134, None),
    "neighbour-solicitation": (135, None),
    "neighbour-advertisement": (136, None),
    "redirect": (137, None),
    "mld2-report": (143, None),
}
_NAMES: Final = {ICMP: ICMP_NAMES, ICMP6: ICMP6_NAMES}
_BY_NUMBER: Final = {p: {number: name for name, number in names.items()} for p, names in _NAMES.items()}


@dataclass(frozen=True, slots=True)
class Service:
    """Ports (or ICMP types) `low` to `high` of an IP protocol; `code` narrows one ICMP type to one code."""

    protocol: int
    low: int = 0
    high: int = 65535
    code: int | None = None

    def matches(self, protocol: int, port: int, code: int) -> bool:
        return (
            protocol == self.protocol
            and self.low <= port <= self.high
            and (self.code is None or self.code == code)
        )

    def __str__(self) -> str:
        name = PROTOCOL_NAMES[self.protocol]
        if (self.low, self.high) == (0, _most(self.protocol)):
            return name
        if self.protocol in _NAMES:
            word = _BY_NUMBER[self.protocol].get((self.low, self.code))
            return f"{name}/{word or self.low}" + (
                f"/{self.code}" if self.code is not None and not word else ""
            )
        return f"{name}/{self.low}" + (f"-{self.high}" if self.high != self.low else "")


def _most(protocol: int) -> int:
    return 255 if protocol in _NAMES else 65535


def describe(protocol: int, port: int, code: int = 0) -> str:
    """A packet's service as people write it: tcp/443, icmp/echo-request, protocol 47."""
    if protocol in _NAMES:
        words = _BY_NUMBER[protocol]
        word = words.get((port, code)) or words.get((port, None)) or f"{port}/{code}"
        return f"{PROTOCOL_NAMES[protocol]}/{word}"
    return f"{PROTOCOL_NAMES[protocol]}/{port}" if protocol in PROTOCOL_NAMES else f"protocol {protocol}"


def parse_services(reader: Reader) -> tuple[Service, ...]:
    """Read `tcp/443,udp/53`. Raises DocumentError."""
    out: list[Service] = []
    while True:
        token = reader.token
        service = parse_service(reader)
        if service in out:
            raise reader.fail(token, f"service {token} is given twice", "keep one of them")
        if len(out) == MAX_SERVICES:
            raise reader.fail(token, f"more than {MAX_SERVICES} services in one rule", "make two rules of it")
        out.append(service)
        if not reader.accept(","):
            return tuple(out)


def parse_service(reader: Reader) -> Service:
    """Read one service. Raises DocumentError."""
    token = reader.token
    if token.kind != "word":
        raise reader.unexpected("a service", hint="e.g. tcp/443, udp/53, tcp/8000-8099 or icmp/echo-request")
    name, slash, rest = token.text.partition("/")
    protocol = PROTOCOLS.get(name)
    if protocol is None:
        raise reader.fail(token, f"'{name}' is not a protocol", _protocol_hint(token.text, name))
    if not slash:
        service = Service(protocol, 0, _most(protocol))
    elif protocol in _NAMES:
        service = _icmp(reader, token, protocol, rest)
    else:
        service = _ports(reader, token, name, protocol, rest)
    reader.take()
    return service


def _protocol_hint(text: str, name: str) -> str:
    if text.isdigit():
        return f"write the protocol first: tcp/{text}"
    if name.lower() in ("icmpv6", "ipv6-icmp"):
        return "did you mean 'icmp6'?"
    return closest(name, list(PROTOCOLS)) or "the protocols are tcp, udp, icmp and icmp6"


def _ports(reader: Reader, token: Token, name: str, protocol: int, text: str) -> Service:
    low_text, dash, high_text = text.partition("-")
    inside = len(name) + 1
    low = _port(reader, token, low_text, inside)
    high = _port(reader, token, high_text, inside + len(low_text) + 1) if dash else low
    if high < low:
        raise reader.fail(token, f"port range {text} runs backwards", f"write {name}/{high}-{low}", inside)
    if dash and high == low:
        raise reader.fail(token, f"port range {text} is one port", f"write {name}/{low}", inside)
    return Service(protocol, low, high)


def _port(reader: Reader, token: Token, text: str, inside: int) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535 and text[0] != "0":
        return int(text)
    raise reader.fail(
        token, f"'{text}' is not a port", "a number from 1 to 65535, or a range as in tcp/8000-8099", inside
    )


def _icmp(reader: Reader, token: Token, protocol: int, text: str) -> Service:
    names = _NAMES[protocol]
    if text in names:
        kind, code = names[text]
        return Service(protocol, kind, kind, code)
    parts = text.split("/")
    numbers = [int(p) for p in parts if p.isascii() and p.isdigit() and len(p) <= 3 and int(p) <= 255]
    if len(numbers) == len(parts) <= 2:
        return Service(protocol, numbers[0], numbers[0], numbers[1] if len(numbers) == 2 else None)
    family = PROTOCOL_NAMES[protocol]
    raise reader.fail(
        token,
        f"'{text}' is not an {family} message",
        closest(text, list(names))
        or f"a name such as echo-request, or numbers: {family}/TYPE or {family}/TYPE/CODE",
        len(family) + 1,
    )
