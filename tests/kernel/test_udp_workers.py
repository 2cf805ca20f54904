"""Datagram flows shared between several packet workers: each meets one, with handshake, session and data."""

from __future__ import annotations

import pytest

from nfq import rules
from nfq.steering import worker_of
from tests.kernel.datagrams import Echo, ask, connected
from tests.kernel.test_workers import ENCRYPTED, Teams, key_of
from tests.kernel.test_workers import teams as teams

pytestmark = pytest.mark.kernel

FLOWS = 10


@pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
@pytest.mark.parametrize("counts", [(2, 2), (1, 3)], ids=lambda counts: "{}x{}".format(*counts))
def test_datagram_flows_are_shared_between_workers(teams: Teams, counts: tuple[int, int], v6: bool) -> None:
    for team, count in zip(teams.both, counts, strict=True):
        team.start(count, ENCRYPTED)
        with team.space.enter():
            rules.install(rules.RulesConfig(workers=count, beyond_tcp=True), team.first.run)
    server = Echo(teams.b.first, v6=v6)
    address = teams.pair.b.v6 if v6 else teams.pair.b.v4
    clients = [connected(teams.a.first, address, server.port) for _ in range(FLOWS)]
    for turn in range(3):
        for client in clients:
            data = b"%d" % turn + bytes(1000)
            assert ask(client, data) == data
    for team, count in zip(teams.both, counts, strict=True):
        expected = [0] * count
        for client in clients:
            expected[worker_of(key_of(client), count)] += 1
        assert team.live() == expected
        assert not any(share.status()["reasons"].get("unknown_flow") for share in team.workers)
    server.close()
