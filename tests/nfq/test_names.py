"""nfq.names and nfq.namefile: only answers to questions of this host count, for their time, within bounds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.dns import DNS, DNSQR, DNSRR

from nfq import names
from nfq.namefile import Entry, NameFile
from nfq.names import GRACE_S, MAX_TTL_S, MIN_TTL_S, SLOTS, TOTAL, Follower, NameTable, Purse
from sectool.clock import SECOND
from sectool.policy import Engine, parse

NOW = 1_790_000_000_000_000
HOST, RESOLVER = IPv4Address("10.0.0.1").packed, IPv4Address("10.0.0.53").packed
POLICY = """
kind: Policy
name: out
owner: team
rules:
  - allow app=web to call fqdn:api.example.com on tcp/443
  - allow app=web to call fqdn:*.wild.example on tcp/443
"""


def key(port: int = 40_000, resolver: bytes = RESOLVER, remote_port: int = 53) -> bytes:
    return HOST + resolver + port.to_bytes(2, "big") + remote_port.to_bytes(2, "big")


def packed(address: str) -> bytes:
    return IPv4Address(address).packed


class Client:
    """A host that asks, and the resolver that answers it."""

    def __init__(self, table: NameTable | None = None) -> None:
        self.table = table or NameTable()
        self.table.watch(Engine(parse(POLICY)))
        self.now_us = NOW
        self.number = 0

    def ask(self, name: str, flow: bytes = b"") -> int:
        self.number += 1
        query = DNS(id=self.number & 0xFFFF, rd=1, qd=[DNSQR(qname=name)])
        self.table.datagram(bytes(query), True, flow or key(), self.now_us)
        return self.number & 0xFFFF

    def answer(self, number: int, name: str, *records: DNSRR, flow: bytes = b"") -> None:
        message = DNS(id=number, qr=1, ra=1, qd=[DNSQR(qname=name)], an=list(records))
        self.table.datagram(bytes(message), False, flow or key(), self.now_us)

    def learn(self, name: str, *addresses: str, ttl: int = 60, alias: str = "") -> None:
        end = alias or name
        records = [DNSRR(rrname=end, type="A", rdata=address, ttl=ttl) for address in addresses]
        if alias:
            records.insert(0, DNSRR(rrname=name, type="CNAME", rdata=alias, ttl=ttl))
        self.answer(self.ask(name), name, *records)

    def names(self, address: str) -> set[str]:
        return set(self.table.names_of(packed(address), self.now_us))

    def after(self, seconds: float) -> None:
        self.now_us += int(seconds * SECOND)


@pytest.fixture
def client() -> Client:
    return Client()


def record(name: str = "api.example.com", address: str = "192.0.2.1", ttl: int = 60) -> DNSRR:
    return DNSRR(rrname=name, type="A", rdata=address, ttl=ttl)


def test_an_answer_gives_all_names_of_the_chain(client: Client) -> None:
    client.learn("api.example.com", "192.0.2.1", "192.0.2.2", alias="edge.cdn.example")
    for address in ("192.0.2.1", "192.0.2.2"):
        assert client.names(address) == {"api.example.com", "edge.cdn.example"}
    assert client.names("192.0.2.3") == set()


def test_the_case_of_the_question_does_not_matter(client: Client) -> None:
    client.answer(client.ask("aPI.exAMple.cOM"), "api.EXAMPLE.com", record())
    assert client.names("192.0.2.1") == {"api.example.com"}


@pytest.mark.parametrize("ttl, lasts", [(60, 60), (0, MIN_TTL_S), (1 << 30, MAX_TTL_S)])
def test_a_name_lasts_its_time_and_a_little_more(client: Client, ttl: int, lasts: int) -> None:
    client.learn("api.example.com", "192.0.2.1", ttl=ttl)
    client.after(lasts + GRACE_S - 1)
    assert client.names("192.0.2.1") == {"api.example.com"}
    client.after(2)
    assert client.names("192.0.2.1") == set()
    assert client.table.remembered(packed("192.0.2.1")) == {"api.example.com"}


def test_a_shorter_answer_does_not_take_time_away(client: Client) -> None:
    client.learn("api.example.com", "192.0.2.1", ttl=600)
    client.learn("api.example.com", "192.0.2.1", ttl=5)
    client.after(500)
    assert client.names("192.0.2.1") == {"api.example.com"}


def test_what_nobody_asked_for_is_not_believed(client: Client) -> None:
    client.answer(7, "api.example.com", record())
    number = client.ask("api.example.com")
    client.answer(number + 1, "api.example.com", record())  # another id
    client.answer(number, "other.example.com", record("other.example.com"))  # another question
    client.answer(number, "api.example.com", record(), flow=key(40_001))  # another port
    client.answer(number, "api.example.com", record(), flow=key(resolver=packed("10.0.0.66")))
    client.answer(number, "api.example.com", record(), flow=key(remote_port=5353))
    assert client.names("192.0.2.1") == set()
    assert client.table.refused == 5  # what does not come from port 53 is not looked at
    client.answer(number, "api.example.com", record())
    assert client.names("192.0.2.1") == {"api.example.com"}


def test_a_question_is_answered_once(client: Client) -> None:
    number = client.ask("api.example.com")
    client.answer(number, "api.example.com", record())
    client.answer(number, "api.example.com", record(address="192.0.2.66"))
    assert client.names("192.0.2.66") == set()


def test_an_answer_long_after_the_question_is_not_believed(client: Client) -> None:
    number = client.ask("api.example.com")
    client.after(31)
    client.answer(number, "api.example.com", record())
    assert client.names("192.0.2.1") == set()


def test_a_question_from_outside_is_none_of_ours(client: Client) -> None:
    query = bytes(DNS(id=9, qd=[DNSQR(qname="api.example.com")]))
    client.table.datagram(query, False, key(), NOW)
    client.answer(9, "api.example.com", record())
    assert client.names("192.0.2.1") == set()


def test_only_trusted_resolvers_count(client: Client) -> None:
    client.table.trust([ip_network("10.0.0.53/32")])
    evil = key(resolver=packed("203.0.113.1"))
    client.answer(client.ask("api.example.com", evil), "api.example.com", record(), flow=evil)
    assert client.names("192.0.2.1") == set()
    client.learn("api.example.com", "192.0.2.1")
    assert client.names("192.0.2.1") == {"api.example.com"}


def test_a_flood_pushes_out_no_name_that_a_rule_spells_out(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.learn("api.example.com", "192.0.2.1", ttl=86_400)
    client.learn("a.wild.example", "192.0.2.2", ttl=86_400)
    for purse, zone in ((Purse.OTHER, "evil.example"), (Purse.BELOW, "wild.example")):
        for n in range(SLOTS[purse] + 100):
            entry = Entry(f"n{n}.{zone}", n.to_bytes(4, "big"), NOW + 10**12, RESOLVER)
            client.table._put(entry)
        if purse is Purse.OTHER:
            assert client.names("192.0.2.2") == {"a.wild.example"}
    assert client.names("192.0.2.1") == {"api.example.com"}
    assert client.names("192.0.2.2") == set()  # who may name anything below it may crowd out what is below it
    assert len(list(client.table.entries())) <= TOTAL


def test_one_address_and_one_name_have_so_many(client: Client) -> None:
    for n in range(1000):
        client.table._put(Entry(f"n{n}.evil.example", b"\1\2\3\4", NOW + 10**9 + n, RESOLVER))
        client.table._put(Entry("api.example.com", n.to_bytes(4, "big"), NOW + 10**9 + n, RESOLVER))
    assert client.names("1.2.3.4") == {f"n{n}.evil.example" for n in range(936, 1000)}
    assert sum(e.name == "api.example.com" for e in client.table.entries()) == 256
    assert client.names("0.0.3.231") == {"api.example.com"}


def test_another_policy_keeps_what_was_learnt(client: Client) -> None:
    client.learn("new.example.net", "192.0.2.9")
    client.table.watch(Engine(parse(POLICY.replace("api.example.com", "new.example.net"))))
    for n in range(SLOTS[Purse.OTHER] + 1):
        client.table._put(Entry(f"n{n}.evil.example", n.to_bytes(4, "big"), NOW + 10**12, RESOLVER))
    assert client.names("192.0.2.9") == {"new.example.net"}


def test_names_in_a_file_count_if_a_rule_speaks_of_them(client: Client) -> None:
    client.table.known_by_file(
        [
            (packed("192.0.2.7"), "api.example.com"),
            (packed("192.0.2.7"), "ads.example"),
            (packed("192.0.2.8"), "x.wild.example"),
        ]
    )
    assert client.names("192.0.2.7") == {"api.example.com"}
    assert client.names("192.0.2.8") == {"x.wild.example"}


def test_questions_waiting_are_bounded(client: Client) -> None:
    for n in range(names._ASKED_LIMIT + 10):
        client.ask(f"n{n}.example")
    assert len(client.table._asked) == names._ASKED_LIMIT


# -- the file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def path() -> Iterator[Path]:
    path = Path(f"/dev/shm/sectool-test-names-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


def test_a_successor_finds_the_names_and_the_order_in_which_they_go(path: Path) -> None:
    before = Client(NameTable(NameFile.create(path, TOTAL)))
    before.learn("api.example.com", "192.0.2.1", ttl=600)
    before.learn("x.wild.example", "192.0.2.2", ttl=600, alias="cdn.example")
    after = Client(NameTable(NameFile.create(path, TOTAL)))
    assert after.names("192.0.2.1") == {"api.example.com"}
    assert after.names("192.0.2.2") == {"x.wild.example", "cdn.example"}
    for n in range(TOTAL):
        after.table._put(Entry(f"n{n}.evil.example", n.to_bytes(4, "big"), NOW + 10**12, RESOLVER))
    assert after.names("192.0.2.1") == {"api.example.com"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_other_workers_know_at_once(path: Path) -> None:
    one, two = Client(NameTable(NameFile.create(path, TOTAL))), Client()
    file = NameFile.open(path)
    assert file is not None
    two.table.others.append(Follower(file))
    assert two.names("192.0.2.1") == set()
    one.learn("api.example.com", "192.0.2.1")
    assert two.names("192.0.2.1") == {"api.example.com"}
    for n in range(6000):  # more changes than are remembered one by one
        one.table._put(Entry(f"n{n}.evil.example", n.to_bytes(4, "big"), NOW + 10**12, RESOLVER))
    one.learn("api.example.com", "192.0.2.2")
    assert two.names("192.0.2.2") == {"api.example.com"}
    assert two.names("0.0.0.1") == set()
    assert set(two.table.others[0].shelf) == set(one.table.entries())


def test_a_file_of_another_version_is_replaced(path: Path) -> None:
    path.write_bytes(b"something else")
    file = NameFile.create(path, 8)
    assert [file.read(slot) for slot in range(8)] == [None] * 8
    assert path.stat().st_size > 1000


def test_a_torn_slot_is_empty(path: Path) -> None:
    file = NameFile.create(path, 8)
    entry = Entry("api.example.com", b"\1\2\3\4", NOW, b"")
    file.write(3, entry)
    assert file.read(3) == entry
    data = bytearray(path.read_bytes())
    at = data.index(b"api.example.com")
    data[at] ^= 1
    path.write_bytes(data)
    again = NameFile.open(path)
    assert again is not None
    assert again.read(3) is None


def test_no_file_no_reader(path: Path) -> None:
    assert NameFile.open(path) is None
    path.write_bytes(b"x" * 100)
    assert NameFile.open(path) is None


@settings(max_examples=50)
@given(st.binary(max_size=400), st.booleans(), st.binary(min_size=4, max_size=36))
def test_no_datagram_raises(payload: bytes, outbound: bool, flow: bytes) -> None:
    """Invariant: whatever arrives on whatever flow is taken or passed over."""
    NameTable().datagram(payload, outbound, flow[:-2] + b"\0\x35", NOW)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 12), st.integers(0, 100), st.booleans()), max_size=300
    )
)
def test_the_table_and_its_file_agree(steps: list[tuple[int, int, int, bool]]) -> None:
    """Invariant: after any answers and policy changes, a follower and a successor see what the table sees."""
    path = Path(f"/dev/shm/sectool-test-names-{os.getpid()}-agree")
    try:
        one = Client(NameTable(NameFile.create(path, TOTAL)))
        file = NameFile.open(path)
        assert file is not None
        follower = Follower(file)
        for name, address, until, change in steps:
            if change:
                text = POLICY.replace("api.example.com", f"n{name}.example") if until % 2 else POLICY
                one.table.watch(Engine(parse(text)))
            one.table._put(Entry(f"n{name}.example", bytes((1, 2, 3, address)), NOW + until, RESOLVER))
        follower.refresh()
        successor = NameTable(NameFile.create(path, TOTAL))
        assert set(follower.shelf) == set(one.table.entries()) == set(successor.entries())
        for last in range(13):
            raw = bytes((1, 2, 3, last))
            assert one.table.names_of(raw, NOW + 50) == successor.names_of(raw, NOW + 50)
    finally:
        path.unlink(missing_ok=True)
