"""Written flows."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.errors import DocumentError, UsageError
from sectool.labels import LabelSet
from sectool.policy import Party, Request, parse_flow
from sectool.policy.flow import sample
from sectool.policy.network import NetworkSpec, parse_cidr

WEB, DB = Party(LabelSet({"app": "web"})), Party(LabelSet({"app": "db"}))


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("app=web -> app=db tcp/5432", Request(WEB, DB, 6, 5432, 0, True)),
        ("app=web->app=db tcp/5432", Request(WEB, DB, 6, 5432, 0, True)),
        ("app=web -> app=db icmp/3/1", Request(WEB, DB, 1, 3, 1, True)),
        ("app=web -> app=db icmp6/echo-request", Request(WEB, DB, 58, 128, 0, True)),
        (
            "app=web -> ip:192.0.2.1 tcp/1",
            Request(WEB, Party(address=ipaddress.ip_address("192.0.2.1")), 6, 1),
        ),
        ("ip:::1 -> app=web tcp/1", Request(Party(address=ipaddress.ip_address("::1")), WEB, 6, 1)),
        (
            "app=web,ip:10.0.0.1 -> fqdn:A.example tcp/1",
            Request(
                Party(LabelSet({"app": "web"}), None, ipaddress.ip_address("10.0.0.1")),
                Party(names=frozenset({"a.example"})),
                6,
                1,
            ),
        ),
        (
            "net:10.0.0.0/8 -> app=db udp/53",
            Request(Party(address=ipaddress.ip_address("10.0.0.1")), DB, 17, 53),
        ),
        ('app="" -> app=db tcp/1', Request(Party(LabelSet({"app": ""})), DB, 6, 1, 0, True)),
    ],
)
def test_flows(text: str, request_: Request) -> None:
    flow = parse_flow(text)
    assert flow.request() == request_
    assert parse_flow(str(flow)) == flow


def test_encrypted_and_named_networks() -> None:
    assert parse_flow("app=web -> app=db tcp/1 encrypted").encrypted
    spec = NetworkSpec((parse_cidr("10.0.0.0/8"),), (parse_cidr("10.0.0.0/9"),))
    assert parse_flow("net:lan -> app=db tcp/1").request({"lan": spec}).source == Party(
        address=ipaddress.ip_address("10.128.0.0")
    )
    with pytest.raises(UsageError, match="no Network 'lan'"):
        parse_flow("net:lan -> app=db tcp/1").request()
    with pytest.raises(UsageError, match="excludes every address"):
        parse_flow("net:lan -> app=db tcp/1").request({"lan": NetworkSpec(spec.cidrs, spec.cidrs)})


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        ("", 1, "needs '->'", "app=web -> app=db"),
        ("app=web", 8, "needs '->'", ""),
        ("app=web; x", 8, "';' cannot stand here", ""),
        ("-> app=db tcp/1", 1, "expected the calling side", "ip:ADDRESS"),
        ("app=web ->", 11, "expected the called side", ""),
        ("app=web -> app=db", 18, "expected a service", "tcp/5432"),
        ("app=web x -> app=db tcp/1", 9, "expected '->', found 'x'", ""),
        ("app=web -> app=db tcp", 19, "one service", "tcp/443"),
        ("app=web -> app=db icmp", 19, "one service", "icmp/echo-request"),
        ("app=web -> app=db tcp/1-3", 19, "one service", "tcp/1"),
        ("app=web -> app=db tcp/1,tcp/2", 24, "expected 'encrypted' or the end", ""),
        (
            "app=web -> app=db tcp/1 encryptd",
            25,
            "expected 'encrypted' or the end",
            "did you mean 'encrypted'?",
        ),
        ("app=web -> app=db tcp/1 encrypted x", 35, "expected the end", ""),
        ("any -> app=db tcp/1", 1, "'any' does not describe", "definite ends"),
        ("app -> app=db tcp/1", 1, "'app' does not describe", "app=VALUE"),
        ('app "=" web -> app=db tcp/1', 1, "'app' does not describe", "app=VALUE"),
        ("app= -> app=db tcp/1", 6, "expected a value", ""),
        ("app=a,app=b -> app=db tcp/1", 7, "given twice", ""),
        ("app=a- -> app=db tcp/1", 5, "value 'a-'", ""),
        ("-a=b -> app=db tcp/1", 1, "label key '-a'", ""),
        ("ip:x -> app=db tcp/1", 4, "'x' is not an IP address", "ip:10.0.0.7"),
        ("ip:10.0.0.0/8 -> app=db tcp/1", 4, "not an IP address", "net:10.0.0.0/8"),
        ("ip:::1,net:x -> app=db tcp/1", 8, "a second address", ""),
        ("fqdn:*.a -> app=db tcp/1", 1, "one definite host name", ""),
        ("fqdn:a,fqdn:b -> app=db tcp/1", 8, "one definite host name", ""),
        ("net:10.0.0.1/8 -> app=db tcp/1", 5, "bits set", ""),
        (",".join(f"k{i}=v" for i in range(65)) + " -> app=db tcp/1", 1, "at most 64", ""),
    ],
)
def test_refusals(text: str, column: int, message: str, hint: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_flow(text, "f")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.where == f"f:1:{column}"


@settings(max_examples=300)
@given(
    st.text(max_size=30)
    | st.lists(
        st.sampled_from(
            [
                "app=web",
                "->",
                " -> ",
                "tcp/1",
                "ip:::1",
                "net:x",
                "fqdn:a",
                ",",
                " ",
                "=",
                '"',
                "encrypted",
                "any",
            ]
        ),
        max_size=12,
    ).map("".join)
)
def test_any_text_is_a_flow_or_a_document_error(text: str) -> None:
    try:
        flow = parse_flow(text)
    except DocumentError:
        return
    assert parse_flow(str(flow)) == flow


_small = st.builds(
    lambda a, n: ipaddress.ip_network((0x0A000000 | a, n), strict=False),
    st.integers(0, 15),
    st.integers(28, 32),
)


@settings(max_examples=300)
@given(st.lists(_small, min_size=1, max_size=3).map(tuple), st.lists(_small, max_size=4).map(tuple))
def test_a_sample_is_found_exactly_when_there_is_an_address(
    cidrs: tuple[ipaddress.IPv4Network, ...], excepts: tuple[ipaddress.IPv4Network, ...]
) -> None:
    spec = NetworkSpec(cidrs, excepts)
    there = [a for net in cidrs for a in net if spec.contains(a)]
    found = sample(spec)
    assert (found in there) if there else found is None
