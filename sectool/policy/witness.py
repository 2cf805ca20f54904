"""An example of a set of flows: a request that the engine can be asked about, and its text.

Sets are exact, so an example is found whenever there is one, but for `where` comparisons with an order or between the
two sides: those are satisfied by trying values near what they name. No example then means 'none was found'.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, product
from typing import Final

from sectool.labels import LabelError, LabelSet, check_label
from sectool.policy.algebra import ADDRESSES, SIX, Parties, Proof, Region
from sectool.policy.condition import DAY, SECOND, Condition, LabelRef, Quantity, quantity
from sectool.policy.flow import FlowSpec, PartySpec
from sectool.policy.network import IPAddress
from sectool.policy.request import Party, Request
from sectool.policy.service import ICMP, ICMP6, PROTOCOL_NAMES, TCP, UDP, Service
from sectool.policy.valuesets import ALL_VALUES, Ranges, Values, both

MAX_TRIES: Final = 4096
_PLAIN: Final = ipaddress.IPv4Address("192.0.2.1")  # RFC 5737: nobody's


@dataclass(frozen=True, slots=True)
class Witness:
    """A flow of a region: as a question, and as people write it."""

    request: Request
    region: Region

    @property
    def text(self) -> str:
        """The flow as the language writes it."""
        return written(self.request, self.region)


def witness(
    region: Region, now_us: int, *, elsewhere: IPAddress = _PLAIN, strangers: bool = False
) -> Witness | None:
    """A flow of the region, at a moment (UTC microseconds); None when none was found.

    A party whose address does not matter gets `elsewhere`; `strangers` prefers parties without identity, where either
    will do.
    """
    try:
        chosen = _labels(region, now_us, strangers)
    except LabelError:  # more labels than a workload can have
        return None
    if chosen is None:
        return None
    source = _party(region.source, chosen[0], elsewhere)
    destination = _party(region.destination, chosen[1], elsewhere)
    service = _service(region.services)
    if service is None:
        return None
    protocol, port, code = service
    request = Request(
        source,
        destination,
        protocol,
        port,
        code,
        source.labels is not None and destination.labels is not None,
    )
    return Witness(request, region)


def written(request: Request, region: Region | None = None) -> str:
    """A request as the language writes flows. Addresses that do not matter to `region` are left out."""
    source = _spec(request.source, region.source if region else None)
    destination = _spec(request.destination, region.destination if region else None)
    if request.protocol not in PROTOCOL_NAMES:
        return f"{source} -> {destination} protocol {request.protocol}"
    icmp = request.protocol in (ICMP, ICMP6)
    service = Service(request.protocol, request.port, request.port, request.icmp_code if icmp else None)
    return str(FlowSpec(source, destination, service))


def _spec(party: Party, parties: Parties | None) -> PartySpec:
    needless = parties is not None and parties.addresses == ADDRESSES and (party.labels or party.names)
    return PartySpec(
        party.labels or None,
        None,
        None if needless else party.address,
        ",fqdn:".join(sorted(party.names)),
    )


@lru_cache(maxsize=8192)  # by the very object: rules share the sets of selectors they share
def _party(parties: Parties, labels: LabelSet | None, elsewhere: IPAddress) -> Party:
    return Party(labels, None, address_in(parties.addresses, elsewhere), _names(parties))


@lru_cache(maxsize=4096)
def address_in(addresses: Ranges, wanted: IPAddress = _PLAIN) -> IPAddress:
    """An address of a set that is not empty: `wanted` if it is in it, else one that looks like a host's."""
    number = int(wanted) + (SIX if wanted.version == 6 else 0)
    if any(low <= number <= high for low, high in addresses):
        return wanted
    low, high = addresses[0]
    if low < high:
        low += 1  # a network's own address is the example of nobody
    return ipaddress.IPv6Address(low - SIX) if low >= SIX else ipaddress.IPv4Address(low)


def _names(parties: Parties) -> frozenset[str]:
    """As few names as match all patterns, and none that must not be."""
    out = {pattern.name for pattern in parties.named if not pattern.wildcard}
    # The longer the pattern, the more of the others its name matches.
    for pattern in sorted((p for p in parties.named if p.wildcard), key=lambda p: -len(p.name)):
        if pattern.matches(frozenset(out)):
            continue
        words = ("host", "www", "api", *(f"h{n}" for n in range(len(parties.unnamed) + 1)))
        names = (f"{word}.{pattern.name}" for word in words)
        out.add(
            next(
                name
                for name in names
                if not any(unwanted.matches(frozenset((name,))) for unwanted in parties.unnamed)
            )
        )
    return frozenset(out)


def _service(services: Ranges) -> tuple[int, int, int] | None:
    """(protocol, port or ICMP type, ICMP code): a TCP port if there is one, then UDP, ICMP, any protocol."""
    tcp = both(services, ((TCP << 16 | 1, TCP << 16 | 0xFFFF),))
    if tcp:
        low, high = tcp[0]
        return TCP, (443 if low & 0xFFFF <= 443 <= high & 0xFFFF else low & 0xFFFF), 0
    udp = both(services, ((UDP << 16 | 1, UDP << 16 | 0xFFFF),))
    if udp:
        return UDP, udp[0][0] & 0xFFFF, 0
    for low, _ in services:
        protocol, rest = low >> 16, low & 0xFFFF
        if protocol in (ICMP, ICMP6):
            return protocol, rest >> 8, rest & 0xFF
        return protocol, rest, 0
    return None


