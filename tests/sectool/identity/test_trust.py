from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.identity.trust import MAX_DOMAINS, MAX_ROOTS, TrustBundle


def pem(certificate: Any) -> str:
    return str(certificate.public_bytes(Encoding.PEM).decode())


def test_a_bundle_survives_the_file(forge: Any, tmp_path: Path) -> None:
    other = forge.sign_root(san=None)
    bundle = forge.bundle().with_root("other.example", pem(other) + pem(other))
    bundle.save(tmp_path / "trust.pem")
    again = TrustBundle.load(tmp_path / "trust.pem")
    assert again.to_pem() == bundle.to_pem()
    assert again.trust_domains == ("example.org", "other.example")
    assert [len(roots) for roots in again.roots.values()] == [1, 1]  # the same certificate once
    assert again.without("other.example").trust_domains == ("example.org",)
    assert TrustBundle.from_pem("").trust_domains == ()


def test_text_around_certificates_is_no_matter(forge: Any) -> None:
    text = f"hello\n\n#  trust domain:  example.org  \n# by hand\n{pem(forge.root)}\nbye\n"
    assert TrustBundle.from_pem(text).trust_domains == ("example.org",)


NOT_ROOTS: dict[str, Callable[[Any], str]] = {
    "a host CA": lambda f: pem(f.host),
    "a leaf": lambda f: pem(f.leaf),
    "may issue no CA": lambda f: pem(f.sign_root(path_length=0)),
    "may not sign certificates": lambda f: pem(f.sign_root(usage=f.leaf.extensions[0].value)),
    "of another domain": lambda f: pem(f.root),
    "not self-signed": lambda f: pem(f.sign_root(signer=ec.generate_private_key(ec.SECP256R1()))),
    "no certificate": lambda f: "nothing",
}


@pytest.mark.parametrize("fault", NOT_ROOTS)
def test_what_cannot_be_a_root_is_refused(forge: Any, fault: str) -> None:
    text = NOT_ROOTS[fault](forge)
    domain = "b.example" if fault == "of another domain" else "example.org"
    with pytest.raises(SectoolError):
        TrustBundle().with_root(domain, text)


def test_files_that_say_nothing_clear_are_refused(forge: Any, tmp_path: Path) -> None:
    root = pem(forge.root)
    for text in (
        root,
        "# trust domain: Example.org\n" + root,
        "# trust domain: example.org\n" + root[:200],
        "# trust domain: example.org\n" + root.replace("M", "!"),
        "# trust domain: example.org\n" + root.replace("CERTIFICATE", "PRIVATE KEY"),
    ):
        with pytest.raises(SectoolError):
            TrustBundle.from_pem(text)
    with pytest.raises(UsageError, match="does not exist"):
        TrustBundle.load(tmp_path / "none.pem")


def test_the_bundle_is_bounded(forge: Any) -> None:
    root = forge.bundle().roots["example.org"]
    with pytest.raises(SectoolError, match="trust domains"):
        TrustBundle({f"d{i}.example": root for i in range(MAX_DOMAINS + 1)})
    with pytest.raises(SectoolError, match="roots"):
        TrustBundle({"example.org": root * (MAX_ROOTS + 1)})
    with pytest.raises(CredentialError):
        TrustBundle().with_root("Not A Domain", pem(forge.root))


@given(
    st.text()
    | st.lists(
        st.sampled_from(
            [
                "# trust domain: a.b\n",
                "-----BEGIN CERTIFICATE-----",
                "-----END CERTIFICATE-----",
                "\nAAAA\n",
                "MIIB",
            ]
        )
    ).map("".join)
)
def test_arbitrary_text_gives_a_bundle_or_an_error_in_words(text: str) -> None:
    try:
        bundle = TrustBundle.from_pem(text)
    except SectoolError as error:
        assert error.message
    else:
        assert bundle.roots == {}
