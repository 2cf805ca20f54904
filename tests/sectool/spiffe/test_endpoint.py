"""Bundle endpoints, both ends over real TLS on the loopback device: who is believed, and what is too much."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.httpget import fetch
from sectool.identity.bundle import MAX_DOCUMENT
from sectool.identity.federation import Profile, Source
from sectool.spiffe.endpoint import fetch_bundle
from sectool.spiffe.publish import MAX_HEAD, Publisher, SvidContext, web_context

from .conftest import Domain

ENDPOINT_ID = "spiffe://partner.example/host/gate-1/bundle-endpoint"


@contextlib.contextmanager
def published(document: Callable[[], str], tls: ssl.SSLContext) -> Iterator[int]:
    """The product's own endpoint on a port of its own, in a thread."""
    started: list[int] = []
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        async with await Publisher(document, tls).listen("127.0.0.1", 0) as server:
            started.append(server.sockets[0].getsockname()[1])
            ready.set()
            await server.serve_forever()

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    task = loop.create_task(serve())
    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(20)
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(20)
        loop.close()


@contextlib.contextmanager
def scripted(tls: ssl.SSLContext | None, *answers: bytes) -> Iterator[int]:
    """A server that says what it is told to, one answer a connection; without TLS it says it in the clear."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            for answer in answers:
                with contextlib.suppress(OSError):
                    plain, _ = listener.accept()
                    plain.settimeout(20)
                    with plain:
                        sock = tls.wrap_socket(plain, server_side=True) if tls is not None else plain
                        with sock:
                            sock.recv(65_536)
                            sock.sendall(answer)
                            while answer == b"" and sock.recv(1):
                                continue

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
    thread.join(20)


def reply(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.fixture
def svids(domain: Domain) -> SvidContext:
    made = SvidContext(domain.host.authority)
    made.renew(now_us())
    return made


def spiffe(port: int, endpoint_id: str = ENDPOINT_ID) -> Source:
    return Source(Profile.HTTPS_SPIFFE, f"https://127.0.0.1:{port}/bundle.json", endpoint_id)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A web server's certificate for 127.0.0.1, and the file of the CA that it is its own."""
    folder, key = tmp_path_factory.mktemp("web"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "web")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "chain.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    return web_context(folder / "chain.pem", folder / "key.pem"), folder / "chain.pem"


def test_a_bundle_comes_from_a_spiffe_endpoint(domain: Domain, svids: SvidContext) -> None:
    assert svids.spiffe_id == ENDPOINT_ID
    with published(domain.bundle.to_json, svids.context) as port:
        assert fetch_bundle(spiffe(port), "partner.example", domain.roots) == domain.bundle


def test_the_endpoint_renews_its_svid(domain: Domain, svids: SvidContext) -> None:
    with published(domain.bundle.to_json, svids.context) as port:
        first = ssl.get_server_certificate(("127.0.0.1", port))
        svids.renew(now_us())
        assert ssl.get_server_certificate(("127.0.0.1", port)) == first
        svids.renew(now_us() + 1_900_000_000)
        assert ssl.get_server_certificate(("127.0.0.1", port)) != first


def test_only_the_spiffe_id_that_was_configured_is_believed(domain: Domain, svids: SvidContext) -> None:
    with published(domain.bundle.to_json, svids.context) as port:
        wrong = spiffe(port, "spiffe://partner.example/host/gate-2/bundle-endpoint")
        with pytest.raises(SectoolError, match="has SPIFFE ID"):
            fetch_bundle(wrong, "partner.example", domain.roots)


def test_another_domains_svid_is_not_believed(
    domain: Domain, svids: SvidContext, make_domain: Callable[[str], Domain]
) -> None:
    other = make_domain("other.example")
    with published(domain.bundle.to_json, svids.context) as port:
        with pytest.raises(SectoolError, match="not who it should be"):
            fetch_bundle(spiffe(port), "partner.example", other.roots)
        with pytest.raises(SectoolError, match="nothing is known yet"):
            fetch_bundle(spiffe(port), "partner.example", ())


