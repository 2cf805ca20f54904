"""Two hosts of two trust domains: a partner may do what rules say of its domain, until it is trusted no more."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.clock import DAY
from sectool.events import AuthResult, DropReason, Phase, now_us
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.bundle import of_roots, parse_bundle
from sectool.identity.credential import PeerIdentity
from sectool.identity.extensions import LabelConstraints
from sectool.identity.federation import accepted_labels
from sectool.identity.trust import TrustBundle, read_root
from sectool.labels import LabelSet
from tests.kernel.conftest import make_namespace
from tests.kernel.datagrams import Echo, ask, connected
from tests.kernel.hosts import DOMAIN, SHORT_S, Host, Lan, echo, own_cgroup, port_of
from tests.kernel.wire import Wire

pytestmark = pytest.mark.kernel

PARTNER = "partner.example"
RULES = f"""
kind: Policy
name: federation
owner: team
rules:
  - allow domain={PARTNER},app=web to call app=db
  - allow app=lone to call app=db
  - allow app!=legacy to call app=cache
  - allow app=web to call domain={DOMAIN},app=db
"""
STRICT = RULES.replace(f"domain={PARTNER},app=web", "app=web")


def document(root: RootAuthority) -> bytes:
    """What the root's domain publishes."""
    pem = root.certificate.public_bytes(Encoding.PEM).decode()
    return of_roots(root.trust_domain, [read_root(pem, root.trust_domain)], 1).to_json().encode()


def also(bundle: TrustBundle, root: RootAuthority) -> TrustBundle:
    """A bundle that trusts another domain by its document, too."""
    return parse_bundle(document(root), root.trust_domain).added_to(bundle)


@pytest.fixture(scope="module")
def partners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    """Host a of partner.example (app=web) and host b of ours (app=db); nothing else runs anywhere."""
    folder, token = tmp_path_factory.mktemp("domains"), secrets.token_hex(4)
    with own_cgroup(token), ExitStack() as stack:
        a, b, between = (stack.enter_context(make_namespace(role, token)) for role in ("a", "b", "wire"))
        wire = Wire(between)
        stack.callback(wire.close)
        wire.join("a", a, 1)
        wire.join("b", b, 2)
        theirs = RootAuthority.create(folder / "theirs", PARTNER, now_us() - DAY)
        ours = RootAuthority.create(folder / "ours", DOMAIN, now_us() - DAY)
        hosts = Host(a, "a", theirs, {"app": "web"}), Host(b, "b", ours, {"app": "db"})
        for host, other in zip(hosts, (ours, theirs), strict=True):
            host.trusted = also(host.trusted, other)
            host.accepted = {other.trust_domain: accepted_labels(["app"])}
            host.start(RULES)
            stack.callback(host.close)
        for host in hosts:
            host.ready()
        yield Lan(*hosts, wire)


@pytest.fixture
def lan(partners: Lan) -> Iterator[Lan]:
    """The two, trusting each other as at the beginning."""
    trusted = [(host.trusted, host.accepted) for host in partners.hosts]
    yield partners
    for host, (bundle, accepted) in zip(partners.hosts, trusted, strict=True):
        host.trust(bundle, accepted)
        host.reset(RULES)


def refused(lan: Lan, reason: DropReason, *, uid: int = 0, listener: socket.socket | None = None) -> None:
    """A connection from a that host b denies for that reason."""
    listener = listener or lan.b.listen()
    with pytest.raises(OSError):
        lan.a.connect(lan.b.address(), port_of(listener), uid=uid, timeout_s=SHORT_S)
    lan.b.denial(port_of(listener), reason)


def cut_off(client: socket.socket) -> None:
    """Its connection goes on no more."""
    with pytest.raises(ConnectionError):
        for _ in range(2):  # the first may be on its way already
            client.sendall(b"still there?")
            assert client.recv(1) == b""
        raise AssertionError("the connection goes on")


def test_a_partner_is_let_in_by_a_rule_that_says_its_domain(lan: Lan) -> None:
    client, server = lan.establish()
    echo(client, server, b"across domains" * 1000)
    record = lan.b.event(port_of(server), phase=Phase.VERDICT)
    assert record["auth_result"] == AuthResult.PROVEN
    labels = {b["id"]: b["labels"] for b in lan.b.blobs if b["type"] == "dict.labels"}
    assert labels[record["source_labels"]] == {"app": "web", "domain": PARTNER, "federated": "true"}
    assert labels[record["destination_labels"]] == {"app": "db", "domain": DOMAIN}


def test_a_rule_without_a_domain_never_means_a_partner(lan: Lan) -> None:
    """Not app=web, although it is app=web over there; nor what a partner does not have (app!=legacy)."""
    lan.b.policy(STRICT)
    refused(lan, DropReason.DEFAULT_DENY)
    cache = lan.b.user(app="cache")
    refused(lan, DropReason.DEFAULT_DENY, listener=lan.b.listen(uid=cache))


