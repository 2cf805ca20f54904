"""Two hosts under enforcement and the wire between them; the test is their agents, and whoever sits on the wire.

    a ──[eth0]──┐                          ┌──[eth0]── b        real kernel rules, real packet workers
             leg-a ══ bridge in "wire" ══ leg-b
                     10.77.0.3, 192.0.2.3 (outside the enforced networks), no enforcer

The fake agent gives every user id of a host a credential of its own, so a socket's identity is chosen by the user
it is made for. The wire sees all frames, can lose them, and sends what it likes past the senders' rules.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import secrets
import select
import shutil
import socket
import tempfile
import threading
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from nfq import rules
from nfq.cgroup import mount
from nfq.marks import MASK
from sectool.api.wire import as_key, encode, read
from sectool.clock import DAY
from sectool.events import Action, ConnState, DropReason, Phase, Point, now_us
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.credential import Credential
from sectool.identity.extensions import LabelConstraints
from sectool.identity.federation import to_wire
from sectool.identity.revocation import Revocations
from sectool.identity.trust import TrustBundle
from sectool.labels import LabelSet
from sectool.ring import RingReader
from tests import preloaded
from tests.kernel.conftest import DEADLINE_S, PREFIX, Namespace, make_namespace, wait_until
from tests.kernel.wire import Wire

DOMAIN = "lab.example"
RUN = "sectool-test-run-"  # then the process id, by which leftovers of killed runs are told
ENFORCED = ["10.0.0.0/8", "fd00::/8"]
SHORT_S = 0.4  # long enough for a local handshake many times over; how long "nothing happens" is waited for

POLICY = """
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db
  - allow app=web to call app=cache
  - audit app=batch to call app=db
  - allow net:outside to call app=db
  - allow app=web to call net:outside
---
kind: Network
name: outside
cidrs: [192.0.2.0/24, "2001:db8::/64"]
---
kind: Guardrail
name: baseline
owner: security
rules:
  - deny env=dev to call env=prod
"""

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Sockets made by this thread belong to that user (their owner is the file system user id)."""
    before = _libc.setfsuid(ctypes.c_uint(uid))
    try:
        yield
    finally:
        _libc.setfsuid(ctypes.c_uint(before))


