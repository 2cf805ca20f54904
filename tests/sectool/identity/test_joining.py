from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.clock import DAY, HOUR, SECOND
from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import DropReason
from sectool.identity import rollover
from sectool.identity.authority import RootAuthority
from sectool.identity.credential import Credential
from sectool.identity.enrolment import default_constraints, enroll_host, init_ca, load_host
from sectool.identity.extensions import LabelConstraints
from sectool.identity.joining import (
    MAX_REQUEST,
    accept,
    grant,
    make_request,
    pinned,
    prepare,
    read_answer,
    read_request,
    take_roots,
)
from sectool.identity.lists import Lists
from sectool.identity.register import of_host, registered, revoke
from sectool.identity.verify import Verifier
from sectool.labels import LabelSet

NOW = 1_772_330_400 * SECOND
DOMAIN = "shop.example"
EXAMPLES = int(os.environ.get("SECTOOL_EXAMPLES", "100"))


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    init_ca(tmp_path / "at-ca", DOMAIN, now_us=NOW - DAY)
    return tmp_path / "at-ca" / "ca"


def answer_to(ca: Path, request: bytes, now_us: int = NOW, **labels: str) -> bytes:
    wanted = read_request(request)
    limits = default_constraints(wanted.name, LabelSet(labels))
    return grant(RootAuthority.load(ca), wanted, limits, rollover.bundle(ca), now_us, ca_dir=ca)


def enrolled(ca: Path, state: Path, name: str = "web-1", now_us: int = NOW, **labels: str) -> Path:
    accept(state, answer_to(ca, prepare(state, name, None), now_us, **labels), now_us)
    return state


def svid(state: Path, now_us: int) -> Credential:
    host = load_host(state)
    return host.authority.issue(f"/host/{host.name}/wl/x", host.labels, now_us)


def trusts(state: Path, credential: Credential, now_us: int) -> bool:
    verifier = Verifier(load_host(state).bundle)
    verifier.set_revocations(Lists(state, load_host(state).bundle, now_us).revocations())
    try:
        verifier.verify(credential.blob, now_us)
    except CredentialError:
        return False
    return True


def test_a_host_joins_by_files_and_its_key_never_leaves_it(ca: Path, tmp_path: Path) -> None:
    state = tmp_path / "web"
    request = prepare(state, "web-1", None)
    assert stat.S_IMODE((state / "request/host.key").stat().st_mode) == 0o600
    answer = answer_to(ca, request, env="prod")
    assert b"PRIVATE" not in request + answer
    host = accept(state, answer, NOW, enforced_networks=["10.0.0.0/8"])
    assert (host.name, dict(host.labels), len(host.enforced_networks)) == ("web-1", {"env": "prod"}, 1)
    assert not (state / "request").exists()
    assert [each.name for each in registered(ca)] == ["web-1"]
    with pytest.raises(UsageError):
        accept(state, answer, NOW)  # no request is under way any more


def test_an_answer_to_another_request_is_refused(ca: Path, tmp_path: Path) -> None:
    request = prepare(tmp_path / "a", "web-1", None)
    prepare(tmp_path / "b", "web-1", None)
    with pytest.raises(UsageError, match="another request"):
        accept(tmp_path / "b", answer_to(ca, request), NOW)
    assert not (tmp_path / "b/host").exists()
    with pytest.raises(UsageError, match="under way"):
        prepare(tmp_path / "a", "web-1", None)


def test_an_answer_of_a_stranger_or_with_damage_is_refused(ca: Path, tmp_path: Path) -> None:
    state = tmp_path / "web"
    answer = answer_to(ca, prepare(state, "web-1", None))
    init_ca(tmp_path / "evil", DOMAIN, now_us=NOW - DAY)
    certificate, _ = read_answer(answer)
    assert certificate is not None
    with pytest.raises(UsageError, match="no root"):
        accept(state, certificate + rollover.bundle(tmp_path / "evil/ca").to_pem().encode(), NOW)
    for damaged in (answer[:-300], answer[200:], b"", certificate, answer * 2, b"x" * 300_000):
        with pytest.raises(SectoolError):
            accept(state, damaged, NOW)
    with pytest.raises(UsageError):
        accept(state, answer, NOW + 400 * DAY)  # expired on its way
    accept(state, answer, NOW)


