"""Joining with tokens over real TLS; renewal, roots and lists afterwards; what strangers try."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.caservice.client import Connection, join, sync
from sectool.caservice.server import TRIES, Server, Tries, serve
from sectool.caservice.service import RefusedError, Service
from sectool.caservice.tokens import Token, Tokens
from sectool.clock import DAY, HOUR, SECOND
from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import now_us
from sectool.identity import rollover
from sectool.identity.authority import RootAuthority
from sectool.identity.enrolment import HostIdentity, init_ca, load_host
from sectool.identity.extensions import LabelConstraints
from sectool.identity.joining import accept, prepare
from sectool.identity.lists import Lists, revoke_here
from sectool.identity.register import of_host, revoke
from sectool.identity.revocation import Entries

DOMAIN = "shop.example"
EXAMPLES = int(os.environ.get("SECTOOL_EXAMPLES", "60"))
PROD = LabelConstraints({"*": ("*",), "env": ("prod",)})


class Ca:
    """A CA with its service on a local port, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder / "ca"
        self.root = init_ca(folder, DOMAIN, now_us=now_us() - DAY)
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.service = Service(self.dir, self.root, lambda kind, fields: self.notes.append((kind, fields)))
        self.server = Server(self.service)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"https://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._task: asyncio.Task[None]

        async def main() -> None:
            ready = asyncio.Event()
            self._task = asyncio.ensure_future(serve(self.server, "127.0.0.1", self.port, ready))
            await ready.wait()
            started.set()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(main()), daemon=True)
        self._thread.start()
        assert started.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    def token(
        self, name: str = "", ttl_s: int = 60, constraints: LabelConstraints = PROD, at: int | None = None
    ) -> Token:
        root = rollover.status(self.dir, now_us()).roots[0].fingerprint.hex()
        return Tokens(self.dir).create(
            self.url, root, name, constraints, ttl_s, now_us() if at is None else at
        )


@pytest.fixture
def ca(tmp_path: Path) -> Iterator[Ca]:
    made = Ca(tmp_path / "at-ca")
    yield made
    made.close()


def joined(ca: Ca, state: Path, name: str = "web-1") -> HostIdentity:
    return accept(state, join(ca.token(), prepare(state, name, None)), now_us())


def catch_up(ca: Ca, host: HostIdentity, **more: Any) -> dict[str, Any]:
    return sync(ca.url, host.authority, host.bundle.roots[DOMAIN], **more)


def test_a_host_joins_with_nothing_but_a_token(ca: Ca, tmp_path: Path) -> None:
    token = Token.decode(ca.token("web-1").encode())
    assert token.secret not in repr(token)
    assert token.secret not in (ca.dir / "tokens.json").read_text()
    host = accept(tmp_path, join(token, prepare(tmp_path, "web-1", None)), now_us())
    assert (host.name, dict(host.labels)) == ("web-1", {"env": "prod"})
    assert not host.constraints.permits("env", "dev")
    assert [kind for kind, _ in ca.notes] == ["enrolled"]
    assert [(kept.state, kept.used_by) for kept in Tokens(ca.dir).all()] == [("used", "web-1")]


def test_a_token_is_good_once_for_its_host_until_it_expires(ca: Ca, tmp_path: Path) -> None:
    request = prepare(tmp_path, "web-1", None)

    def refused(token: Token) -> str:
        with pytest.raises(SectoolError) as error:
            join(token, request)
        return error.value.message

    other = ca.token("web-2")
    assert "web-2" in refused(other)
    used = ca.token()
    join(used, request)
    unknown = refused(used)  # replayed
    assert refused(ca.token(ttl_s=1, at=now_us() - 2 * SECOND)) == unknown
    assert refused(replace(ca.token(), secret="00" * 32)) == unknown
    assert refused(replace(ca.token(), secret="zz")) == unknown
    assert refused(replace(ca.token(), id="nobody")) == unknown
    revoked = ca.token()
    Tokens(ca.dir).revoke(revoked.id, now_us())
    assert refused(revoked) == unknown
    with pytest.raises(UsageError):
        Tokens(ca.dir).revoke(revoked.id, now_us())


