"""A flow as a person writes it: `app=web,env=prod -> app=db,env=prod tcp/5432 encrypted`.

    flow  = party "->" party service ["encrypted"]
    party = part {"," part}
    part  = KEY=VALUE | "net:" (NAME | CIDR) | "ip:" ADDRESS | "fqdn:" NAME

A party with labels has a proven identity and an enforcer; one without is a bare network peer. `net:` stands
for one address of that network.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

from sectool.errors import UsageError
from sectool.labels import LabelError, LabelSet
from sectool.policy.network import IPAddress, NetworkSpec
from sectool.policy.request import Party, Request
from sectool.policy.selector import Cidr, Fqdn, NamedNet, parse_fqdn, parse_net
from sectool.policy.service import PROTOCOL_NAMES, Service, parse_service
from sectool.policy.tokens import Reader, Token
from sectool.policy.yamlpos import Scalar

ARROW: Final = "->"


@dataclass(frozen=True, slots=True)
class PartySpec:
    """One end of a written flow. Without labels it is a peer without identity."""

    labels: LabelSet | None = None
    place: NamedNet | Cidr | None = None
    address: IPAddress | None = None
    name: str = ""

    def resolve(self, networks: Mapping[str, NetworkSpec]) -> Party:
        """The party, with an address from its network if it names one. Raises UsageError."""
        address = self.address
        if isinstance(self.place, Cidr):
            address = sample(NetworkSpec((self.place.network,)))
        elif isinstance(self.place, NamedNet):
            spec = networks.get(self.place.name)
            if spec is None:
                raise UsageError(
                    f"there is no Network {self.place.name!r}", "define it, or give an address as ip:ADDRESS"
                )
            address = sample(spec)
            if address is None:
                raise UsageError(
                    f"Network {self.place.name!r} excludes every address it holds",
                    "give an address as ip:ADDRESS",
                )
        return Party(self.labels, None, address, frozenset({self.name}) if self.name else frozenset())

    def __str__(self) -> str:
        parts = [] if self.labels is None else [str(self.labels).replace("=,", '="",')] if self.labels else []
        if parts and parts[0].endswith("="):
            parts[0] += '""'
        if self.place:
            parts.append(str(self.place))
        if self.address is not None:
            parts.append(f"ip:{self.address}")
        if self.name:
            parts.append(f"fqdn:{self.name}")
        return ",".join(parts)


@dataclass(frozen=True, slots=True)
class FlowSpec:
    """A written flow; `encrypted` demands that the verdict demands encryption."""

    source: PartySpec
    destination: PartySpec
    service: Service
    encrypted: bool = False

    def request(self, networks: Mapping[str, NetworkSpec] | None = None) -> Request:
        """The question this flow asks. Raises UsageError for a network that is not among `networks`."""
        known = networks or {}
        both = self.source.labels is not None and self.destination.labels is not None
        return Request(
            self.source.resolve(known),
            self.destination.resolve(known),
            self.service.protocol,
            self.service.low,
            self.service.code or 0,
            both,
        )

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination} {self.service}{' encrypted' if self.encrypted else ''}"


def sample(spec: NetworkSpec) -> IPAddress | None:
    """An address inside the network and outside its exceptions: the first host of the first gap, or None.

    Only the edges of CIDRs matter, so trying the first host of each CIDR and the address after each exception
    is exhaustive.
    """
    candidates: list[IPAddress] = []
    for net in spec.cidrs:
        candidates.extend(islice(net.hosts(), 1))
        candidates.append(net.network_address)
    last = [net.broadcast_address for net in spec.excepts]
    candidates.extend(end + 1 for end in last if int(end) + 1 < 1 << end.max_prefixlen)
    return next((address for address in candidates if spec.contains(address)), None)


def parse_flow(text: str | Scalar, source: str = "<flow>") -> FlowSpec:
    """Parse a written flow. Raises DocumentError that points at the word."""
    scalar = text if isinstance(text, Scalar) else Scalar.whole(text, source)
    arrow = scalar.value.find(ARROW)
    if arrow < 0:
        Reader(scalar)  # a stray character is the better news
        raise scalar.fail(
            "a flow needs '->' between its two ends", "e.g. app=web -> app=db tcp/5432", len(scalar.value)
        )
    left = Reader(scalar, 0, arrow)
    origin = _party(left, "the calling side")
    if left.token.kind != "end":
        raise left.unexpected("'->'")
    right = Reader(scalar, arrow + len(ARROW))
    target = _party(right, "the called side")
    token = right.token
    if token.kind == "end":
        raise right.unexpected("a service", hint="e.g. tcp/5432, udp/53 or icmp/echo-request")
    service = parse_service(right)
    if service.low != service.high:
        raise right.fail(token, f"a flow has one service, {token} is several", f"e.g. {_one_of(service)}")
    encrypted = right.accept("encrypted")
    if right.token.kind != "end":
        raise right.unexpected("the end" if encrypted else "'encrypted' or the end", ["encrypted"])
    return FlowSpec(origin, target, service, encrypted)


def _one_of(service: Service) -> str:
    return (
        f"{PROTOCOL_NAMES[service.protocol]}/{service.low or (443 if service.high > 255 else 'echo-request')}"
    )


def _party(reader: Reader, what: str) -> PartySpec:
    labels: dict[str, str] = {}
    place: NamedNet | Cidr | None = None
    address: IPAddress | None = None
    name = ""
    first = reader.token
    while True:
        token = reader.token
        prefix, colon, rest = token.text.partition(":")
        if token.kind != "word":
            raise reader.unexpected(what, hint="labels (app=web), ip:ADDRESS, net:NAME or fqdn:NAME")
        if reader.following.kind == "sign" and reader.following.text in ("=", "=="):
            _label(reader, labels)
        elif colon and prefix in ("net", "ip"):
            if place is not None or address is not None:
                raise reader.fail(token, "a second address for one party", "a party has one")
            if prefix == "net":
                place = parse_net(reader, token, rest)
            else:
                address = _address(reader, token, rest)
            reader.take()
        elif colon and prefix == "fqdn":
            fqdn: Fqdn = parse_fqdn(reader, token, rest)
            if fqdn.wildcard or name:
                raise reader.fail(
                    token, "a party of a flow has one definite host name", "e.g. fqdn:api.example.com"
                )
            name = fqdn.name
            reader.take()
        else:
            raise reader.fail(token, f"{token} does not describe a party of a flow", _party_hint(token.text))
        if not reader.accept(","):
            break
    try:
        return PartySpec(LabelSet(labels) if labels else None, place, address, name)
    except LabelError as error:
        raise reader.fail(first, str(error), "leave out what no rule asks for") from None


def _party_hint(word: str) -> str:
    if word == "any":
        return "a flow has definite ends: labels (app=web), ip:ADDRESS, net:NAME or fqdn:NAME"
    return f"write {word}=VALUE, ip:ADDRESS, net:NAME or fqdn:NAME"


def _label(reader: Reader, labels: dict[str, str]) -> None:
    key = reader.take()
    reader.take()
    value = reader.token
    if value.kind not in ("word", "string"):
        raise reader.unexpected(f"a value for label '{key.text}'", hint='the empty value is written ""')
    if key.text in labels:
        raise reader.fail(key, f"label '{key.text}' is given twice", "keep one of them")
    try:
        LabelSet({key.text: value.text})
    except LabelError as error:
        wrong = value if error.args[0].startswith("value") else key
        raise reader.fail(wrong, str(error), "labels are written as in a rule: app=web") from None
    reader.take()
    labels[key.text] = value.text


def _address(reader: Reader, token: Token, text: str) -> IPAddress:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        hint = f"for a network write net:{text}" if "/" in text else "e.g. ip:10.0.0.7 or ip:fd00::7"
        raise reader.fail(token, f"{text!r} is not an IP address", hint, 3) from None
