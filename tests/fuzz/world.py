"""What targets share: a trust domain with two hosts, and a handshake between them. Made once, when first asked for."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.serialization import Encoding

from nfq.flow import LocalWorkload
from nfq.handshake import Answer, Decision, Grant, Greeting, Hello
from nfq.noise import TransportKeys
from sectool.identity.authority import RootAuthority
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import Verifier
from tests.nfq.memory import NOW_US, Host, make_host

__all__ = ["NOW_US", "Hosts", "Shaken", "hosts", "root", "shaken"]


class Shaken(NamedTuple):
    """A full handshake with all its messages."""

    hello: Hello
    syn: bytes
    answer: bytes
    said: Answer
    keys: TransportKeys


@cache
def root() -> RootAuthority:
    """The root of the trust domain."""
    with tempfile.TemporaryDirectory(prefix="st-fuzz-") as folder:
        return RootAuthority.create(Path(folder) / "ca", "lab.example", NOW_US)


class Hosts(NamedTuple):
    """A client host with workload web, and a server host with workload db on port 5432."""

    a: Host
    b: Host
    web: LocalWorkload
    db: LocalWorkload
    verifier: Verifier  # trusts the root


@cache
def hosts() -> Hosts:
    """Enrolled with the same root."""
    a, b = make_host(root(), "a"), make_host(root(), "b")
    web, db = a.workload("web", {"app": "web"}), b.workload("db", {"app": "db"}, port=5432)
    pem = root().certificate.public_bytes(Encoding.PEM).decode()
    return Hosts(a, b, web, db, Verifier(TrustBundle().with_root("lab.example", pem)))


@cache
def shaken(protocol: int = 0) -> Shaken:
    """A handshake between them that grants a session."""
    mine, theirs, verifier = hosts()[2:]
    hello = Hello(mine.static, mine.blob, NOW_US, 3, protocol=protocol)
    greeting = Greeting(hello.payload, NOW_US, protocol=protocol)
    greeting.peer(verifier, NOW_US)
    answer, keys = greeting.answer(theirs.static, theirs.blob, Decision.PLAIN, suite=1, grant=Grant(120))
    return Shaken(hello, hello.payload, answer, hello.read(answer, verifier, NOW_US), keys)
