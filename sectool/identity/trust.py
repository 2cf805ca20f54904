"""The trust bundle: which roots vouch for which trust domain.

On disk it is one PEM file. A comment names the trust domain that the certificates below it are for:

    # trust domain: example.org
    -----BEGIN CERTIFICATE-----
    ...

A root that carries a SPIFFE ID must carry that very domain's; one without (another PKI's) is bound by the
comment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import CredentialError, SectoolError
from sectool.identity.files import read_file, write_atomic
from sectool.identity.profile import Profile, read_profile
from sectool.identity.spiffe import check_trust_domain

MAX_DOMAINS = 256
MAX_ROOTS = 16  # of one domain: bounds the signatures a verifier tries

_PIECE = re.compile(
    r"^#[ \t]*trust domain:[ \t]*(?P<domain>\S+)[ \t]*$"
    r"|(?P<pem>-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----)",
    re.MULTILINE,
)
_HINT = "the file holds '# trust domain: NAME' lines, each followed by that domain's root certificates in PEM"


def read_root(pem: str, trust_domain: str) -> Profile:
    """Read one self-signed root for `trust_domain`; SectoolError for anything that cannot be one."""
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode("ascii"))
        root = read_profile(certificate.public_bytes(Encoding.DER), "root")
        root.check_ca()
        root.issued_by(root)
        if root.path_length == 0:
            raise CredentialError(0, "the root may not issue host CAs (path length 0)")
        if root.uris and (named := root.spiffe_id()).trust_domain != trust_domain:
            raise CredentialError(0, f"the root is for trust domain {named.trust_domain}, not {trust_domain}")
    except (ValueError, CredentialError) as error:
        raise SectoolError(
            f"not a usable root for {trust_domain}: {error}", "give the root CA's certificate"
        ) from None
    return root


@dataclass(frozen=True, slots=True, init=False)
class TrustBundle:
    """Trust domain -> its roots. Immutable: `with_root` and `without` give new bundles."""

    roots: Mapping[str, tuple[Profile, ...]]

    def __init__(self, roots: Mapping[str, tuple[Profile, ...]] | None = None) -> None:
        """Raise SectoolError beyond MAX_DOMAINS domains or MAX_ROOTS roots of one."""
        roots = dict(roots or {})
        if len(roots) > MAX_DOMAINS:
            raise SectoolError(f"{len(roots)} trust domains; at most {MAX_DOMAINS} are supported")
        for domain, certificates in roots.items():
            if len(certificates) > MAX_ROOTS:
                raise SectoolError(
                    f"{len(certificates)} roots of {domain}; at most {MAX_ROOTS} are supported"
                )
        object.__setattr__(self, "roots", MappingProxyType(roots))

    @property
    def trust_domains(self) -> tuple[str, ...]:
        """The domains trusted, in order of the file."""
        return tuple(self.roots)

    def with_root(self, trust_domain: str, pem: str) -> TrustBundle:
        """A bundle that also trusts every certificate in `pem` for `trust_domain`."""
        check_trust_domain(trust_domain)
        found = [match["pem"] for match in _PIECE.finditer(pem) if match["pem"]]
        if not found:
            raise SectoolError(
                "there is no certificate in the PEM text", "give the root CA's certificate in PEM"
            )
        roots = list(self.roots.get(trust_domain, ()))
        for text in found:
            root = read_root(text, trust_domain)
            if all(root.fingerprint != known.fingerprint for known in roots):
                roots.append(root)
        return TrustBundle({**self.roots, trust_domain: tuple(roots)})

    def without(self, trust_domain: str) -> TrustBundle:
        """A bundle that does not trust `trust_domain`."""
        return TrustBundle({domain: roots for domain, roots in self.roots.items() if domain != trust_domain})

    def to_pem(self) -> str:
        """The text `from_pem` reads."""
        lines: list[str] = []
        for domain, roots in self.roots.items():
            lines.append(f"# trust domain: {domain}\n")
            lines += (root.certificate.public_bytes(Encoding.PEM).decode("ascii") for root in roots)
        return "".join(lines)

    @classmethod
    def from_pem(cls, text: str) -> TrustBundle:
        """Parse `to_pem`'s text; SectoolError for a certificate under no domain or unusable as a root."""
        bundle = cls()
        domain = ""
        for match in _PIECE.finditer(text):
            if match["domain"]:
                try:
                    domain = check_trust_domain(match["domain"])
                except CredentialError as error:
                    raise SectoolError(f"trust bundle: {error}", _HINT) from None
            elif not domain:
                raise SectoolError("trust bundle: a certificate stands under no trust domain", _HINT)
            else:
                bundle = bundle.with_root(domain, match["pem"])
        if text.count("-----BEGIN") != sum(1 for m in _PIECE.finditer(text) if m["pem"]):
            raise SectoolError("trust bundle: something in it is not a certificate", _HINT)
        return bundle

    @classmethod
    def load(cls, path: Path) -> TrustBundle:
        """Read a PEM file; errors of `read_file` and `from_pem`."""
        data = read_file(path, "there is no trust bundle", "enroll this host: sectool host enroll")
        return cls.from_pem(data.decode("utf-8", "replace"))

    def save(self, path: Path) -> None:
        """Write the PEM file atomically."""
        write_atomic(path, self.to_pem().encode("ascii"))
