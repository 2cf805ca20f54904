"""The DER that we write is what the library reads, and would write."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography import x509

from sectool.identity.der import OCTET_STRING, element, extension, oid, time


@pytest.mark.parametrize(
    ("length", "head"),
    [(0, "0400"), (127, "047f"), (128, "048180"), (255, "0481ff"), (256, "04820100"), (65535, "0482ffff")],
)
def test_lengths_take_as_few_bytes_as_they_can(length: int, head: str) -> None:
    assert element(OCTET_STRING, bytes(length)) == bytes.fromhex(head) + bytes(length)


@pytest.mark.parametrize(
    ("dotted", "der"), [("2.5.29.17", "0603551d11"), ("1.2.840.10045.4.3.2", "06082a8648ce3d040302")]
)
def test_object_identifiers(dotted: str, der: str) -> None:
    assert oid(dotted) == bytes.fromhex(der)


def test_times_change_their_form_with_2050() -> None:
    assert time(datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)) == b"\x17\x0d491231235959Z"
    assert time(datetime(2050, 1, 1, tzinfo=UTC)) == b"\x18\x0f20500101000000Z"


def test_an_extension_says_critical_only_when_it_is() -> None:
    value = x509.BasicConstraints(False, None).public_bytes()
    assert extension(oid("2.5.29.19"), value, critical=True) == bytes.fromhex("300c0603551d130101ff04023000")
    assert extension(oid("2.5.29.19"), value, critical=False) == bytes.fromhex("30090603551d1304023000")
