"""A small PKI whose certificates can be wrong in any way a test needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from sectool.clock import DAY, HOUR, MINUTE, SECOND, to_datetime
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.blob import Delegation, compress, pack
from sectool.identity.extensions import (
    CONSTRAINTS_OID,
    LABELS_OID,
    LabelConstraints,
    encode_constraints,
    encode_labels,
)
from sectool.identity.trust import TrustBundle
from sectool.labels import LabelSet

DOMAIN = "example.org"
SHA256 = hashes.SHA256()
NOW = 1_772_330_400 * SECOND  # 2026-03-01T02:00:00Z

Extension = tuple[x509.ExtensionType, bool]


def usage(digital: bool = False, cert: bool = False, crl: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(digital, False, False, False, False, cert, crl, False, False)


def uris(*texts: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(text) for text in texts])


def private(oid: x509.ObjectIdentifier, value: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(oid, value)


class Forge:
    """Issues certificates with every field under the test's control. Defaults are what a verifier accepts."""

    now = NOW

    def __init__(self) -> None:
        self.root_key: Any = ec.generate_private_key(ec.SECP256R1())
        self.host_key: Any = ec.generate_private_key(ec.SECP256R1())
        self.leaf_key: Any = ec.generate_private_key(ec.SECP256R1())
        self.x25519 = (
            x25519.X25519PrivateKey.generate().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        )
        self.constraints = LabelConstraints({"*": ("*",), "env": ("dev", "test*")}, "/host/web1/")
        self.labels = LabelSet({"app": "web", "env": "dev"})
        self.root = self.sign_root()
        self.host = self.sign_host()
        self.leaf = self.sign_leaf()

    def sign(
        self,
        public: Any,
        signer: Any,
        subject: str | None,
        issuer: str,
        validity: tuple[int, int],
        extensions: Iterable[Extension | None],
        *,
        attribute: x509.ObjectIdentifier = NameOID.COMMON_NAME,
        issuer_attribute: x509.ObjectIdentifier = NameOID.COMMON_NAME,
        digest: Any = SHA256,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .subject_name(x509.Name([x509.NameAttribute(attribute, subject)] if subject else []))
            .issuer_name(x509.Name([x509.NameAttribute(issuer_attribute, issuer)]))
            .not_valid_before(to_datetime(validity[0]))
            .not_valid_after(to_datetime(validity[1]))
        )
        for extension in extensions:
            if extension is not None:
                builder = builder.add_extension(extension[0], extension[1])
        if isinstance(signer, ed25519.Ed25519PrivateKey):
            digest = None
        return builder.sign(signer, digest)

    def sign_root(self, **over: Any) -> x509.Certificate:
        return self.sign(
            over.get("public", self.root_key.public_key()),
            over.get("signer", self.root_key),
            "root",
            over.get("issuer", "root"),
            over.get("validity", (NOW - DAY, NOW + 3650 * DAY)),
            [
                (x509.BasicConstraints(over.get("ca", True), over.get("path_length")), True),
                (over.get("usage", usage(cert=True, crl=True)), True),
                (over.get("san", uris(f"spiffe://{DOMAIN}")), False) if over.get("san", True) else None,
            ],
            digest=over.get("digest", SHA256),
        )

    def sign_host(self, **over: Any) -> x509.Certificate:
        value = over.get("constraints", encode_constraints(self.constraints))
        san = over.get("san", uris(f"spiffe://{DOMAIN}"))
        return self.sign(
            over.get("public", self.host_key.public_key()),
            over.get("signer", self.root_key),
            over.get("subject", "web1"),
            over.get("issuer", "root"),
            over.get("validity", (NOW - HOUR, NOW + 30 * DAY)),
            [
                (x509.BasicConstraints(over.get("ca", True), over.get("path_length", 0)), True),
                (over.get("usage", usage(True, True, True)), True),
                (san, False) if san else None,
                (private(CONSTRAINTS_OID, value), False) if value is not None else None,
                over.get("extra"),
            ],
            digest=over.get("digest", SHA256),
        )

    def sign_leaf(self, **over: Any) -> x509.Certificate:
        value = over.get("labels", encode_labels(self.labels))
        san = over.get("san", uris(f"spiffe://{DOMAIN}/host/web1/wl/shop"))
        ca = over.get("ca")
        key_usage = over.get("usage", usage(True))
        return self.sign(
            over.get("public", self.leaf_key.public_key()),
            over.get("signer", self.host_key),
            None,
            over.get("issuer", "web1"),
            over.get("validity", (NOW - MINUTE, NOW + HOUR)),
            [
                (x509.BasicConstraints(ca, None), True) if ca is not None else None,
                (key_usage, True) if key_usage else None,
                (san, True) if san else None,
                (private(LABELS_OID, value), False) if value is not None else None,
                over.get("extra"),
            ],
            digest=over.get("digest", SHA256),
        )

    def blob(
        self,
        leaf: x509.Certificate | None = None,
        host: x509.Certificate | None = None,
        *,
        leaf_key: Any = None,
        not_after_s: int | None = None,
    ) -> bytes:
        leaf = leaf or self.leaf
        if not_after_s is None:
            not_after_s = int(leaf.not_valid_after_utc.timestamp())
        stream = compress(leaf.public_bytes(Encoding.DER), (host or self.host).public_bytes(Encoding.DER))
        return pack(Delegation.sign(leaf_key or self.leaf_key, self.x25519, not_after_s, stream), stream)

    def bundle(self, *roots: x509.Certificate, domain: str = DOMAIN) -> TrustBundle:
        bundle = TrustBundle()
        for root in roots or (self.root,):
            bundle = bundle.with_root(domain, root.public_bytes(Encoding.PEM).decode())
        return bundle


@pytest.fixture
def forge() -> Forge:
    return Forge()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> HostAuthority:
    """A host CA made by the product itself: env is pinned to dev, everything else is free."""
    directory: Path = tmp_path_factory.mktemp("pki") / "ca"
    root = RootAuthority.create(directory, DOMAIN, NOW)
    key = ec.generate_private_key(ec.SECP256R1())
    constraints = LabelConstraints({"*": ("*",), "env": ("dev",)}, "/host/web1/")
    return HostAuthority(root.issue_host(key.public_key(), "web1", constraints, NOW), key, root.certificate)
