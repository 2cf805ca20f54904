"""The lab's description hangs together: addresses, trust domains, services, policies, cases."""

from __future__ import annotations

import subprocess
from ipaddress import ip_address, ip_network

import pytest

from labs.cases import CASES, Case
from labs.lab import SECTOOL, SERVICES
from labs.topology import ENFORCED, OUTSIDE, POLICIES, SHOP


def test_addresses_are_unique() -> None:
    addresses = [address for host in SHOP.hosts for address in host.addresses]
    assert len(addresses) == len(set(addresses))


def test_first_addresses_are_inside_the_enforced_network_and_second_ones_outside() -> None:
    inside = [ip_network(network) for network in ENFORCED]
    outside = [ip_network(network) for network in OUTSIDE]
    for host in SHOP.hosts:
        assert any(ip_address(host.ip4) in network for network in inside)
        assert any(ip_address(host.ip6) in network for network in inside)
        for extra in set(host.addresses) - {host.ip4, host.ip6}:
            assert any(ip_address(extra) in network for network in outside)


def test_every_trust_domain_has_a_policy_file() -> None:
    files = dict(SHOP.policies)
    for host in SHOP.hosts:
        if host.enforcer is not None:
            assert files[host.enforcer.trust_domain].is_file()


def test_services_are_known() -> None:
    assert {service for host in SHOP.hosts for service in host.services} <= set(SERVICES)


def test_an_unknown_host_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        SHOP.host("nowhere")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_speaks_of_hosts_and_rules_that_exist(case: Case) -> None:
    text = (POLICIES / "shop.yaml").read_text()
    assert SHOP.host(case.host)
    assert case.events, "a case that looks at no record proves half"
    for seen in case.events:
        assert SHOP.host(seen.host).enforcer is not None, "no enforcer there to record anything"
        assert seen.rule in text


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("name", ["shop.yaml", "freeze.yaml", "rogue.yaml"])
def test_policies_parse_and_pass_their_own_tests(name: str) -> None:
    done = subprocess.run(
        [SECTOOL, "policy", "test", str(POLICIES / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
