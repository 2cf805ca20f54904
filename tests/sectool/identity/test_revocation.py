from __future__ import annotations

import base64
import os
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.clock import DAY, HOUR, SECOND
from sectool.errors import CredentialError, UsageError
from sectool.events import DropReason
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.credential import Credential
from sectool.identity.extensions import LabelConstraints
from sectool.identity.profile import key_id, read_profile
from sectool.identity.revocation import (
    MAX_LIST,
    MAX_SERIALS,
    Entries,
    RevocationList,
    Revocations,
    plain_serial,
    read_list,
    sign_list,
)
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import Verifier
from sectool.labels import LabelSet

NOW = 1_772_330_400 * SECOND
R = DropReason
DOMAIN = "example.org"
EXAMPLES = int(os.environ.get("SECTOOL_EXAMPLES", "150"))


SOME = Entries(frozenset({"aa"}), frozenset({"0" * 64}), {f"spiffe://{DOMAIN}/x": 5})


class Domain:
    """A trust domain with two hosts, and lists signed by whoever a test wants."""

    def __init__(self, folder: Path) -> None:
        self.root = RootAuthority.create(folder, DOMAIN, NOW - DAY)
        self.bundle = TrustBundle().with_root(
            DOMAIN, self.root.certificate.public_bytes(Encoding.PEM).decode()
        )
        self.keys, self.hosts = {}, {}
        for name in ("a", "b"):
            key = ec.generate_private_key(ec.SECP256R1())
            constraints = LabelConstraints({"*": ("*",)}, f"/host/{name}/")
            certificate = self.root.issue_host(key.public_key(), name, constraints, NOW - HOUR)
            self.keys[name], self.hosts[name] = key, HostAuthority(certificate, key, self.root.certificate)

        crl = x509.load_pem_x509_crl(self.pem(SOME))
        self.signed = crl.public_bytes(Encoding.DER)

    def svid(self, host: str = "a", name: str = "web", now_us: int = NOW) -> Credential:
        return self.hosts[host].issue(f"/host/{host}/wl/{name}", LabelSet({"app": name}), now_us)

    def profile(self, host: str = "") -> object:
        certificate = self.hosts[host].certificate if host else self.root.certificate
        return read_profile(certificate.public_bytes(Encoding.DER), "host CA" if host else "root")

    def pem(self, entries: Entries, host: str = "", number: int = 1, days: int = 30) -> bytes:
        key = self.keys[host] if host else self.root._key
        return sign_list(self.profile(host), key, entries, number, NOW, days=days)  # type: ignore[arg-type]

    def list(self, entries: Entries, host: str = "", **more: int) -> RevocationList:
        return read_list(self.pem(entries, host, **more), self.bundle, NOW)

    def verifier(self, *lists: RevocationList, closed: bool = True) -> Verifier:
        verifier = Verifier(self.bundle)
        verifier.set_revocations(Revocations.from_wire(Revocations(lists, closed=closed).to_wire()))
        return verifier


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return Domain(tmp_path_factory.mktemp("pki") / "ca")


def reason(verifier: Verifier, credential: Credential, now_us: int = NOW) -> int:
    """0: it holds."""
    try:
        verifier.verify(credential.blob, now_us)
    except CredentialError as error:
        assert error.message
        return error.reason
    return 0


def test_a_list_says_again_what_was_put_into_it(domain: Domain) -> None:
    entries = Entries(
        frozenset({"abc", "1f"}),
        frozenset({"0" * 64}),
        {f"spiffe://{DOMAIN}/host/a/wl/web": 0, f"spiffe://{DOMAIN}/x": 7},
    )
    read = domain.list(entries, number=7)
    assert (read.entries, read.number, read.trust_domain, read.by_root) == (entries, 7, DOMAIN, True)
    assert read.next_update_us == NOW + 30 * DAY
    assert domain.list(entries, "a").issuer_name == "a"


