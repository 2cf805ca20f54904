from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.clock import DAY, HOUR, MINUTE, SECOND, YEAR, from_datetime
from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import DropReason, now_us
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.blob import MAX_BLOB
from sectool.identity.extensions import LABELS_OID, LabelConstraints
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import Verifier
from sectool.labels import LabelSet

NOW = 1_772_330_400 * SECOND
ANY = LabelConstraints({"*": ["*"]})


def host_of(
    root: RootAuthority, constraints: LabelConstraints = ANY, now: int = NOW, days: int = 365
) -> HostAuthority:
    key = ec.generate_private_key(ec.SECP256R1())
    return HostAuthority(
        root.issue_host(key.public_key(), "web1", constraints, now, days), key, root.certificate
    )


@pytest.fixture
def root(tmp_path: Path) -> RootAuthority:
    return RootAuthority.create(tmp_path / "ca", "example.org", NOW)


def test_a_root_is_written_with_modes_and_read_back(tmp_path: Path) -> None:
    made = RootAuthority.create(tmp_path / "ca", "example.org", NOW, 3)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "ca").iterdir()}
    assert modes == {"root.crt": 0o644, "root.key": 0o600, "trust-domain": 0o644}
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700
    loaded = RootAuthority.load(tmp_path / "ca")
    assert loaded.certificate == made.certificate
    assert loaded.trust_domain == "example.org"
    assert from_datetime(loaded.certificate.not_valid_after_utc) == NOW + 3 * YEAR
    assert from_datetime(loaded.certificate.not_valid_before_utc) == NOW - MINUTE
    assert "BEGIN" not in repr(loaded)


def test_an_existing_root_is_not_overwritten(tmp_path: Path) -> None:
    first = RootAuthority.create(tmp_path / "ca", "example.org", NOW)
    with pytest.raises(UsageError, match="already"):
        RootAuthority.create(tmp_path / "ca", "example.org", NOW)
    assert RootAuthority.load(tmp_path / "ca").certificate == first.certificate
    second = RootAuthority.create(tmp_path / "ca", "example.org", NOW, force=True)
    assert RootAuthority.load(tmp_path / "ca").certificate == second.certificate
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]


