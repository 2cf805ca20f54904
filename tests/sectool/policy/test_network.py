"""CIDRs, and the table against the plain reading of the same networks."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.policy.network import IPAddress, IPNetwork, NetworkSpec, NetworkTable, parse_cidr


@pytest.mark.parametrize(
    "text", ["0.0.0.0/0", "10.0.0.0/8", "192.0.2.1/32", "::/0", "fd00::/8", "2001:db8::1/128"]
)
def test_cidr(text: str) -> None:
    assert str(parse_cidr(text)) == text


@given(st.text(max_size=20) | st.text("0123456789./:af%", max_size=20))
def test_any_text_is_a_cidr_or_a_value_error(text: str) -> None:
    try:
        network = parse_cidr(text)
    except ValueError as error:
        assert "; " in str(error) or "zone" in str(error)
        return
    assert parse_cidr(str(network)) == network


def _net(base: int, length: int) -> IPNetwork:
    return ipaddress.ip_network((base, length), strict=False)


# Few bits in play, so that networks nest and touch.
_four = st.builds(lambda a, n: _net(a << 20, n), st.integers(0, 4095), st.sampled_from([0, 1, 8, 11, 12, 32]))
_six = st.builds(
    lambda a, n: _net(1 << 127 | a << 100, n), st.integers(0, 255), st.sampled_from([0, 1, 20, 28, 128])
)
_networks = st.lists(_four | _six, max_size=3).map(tuple)
_addresses: st.SearchStrategy[IPAddress] = st.one_of(
    st.integers(0, 4095).map(lambda a: ipaddress.IPv4Address(a << 20)),
    st.integers(0, 255).map(lambda a: ipaddress.IPv6Address(1 << 127 | a << 100)),
    st.integers(0, 2**32 - 1).map(ipaddress.IPv6Address),
)


@settings(max_examples=300)
@given(st.lists(st.builds(NetworkSpec, _networks, _networks), max_size=5), st.lists(_addresses, max_size=10))
def test_the_table_reads_networks_as_they_are_written(
    specs: list[NetworkSpec], addresses: list[IPAddress]
) -> None:
    table = NetworkTable(specs, memory=3)
    for address in addresses * 2:
        assert table.find(address) == {n for n, spec in enumerate(specs) if spec.contains(address)}


def test_mapped_addresses_count_as_what_they_are() -> None:
    table = NetworkTable([NetworkSpec((parse_cidr("10.0.0.0/8"),)), NetworkSpec((parse_cidr("::/0"),))])
    assert table.find(ipaddress.ip_address("::ffff:10.0.0.1")) == {0}
    assert table.find(ipaddress.ip_address("10.0.0.1")) == {0}
    assert table.find(ipaddress.ip_address("::a00:1")) == {1}


def test_equal_answers_are_one_object() -> None:
    table = NetworkTable([NetworkSpec((parse_cidr("10.0.0.0/8"),))])
    one, two = (table.find(ipaddress.ip_address(a)) for a in ("10.0.0.1", "10.0.0.2"))
    assert one is two