def test_openssl_reads_a_list_and_refuses_by_it(domain: Domain, tmp_path: Path) -> None:
    serial = f"{domain.hosts['a'].certificate.serial_number:x}"
    listed = tmp_path / "list.pem"
    listed.write_bytes(
        domain.pem(Entries(frozenset({serial}), frozenset(), {f"spiffe://{DOMAIN}/x": 0}), days=3650)
    )
    for name, text in (
        ("root", domain.root.certificate),
        ("a", domain.hosts["a"].certificate),
        ("b", domain.hosts["b"].certificate),
    ):
        (tmp_path / name).write_bytes(text.public_bytes(Encoding.PEM))

    def openssl(*words: str) -> str:
        done = subprocess.run(["openssl", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert serial.upper() in openssl("crl", "-in", "list.pem", "-noout", "-text")
    check = ("verify", "-CAfile", "root", "-CRLfile", "list.pem", "-crl_check", "-attime", str(NOW // SECOND))
    assert "b: OK" in openssl(*check, "b")
    assert "revoked" in openssl(*check, "a")


def test_the_roots_list_covers_hosts_keys_workloads_and_serials(domain: Domain) -> None:
    mine, other = domain.svid("a"), domain.svid("b")
    host = domain.hosts["a"].certificate
    for entries in (
        Entries(frozenset({f"{host.serial_number:x}"})),
        Entries(frozenset({mine.peer.serial})),
        Entries(keys=frozenset({key_id(domain.keys["a"].public_key())})),
        Entries(workloads={mine.peer.spiffe_id: 0}),
    ):
        verifier = domain.verifier(domain.list(entries))
        assert reason(verifier, mine) == R.CREDENTIAL_REVOKED
        assert reason(verifier, other) == 0
        assert Revocations((domain.list(entries),)).of(mine.peer)  # live flows are found by the same lists
        assert not Revocations((domain.list(entries),)).of(other.peer)


def test_a_hosts_list_covers_nothing_but_what_it_issued(domain: Domain) -> None:
    mine, other = domain.svid("a"), domain.svid("b")
    for entries in (
        Entries(frozenset({mine.peer.serial, other.peer.serial})),
        Entries(workloads={mine.peer.spiffe_id: 0, other.peer.spiffe_id: 0}),
    ):
        verifier = domain.verifier(domain.list(entries, "a"))
        assert reason(verifier, mine) == R.CREDENTIAL_REVOKED
        assert reason(verifier, other) == 0
    # Nor can a host revoke itself into a statement about another's key.
    keys = Entries(keys=frozenset({key_id(domain.keys["b"].public_key())}))
    assert reason(domain.verifier(domain.list(keys, "a")), other) == 0


def test_a_bound_lets_later_credentials_hold(domain: Domain) -> None:
    old, new = domain.svid(now_us=NOW - HOUR // 2), domain.svid()
    entries = Entries(workloads={old.peer.spiffe_id: (NOW - 10 * 60 * SECOND) // SECOND})
    verifier = domain.verifier(domain.list(entries))
    assert reason(verifier, old) == R.CREDENTIAL_REVOKED
    assert reason(verifier, new) == 0


def test_what_was_good_and_cached_is_refused_at_once(domain: Domain) -> None:
    verifier, mine = Verifier(domain.bundle), domain.svid()
    assert reason(verifier, mine) == 0
    verifier.set_revocations(Revocations((domain.list(Entries(frozenset({mine.peer.serial}))),)))
    assert reason(verifier, mine) == R.CREDENTIAL_REVOKED
    verifier.set_revocations(Revocations())
    assert reason(verifier, mine) == 0


@pytest.mark.parametrize("by", ["", "a"], ids=["root", "host"])
def test_an_expired_list_fails_closed_or_open_as_told(domain: Domain, by: str) -> None:
    later = NOW + 2 * DAY
    mine = domain.hosts["a"].issue("/host/a/wl/web", LabelSet({}), later - SECOND)
    listed = domain.list(Entries(frozenset({"aa"})), by, days=2)
    assert reason(domain.verifier(listed), mine, later) == 0
    closed = domain.verifier(listed)
    assert reason(closed, mine, later - SECOND) == 0  # cached from here on
    assert reason(closed, mine, later + SECOND) == R.REVOCATION_STALE
    assert reason(domain.verifier(listed, closed=False), mine, later + SECOND) == 0
    other = domain.hosts["b"].issue("/host/b/wl/web", LabelSet({}), later - SECOND)
    assert reason(closed, other, later + SECOND) == (0 if by else R.REVOCATION_STALE)
    assert listed.warn_us < later - DAY // 4


def test_who_may_sign_a_list(domain: Domain, tmp_path: Path) -> None:
    def refused(pem: bytes, bundle: TrustBundle | None = None, now_us: int = NOW) -> int:
        with pytest.raises(CredentialError) as error:
            read_list(pem, bundle or domain.bundle, now_us)
        return error.value.reason

    good = domain.pem(Entries())
    stranger = Domain(tmp_path / "ca")
    assert refused(stranger.pem(Entries())) == R.UNTRUSTED_CHAIN
    assert refused(stranger.pem(Entries(), "a")) == R.UNTRUSTED_CHAIN
    assert refused(good, TrustBundle()) == R.UNTRUSTED_CHAIN
    assert (
        refused(domain.pem(Entries(), "a").replace(good, b"").partition(b"-----BEGIN X509")[0])
        == R.CREDENTIAL_MALFORMED
    )
    host_part = domain.pem(Entries(), "a").partition(b"-----BEGIN X509")[0]
    assert refused(host_part + good) == R.UNTRUSTED_CHAIN  # another's signature
    leaf = domain.svid()
    wrong = x509.load_der_x509_certificate(leaf.leaf_der).public_bytes(Encoding.PEM)
    assert refused(wrong + good) == R.KEY_USAGE_INVALID  # a leaf signs no lists
    assert refused(good, now_us=NOW - HOUR) == R.CREDENTIAL_NOT_YET_VALID
    assert refused(good + bytes(MAX_LIST)) == R.CREDENTIAL_OVERSIZED
    assert refused(domain.pem(Entries(), "a"), now_us=NOW + 400 * DAY) == R.CREDENTIAL_EXPIRED


def test_limits(domain: Domain) -> None:
    with pytest.raises(UsageError):
        domain.pem(Entries(frozenset(f"{n:x}" for n in range(1, MAX_SERIALS + 2))))
    with pytest.raises(UsageError):
        domain.pem(Entries(), days=0)
    for bad in ("", "xyz", "0", "1" * 65):
        with pytest.raises(UsageError):
            plain_serial(bad)
    assert plain_serial("0A:bC") == "abc"


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_changed_bytes_are_refused_with_a_reason_and_never_pass(domain: Domain, data: st.DataObject) -> None:
    """Whatever is done to a list's DER gives CredentialError, or the same list in another PEM spelling."""
    host = data.draw(st.sampled_from(["", "a"]))
    head = domain.hosts["a"].certificate.public_bytes(Encoding.PEM) if host else b""
    der = bytearray(domain.signed)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(der) - 1))
        match data.draw(st.sampled_from(["set", "cut", "add"])):
            case "set":
                der[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del der[at : at + data.draw(st.integers(1, 40))]
            case _:
                der[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        if not der:
            der = bytearray(b"0")
    text = base64.encodebytes(bytes(der))
    pem = head + b"-----BEGIN X509 CRL-----\n" + text + b"-----END X509 CRL-----\n"
    try:
        read = read_list(pem, domain.bundle, NOW)
    except CredentialError as error:
        assert error.reason and error.message
        return
    assert read.entries == SOME  # a twin of the ECDSA signature: (r, n - s)


@given(st.binary(max_size=300))
@settings(max_examples=EXAMPLES, deadline=None)
def test_garbage_is_refused(domain: Domain, junk: bytes) -> None:
    for pem in (junk, b"-----BEGIN X509 CRL-----\n" + junk + b"\n-----END X509 CRL-----\n"):
        with pytest.raises(CredentialError):
            read_list(pem, domain.bundle, NOW)


def test_a_list_whose_issuer_is_no_name_is_refused(domain: Domain) -> None:
    """The library parses the issuer only when it is asked for."""
    der = domain.signed.replace(b"\x0c\x0bexample.org", b"\x0d\x0bexample.org", 1)
    assert der != domain.signed
    text = base64.encodebytes(der)
    with pytest.raises(CredentialError) as error:
        read_list(b"-----BEGIN X509 CRL-----\n" + text + b"-----END X509 CRL-----\n", domain.bundle, NOW)
    assert error.value.reason == R.CREDENTIAL_MALFORMED
