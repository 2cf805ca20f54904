"""nfq.namesources: the host's own files, and the other workers', read when they change."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from nfq.namefile import Entry, NameFile
from nfq.names import TOTAL, NameTable
from nfq.namesources import NameSources, hosts, nameservers
from sectool.policy import Engine, parse
from tests.nfq.test_names import NOW, POLICY, RESOLVER, Client


def packed(address: str) -> bytes:
    return ip_address(address).packed


def test_hosts() -> None:
    text = """
    # 192.0.2.1 no.example
    127.0.0.1 localhost
    192.0.2.1\tAPI.example.com. api # the api
    fe80::1%eth0 link.example
    ::ffff:192.0.2.9 mapped.example
    nonsense x.example
    192.0.2.300 y.example
    2001:db8::1 bad_..name z.example
    """
    assert list(hosts(text)) == [
        (packed("127.0.0.1"), "localhost"),
        (packed("192.0.2.1"), "api.example.com"),
        (packed("192.0.2.1"), "api"),
        (packed("fe80::1"), "link.example"),
        (packed("192.0.2.9"), "mapped.example"),
        (packed("2001:db8::1"), "z.example"),
    ]


def test_nameservers() -> None:
    text = "search example.com\nnameserver 10.0.0.53\nnameserver fe80::53%eth0\n#nameserver 1.1.1.1\nnameserver x\n"
    assert list(nameservers(text)) == [ip_network("10.0.0.53/32"), ip_network("fe80::53/128")]


@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    """Invariant: no content of either file raises."""
    assert all(len(address) in (4, 16) for address, _ in hosts(text))
    assert all(network.num_addresses == 1 for network in nameservers("nameserver " + text))


def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    hosts_file, resolv = tmp_path / "hosts", tmp_path / "resolv.conf"
    client = Client()
    sources = NameSources(client.table, None, hosts_file=hosts_file, resolv_files=[resolv, tmp_path / "none"])
    client.learn("api.example.com", "192.0.2.1")
    assert client.names("192.0.2.1") == set()  # the only resolver of a host that names none is itself
    resolv.write_text("nameserver 10.0.0.53\n")
    hosts_file.write_text("192.0.2.2 api.example.com other.example\n")
    sources.refresh()
    client.learn("api.example.com", "192.0.2.1")
    assert client.names("192.0.2.1") == {"api.example.com"}
    assert client.names("192.0.2.2") == {"api.example.com"}
    client.table.watch(Engine(parse(POLICY.replace("api.example.com", "other.example"))))
    sources.refresh()
    assert client.names("192.0.2.2") == {"other.example"}
    hosts_file.unlink()
    sources.refresh()
    assert client.names("192.0.2.2") == set()


def test_resolvers_that_are_set_are_the_only_ones(tmp_path: Path) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 10.0.0.53\n")
    client = Client()
    NameSources(client.table, [ip_network("192.0.2.0/24")], hosts_file=tmp_path / "h", resolv_files=[resolv])
    client.learn("api.example.com", "192.0.2.1")
    assert client.names("192.0.2.1") == set()


def test_other_workers_come_and_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "names-worker-1"
    table = NameTable()
    sources = NameSources(table, None, [path], hosts_file=tmp_path / "h", resolv_files=[])
    address = packed("192.0.2.1")
    NameTable(NameFile.create(path, TOTAL))._put(Entry("one.example", address, NOW + 1, RESOLVER))
    assert table.names_of(address, NOW) == set()
    sources.refresh()
    assert table.names_of(address, NOW) == {"one.example"}
    path.unlink()
    NameTable(NameFile.create(path, TOTAL))._put(Entry("two.example", address, NOW + 1, RESOLVER))
    sources.refresh()
    assert table.names_of(address, NOW) == {"two.example"}
    assert len(table.others) == 1
    table.close()
