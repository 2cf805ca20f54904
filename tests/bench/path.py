"""What the code on the handshake path costs, without the kernel: all packets of a connection, two enforcers in memory.

`cpu` is process CPU time per connection and host of everything between a packet's arrival and its verdict: parsing,
credential check (cached, as for any workload seen before), policy, Noise, rebuilding, the event. `x25519` beside it is
the public-key work alone that a full Noise IX handshake costs a host: one key, three exchanges. The cases named
`session` are connections under a session that one full handshake has left: no public-key work at all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from nfq import datapath
from nfq.core import Result
from nfq.noise import KeyPair
from sectool.identity.authority import RootAuthority
from tests.bench.rows import Row, compare, row
from tests.nfq.memory import NOW_US, Host, Pair, make_pair

CONNECTIONS = 1000


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time_ns()
    result = work()
    return (time.process_time_ns() - begin) / 1000 / CONNECTIONS, result


def _packets(pair: Pair, kind: str) -> list[bytes]:
    made = []
    for i in range(CONNECTIONS):
        pair.sport, pair.isn = 1024 + i, 7 + 1000 * i
        made.append(bytes(getattr(pair, kind)()))
    return made


def _all(host: Host, packets: list[bytes], outbound: bool) -> list[bytes]:
    results: list[Result] = [datapath.handle(host.core, p, outbound, False, host.now_us) for p in packets]
    return [bytes(r.packet) if r.packet is not None else p for r, p in zip(results, packets, strict=True)]


def one_round(root: RootAuthority) -> dict[str, float]:
    """Microseconds per connection: initiator and responder, full and under a session, and X25519 alone."""
    full, session = make_pair(root), make_pair(root)
    session.establish()
    floor, _ = _timed(_public_key_work)
    a, b = _connections(full)
    c, d = _connections(session)
    return {"x25519": floor, "initiator": a, "responder": b, "initiator session": c, "responder session": d}


def _connections(pair: Pair) -> tuple[float, float]:
    """Make connections, each step of all of them in turn; microseconds per connection of initiator and responder."""
    before = len(pair.a.core.live)
    kinds = {k: _packets(pair, k) for k in ("syn", "synack", "ack", "reply")}
    a = b = 0.0
    for kind, to_b in (("syn", True), ("synack", False), ("ack", True)):
        sender, receiver = (pair.a, pair.b) if to_b else (pair.b, pair.a)
        sent, wire = _timed(lambda s=sender, k=kind: _all(s, kinds[k], True))  # type: ignore[misc]
        got, _ = _timed(lambda r=receiver, w=wire: _all(r, w, False))  # type: ignore[misc]
        a, b = (a + sent, b + got) if to_b else (a + got, b + sent)
    heard, _ = _timed(lambda: _all(pair.a, kinds["reply"], False))
    if {len(host.core.live) for host in (pair.a, pair.b)} != {before + CONNECTIONS}:
        raise AssertionError("not all connections were made")
    return a + heard, b


def _public_key_work() -> None:
    peer = KeyPair.generate().public
    for _ in range(CONNECTIONS):
        key = X25519PrivateKey.generate()
        key.public_key().public_bytes_raw()
        for _ in range(3):
            key.exchange(X25519PublicKey.from_public_bytes(peer))


def rows(rounds: int) -> list[Row]:
    """CPU microseconds per connection of either side, with the ratio to bare X25519."""
    with tempfile.TemporaryDirectory() as folder:
        root = RootAuthority.create(Path(folder) / "ca", "bench.example", NOW_US)
        one_round(root)  # imports, caches, certificates
        measured = [one_round(root) for _ in range(rounds)]
    made = {
        case: row("path", case, "cpu_per_connection", "µs", [m[case] for m in measured])
        for case in measured[0]
    }
    base = made.pop("x25519")
    return [base, *(compare(one, base) for one in made.values())]
