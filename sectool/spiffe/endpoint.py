"""Asking another trust domain's bundle endpoint for its bundle (SPIFFE Federation, 5.2.1.4 and 5.2.2.4).

    https_web      TLS as in a browser: the public CAs of this host, and the name in the URL
    https_spiffe   an X.509-SVID with exactly the SPIFFE ID that was configured, vouched for by that domain's own bundle

Redirects are followed a few times, each under the same demands as the first URL, and never remembered.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from urllib.parse import urljoin

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import SectoolError
from sectool.httpget import Response, fetch
from sectool.identity.bundle import MAX_DOCUMENT, SpiffeBundle, parse_bundle
from sectool.identity.federation import Profile, Source
from sectool.identity.profile import Profile as Certificate

TIMEOUT_S: Final = 10.0  # for the bundle, redirects included
MAX_REDIRECTS: Final = 3
_MOVED: Final = frozenset((301, 302, 303, 307, 308))


def fetch_bundle(
    source: Source,
    trust_domain: str,
    anchors: Iterable[Certificate],
    *,
    timeout_s: float = TIMEOUT_S,
    web_roots: Path | None = None,
) -> SpiffeBundle:
    """The bundle that the endpoint publishes for `trust_domain` now. Raises SectoolError; blocks, so call in a thread.

    `anchors` are the roots, known so far, of the domain that `source.endpoint_id` is in. `web_roots`: a PEM file of
    CAs instead of the system's, for https_web.
    """
    tls = _context(source, list(anchors), web_roots)
    url, end = source.url, time.monotonic() + timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        answer = fetch(
            url,
            timeout_s=max(0.001, end - time.monotonic()),
            limit=MAX_DOCUMENT,
            headers={"Accept": "application/json"},
            tls=tls,
            check=lambda sock: _check(source, sock),
        )
        if answer.status == 200:
            return parse_bundle(answer.body, trust_domain)
        url = _moved(source, url, answer)
    raise SectoolError(f"{source.url} redirects more than {MAX_REDIRECTS} times", "ask who runs the endpoint")


def _context(source: Source, anchors: list[Certificate], web_roots: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if source.profile is Profile.HTTPS_WEB:
        try:
            context.load_verify_locations(web_roots) if web_roots else context.load_default_certs()
        except (OSError, ssl.SSLError) as error:
            raise SectoolError(f"{web_roots} holds no CA certificates in PEM: {error}") from None
        return context
    if not anchors:
        raise SectoolError(
            f"nothing is known yet to verify {source.endpoint_id} with",
            "give its trust domain's bundle once with --bundle FILE, from a source you trust",
        )
    context.check_hostname = False  # a SPIFFE ID is the name that counts, see _check
    context.verify_mode = ssl.CERT_REQUIRED
    pem = "".join(root.certificate.public_bytes(Encoding.PEM).decode("ascii") for root in anchors)
    context.load_verify_locations(cadata=pem)
    return context


def _check(source: Source, sock: ssl.SSLSocket) -> None:
    """The chain is verified by now; for https_spiffe the SPIFFE ID is left (X509-SVID, 5.2)."""
    if source.profile is Profile.HTTPS_WEB:
        return
    der = sock.getpeercert(binary_form=True)
    try:
        certificate = x509.load_der_x509_certificate(der or b"")
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        is_ca = constraints.ca
    except x509.ExtensionNotFound as error:
        is_ca = False
        if error.oid != x509.BasicConstraints.oid:
            raise SectoolError(
                f"the bundle endpoint shows a certificate without SPIFFE ID, not {source.endpoint_id}"
            ) from None
    except Exception as error:  # the parser has many exception types; each means the same here
        raise SectoolError(
            f"the bundle endpoint's certificate cannot be read ({type(error).__name__})"
        ) from None
    if is_ca or uris != [source.endpoint_id]:
        shown = ", ".join(uris) or "none"
        raise SectoolError(
            f"the bundle endpoint has SPIFFE ID {shown[:300]}, not {source.endpoint_id}",
            "check --endpoint-id with who runs the endpoint",
        )


def _moved(source: Source, url: str, answer: Response) -> str:
    """Where a redirect leads. Raises SectoolError for any other status and for a target that is no endpoint's URL."""
    where = answer.headers.get("location", "")
    if answer.status not in _MOVED or not where:
        raise SectoolError(f"{url} answers with status {answer.status}, not with a bundle")
    target = urljoin(url, where)
    Source(source.profile, target, source.endpoint_id)
    return target
