"""The walk through connection tracking, over real entries: each worker looks after its own share."""

from __future__ import annotations

import socket
from collections.abc import Callable

import numpy as np
import pytest

from nfq.conntrack import ConntrackControl, FlowTuple
from nfq.core import Config, Core
from nfq.flow import Flow, State
from nfq.reconcile import Reconciler
from nfq.recorder import Recorder
from nfq.steering import worker_of
from sectool.clock import SECOND
from sectool.events import FLOW_DTYPE, Phase, Point, now_us
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import Verifier
from sectool.policy import Engine, parse
from tests.kernel.conftest import Decide, Enforcer, Namespace, Pair, allow, wait_until
from tests.kernel.test_workers import key_of
from tests.nfq.memory import MemoryPorts, Sink

pytestmark = pytest.mark.kernel

Enforce = Callable[[Namespace, Decide], Enforcer]
FLOWS = 10


class Share:
    """One of two workers, as far as the walk is concerned."""

    def __init__(self, space: Namespace, number: int, mask: int) -> None:
        self.sink = Sink()
        verifier = Verifier(TrustBundle())
        self.core = Core(Config(), Engine(parse("")), verifier, Recorder(self.sink), MemoryPorts())
        self._space = space
        with space.enter():
            self.conntrack = ConntrackControl()
        self._walks = Reconciler(self.core, self.conntrack, mask, lambda key: worker_of(key, 2) == number)

    def walk(self, at_us: int) -> None:
        """Once through everything."""
        with self._space.enter():
            self._walks.start(at_us)
            while self._walks.busy:
                self._walks.step(at_us)

    def knows(self, key: bytes, since_us: int) -> Flow:
        """Have it answer for a connection."""
        flow = Flow(key, len(key) == 36, Point.INITIATOR, State.AUTHORISED, 0, since_us)
        self.core.live.add(flow)
        return flow


def marked(share: Share, ends: list[socket.socket], mask: int) -> list[bool]:
    """Which connections are still released."""
    found = [share.conntrack.get(where(sock)) for sock in ends]
    return [entry is not None and bool(entry.mark & mask) for entry in found]


def where(sock: socket.socket) -> FlowTuple:
    """The connection of a socket that opened it."""
    (local, lport), (remote, rport) = sock.getsockname()[:2], sock.getpeername()[:2]
    return FlowTuple(
        socket.inet_pton(sock.family, local), socket.inet_pton(sock.family, remote), lport, rport
    )


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_a_worker_takes_marks_back_from_its_own_share_alone(
    pair: Pair, enforce: Enforce, family: str
) -> None:
    mask = enforce(pair.a, allow).config.mask
    listener = pair.b.listen(v6=family == "v6")
    address = pair.b.v6 if family == "v6" else pair.b.v4
    ends: list[socket.socket] = []
    owners: list[int] = []
    while len(ends) < FLOWS or len(set(owners)) < 2:  # the kernel chooses the ports, and by them the workers
        ends.append(pair.a.connect(address, listener.getsockname()[1]))
        ends[-1].sendall(b"x")
        owners.append(worker_of(key_of(ends[-1]), 2))
        assert len(ends) < 20 * FLOWS, "every connection has the same worker"
    first, second = Share(pair.a, 0, mask), Share(pair.a, 1, mask)
    now = now_us()
    known = first.knows(key_of(ends[owners.index(0)]), now)
    assert all(marked(first, ends, mask))
    first.walk(now)
    assert all(marked(first, ends, mask)), "a connection may have been released a moment ago"
    first.walk(now + 30 * SECOND)
    kept = [owner == 1 or key_of(sock) == known.key for sock, owner in zip(ends, owners, strict=True)]
    assert marked(first, ends, mask) == kept
    for n in (0, 30):
        second.walk(now + n * SECOND)
    assert marked(first, ends, mask) == [key_of(sock) == known.key for sock in ends]


def test_long_connections_are_updated_and_vanished_ones_get_their_end(pair: Pair, enforce: Enforce) -> None:
    mask = enforce(pair.a, allow).config.mask
    listener = pair.b.listen()
    client = pair.a.connect(pair.b.v4, listener.getsockname()[1])
    client.sendall(b"x" * 1000)
    share = Share(pair.a, 0, mask)
    now = now_us()
    there = share.knows(key_of(client), now - 100 * SECOND)
    gone = share.knows(key_of(client)[:-2] + b"\0\1", now - 100 * SECOND)

    def counted() -> bool:
        entry = share.conntrack.get(where(client))
        return entry is not None and entry.orig_bytes > 1000

    wait_until(counted, "the data to be counted")
    share.walk(now)
    records = [np.frombuffer(record, FLOW_DTYPE)[0] for record in share.sink.records]
    assert [(r["phase"], r["source_bytes"] > 1000) for r in records] == [
        (Phase.UPDATE, True),
        (Phase.END, False),
    ]
    assert list(share.core.live) == [there]
    assert gone is not there
