"""Filters in SQL find what a plain reading of the filter finds."""

from __future__ import annotations

import fnmatch
import ipaddress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sectool.events import Action, DropReason, Encryption
from sectool.filters import (
    Address,
    Clause,
    Field,
    Filter,
    InNetwork,
    IsEncrypted,
    IsProtocol,
    IsReason,
    IsVerdict,
    LabelMatch,
    Pattern,
    PortRange,
    Side,
    Value,
    parse_text,
)
from store.flows import list_flows

LABELS = ["", "app=web", "app=web,env=prod", "app=db,env=dev", "env=prod,team=a_b"]
NAMES = ["web", "web-2", "we%", "100%_x", "db\\1"]
ADDRESSES = ["10.0.0.1", "10.0.1.200", "192.168.7.7", "::1", "2001:db8::5", "2001:db8:1::5", "::a00:1"]
FLOWS: list[dict[str, Any]] = [
    {
        "source_ip": ADDRESSES[n % 7],
        "destination_ip": ADDRESSES[(n * 3 + 1) % 7],
        "source_port": 1000 + n,
        "destination_port": [80, 443, 0, 65535][n % 4],
        "labels": (LABELS[n % 5], LABELS[(n // 2) % 5]),
        "workload": (NAMES[n % 5], None),
        "identity": (f"spiffe://lab.example/{NAMES[n % 5]}", f"spiffe://lab.example/{NAMES[(n + 1) % 5]}"),
        "action": [Action.ALLOW, Action.DENY, Action.AUDIT][n % 3],
        "drop_reason": [0, DropReason.DEFAULT_DENY, DropReason.PEER_DENIED][n % 3],
        "peer_reason": [0, 0, DropReason.GUARDRAIL_DENY][n % 3],
        "transport": [6, 17, 1][n % 3 - 1],
        "encryption": [Encryption.NONE, Encryption.PLAIN, Encryption.ENCRYPTED][(n // 3) % 3],
    }
    for n in range(40)
]


def holds(value: Value, field: Field, flow: dict[str, Any], end: int) -> bool:
    """The filter read plainly, on the flow as it was made."""
    side = ("source", "destination")[end]
    address = ipaddress.ip_address(flow[f"{side}_ip"])
    match value:
        case LabelMatch():
            have = dict(part.split("=") for part in flow["labels"][end].split(",") if part)
            return all(key in have and wanted in (None, have[key]) for key, wanted in value.labels)
        case Pattern():
            name = flow["identity" if field is Field.IDENTITY else "workload"][end]
            pattern = value.text.replace("[", "[[]").replace("?", "[?]")
            return name is not None and fnmatch.fnmatchcase(name, pattern)
        case Address():
            return address == value.address
        case InNetwork():
            return address.version == value.network.version and address in value.network
        case PortRange():
            return bool(value.low <= flow[f"{side}_port"] <= value.high)
        case IsVerdict():
            return bool(flow["action"] == value.action)
        case IsReason():
            return value.reason in (flow["drop_reason"], flow["peer_reason"])
        case IsProtocol():
            return bool(flow["transport"] == value.number)
        case IsEncrypted():
            return (flow["encryption"] == Encryption.ENCRYPTED) is value.yes


def expected(filter_: Filter) -> list[int]:
    out = []
    for number, flow in enumerate(FLOWS):
        ends = {Side.FROM: (0,), Side.TO: (1,), Side.ANY: (0, 1)}
        if all(
            any(holds(v, c.field, flow, end) for v in c.values for end in ends[c.side]) is not c.negated
            for c in filter_.clauses
        ):
            out.append(number)
    return out


@pytest.fixture
def store(lab: Any) -> Any:
    """The flows of FLOWS, stored."""
    ring = lab.ring()
    for number, flow in enumerate(FLOWS):
        labels = [lab.labels(text) for text in flow["labels"]]
        workload = lab.workload(flow["workload"][0], labels[0])
        identities = [lab.identity(name, labels[0]) for name in flow["identity"]]
        plain = {k: v for k, v in flow.items() if k not in ("labels", "workload", "identity")}
        ring.put(
            lab.record(
                **plain,
                flow=number,
                start=lab.T0 + number,
                ip_version=ipaddress.ip_address(flow["source_ip"]).version,
                source_labels=labels[0],
                destination_labels=labels[1],
                source_workload=workload,
                source_identity=identities[0],
                destination_identity=identities[1],
            )
        )
    store = lab.inside()
    store.step()
    return store


def found(store: Any, filter_: Filter) -> list[int]:
    table = list_flows(store.catalog, filter_, last=1000).table
    return [port - 1000 for port in table["source_port"].to_pylist()]


PATTERNS = st.sampled_from(
    [*NAMES, "*", "we*", "w*2", "web", "*%*", "100%_x", "db\\*", "WEB", "a_b", "w_b"]
).map(Pattern)
VALUES: dict[Field, st.SearchStrategy[Value]] = {
    Field.LABEL: st.sampled_from(
        ["app", "app=web", "app=web,env=prod", "env", "env=", "nope", "team=a_b", "team=aXb"]
    ).map(
        lambda text: LabelMatch(
            tuple((k, v if eq else None) for k, eq, v in (part.partition("=") for part in text.split(",")))
        )
    ),
    Field.IDENTITY: PATTERNS.map(lambda p: Pattern(f"spiffe://lab.example/{p.text}")),
    Field.WORKLOAD: PATTERNS,
    Field.IP: st.sampled_from(ADDRESSES).map(lambda a: Address(ipaddress.ip_address(a))),
    Field.NET: st.tuples(st.sampled_from(ADDRESSES), st.integers(0, 128)).map(
        lambda pair: InNetwork(
            ipaddress.ip_network(
                (pair[0], min(pair[1], ipaddress.ip_address(pair[0]).max_prefixlen)), strict=False
            )
        )
    ),
    Field.PORT: st.sampled_from([(80, 80), (0, 0), (1000, 1010), (400, 500), (0, 65535), (65535, 65535)]).map(
        lambda pair: PortRange(*pair)
    ),
    Field.VERDICT: st.sampled_from(
        [IsVerdict(Action.ALLOW), IsVerdict(Action.DENY), IsVerdict(Action.ERROR)]
    ),
    Field.REASON: st.sampled_from(
        [
            IsReason(DropReason.DEFAULT_DENY),
            IsReason(DropReason.GUARDRAIL_DENY),
            IsReason(DropReason.RATE_LIMITED),
        ]
    ),
    Field.PROTOCOL: st.sampled_from([6, 17, 99]).map(IsProtocol),
    Field.ENCRYPTED: st.booleans().map(IsEncrypted),
}


@st.composite
def filters(draw: st.DrawFn) -> Filter:
    clauses = []
    for field in draw(st.lists(st.sampled_from(list(Field)), max_size=3)):
        sided = field in (Field.LABEL, Field.IDENTITY, Field.IP, Field.NET, Field.PORT, Field.WORKLOAD)
        side = draw(st.sampled_from(list(Side))) if sided else Side.ANY
        values = draw(st.lists(VALUES[field], min_size=1, max_size=2))
        clauses.append(Clause(field, side, tuple(values), draw(st.booleans())))
    return Filter(tuple(clauses))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(filter_=filters())
def test_sql_finds_what_a_plain_reading_finds(store: Any, filter_: Filter) -> None:
    assert found(store, filter_) == expected(filter_)


@pytest.mark.parametrize(
    "text",
    [
        "from-label=app=web to-port=443",
        "verdict=deny verdict=audit not net=10.0.0.0/8",
        "net=::/0",
        "net=0.0.0.0/0",
        "net=::/64",
        "reason=guardrail-deny",
        "ip=::ffff:10.0.0.1",
        "not workload=web* encrypted=yes",
        "",
    ],
)
def test_by_hand(store: Any, text: str) -> None:
    filter_ = parse_text(text)
    got = found(store, filter_)
    if "ffff" in text:
        assert got == found(store, parse_text("ip=10.0.0.1")), "an IPv4-mapped address is the IPv4 address"
    else:
        assert got == expected(filter_)


def test_values_are_never_sql(store: Any) -> None:
    for text in ("x' OR '1'='1", "'; DROP TABLE labels; --", "\\", "%", "_"):
        assert found(store, Filter((Clause(Field.WORKLOAD, Side.ANY, (Pattern(text),)),))) == []


def test_first_last_since_until(store: Any, lab: Any) -> None:
    def ports(**bounds: int) -> list[int]:
        result = list_flows(store.catalog, parse_text("verdict=deny"), **bounds)
        return [port - 1000 for port in result.table["source_port"].to_pylist()]

    denied = expected(parse_text("verdict=deny"))
    assert ports(first=3) == denied[:3]
    assert ports(last=3) == denied[-3:]
    assert ports(since=lab.T0 + 10, until=lab.T0 + 20) == [n for n in denied if 10 <= n < 20]
    assert ports(last=0) == []
    assert list_flows(store.catalog, Filter(), last=3).truncated
    assert not list_flows(store.catalog, Filter(), last=40).truncated


def test_flows_with_many_records_count_once(lab: Any) -> None:
    ring = lab.ring()
    for flow in range(5):
        for step in range(60):
            ring.put(
                lab.record(
                    flow=flow,
                    start=lab.T0 + flow,
                    phase=2 if step else 1,
                    ts=lab.T0 + 10 + step,
                    source_bytes=step,
                )
            )
    store = lab.inside()
    store.step()
    table = list_flows(store.catalog, Filter(), last=4).table
    assert table["event_start"].cast("int64").to_pylist() == [lab.T0 + n for n in range(1, 5)]
    assert set(table["source_bytes"].to_pylist()) == {59}


def test_at_a_moment(lab: Any) -> None:
    ring = lab.ring()
    for flow in range(4):
        ring.put(lab.record(flow=flow, start=lab.T0 + flow, destination_port=flow))
        end = lab.T0 + 10 * flow + 5
        ring.put(lab.record(flow=flow, start=lab.T0 + flow, phase=3, ts=end, end=end, destination_port=flow))
    store = lab.inside()
    store.step()

    def at(moment: int, text: str = "") -> list[int]:
        table = list_flows(store.catalog, parse_text(text), at=lab.T0 + moment).table
        assert all(table["open"].to_pylist())
        return list(table["destination_port"].to_pylist())

    assert at(1) == [0, 1]
    assert at(4) == [0, 1, 2, 3]
    assert at(20) == [2, 3]
    assert at(20, "to-port=3") == [3]
    assert at(40) == []
