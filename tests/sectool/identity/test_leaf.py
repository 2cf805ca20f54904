"""Leaves are the library's, byte for byte, whatever stands in them."""

from __future__ import annotations

import os
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.clock import HOUR, SECOND, from_datetime, to_datetime
from sectool.errors import CredentialError
from sectool.identity.authority import HostAuthority
from sectool.identity.extensions import LABELS_OID, encode_labels
from sectool.identity.leaf import LEAF_PURPOSES, LEAF_USAGE, NO_CA, LeafMaker, authority_key, new_serial
from sectool.identity.profile import read_profile
from sectool.identity.spiffe import SpiffeId
from sectool.labels import LabelSet

EXAMPLES = int(os.environ.get("SECTOOL_LEAF_EXAMPLES", "60"))
NOW = 1_772_330_400 * SECOND
ISSUERS: tuple[Any, ...] = (ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate())
KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
SEGMENT = st.text("abzAZ09-_.", min_size=1, max_size=60).filter(lambda s: s not in (".", ".."))
NAMES = st.text("abzAZ09-", min_size=1, max_size=40)
VALUES = st.text("abzAZ09._/@:+-", max_size=100).map(lambda v: f"x{v}x")
SECONDS = st.integers(NOW // SECOND, 8_000_000_000)  # to the year 2223: both forms of a time


def by_the_library(
    issuer: Any,
    name: x509.Name,
    serial: int,
    spiffe_id: SpiffeId,
    labels: LabelSet | None,
    times: tuple[int, int],
) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .serial_number(serial)
        .public_key(KEY)
        .subject_name(x509.Name([]))
        .issuer_name(name)
        .not_valid_before(to_datetime(times[0]))
        .not_valid_after(to_datetime(times[1]))
        .add_extension(authority_key(issuer.public_key()), False)
        .add_extension(LEAF_USAGE, True)
        .add_extension(LEAF_PURPOSES, False)
        .add_extension(NO_CA, True)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe_id))]), True)
    )
    if labels is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(LABELS_OID, encode_labels(labels)), False)
    digest = None if issuer is ISSUERS[1] else SHA256()
    return builder.sign(issuer, digest).tbs_certificate_bytes


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.sampled_from(ISSUERS),
    NAMES,
    st.lists(SEGMENT, min_size=1, max_size=20),
    st.none() | st.dictionaries(NAMES.map(lambda k: f"k{k}k"), VALUES, max_size=30),
    SECONDS,
    SECONDS,
)
def test_what_is_signed_is_what_the_library_would_sign(
    issuer: Any, host: str, path: list[str], labels: dict[str, str] | None, begin: int, end: int
) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    spiffe_id = SpiffeId("example.org", "/" + "/".join(path))
    label_set = None if labels is None else LabelSet(labels)
    times = min(begin, end) * SECOND, max(begin, end) * SECOND
    leaf = LeafMaker(issuer, name).make(KEY, spiffe_id, label_set, *times)
    read = x509.load_der_x509_certificate(leaf.der)
    assert read.tbs_certificate_bytes == by_the_library(
        issuer, name, leaf.serial, spiffe_id, label_set, times
    )
    assert read.public_bytes(Encoding.DER) == leaf.der
    profile = read_profile(leaf.der, "leaf")
    profile.check_leaf()
    assert (profile.not_before_us, profile.not_after_us) == times
    if issuer is ISSUERS[0]:
        issuer.public_key().verify(read.signature, read.tbs_certificate_bytes, ec.ECDSA(SHA256()))
    else:
        issuer.public_key().verify(read.signature, read.tbs_certificate_bytes)


def test_a_part_of_a_second_is_cut_off() -> None:
    leaf = LeafMaker(ISSUERS[0], x509.Name([])).make(
        KEY, SpiffeId("example.org", "/a"), None, NOW + 999_999, NOW + HOUR + 1
    )
    read = x509.load_der_x509_certificate(leaf.der)
    assert from_datetime(read.not_valid_before_utc) == NOW
    assert from_datetime(read.not_valid_after_utc) == NOW + HOUR


def test_serial_numbers_have_nine_bytes_and_differ() -> None:
    found = {new_serial() for _ in range(200)}
    assert len(found) == 200
    assert {serial.bit_length() for serial in found} == {65}


def test_labels_that_no_extension_holds_are_refused(authority: HostAuthority) -> None:
    labels = LabelSet({f"k{n}": "v" * 127 for n in range(40)})
    with pytest.raises(CredentialError, match="bytes of labels"):
        authority.issue("/host/web1/wl/a", labels, NOW)