def test_renewal_in_place_keeps_what_the_host_had(ca: Path, tmp_path: Path) -> None:
    state = enrolled(ca, tmp_path / "web", env="prod")
    init_ca(tmp_path / "partner", "partner.example", now_us=NOW)
    partner = (tmp_path / "partner/ca/root.crt").read_text()
    load_host(state).bundle.with_root("partner.example", partner).save(state / "host/trust.pem")
    before, old = load_host(state), svid(state, NOW)
    later = NOW + 200 * DAY
    accept(state, answer_to(ca, prepare(state, "web-1", before.constraints), later, env="prod"), later)
    after = load_host(state)
    assert after.authority.not_after_us > before.authority.not_after_us
    assert after.authority.key_id != before.authority.key_id
    assert (after.labels, after.enforced_networks) == (before.labels, before.enforced_networks)
    assert after.bundle.trust_domains == (DOMAIN, "partner.example")
    assert trusts(state, old, NOW + HOUR // 2)  # SVIDs of the old CA go on until they expire
    with pytest.raises(UsageError, match="already"):
        accept(state, answer_to(ca, prepare(state, "other", None), later), later)


def test_a_rollover_never_leaves_two_hosts_without_trust(ca: Path, tmp_path: Path) -> None:
    """Hosts go through each step one by one, in any order of their own: at every moment both trust each other."""
    a, b = (enrolled(ca, tmp_path / name, name) for name in ("a", "b"))
    now = [NOW]

    def both_ways() -> None:
        now[0] += SECOND
        for one, other in ((a, b), (b, a)):
            assert trusts(one, svid(other, now[0]), now[0])

    def everywhere(step: object) -> None:
        for host in (a, b):
            step(host)  # type: ignore[operator]
            both_ways()

    def give_bundle(host: Path) -> None:
        take_roots(host, rollover.bundle(ca).to_pem().encode(), now[0])

    def renew(host: Path) -> None:
        name = load_host(host).name
        accept(host, answer_to(ca, prepare(host, name, None), now[0]), now[0])

    both_ways()
    assert rollover.status(ca, NOW).step == "none"
    rollover.begin(ca, NOW)
    both_ways()
    everywhere(give_bundle)
    rollover.switch(ca, NOW)
    assert {each.name for each in rollover.status(ca, NOW).behind} == {"a", "b"}
    both_ways()
    with pytest.raises(UsageError, match="still have"):
        rollover.finish(ca, NOW)
    everywhere(renew)
    old = rollover.finish(ca, now[0])
    everywhere(give_bundle)
    assert rollover.status(ca, NOW).step == "none"
    assert all(old.fingerprint != r.fingerprint for r in load_host(a).bundle.roots[DOMAIN])
    assert not (ca / "old").exists() and (ca / "retired").exists()


def test_a_host_that_missed_the_renewal_is_told_instead_of_cut_off(ca: Path, tmp_path: Path) -> None:
    a = enrolled(ca, tmp_path / "a", "a")
    rollover.begin(ca, NOW)
    rollover.switch(ca, NOW)
    rollover.finish(ca, NOW, force=True)
    with pytest.raises(UsageError, match="itself"):
        take_roots(a, rollover.bundle(ca).to_pem().encode(), NOW)


def test_a_rollover_forgets_no_revocation(ca: Path, tmp_path: Path) -> None:
    a, _ = (enrolled(ca, tmp_path / name, name) for name in ("a", "b"))
    listed = revoke(ca, RootAuthority.load(ca), of_host(ca, "b", NOW), NOW)
    Lists(a, load_host(a).bundle, NOW).take(listed.pem, NOW)
    rollover.begin(ca, NOW)
    take_roots(a, rollover.bundle(ca).to_pem().encode(), NOW)
    rollover.switch(ca, NOW + SECOND)
    accept(a, answer_to(ca, prepare(a, "a", None), NOW + SECOND), NOW + SECOND)
    rollover.finish(ca, NOW + SECOND, force=True)
    only_new = rollover.bundle(ca).to_pem().encode()
    with pytest.raises(UsageError, match="forgotten"):
        take_roots(a, only_new, NOW + SECOND)
    found, _ = Lists(a, load_host(a).bundle, NOW + SECOND).take(
        (ca / "revoked.pem").read_bytes(), NOW + SECOND
    )
    assert found.entries == listed.entries
    take_roots(a, only_new, NOW + SECOND)
    assert len(Lists(a, load_host(a).bundle, NOW + SECOND).known) == 1


@pytest.mark.parametrize("torn", ["root.key", "root.crt"])
def test_a_switch_that_was_interrupted_is_repeated(ca: Path, torn: str) -> None:
    """Killed after writing this file: the next call completes it, and both keys are still there."""
    old_key = (ca / "root.key").read_bytes()
    rollover.begin(ca, NOW)
    (ca / "old").mkdir()
    for name in ("root.key", "root.crt", "trust-domain"):
        (ca / "old" / name).write_bytes((ca / name).read_bytes())
    for name in ("root.key", "root.crt"):
        (ca / name).write_bytes((ca / "next" / name).read_bytes())
        if name == torn:
            break
    (ca / "root.key").chmod(0o600)
    fresh = rollover.switch(ca, NOW)
    assert RootAuthority.load(ca).certificate == fresh.certificate
    assert (ca / "old/root.key").read_bytes() == old_key


def test_a_passphrase_encrypts_the_roots_key(tmp_path: Path) -> None:
    root = init_ca(tmp_path, DOMAIN, passphrase=b"correct horse", now_us=NOW)
    ca = tmp_path / "ca"
    assert b"ENCRYPTED" in (ca / "root.key").read_bytes()
    assert RootAuthority.load(ca, lambda: b"correct horse").certificate == root.certificate
    for wrong in (b"", b"wrong"):
        with pytest.raises(UsageError, match="passphrase"):
            RootAuthority.load(ca, lambda wrong=wrong: wrong)  # type: ignore[misc]
    (ca / "root.key").unlink()
    with pytest.raises(UsageError, match=r"no root\.key"):
        enroll_host(tmp_path, "web", ca, now_us=NOW)


def test_what_a_request_may_not_be(tmp_path: Path) -> None:
    def reason(pem: bytes) -> int:
        with pytest.raises(CredentialError) as error:
            read_request(pem)
        return error.value.reason

    good = make_request(
        ec.generate_private_key(ec.SECP256R1()), "web-1", LabelConstraints({"*": ("*",)}, "/host/x/")
    )
    assert read_request(good).constraints is not None
    assert (
        reason(make_request(ec.generate_private_key(ec.SECP384R1()), "web-1")) == DropReason.UNTRUSTED_CHAIN
    )
    assert reason(good + bytes(MAX_REQUEST)) == DropReason.CREDENTIAL_OVERSIZED
    assert reason(b"") == DropReason.CREDENTIAL_MALFORMED
    with pytest.raises(UsageError):
        make_request(ec.generate_private_key(ec.SECP256R1()), "../web")
    assert pinned(
        LabelConstraints({"*": ("*",), "a": ("x",), "b": ("x", "y"), "c": ("x*",), "d": ()})
    ) == LabelSet({"a": "x"})


REQUEST = make_request(ec.generate_private_key(ec.SECP256R1()), "web-1")


@given(st.integers(0, len(REQUEST) - 1), st.binary(max_size=8), st.integers(0, 8))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_bytes_are_a_request_or_refused(at: int, put: bytes, gone: int) -> None:
    try:
        wanted = read_request(REQUEST[:at] + put + REQUEST[at + gone :])
    except CredentialError:
        return
    assert wanted.name == "web-1"


@given(st.binary(max_size=400))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_bytes_are_an_answer_or_refused(junk: bytes) -> None:
    try:
        read_answer(junk)
    except SectoolError:
        return