class Host:
    """One enforced namespace with a real packet worker. This process is its agent."""

    def __init__(self, space: Namespace, name: str, root: RootAuthority, labels: dict[str, str]) -> None:
        self.space, self.name, self.root = space, name, root
        certificate = root.certificate.public_bytes(Encoding.PEM).decode()
        self.trusted = TrustBundle().with_root(root.trust_domain, certificate)
        self.accepted: dict[str, LabelConstraints] = {}  # labels of federated domains that count
        self.revocations = Revocations()
        key = ec.generate_private_key(ec.SECP256R1())
        constraints = LabelConstraints({"app": ("*",), "env": ("*",)}, f"/host/{name}/")
        self.authority = HostAuthority(root.issue_host(key.public_key(), name, constraints, now_us()), key)
        self.known: dict[int, Credential | str | None] = {}  # by user; text: refused; None: no answer
        self.asked: list[tuple[Hashable, int]] = []  # questions not answered, with their user
        self.run = Path(tempfile.mkdtemp(prefix=f"{RUN}{os.getpid()}-", dir="/dev/shm"))
        self.revision = 0
        self.active: dict[int, dict[str, Any]] = {}
        self.stats: dict[str, Any] = {}
        self.stats_heard = 0
        self.own = self.user(**labels)  # the user of sockets that name none
        self._lock = threading.Lock()
        self._text = ""
        self._reader: RingReader | None = None
        self._records: list[np.void] = []
        self.blobs: list[dict[str, Any]] = []
        self._since = 0
        self._uids = itertools.count(20_001)

    # -- identities ------------------------------------------------------------------------------------------

    def credential(self, **labels: str) -> Credential:
        """A credential of this host for these labels."""
        path = f"/host/{self.name}/wl/{labels.get('app', 'x')}"
        return self.authority.issue(path, LabelSet(labels), now_us())

    def user(self, answer: Credential | str | None = "", **labels: str) -> int:
        """A user id whose sockets have these labels, or another answer of the agent's."""
        uid = next(self._uids) if self.known else 20_000
        self.known[uid] = self.credential(**labels) if labels else answer
        return uid

    def identity(self, uid: int = 0) -> Credential:
        """The credential of a user's sockets."""
        found = self.known[uid or self.own]
        assert isinstance(found, Credential)
        return found

    # -- the agent -------------------------------------------------------------------------------------------

    def start(self, text: str | None = POLICY, **settings: object) -> None:
        """Start a worker with a policy, or without any yet."""
        ours, theirs = socket.socketpair()
        with theirs, (self.run / "output").open("ab") as output:
            args = ["--config-fd", "{}"]
            self.worker = preloaded.begin("nfq", args, output.fileno(), self.space.path, [theirs.fileno()])
        self.space.started.append(self.worker)
        self.control = ours
        config = {
            "t": "config",
            "run_dir": str(self.run),
            "ring": str(self.run / "ring"),
            "journal": str(self.run / "flows"),
            "queue": rules.QUEUE,
            "number": 0,
            "workers": 1,
            "mask": MASK,
            "reject": False,
            "enforced_networks": ENFORCED,
            "host": self.name,
            "trust_domain": self.root.trust_domain,
            "accepted": to_wire(self.accepted),
            "clock_skew_s": 30,
            "syn_rate": 100_000,
            **settings,
        }
        self.settings = settings
        self._send(config, self.trusted.to_pem().encode())
        self._send({"t": "revoked"}, self.revocations.to_wire())
        self._thread = threading.Thread(target=self._listen, args=(ours,), daemon=True)
        self._thread.start()
        if text is not None:
            self._begin_policy(text)

    def ready(self) -> None:
        """Wait until the worker enforces what `start` gave it."""
        self._await_policy()
        if self._reader is None:
            self._reader = RingReader.open(self.run / "ring")
            with self.space.enter():
                rules.install(rules.RulesConfig(), self.run)

    def stop(self) -> None:
        """End the worker in order."""
        with contextlib.suppress(OSError):
            self._send({"t": "stop"})
        self.worker.wait(DEADLINE_S)
        said = (self.run / "output").read_text()
        assert self.worker.returncode == 0, f"the worker ended with {self.worker.returncode}: {said}"
        assert said == "", "a worker has nothing to say"

    def kill(self) -> None:
        """End the worker as the kernel would."""
        self.worker.kill()
        self.worker.wait(DEADLINE_S)

    def hang_up(self) -> None:
        """End the agent, as far as the worker can tell."""
        self.control.shutdown(socket.SHUT_RDWR)

    def restart(self, text: str | None = POLICY, **settings: object) -> None:
        """Another worker after one that has ended."""
        self._thread.join(DEADLINE_S)
        self.control.close()
        self.start(text, **settings)
        if text is not None:
            self.ready()

    def policy(self, text: str) -> int:
        """Switch to a policy; how many live flows that cut."""
        self._begin_policy(text)
        return self._await_policy()

    def trust(self, trusted: TrustBundle, accepted: dict[str, LabelConstraints] | None = None) -> None:
        """Trust these domains from now on, and of the labels of others these."""
        self.trusted, self.accepted = trusted, accepted or {}
        self._send({"t": "bundle", "accepted": to_wire(self.accepted)}, trusted.to_pem().encode())

    def revoke(self, revocations: Revocations) -> None:
        """Have these lists count from now on, and no others."""
        self.revocations = revocations
        self._send({"t": "revoked"}, revocations.to_wire())
        self.status()  # answered after what was sent before it was done

    def _begin_policy(self, text: str) -> None:
        self.revision += 1
        self._text = text
        self._send({"t": "policy", "revision": self.revision, "hash": "ab12"}, text.encode())

    def _await_policy(self) -> int:
        wait_until(
            lambda: self.revision in self.active or self.worker.poll() is not None, "the worker's policy"
        )
        answer = self.active[self.revision]
        assert "error" not in answer, answer
        return int(answer["cut"])

    def _send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        with self._lock:
            self.control.sendall(encode(header, payload))

    def _listen(self, control: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            while (frame := read(control)) is not None:
                self._hear(frame.header)

    def _hear(self, header: dict[str, Any]) -> None:
        match header["t"]:
            case "policy_active":
                self.active[header["revision"]] = header
            case "identify":
                self._identify(as_key(header["key"]), int(header["facts"]["uid"]))
            case "stats":
                self.stats = header
                self.stats_heard += 1

    def _identify(self, key: Hashable, uid: int) -> None:
        answer = self.known.get(uid, "no such workload")
        if answer is None:
            self.asked.append((key, uid))
        elif isinstance(answer, str):
            self._send({"t": "credential", "key": key, "error": answer})
        else:
            workload = {"id": uid, "name": f"user-{uid}"}
            self._send({"t": "credential", "key": key, "workload": workload}, answer.to_wire())

    def answer(self, uid: int, with_: Credential) -> None:
        """Answer the open questions about a user after all."""
        self.known[uid] = with_
        for key, who in list(self.asked):
            if who == uid:
                self.asked.remove((key, who))
                self._identify(key, who)

    # -- what it did -----------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The worker's counters now. What was queued before this call has been judged when it returns."""
        for _ in range(2):  # its loop may read our question before packets of the same round
            before = self.stats_heard
            self._send({"t": "stats"})
            wait_until(lambda n=before: self.stats_heard > n, "the worker's statistics")  # type: ignore[misc]
        return self.stats

    def count(self, reason: DropReason) -> int:
        """How many packets were dropped for that reason so far."""
        return int(self.status()["reasons"].get(reason.name.lower(), 0))

    def records(self, port: int) -> list[np.void]:
        """Flow records of this test with that destination port."""
        assert self._reader is not None
        batch = self._reader.read(1 << 16)
        self._reader.commit()
        self._records += list(batch.records)
        self.blobs += batch.blobs
        assert batch.damaged == 0
        return [r for r in self._records[self._since :] if r["destination_port"] == port]

    def told(self, port: int) -> list[str]:
        """The records of this test with that destination port, in words."""
        return [
            f"{Point(r['point']).name} {Phase(r['phase']).name} {Action(r['action']).name}"
            f" {DropReason(r['drop_reason']).name} {ConnState(r['conn_state']).name}"
            for r in self.records(port)
        ]

    def event(self, port: int, **fields: int) -> np.void:
        """The first record of this test with that destination port and these fields; waits for it."""

        def found() -> np.void | None:
            return next((r for r in self.records(port) if all(r[k] == v for k, v in fields.items())), None)

        try:
            wait_until(found, f"{self.name}'s record of port {port} with {fields}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it has {self.told(port)}") from None
        record = found()
        assert record is not None
        return record

    def denial(self, port: int, reason: DropReason, **fields: int) -> np.void:
        """The VERDICT record of a refusal."""
        return self.event(port, phase=Phase.VERDICT, drop_reason=reason, **fields)

    def reset(self, text: str = POLICY) -> None:
        """For the next test: its own sockets, the usual policy, only its own records."""
        for sock in self.space.opened:
            sock.close()
        self.space.opened.clear()
        if self._text != text:
            self.policy(text)
        self.records(0)
        self._since = len(self._records)

    def invalid(self) -> int:
        """Packets that connection tracking could not place so far."""
        rows = self.space.run("conntrack", "-S").splitlines()
        return sum(
            int(word.removeprefix("invalid=")) for row in rows for word in row.split() if "invalid=" in word
        )

    # -- sockets ---------------------------------------------------------------------------------------------

    def address(self, v6: bool = False) -> str:
        """This host's address."""
        return self.space.v6 if v6 else self.space.v4

    def new_socket(self, family: int = socket.AF_INET, uid: int = 0) -> socket.socket:
        """A socket of a user's; closed at the end of the test."""
        with self.space.enter(), as_user(uid or self.own):
            made = socket.socket(family, socket.SOCK_STREAM)
        made.settimeout(DEADLINE_S)
        self.space.opened.append(made)
        return made

    def listen(
        self, address: str = "", *, v6: bool = False, dual: bool = False, uid: int = 0
    ) -> socket.socket:
        """A listener on a port of its own."""
        sock = self.new_socket(socket.AF_INET6 if v6 else socket.AF_INET, uid)
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        sock.bind((address or ("::" if v6 else "0.0.0.0"), 0))
        sock.listen(512)
        return sock

    def dial(self, address: str, port: int, *, uid: int = 0) -> socket.socket:
        """Begin to connect; the socket does not block (see `finish`)."""
        sock = self.new_socket(socket.AF_INET6 if ":" in address else socket.AF_INET, uid)
        sock.setblocking(False)
        result = sock.connect_ex((address, port))
        assert result in (0, errno.EINPROGRESS), os.strerror(result)
        return sock

    def connect(
        self, address: str, port: int, *, uid: int = 0, timeout_s: float = DEADLINE_S
    ) -> socket.socket:
        """A connection; raises what connect(2) would, TimeoutError after `timeout_s`."""
        return finish(self.dial(address, port, uid=uid), timeout_s)

    def close(self) -> None:
        """End the worker in order, if it still runs, and take away rules and files."""
        try:
            if self.worker.poll() is None:
                self.stop()
        finally:
            self.control.close()
            self._thread.join(DEADLINE_S)
            if self._reader is not None:
                self._reader.close()
            with self.space.enter():
                rules.remove(self.run)
            shutil.rmtree(self.run)


def finish(sock: socket.socket, timeout_s: float = DEADLINE_S) -> socket.socket:
    """Wait for a connection begun by `dial`."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    if not poll.poll(timeout_s * 1000):
        raise TimeoutError(f"no connection within {timeout_s} s")
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))  # of the fitting subclass, such as ConnectionRefusedError
    sock.settimeout(DEADLINE_S)
    return sock


def accept(listener: socket.socket) -> socket.socket:
    """The accepted end, with a timeout."""
    sock, _ = listener.accept()
    sock.settimeout(DEADLINE_S)
    return sock


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """That many bytes; the test fails if the other side closes before."""
    parts = []
    while size:
        part = sock.recv(min(size, 1 << 20))
        assert part, f"{size} bytes are missing"
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def port_of(sock: socket.socket) -> int:
    """The local port."""
    return int(sock.getsockname()[1])


def nothing_arrives(listener: socket.socket) -> None:
    """accept(2) has nothing to give."""
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        connection, peer = listener.accept()
        connection.close()
        raise AssertionError(f"accept() returned a connection from {peer}")
    listener.settimeout(DEADLINE_S)


class Lan:
    """Host a (user app=web), host b (user app=db), and the wire."""

    def __init__(self, a: Host, b: Host, wire: Wire) -> None:
        self.a, self.b, self.wire = a, b, wire

    @property
    def hosts(self) -> tuple[Host, Host]:
        """Both."""
        return self.a, self.b

    def establish(self, *, v6: bool = False, uid: int = 0) -> tuple[socket.socket, socket.socket]:
        """A connection from a to b over which a byte went both ways: client, server."""
        listener = self.b.listen(v6=v6)
        client = self.a.connect(self.b.address(v6), port_of(listener), uid=uid)
        server = accept(listener)
        echo(client, server)
        return client, server

    def policy(self, text: str) -> int:
        """Switch both hosts; how many live flows that cut in all."""
        return sum(host.policy(text) for host in self.hosts)


def echo(client: socket.socket, server: socket.socket, data: bytes = b"x") -> None:
    """Data goes both ways, unchanged."""
    for sender, receiver in ((client, server), (server, client)):
        sender.sendall(data)
        assert read_exactly(receiver, len(data)) == data


@contextlib.contextmanager
def own_cgroup(token: str) -> Iterator[None]:
    """This process, and what it starts, in a cgroup of its own: what shares it with others takes longer to attribute.

    What killed runs have left is removed: their groups and run folders.
    """
    root = mount()
    for left in (*root.glob(f"{PREFIX}lan-*"), *Path("/dev/shm").glob(f"{RUN}*")):
        if not Path("/proc", left.name.rsplit("-", 2)[1]).exists():
            with contextlib.suppress(OSError):
                left.rmdir() if left.parent == root else shutil.rmtree(left)
    before = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    folder = root / f"{PREFIX}lan-{os.getpid()}-{token}"
    folder.mkdir()
    try:
        (folder / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (root / before / "cgroup.procs").write_text(str(os.getpid()))
        wait_until(lambda: not (folder / "cgroup.procs").read_text(), "the workers to leave the cgroup")
        folder.rmdir()


@contextlib.contextmanager
def make_lan(folder: Path) -> Iterator[Lan]:
    """Namespaces, wire and workers; all gone afterwards, whatever happens."""
    token = secrets.token_hex(4)
    with own_cgroup(token), contextlib.ExitStack() as stack:
        a, b, between = (stack.enter_context(make_namespace(role, token)) for role in ("a", "b", "wire"))
        wire = Wire(between)
        stack.callback(wire.close)
        wire.join("a", a, 1)
        wire.join("b", b, 2)
        root = RootAuthority.create(
            folder / "ca", DOMAIN, now_us() - DAY
        )  # a day old: it can have vouched yesterday
        hosts = []
        for name, space, labels in (("a", a, {"app": "web"}), ("b", b, {"app": "db"})):
            host = Host(space, name, root, labels)
            host.start()
            stack.callback(host.close)
            hosts.append(host)
        for host in hosts:
            host.ready()
        yield Lan(hosts[0], hosts[1], wire)


@pytest.fixture(scope="module")
def running_lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    """One lan for all tests of a module."""
    with make_lan(tmp_path_factory.mktemp("lan")) as lan:
        yield lan


@pytest.fixture
def lan(running_lan: Lan) -> Iterator[Lan]:
    """The module's lan, tidied after each test."""
    yield running_lan
    running_lan.wire.reset()
    for host in running_lan.hosts:
        if host.worker.poll() is not None:
            host.restart()
        host.reset()
