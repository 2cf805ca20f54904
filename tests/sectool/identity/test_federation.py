"""Relationships with other trust domains: kept, renewed, refused; and what a verifier makes of their peers."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import DropReason
from sectool.identity.authority import HostAuthority
from sectool.identity.bundle import SpiffeBundle, of_roots
from sectool.identity.extensions import encode_labels
from sectool.identity.federation import (
    Federation,
    Profile,
    Relationship,
    Source,
    accepted_labels,
    from_wire,
    to_wire,
)
from sectool.identity.trust import TrustBundle, read_root
from sectool.identity.verify import PathRule, Verifier, path_labels
from sectool.labels import LabelSet

from .conftest import DOMAIN, NOW, Forge

OURS = "ours.example"


def bundle(sequence: int | None = 1, forge: Forge | None = None) -> SpiffeBundle:
    root = (forge or Forge()).root.public_bytes(Encoding.PEM).decode()
    made = of_roots(DOMAIN, [read_root(root, DOMAIN)], sequence or 0)
    return made if sequence is not None else SpiffeBundle(DOMAIN, made.roots)


def relationship(**over: object) -> Relationship:
    values = {"bundle": bundle(), "source": Source(Profile.FILE), "accept": accepted_labels(["app"]), **over}
    return Relationship(added_us=1, fetched_us=2, checked_us=3, **values)  # type: ignore[arg-type]


def test_a_relationship_survives_its_file(tmp_path: Path) -> None:
    made = relationship(
        source=Source(Profile.HTTPS_SPIFFE, "https://p.example:8443/x", f"spiffe://{DOMAIN}/host/a/e"),
        error="no answer",
    )
    federation = Federation(tmp_path / "trust", OURS)
    federation.put(made)
    again = Federation(tmp_path / "trust", OURS)
    assert again.get(DOMAIN).to_json() == made.to_json()
    assert again.accepted[DOMAIN].permits("app", "anything")
    assert again.added_to(TrustBundle()).trust_domains == (DOMAIN,)
    assert from_wire(to_wire(again.accepted)) == again.accepted
    again.remove(DOMAIN)
    assert Federation(tmp_path / "trust", OURS).known == {}


def test_our_own_domain_is_no_partner(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="own trust domain"):
        Federation(tmp_path, DOMAIN).put(relationship())
    Federation(tmp_path, OURS).put(relationship())
    with pytest.raises(SectoolError, match="relationship with"):
        Federation(tmp_path, DOMAIN)
    with pytest.raises(UsageError, match="no relationship"):
        Federation(tmp_path, OURS).remove("unknown.example")


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"version": 2}', b"[1]", b"\xff"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / f"{DOMAIN}.json").write_bytes(damage)
    with pytest.raises(SectoolError, match=DOMAIN):
        Federation(tmp_path, OURS)


def test_a_bundle_never_goes_back() -> None:
    known = relationship(bundle=bundle(5))
    newer = known.with_bundle(bundle(6), NOW)
    assert (newer.bundle.sequence, newer.fetched_us, newer.error) == (6, NOW, "")
    for old in (bundle(5), bundle(4), bundle(None)):
        with pytest.raises(SectoolError, match="sequence"):
            known.with_bundle(old, NOW)


def test_the_same_roots_under_another_number_are_no_news() -> None:
    """Each host of a domain may publish the same bundle under a number of its own."""
    forge = Forge()
    known = relationship(bundle=bundle(5, forge))
    assert known.with_bundle(bundle(3, forge), NOW).bundle.sequence == 5
    assert known.with_bundle(bundle(None, forge), NOW).bundle.sequence == 5


def test_only_endpoints_are_asked_again() -> None:
    assert relationship().due_us == 0
    endpoint = relationship(source=Source(Profile.HTTPS_WEB, "https://p.example/"))
    assert endpoint.due_us == 3 + 300_000_000
    failed = endpoint.failed("down", NOW)
    assert failed.due_us == NOW + 300_000_000
    assert failed.bundle == endpoint.bundle


@pytest.mark.parametrize(
    "url",
    [
        "http://p.example/",
        "https://",
        "https://u:p@p.example/",
        "ftp://x/",
        "https://p.example/a b",
        "https://p:0x/",
        "https://[::1",
        "",
    ],
)
def test_urls_that_are_no_endpoint(url: str) -> None:
    with pytest.raises(SectoolError):
        Source(Profile.HTTPS_WEB, url)


def test_https_spiffe_needs_a_name_to_expect() -> None:
    with pytest.raises(SectoolError, match="does not begin with spiffe"):
        Source(Profile.HTTPS_SPIFFE, "https://p.example/", "p.example")


@pytest.mark.parametrize("text", ["domain", "federated=true", "*", "app*=x", "=x", "app=a b"])
def test_labels_that_cannot_be_accepted(text: str) -> None:
    with pytest.raises(UsageError):
        accepted_labels([text])


def verifier(forge: Forge, *accept: str, own: str = OURS) -> Verifier:
    accepted = {DOMAIN: accepted_labels(accept)} if accept else {}
    return Verifier(forge.bundle(), own_domain=own, accepted=accepted)


@pytest.mark.parametrize(
    ("accept", "labels"),
    [
        ((), ""),
        (("app",), "app=web"),
        (("app=db",), ""),
        (("app=w*", "env"), "app=web,env=dev"),
        (("tier",), ""),
    ],
)
def test_of_a_partners_labels_those_accepted_count(
    forge: Forge, accept: tuple[str, ...], labels: str
) -> None:
    peer = verifier(forge, *accept).verify(forge.blob(), NOW)
    assert peer.labels == LabelSet.parse(labels).with_({"domain": DOMAIN, "federated": "true"})


def test_our_own_peers_keep_all_they_have(forge: Forge) -> None:
    peer = verifier(forge, own=DOMAIN).verify(forge.blob(), NOW)
    assert peer.labels == LabelSet({"app": "web", "env": "dev", "domain": DOMAIN})


def test_a_change_of_what_is_accepted_is_seen_at_once(forge: Forge) -> None:
    checks = verifier(forge, "app")
    assert "app" in checks.verify(forge.blob(), NOW).labels
    blob = forge.blob()
    assert "app" in checks.verify(blob, NOW).labels
    checks.set_accepted({})
    assert "app" not in checks.verify(blob, NOW).labels


@pytest.mark.parametrize("lie", [{"domain": OURS}, {"federated": "true"}])
@pytest.mark.parametrize("own", [OURS, DOMAIN])
def test_where_a_peer_is_from_is_not_its_own_to_say(forge: Forge, lie: dict[str, str], own: str) -> None:
    leaf = forge.sign_leaf(labels=encode_labels(LabelSet({"app": "web", **lie})))
    with pytest.raises(CredentialError) as caught:
        verifier(forge, "app", own=own).verify(forge.blob(leaf), NOW)
    assert caught.value.reason == DropReason.LABEL_NOT_PERMITTED


def test_an_svid_without_labels_is_marked_as_well(forge: Forge) -> None:
    """Of another issuer: CAs of ours make none for handshakes."""
    leaf, host = forge.sign_leaf(labels=None), forge.sign_host(constraints=None)
    plain = Verifier(forge.bundle(), own_domain=OURS)
    marked = LabelSet({"domain": DOMAIN, "federated": "true"})
    assert plain.verify(forge.blob(leaf, host), NOW).labels == marked
    rules = path_labels([PathRule("spiffe://*", LabelSet({"app": "theirs"}))])
    mapped = Verifier(forge.bundle(), own_domain=OURS, path_labels=rules)
    assert mapped.verify(forge.blob(leaf, host), NOW).labels["federated"] == "true"


def test_no_workload_of_ours_can_carry_the_mark(authority: HostAuthority) -> None:
    with pytest.raises(CredentialError, match="federated"):
        authority.issue("/host/web1/wl/x", LabelSet({"federated": "true"}), NOW)


def test_an_svid_that_a_workload_holds_opens_no_handshake(authority: HostAuthority, forge: Forge) -> None:
    held = authority.issue_portable("/host/web1/wl/x", NOW)
    assert held.spiffe_id == f"spiffe://{DOMAIN}/host/web1/wl/x"
    assert held.renew_at_us == NOW + 1_800_000_000
    leaf = forge.sign_leaf(labels=None)
    with pytest.raises(CredentialError) as caught:
        verifier(forge, own=DOMAIN).verify(forge.blob(leaf), NOW)
    assert caught.value.reason == DropReason.KEY_USAGE_INVALID
    with pytest.raises(CredentialError):
        authority.issue_portable("/host/other/wl/x", NOW)