@pytest.mark.parametrize(
    ("domain", "years"), [("Example.org", 1), ("", 1), ("a" * 65, 1), ("a", 0), ("a", 51)]
)
def test_nonsense_is_refused_before_anything_is_written(tmp_path: Path, domain: str, years: int) -> None:
    with pytest.raises(UsageError):
        RootAuthority.create(tmp_path / "ca", domain, NOW, years)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["root.crt", "root.key", "trust-domain"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    RootAuthority.create(tmp_path / "ca", "example.org", NOW)
    (tmp_path / "ca" / name).unlink()
    with pytest.raises(UsageError, match=name) as error:
        RootAuthority.load(tmp_path / "ca")
    assert "sectool ca init" in error.value.hint


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    RootAuthority.create(tmp_path / "ca", "example.org", NOW)
    (tmp_path / "ca" / "root.key").chmod(mode)
    with pytest.raises(SectoolError, match=f"{mode:04o}") as error:
        RootAuthority.load(tmp_path / "ca")
    assert "chmod 600" in error.value.hint


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    RootAuthority.create(tmp_path / "a", "example.org", NOW)
    RootAuthority.create(tmp_path / "b", "example.org", NOW)
    key = tmp_path / "a" / "root.key"
    key.write_bytes((tmp_path / "b" / "root.key").read_bytes())
    with pytest.raises(SectoolError, match="not the private key"):
        RootAuthority.load(tmp_path / "a")
    (tmp_path / "b" / "trust-domain").write_text("other.example\n")
    with pytest.raises(SectoolError, match=r"other\.example"):
        RootAuthority.load(tmp_path / "b")


@pytest.mark.parametrize("name", ["root.crt", "root.key"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_damaged_files_are_refused_in_words(tmp_path: Path, name: str, content: bytes) -> None:
    RootAuthority.create(tmp_path / "ca", "example.org", NOW)
    (tmp_path / "ca" / name).write_bytes(content)
    with pytest.raises(SectoolError, match=name):
        RootAuthority.load(tmp_path / "ca")


def test_a_host_ca_has_the_shape_that_is_documented(root: RootAuthority) -> None:
    certificate = host_of(root, LabelConstraints({"env": ["dev"]}, "/host/web1/")).certificate
    extensions = certificate.extensions
    assert certificate.subject.rfc4514_string() == "CN=web1"
    assert certificate.issuer.rfc4514_string() == "O=example.org"
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature  # leaves only (X509-SVID, appendix A)
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://example.org"]
    assert certificate.serial_number.bit_length() == 65


def test_a_leaf_has_the_shape_that_is_documented(root: RootAuthority) -> None:
    credential = host_of(root).issue("/host/web1/wl/a", LabelSet({"app": "x"}), NOW)
    leaf = x509.load_der_x509_certificate(credential.leaf_der)
    seen = [(each.oid.dotted_string, each.critical) for each in leaf.extensions]
    assert seen == [
        ("2.5.29.35", False),
        ("2.5.29.15", True),
        ("2.5.29.37", False),
        ("2.5.29.19", True),
        ("2.5.29.17", True),
        (LABELS_OID.dotted_string, False),
    ]
    assert leaf.subject.rfc4514_string() == ""
    assert leaf.issuer.rfc4514_string() == "CN=web1"
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    labels = leaf.extensions.get_extension_for_oid(LABELS_OID).value
    assert isinstance(labels, x509.UnrecognizedExtension)
    assert labels.value == b"\x0c\x05app=x"


def test_a_host_ca_never_outlives_the_root(tmp_path: Path) -> None:
    root = RootAuthority.create(tmp_path / "ca", "example.org", NOW, 1)
    host = host_of(root, now=NOW + 300 * DAY, days=365)
    assert host.not_after_us == from_datetime(root.certificate.not_valid_after_utc) == NOW + YEAR
    with pytest.raises(UsageError, match="root is valid until"):
        host_of(root, now=NOW + YEAR)
    with pytest.raises(UsageError):
        host_of(root, days=0)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-a", "a" * 64, "ä", "a\n"])
def test_bad_host_names_are_refused(root: RootAuthority, name: str) -> None:
    with pytest.raises(UsageError, match="host name"):
        root.issue_host(ec.generate_private_key(ec.SECP256R1()).public_key(), name, ANY, NOW)


def test_an_svid_lives_as_long_as_asked_but_not_longer_than_its_issuer(root: RootAuthority) -> None:
    host = host_of(root, days=1)
    short = host.issue("/a", LabelSet(), NOW, 90)
    assert (short.not_after_us, short.renew_at_us) == (NOW + 90 * SECOND, NOW + 45 * SECOND)
    late = host.issue("/a", LabelSet(), NOW + DAY - MINUTE, 3600)
    assert late.not_after_us == host.not_after_us == NOW + DAY
    assert late.renew_at_us == NOW + DAY - MINUTE // 2
    assert late.delegation.not_after_s == (NOW + DAY) // SECOND
    for moment, reason in [
        (NOW + DAY + 1, DropReason.CREDENTIAL_EXPIRED),
        (NOW - HOUR, DropReason.CREDENTIAL_NOT_YET_VALID),
    ]:
        with pytest.raises(CredentialError) as error:
            host.issue("/a", LabelSet(), moment)
        assert error.value.reason == reason
    with pytest.raises(UsageError):
        host.issue("/a", LabelSet(), NOW, 0)


def test_half_a_second_does_not_make_an_svid_that_ends_before_it_is_announced(root: RootAuthority) -> None:
    credential = host_of(root).issue("/a", LabelSet(), NOW + 999_999, 10)
    assert credential.not_after_us == NOW + 10 * SECOND
    assert credential.peer.not_before_us == NOW - MINUTE


@pytest.mark.parametrize(
    ("path", "labels", "reason"),
    [
        ("/host/web1/wl/a", {"env": "prod"}, DropReason.LABEL_NOT_PERMITTED),
        ("/host/web1/wl/a", {"team": "x"}, DropReason.LABEL_NOT_PERMITTED),
        ("/host/web1/wl/a", {"domain": "bank.example"}, DropReason.LABEL_NOT_PERMITTED),
        ("/host/web2/wl/a", {}, DropReason.SPIFFE_ID_INVALID),
        ("/host/web1/../web2/a", {}, DropReason.SPIFFE_ID_INVALID),
        ("/host/web1/", {}, DropReason.SPIFFE_ID_INVALID),
        ("", {}, DropReason.SPIFFE_ID_INVALID),
        ("host/web1/wl/a", {}, DropReason.SPIFFE_ID_INVALID),
        ("/host/web1/wl/" + "a" * 2048, {}, DropReason.SPIFFE_ID_INVALID),
    ],
)
def test_what_a_verifier_would_refuse_is_not_issued(
    root: RootAuthority, path: str, labels: dict[str, str], reason: DropReason
) -> None:
    host = host_of(root, LabelConstraints({"env": ["dev"], "domain": ["*"]}, "/host/web1/"))
    with pytest.raises(CredentialError) as error:
        host.issue(path, LabelSet(labels), NOW)
    assert error.value.reason == reason
    assert error.value.hint


def test_a_path_without_any_prefix_still_needs_to_be_one(root: RootAuthority) -> None:
    with pytest.raises(CredentialError) as error:
        host_of(root).issue("", LabelSet(), NOW)
    assert error.value.reason == DropReason.SPIFFE_ID_INVALID


def test_an_identity_that_does_not_fit_into_a_syn_is_refused(root: RootAuthority) -> None:
    host = host_of(root)
    labels: dict[str, str] = {}
    sizes = []
    with pytest.raises(CredentialError) as error:
        for i in range(62):
            labels[f"key{i}"] = f"{(i * 7919 + 1) ** 9:x}"
            sizes.append(len(host.issue("/host/web1/wl/a", LabelSet(labels), NOW).blob))
    assert error.value.reason == DropReason.CREDENTIAL_OVERSIZED
    assert str(MAX_BLOB) in error.value.message
    assert sizes[-1] <= MAX_BLOB
    assert len(sizes) > 8


def test_eleven_everyday_labels_leave_room(root: RootAuthority) -> None:
    """The size the wire format aims at: about 750 bytes with 11 labels that the dictionary does not know."""
    labels = LabelSet.parse(
        "app=checkout-api,cost=cc-4711,env=prod,exe=gunicorn,region=fsn1,team=payments,tier=edge,"
        "unit=checkout-api.service,user=svc-checkout,version=4.17.2-rc3,zone=fsn1-dc14"
    )
    assert len(labels) == 11
    constraints = LabelConstraints({"*": ["*"], "env": ["prod"], "zone": ["fsn1-dc14"]}, "/host/web1/")
    blob = host_of(root, constraints).issue("/host/web1/wl/checkout-api", labels, NOW).blob
    assert len(blob) <= 750


def test_what_is_issued_verifies_for_every_kind_of_host_key(root: RootAuthority) -> None:
    pem = root.certificate.public_bytes(Encoding.PEM).decode()
    verifier = Verifier(TrustBundle().with_root("example.org", pem))
    for key in (ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()):
        host = HostAuthority(root.issue_host(key.public_key(), "web1", ANY, NOW), key, root.certificate)
        credential = host.issue("/wl/a", LabelSet({"app": "x"}), NOW)
        assert verifier.verify(credential.blob, NOW) == credential.peer


def test_only_a_host_ca_of_ours_makes_an_authority(root: RootAuthority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(CredentialError, match="constraints"):
        HostAuthority(root.certificate, key)
    leaf = x509.load_der_x509_certificate(host_of(root).issue("/a", LabelSet(), NOW).leaf_der)
    with pytest.raises(CredentialError, match="not a CA"):
        HostAuthority(leaf, key)


@pytest.mark.parametrize("strict", [False, True])
def test_openssl_verifies_the_chain(tmp_path: Path, strict: bool) -> None:
    now = now_us()
    root = RootAuthority.create(tmp_path / "ca", "example.org", now)
    host = host_of(root, LabelConstraints({"*": ["*"]}, "/host/web1/"), now)
    credential = host.issue("/host/web1/wl/shop", LabelSet({"app": "web"}), now)
    leaf = x509.load_der_x509_certificate(credential.leaf_der)
    for name, certificate in (("leaf", leaf), ("host", host.certificate)):
        (tmp_path / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))

    def openssl(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["openssl", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30
        )

    flags = ["-x509_strict"] if strict else []
    chain = ["-CAfile", "ca/root.crt", "-untrusted", "host.pem", "leaf.pem"]
    done = openssl("verify", *flags, *chain)
    assert (done.returncode, done.stdout) == (0, "leaf.pem: OK\n"), done.stderr
    text = openssl("x509", "-in", "leaf.pem", "-noout", "-text").stdout
    assert "URI:spiffe://example.org/host/web1/wl/shop" in text
    assert "app=web" in text  # the labels extension is readable without our tools
    stranger = RootAuthority.create(tmp_path / "other", "example.org", now)
    assert stranger.trust_domain == "example.org"
    assert (
        openssl("verify", "-CAfile", "other/root.crt", "-untrusted", "host.pem", "leaf.pem").returncode != 0
    )