def test_a_bundle_comes_from_a_web_endpoint(domain: Domain, web: tuple[ssl.SSLContext, Path]) -> None:
    tls, roots = web
    with published(domain.bundle.to_json, tls) as port:
        source = Source(Profile.HTTPS_WEB, f"https://127.0.0.1:{port}/")
        assert fetch_bundle(source, "partner.example", (), web_roots=roots) == domain.bundle
        with pytest.raises(SectoolError, match="not who it should be"):
            fetch_bundle(source, "partner.example", ())
        elsewhere = Source(Profile.HTTPS_WEB, f"https://localhost:{port}/")
        with pytest.raises(SectoolError, match="not who it should be"):
            fetch_bundle(elsewhere, "partner.example", (), web_roots=roots)


def test_redirects_are_followed_a_few_times_and_never_out_of_tls(domain: Domain, svids: SvidContext) -> None:
    body = domain.bundle.to_json().encode()

    def moved(where: str) -> bytes:
        return reply("302 Found", Location=where)

    with scripted(svids.context, moved("/a"), moved("/b"), reply("200 OK", body)) as port:
        assert fetch_bundle(spiffe(port), "partner.example", domain.roots) == domain.bundle
    with (
        scripted(svids.context, *[moved("/again")] * 4) as port,
        pytest.raises(SectoolError, match="redirects more than 3 times"),
    ):
        fetch_bundle(spiffe(port), "partner.example", domain.roots)
    for where in ("http://127.0.0.1/x", "https://u:p@127.0.0.1/", "file:///etc/passwd"):
        with (
            scripted(svids.context, moved(where)) as port,
            pytest.raises(SectoolError, match="bundle endpoint"),
        ):
            fetch_bundle(spiffe(port), "partner.example", domain.roots)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply("404 Not Found"), "status 404"),
        (reply("200 OK", b"{}"), "no list 'keys'"),
        (reply("200 OK", b" " * (MAX_DOCUMENT + 1)), "more than"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200, "cannot be asked"),
        (b"hello\r\n", "cannot be asked"),
        (reply("302 Found"), "status 302"),
    ],
)
def test_answers_that_are_no_bundle(domain: Domain, svids: SvidContext, answer: bytes, words: str) -> None:
    with scripted(svids.context, answer) as port, pytest.raises(SectoolError, match=words):
        fetch_bundle(spiffe(port), "partner.example", domain.roots)


def test_nobody_is_waited_for_longer_than_said(domain: Domain, svids: SvidContext) -> None:
    for tls in (svids.context, None):  # silent after the handshake, and instead of it
        with scripted(tls, b"") as port, pytest.raises(SectoolError, match=r"not answered within 0\.\d+ s"):
            fetch_bundle(spiffe(port), "partner.example", domain.roots, timeout_s=0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    with pytest.raises(SectoolError, match="cannot be asked"):
        fetch_bundle(spiffe(free), "partner.example", domain.roots)


def test_the_endpoint_answers_get_and_nothing_else(domain: Domain, svids: SvidContext) -> None:
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE
    with published(domain.bundle.to_json, svids.context) as port:
        url = f"https://127.0.0.1:{port}/any/path?q"
        got = fetch(url, timeout_s=20, limit=MAX_DOCUMENT, tls=trusting)
        assert (got.status, got.headers["content-type"]) == (200, "application/json")
        assert fetch(url, timeout_s=20, limit=100, tls=trusting, method="PUT").status == 405
        for request in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 2 * MAX_HEAD):
            with (
                socket.create_connection(("127.0.0.1", port), 20) as plain,
                trusting.wrap_socket(plain) as sock,
            ):
                sock.sendall(request)
                assert sock.recv(12).startswith(b"HTTP/1.1 4")
        with socket.create_connection(("127.0.0.1", port), 20) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")  # no TLS
            assert b"HTTP" not in plain.recv(100)
        assert fetch(url, timeout_s=20, limit=MAX_DOCUMENT, tls=trusting).status == 200


@pytest.mark.parametrize("url", ["ftp://x/", "https://127.0.0.1/", "http:///x", "nothing"])
def test_what_cannot_be_fetched(url: str) -> None:
    with pytest.raises(SectoolError, match="cannot be fetched"):
        fetch(url, timeout_s=1, limit=1)