_Labels = tuple[LabelSet | None, LabelSet | None]


def _labels(region: Region, now_us: int, strangers: bool) -> _Labels | None:
    """Labels (None: no identity) for both sides that satisfy all conditions."""
    if not region.conditions:
        return (
            _plain_labels(region.source, strangers),
            _plain_labels(region.destination, strangers),
        )
    open_keys: dict[tuple[str, str], list[str | None]] = {}
    for condition in region.conditions:
        for ref in (condition.left, condition.right):
            if isinstance(ref, LabelRef):
                open_keys[ref.side, ref.key] = []
    for (side, key), out in open_keys.items():
        out.extend(_candidates(region, side, key, now_us))
    names = list(open_keys)
    bases = {
        "source": _base(region.source, {k for s, k in names if s == "source"}),
        "destination": _base(region.destination, {k for s, k in names if s == "destination"}),
    }
    for values in islice(product(*open_keys.values()), MAX_TRIES):
        labels = {side: dict(base) for side, base in bases.items()}
        for (side, key), value in zip(names, values, strict=True):
            if value is not None:
                labels[side][key] = value
        if all(c.holds(labels["source"], labels["destination"], now_us)[0] for c in region.conditions):
            # A side that no condition looks at may be a stranger.
            return (
                _given(region.source, labels["source"]),
                _given(region.destination, labels["destination"]),
            )
    return None


def _given(parties: Parties, labels: dict[str, str]) -> LabelSet | None:
    return LabelSet(labels or _some_label(parties)) if parties.proof is Proof.PROVEN else None


def _some_label(parties: Parties) -> dict[str, str]:
    """A label for a workload that needs none, so that it can be written down."""
    return next(
        (
            {key: "other"}
            for key in ("app", "name", "x")
            if parties.labels.get(key, ALL_VALUES).holds("other")
        ),
        {},
    )


@lru_cache(maxsize=8192)
def _plain_labels(parties: Parties, strangers: bool) -> LabelSet | None:
    if parties.proof is Proof.NONE or (strangers and parties.proof is Proof.EITHER):
        return None
    if parties.proof is Proof.EITHER and (parties.named or parties.addresses != ADDRESSES):
        return None  # who is named by an address or a host name has no enforcer, as a rule
    return LabelSet(_base(parties, set()) or _some_label(parties))


def _base(parties: Parties, without: set[str]) -> dict[str, str]:
    """The least labels that satisfy the bounds, keys of `without` left open."""
    out: dict[str, str] = {}
    for key, values in parties.labels.items():
        if key not in without and not values.absent:
            value = values.some()
            if value is not None:
                out[key] = value
    return out


def _candidates(region: Region, side: str, key: str, now_us: int) -> Iterable[str | None]:
    """Values of a label worth trying: near what conditions name, and what the bounds ask for."""
    bounds = _bounds(region, side, key)
    wanted: dict[str | None, None] = {}
    for condition in region.conditions:
        wanted.update(dict.fromkeys(_named(condition, side, key, region, now_us)))
    first = bounds.some()
    wanted[first] = None
    wanted[None] = None
    if first is not None:
        for other in bounds.minus(Values(True, frozenset((first,)))):
            wanted[other.some()] = None
    if bounds.only is not None:
        wanted.update(dict.fromkeys(sorted(bounds.only)[:16]))
    return [v for v in wanted if bounds.holds(v) and (v is None or _fits(key, v))]


def _bounds(region: Region, side: str, key: str) -> Values:
    parties = region.source if side == "source" else region.destination
    return parties.labels.get(key, ALL_VALUES)


def _named(condition: Condition, side: str, key: str, region: Region, now_us: int) -> Iterable[str | None]:
    here = LabelRef(side, key)
    if here not in (condition.left, condition.right):
        return []
    other = condition.right if condition.left == here else condition.left
    if isinstance(other, str):
        return _near(other, now_us)
    their = _bounds(region, other.side, other.key)
    common = _bounds(region, side, key).meet(their)
    near: list[str | None] = [common.some()]
    for value in sorted(their.only or ())[:8]:
        near += [value, *_near(value, now_us)]
    return [*near, "1", "2", "1d", "2d", "2026-01-01", "2026-01-02"]


def _near(text: str, now_us: int) -> list[str | None]:
    """A quantity, and what is a little less and more."""
    found = quantity(text)
    if found is None:
        return [text]
    return [text, *(spelled for step in (1, -1) for spelled in _stepped(found, step, now_us))]


def _stepped(amount: Quantity, step: int, now_us: int) -> list[str]:
    number = int(amount.amount)
    if amount.kind == "number":
        return [str(number + step)] if number + step >= 0 else []
    if amount.kind == "duration":
        seconds = number // SECOND + step
        date = _date(now_us - number - step * DAY)
        return [*([f"{seconds}s"] if 0 <= seconds < 10**9 else []), *([date] if date else [])]
    date = _date(number + step * DAY)
    return [date] if date else []


def _date(us: int) -> str:
    from datetime import UTC, datetime, timedelta

    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)).strftime("%Y-%m-%d")
    except OverflowError:
        return ""


def _fits(key: str, value: str) -> bool:
    try:
        check_label(key, value)
    except LabelError:
        return False
    return True


__all__ = ["Witness", "address_in", "witness", "written"]
