"""Several packet workers on each host: every flow has one of them, all its life, and they do not need each other."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfq import rules
from nfq.steering import worker_of
from sectool.clock import DAY
from sectool.events import now_us
from sectool.identity.authority import RootAuthority
from tests.kernel.conftest import Namespace, Pair, make_pair, wait_until
from tests.kernel.hosts import (
    DOMAIN,
    POLICY,
    SHORT_S,
    Host,
    accept,
    echo,
    finish,
    own_cgroup,
    port_of,
    read_exactly,
)
from tests.kernel.test_bulk import allow_big_packets

pytestmark = pytest.mark.kernel

ENCRYPTED = POLICY.replace("app=web to call app=db", "app=web to call app=db encrypted")
FLOWS = 12
PATIENCE_S = 40.0  # stacks send again ever more seldom
Ends = tuple[socket.socket, socket.socket]


class Share(Host):
    """One worker of several."""

    def ready(self) -> None:
        """Wait until it enforces; rules are the team's business."""
        self._await_policy()


class Team:
    """A host with several workers, each with an agent of its own that knows the same workloads."""

    def __init__(self, space: Namespace, name: str, root: RootAuthority, labels: dict[str, str]) -> None:
        self.space, self._name, self._root, self._labels = space, name, root, labels
        self.workers: list[Share] = []
        self.spare: list[Share] = []
        self.first = self._share()
        self.spare.append(self.first)

    def _share(self) -> Share:
        share = Share(self.space, self._name, self._root, self._labels)
        if self.workers or self.spare:
            share.run.rmdir()
            share.run, share.known, share.own = self.first.run, self.first.known, self.first.own
        return share

    def settings(self, number: int, count: int, **more: object) -> dict[str, object]:
        """What a worker is told beside the usual."""
        run = self.first.run
        return {
            "number": number,
            "workers": count,
            "ring": str(run / f"ring-{number}"),
            "journal": str(run / f"flows-worker-{number}"),
            "journals": [str(path) for path in run.glob("flows-worker-?")],
            **more,
        }

    def start(self, count: int, text: str = ENCRYPTED, **more: object) -> None:
        """That many workers, one after the other as the agent starts them, and then the rules."""
        for number in range(count):
            share = self.spare.pop(0) if self.spare else self._share()
            self.workers.append(share)
            share.start(text, **self.settings(number, count, **more))
            share.ready()
        with self.space.enter():
            rules.install(rules.RulesConfig(workers=count), self.first.run)

    def again(self, number: int) -> None:
        """Another worker in place of one that has ended."""
        share = self.workers[number]
        share.restart(ENCRYPTED, **self.settings(number, len(self.workers)))

    def kill(self) -> None:
        """All of them, as a machine's memory shortage would."""
        for share in self.workers:
            share.kill()
            share._thread.join(10)
            share.control.close()
        self.spare = self.workers
        self.workers = []

    def live(self) -> list[int]:
        """How many live flows each worker knows."""
        return [int(share.status()["live"]) for share in self.workers]

    def close(self) -> None:
        """End the workers, and take away rules and files."""
        for share in self.workers:
            if share.worker.poll() is None:
                share.stop()
            share.control.close()
        with self.space.enter():
            rules.remove(self.first.run)
        shutil.rmtree(self.first.run)


class Teams:
    """Two such hosts."""

    def __init__(self, pair: Pair, a: Team, b: Team) -> None:
        self.pair, self.a, self.b = pair, a, b

    @property
    def both(self) -> tuple[Team, Team]:
        """Initiator and responder."""
        return self.a, self.b

    def dial(self, listener: socket.socket, v6: bool = False) -> socket.socket:
        """Begin to connect from a to b."""
        return self.a.first.dial(self.pair.b.v6 if v6 else self.pair.b.v4, port_of(listener))

    def connect(self, count: int, v6: bool = False) -> list[Ends]:
        """Connections over which a line went both ways."""
        listener = self.b.first.listen(v6=v6)
        made = []
        for _ in range(count):
            client = finish(self.dial(listener, v6))
            made.append((client, accept(listener)))
            echo(*made[-1], b"first line")
        return made


@pytest.fixture
def teams(tmp_path: Path) -> Iterator[Teams]:
    """Hosts a (app=web) and b (app=db) whose workers are still to be started."""
    root = RootAuthority.create(tmp_path / "ca", DOMAIN, now_us() - DAY)
    with own_cgroup(secrets.token_hex(4)), make_pair() as pair, contextlib.ExitStack() as stack:
        made = []
        for name, space, labels in (("a", pair.a, {"app": "web"}), ("b", pair.b, {"app": "db"})):
            made.append(Team(space, name, root, labels))
            stack.callback(made[-1].close)
        yield Teams(pair, *made)


def key_of(sock: socket.socket) -> bytes:
    """The flow key of a connected socket."""
    (local, lport), (remote, rport) = sock.getsockname()[:2], sock.getpeername()[:2]
    packed = b"".join(socket.inet_pton(sock.family, address) for address in (local, remote))
    ports: bytes = struct.pack(">HH", lport, rport)
    return packed + ports