@pytest.mark.parametrize("lie", [{"domain": DOMAIN}, {"federated": "false"}], ids=["domain", "federated"])
def test_a_partner_that_claims_to_be_ours_is_refused(
    lan: Lan, lie: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host CA permits anything, and its software lies: where a peer is from is for its verifier to say."""
    key = ec.generate_private_key(ec.SECP256R1())
    anything = LabelConstraints({"*": ("*",)}, "/host/a/")
    liar = HostAuthority(lan.a.root.issue_host(key.public_key(), "a", anything, now_us()), key)
    honest = PeerIdentity.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(HostAuthority, "_check", lambda *_: None)
    monkeypatch.setattr(
        PeerIdentity, "of", classmethod(lambda cls, name, _, *rest: honest(cls, name, {"app": "web"}, *rest))
    )
    credential = liar.issue("/host/a/wl/web", LabelSet({"app": "web", **lie}), now_us())
    refused(lan, DropReason.LABEL_NOT_PERMITTED, uid=lan.a.user(credential))


def test_labels_of_a_partner_count_only_where_they_are_accepted(lan: Lan) -> None:
    """What is taken back ends the connections that rested on it."""
    client, server = lan.establish()
    lan.b.trust(lan.b.trusted, {PARTNER: accepted_labels(["app=other"])})
    lan.b.event(port_of(server), phase=Phase.END, drop_reason=DropReason.UNTRUSTED_DOMAIN)
    cut_off(client)
    refused(lan, DropReason.DEFAULT_DENY)


def test_removing_a_domain_cuts_what_lives_and_lets_nothing_in(lan: Lan) -> None:
    client, server = lan.establish()
    lan.b.trust(lan.b.trusted.without(PARTNER))
    lan.b.event(port_of(server), phase=Phase.END, drop_reason=DropReason.UNTRUSTED_DOMAIN)
    cut_off(client)
    refused(lan, DropReason.UNTRUSTED_DOMAIN)


def test_a_root_that_leaves_takes_what_rests_on_it_and_only_that(lan: Lan, tmp_path: Path) -> None:
    """Of two that the partner's bundle has; first the one that this partner's hosts are not by."""
    other = RootAuthority.create(tmp_path / "ca", PARTNER, now_us() - DAY)
    alone = lan.b.trusted
    both = alone.with_root(PARTNER, other.certificate.public_bytes(Encoding.PEM).decode())
    lan.b.trust(both, lan.b.accepted)
    client, server = lan.establish()
    lan.b.trust(alone, lan.b.accepted)
    lan.b.status()  # it has done so
    echo(client, server, b"not by that one")
    lan.b.trust(both, lan.b.accepted)
    lan.b.trust(also(alone.without(PARTNER), other), lan.b.accepted)
    lan.b.event(port_of(server), phase=Phase.END, drop_reason=DropReason.UNTRUSTED_CHAIN)
    cut_off(client)
    refused(lan, DropReason.UNTRUSTED_CHAIN)


def test_a_root_of_our_own_that_leaves_cuts_nothing(lan: Lan, tmp_path: Path) -> None:
    """So ends a rollover: nobody depends on it any more but what has lived since before."""
    other = RootAuthority.create(tmp_path / "ca", PARTNER, now_us() - DAY)
    pem = other.certificate.public_bytes(Encoding.PEM).decode()
    client, server = lan.establish()
    lan.a.trust(lan.a.trusted.without(PARTNER).with_root(PARTNER, pem), lan.a.accepted)
    lan.a.status()
    echo(client, server, b"goes on")


def test_who_was_not_trusted_before_has_not_left(lan: Lan, tmp_path: Path) -> None:
    """Host a has its identity from a domain that only others trust: news of trust do not end its connections."""
    lan.a.trust(lan.a.trusted.without(PARTNER), lan.a.accepted)
    client, server = lan.establish()
    lan.a.trust(
        also(lan.a.trusted, RootAuthority.create(tmp_path / "ca", "third.example", now_us())), lan.a.accepted
    )
    lan.a.status()
    echo(client, server, b"goes on")


def test_datagrams_of_a_partner_go_by_the_same_rules(lan: Lan) -> None:
    server = Echo(lan.b)
    client = connected(lan.a, lan.b.address(), server.port)
    assert ask(client, b"across domains") == b"across domains"
    lan.b.event(server.port, phase=Phase.VERDICT, auth_result=AuthResult.PROVEN)
    lan.b.trust(lan.b.trusted, {PARTNER: accepted_labels(["app=other"])})
    lan.b.event(server.port, phase=Phase.END, drop_reason=DropReason.UNTRUSTED_DOMAIN)
    client.send(b"still there?")
    lan.b.denial(server.port, DropReason.NO_IDENTITY)
    connected(lan.a, lan.b.address(), server.port).send(b"and anew?")
    lan.b.denial(server.port, DropReason.DEFAULT_DENY)
    server.close()
    assert server.got == [b"across domains"]


def test_no_rule_without_a_domain_means_a_partners_datagrams(lan: Lan) -> None:
    lan.b.policy(STRICT)
    server = Echo(lan.b)
    connected(lan.a, lan.b.address(), server.port).send(b"app=web, says another domain")
    lan.b.denial(server.port, DropReason.DEFAULT_DENY)
    server.close()
    assert server.got == []


def test_a_worker_that_comes_back_does_not_bring_back_who_was_removed_meanwhile(lan: Lan) -> None:
    client, server = lan.establish()
    lan.b.status()  # it has written the flow down
    lan.b.kill()
    lan.b.trusted = lan.b.trusted.without(PARTNER)
    lan.b.restart(RULES)
    lan.b.event(port_of(server), phase=Phase.END, drop_reason=DropReason.UNTRUSTED_DOMAIN)
    cut_off(client)
