from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.spiffe import SpiffeId


@pytest.mark.parametrize(
    ("text", "domain", "path"),
    [
        ("spiffe://example.org", "example.org", ""),
        ("spiffe://a/b", "a", "/b"),
        ("spiffe://1.2_3-4/Host/web.1/wl/_x-", "1.2_3-4", "/Host/web.1/wl/_x-"),
        ("spiffe://example.org/...", "example.org", "/..."),
        ("spiffe://" + "a" * 128, "a" * 128, ""),
        ("spiffe://a/" + "b" * 2037, "a", "/" + "b" * 2037),
    ],
)
def test_accepts_canonical_ids(text: str, domain: str, path: str) -> None:
    parsed = SpiffeId.parse(text)
    assert (parsed.trust_domain, parsed.path) == (domain, path)
    assert str(parsed) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "spiffe:///path",
        "SPIFFE://example.org/a",
        "https://example.org/a",
        "spiffe://Example.org/a",
        "spiffe://example.org:443/a",
        "spiffe://user@example.org/a",
        "spiffe://example.org/",
        "spiffe://example.org/a/",
        "spiffe://example.org//a",
        "spiffe://example.org/./a",
        "spiffe://example.org/a/../b",
        "spiffe://example.org/a?b",
        "spiffe://example.org/a#b",
        "spiffe://example.org?b",
        "spiffe://example.org/a%20b",
        "spiffe://example.org/ä",
        "spiffe://exämple.org/a",
        "spiffe://example.org/a\n",
        "spiffe://example.org\n",
        " spiffe://example.org/a",
        "spiffe://-example.org",
        "spiffe://example.org.",
        "spiffe://" + "a" * 129,
        "spiffe://a/" + "b" * 2038,
    ],
)
def test_refuses_everything_else(text: str) -> None:
    with pytest.raises(CredentialError) as refused:
        SpiffeId.parse(text)
    assert refused.value.reason == DropReason.SPIFFE_ID_INVALID


@given(st.one_of(st.text(), st.text("spiffe:/ab.-_%").map("spiffe://".__add__)))
def test_any_text_gives_an_id_that_prints_back_or_a_refusal(text: str) -> None:
    try:
        parsed = SpiffeId.parse(text)
    except CredentialError as error:
        assert error.reason == DropReason.SPIFFE_ID_INVALID
    else:
        assert str(parsed) == text
        assert not {".", "..", ""} & set(parsed.path.split("/")[1:])