def shares(ends: list[Ends], workers: int) -> list[int]:
    """How many of the connections belong to each worker."""
    counts = [0] * workers
    for client, _ in ends:
        counts[worker_of(key_of(client), workers)] += 1
    return counts


@pytest.mark.parametrize("counts", [(2, 2), (3, 1), (1, 2)], ids=lambda counts: "{}x{}".format(*counts))
def test_flows_are_shared_between_the_workers_and_each_stays_with_its_own(
    teams: Teams, counts: tuple[int, int]
) -> None:
    for team, count in zip(teams.both, counts, strict=True):
        team.start(count)
    ends = teams.connect(FLOWS) + teams.connect(FLOWS, v6=True)
    for pair in ends:
        echo(*pair, bytes(20_000))
    for team, count in zip(teams.both, counts, strict=True):
        expected = shares(ends, count)
        assert min(expected) > 0
        assert team.live() == expected
        statuses = [share.status() for share in team.workers]
        assert [status["encrypted"] for status in statuses] == expected
        assert all(status["bulk"]["packets"] > 0 for status in statuses)
        assert not any(status["reasons"].get("unknown_flow") for status in statuses)


def _not_made(dialled: list[socket.socket], patience_s: float) -> list[socket.socket]:
    """Those of some beginning connections that are not made in that time."""
    end = time.monotonic() + patience_s
    left = []
    for sock in dialled:
        try:
            finish(sock, max(0.0, end - time.monotonic()))
        except TimeoutError:
            left.append(sock)
    return left


def test_one_of_two_workers_dies_and_the_other_one_does_not_notice(teams: Teams) -> None:
    for team in teams.both:
        team.start(2)
    ends = teams.connect(FLOWS)
    of_first = [pair for pair in ends if worker_of(key_of(pair[0]), 2) == 0]
    of_second = [pair for pair in ends if pair not in of_first]
    assert of_first
    assert of_second
    teams.b.workers[0].kill()
    for pair in of_second:
        echo(*pair, b"as before" * 1000)
    for client, server in of_first:
        client.sendall(b"waits")
        server.settimeout(SHORT_S / 4)
        with pytest.raises(TimeoutError):
            server.recv(1)
        server.settimeout(PATIENCE_S)
    listener = teams.b.first.listen()
    dialled = [teams.dial(listener) for _ in range(FLOWS)]
    waiting = _not_made(dialled, SHORT_S)
    assert 0 < len(waiting) < FLOWS, "new ones of the other's share are made"
    teams.b.again(0)
    for client, server in of_first:
        assert server.recv(100) == b"waits"
        echo(client, server, b"goes on" * 1000)
    assert _not_made(waiting, PATIENCE_S) == []
    servers = {sock.getpeername(): sock for sock in (accept(listener) for _ in dialled)}
    for client in dialled:
        client.settimeout(10)
        echo(client, servers[client.getsockname()], b"made after all")
    assert sum(teams.b.live()) == 2 * FLOWS


def test_another_number_of_workers_after_a_restart_keeps_all_flows(teams: Teams) -> None:
    for team in teams.both:
        team.start(2)
    ends = teams.connect(FLOWS) + teams.connect(FLOWS, v6=True)
    for count in (3, 1, 2):
        teams.b.kill()
        teams.b.start(count)
        for pair in ends:
            echo(*pair, b"%d workers" % count * 100)
        assert teams.b.live() == shares(ends, count)
        assert sum(int(share.status()["encrypted"]) for share in teams.b.workers) == 2 * FLOWS


@pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
def test_encrypted_connections_may_have_packets_over_64_kib(teams: Teams, v6: bool) -> None:
    """BIG TCP: what does not fit a message of the bulk queue comes in segments through the normal one."""
    for team in teams.both:
        allow_big_packets(team.space, 180_000)
        team.start(2)
    ((client, server),) = teams.connect(1, v6)
    block = bytes(range(256)) * (3 << 12)
    for sender, receiver, team in ((client, server, teams.a), (server, client, teams.b)):
        before = sum(int(share.status()["packets"]) for share in team.workers)
        thread = threading.Thread(target=sender.sendall, args=(block,))
        thread.start()
        assert read_exactly(receiver, len(block)) == block
        thread.join()
        assert sum(int(share.status()["packets"]) for share in team.workers) - before > 45, "some were split"


def test_connections_from_before_the_first_start_are_adopted_by_their_own_workers(teams: Teams) -> None:
    listener = teams.b.first.listen()
    ends = []
    for _ in range(FLOWS):
        client = finish(teams.dial(listener))
        ends.append((client, accept(listener)))
    for team in teams.both:
        team.start(2, adopt=True)
    for pair in ends:
        echo(*pair, b"as if nothing had been")
    for team in teams.both:
        assert team.live() == shares(ends, 2)
    for client, server in ends:
        client.close()
        server.close()
    for team in teams.both:
        wait_until(lambda t=team: not any(t.live()), "all ends")  # type: ignore[misc]