def test_two_at_once_with_one_token_give_one_host(ca: Ca) -> None:
    token, got = ca.token(), []

    def attempt(n: int) -> None:
        try:
            kept = Tokens(ca.dir).consume(token.id, token.secret, f"host-{n}", now_us())
        except CredentialError:
            return
        got.append(kept.used_by)

    threads = [threading.Thread(target=attempt, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_the_secret_is_told_to_no_server_but_the_one_whose_root_is_pinned(ca: Ca, tmp_path: Path) -> None:
    evil = Ca(tmp_path / "evil")
    try:
        token = ca.token()
        request = prepare(tmp_path / "h", "web-1", None)
        with pytest.raises(CredentialError, match="does not know the root"):
            join(replace(token, url=evil.url), request)
        # One that knows the real root's certificate, and answers with it, has not its key.
        evil.service.ca_dir, before = ca.dir, evil.service.ca_dir
        with pytest.raises(CredentialError, match="no root we trust"):
            join(replace(token, url=evil.url), request)
        evil.service.ca_dir = before
        assert evil.notes == []
        assert [kept.state for kept in Tokens(ca.dir).all()] == ["open"]
    finally:
        evil.close()


def test_an_enrolled_host_renews_and_hears_of_revocations_and_roots(ca: Ca, tmp_path: Path) -> None:
    host = joined(ca, tmp_path / "a")
    joined(ca, tmp_path / "b", "web-2")
    said = catch_up(ca, host, request=make_request_for(tmp_path / "a", "web-1"))
    renewed = accept(tmp_path / "a", said["answer"].encode(), now_us())
    assert renewed.authority.key_id != host.authority.key_id
    assert renewed.constraints == host.constraints
    assert said["lists"] == []
    mine = revoke_here(
        tmp_path / "a",
        renewed,
        Lists(tmp_path / "a", renewed.bundle, now_us()),
        Entries(frozenset({"aa"})),
        now_us(),
    )
    said = catch_up(ca, renewed, own_list=mine.pem)
    assert said["lists"] == [mine.pem.decode()]
    # Someone who waits hears at once.
    heard: list[dict[str, Any]] = []
    waiting = threading.Thread(target=lambda: heard.append(catch_up(ca, renewed, digest=said["digest"])))
    waiting.start()
    listed = revoke(ca.dir, ca.root, of_host(ca.dir, "web-2", now_us()), now_us())
    waiting.join(15)
    assert listed.pem.decode() in heard[0]["lists"]
    with pytest.raises(SectoolError, match="revoked"):
        catch_up(ca, load_host(tmp_path / "b"))


def make_request_for(state: Path, name: str) -> bytes:
    return prepare(state, name, None, force=True)


def test_what_an_enrolled_host_may_not_do(ca: Ca, tmp_path: Path) -> None:
    a, b = joined(ca, tmp_path / "a"), joined(ca, tmp_path / "b", "web-2")
    with pytest.raises(SectoolError, match="same host"):
        catch_up(ca, a, request=make_request_for(tmp_path / "a", "web-2"))
    theirs = revoke_here(
        tmp_path / "b", b, Lists(tmp_path / "b", b.bundle, now_us()), Entries(frozenset({"1"})), now_us()
    )
    with pytest.raises(SectoolError, match="but its own"):
        catch_up(ca, a, own_list=theirs.pem)
    # A certificate of its own for another's name, or for a workload of its, is no agent's.
    with pytest.raises(SectoolError):
        connection = Connection(ca.url, a.authority)
        fields = {
            "host": b.authority.certificate.public_bytes(Encoding.PEM).decode(),
            "lists": [],
            "digest": "",
        }
        connection.ask("POST", "/v1/sync", json.dumps(fields).encode())
    with pytest.raises(SectoolError, match="certificate"):
        Connection(ca.url).ask("POST", "/v1/sync", b"{}")


def test_a_joining_host_whose_clock_is_wrong_is_told(ca: Ca, tmp_path: Path) -> None:
    """Its token is spent, but the answer can be taken once the clock is set."""
    answer = join(ca.token(), prepare(tmp_path, "web-1", None))
    with pytest.raises(UsageError) as error:
        accept(tmp_path, answer, now_us() - HOUR)
    assert "clock" in error.value.hint
    assert accept(tmp_path, answer, now_us()).name == "web-1"


def raw(ca: Ca, data: bytes, *, timeout: float = 10.0) -> bytes:
    """Send bytes over TLS; what comes back until the end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    out = b""
    with (
        socket.create_connection(("127.0.0.1", ca.port), timeout) as plain,
        context.wrap_socket(plain) as sock,
    ):
        sock.sendall(data)
        with contextlib.suppress(OSError):
            while got := sock.recv(65_536):
                out += got
    return out


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /v1/roots HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"\0\0\0\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", b"4"),
        (b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nContent-Length: 40000\r\n\r\n" + b"a" * 40_000, b"413"),
        (b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n[]", b"400"),
        (b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", b"400"),
        (b"POST /other HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", b"413"),
    ],
)
def test_odd_requests_are_answered_and_the_service_goes_on(ca: Ca, data: bytes, status: bytes) -> None:
    assert raw(ca, data).split(b" ", 1)[1].startswith(status)
    assert raw(ca, b"GET /v1/roots HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


def test_a_slow_client_holds_up_nobody_and_tries_are_limited(
    ca: Ca, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sectool.caservice.server.REQUEST_S", 0.3)
    with socket.create_connection(("127.0.0.1", ca.port), 10) as silent:
        joined(ca, tmp_path)
        silent.settimeout(30)
    post = b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"  # and never the rest
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", ca.port), 10) as plain, context.wrap_socket(plain) as sock:
        sock.sendall(post)
        assert sock.recv(100) == b""  # cut off
    tries = Tries()
    assert [tries.take("a", 0.0) for _ in range(int(TRIES) + 1)] == [True] * int(TRIES) + [False]
    assert tries.take("b", 0.0) and tries.take("a", 6.0)
    for _ in range(int(TRIES)):
        answer = raw(ca, b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    assert answer.startswith(b"HTTP/1.1 429")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("ca")
    init_ca(folder, DOMAIN)
    return Service(folder / "ca", RootAuthority.load(folder / "ca"), lambda *_: None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda more: st.lists(more, max_size=3) | st.dictionaries(st.text(max_size=8), more, max_size=3),
    max_leaves=6,
)
BODIES = st.binary(max_size=200) | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("id", "secret", "request", "host", "lists", "digest"), JSON)
).map(lambda fields: json.dumps(fields).encode())


@given(BODIES, st.binary(max_size=50))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_body_is_refused_in_order(service: Service, body: bytes, leaf: bytes) -> None:
    """No token, no certificate: RefusedError, and nothing else, whatever is said."""
    with pytest.raises(RefusedError):
        service.enroll(body, now_us())
    with pytest.raises(RefusedError):
        service.sync(leaf, body, now_us())


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda b: "join1." + b.hex()))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Token.decode(text)


def test_a_token_survives_its_text() -> None:
    token = Token("https://ca.example:8443", "ab" * 32, "1", "cd" * 32)
    assert Token.decode(f" {token.encode()}\n") == token
