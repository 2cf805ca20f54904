"""The packet worker process: its queue, its line to the agent, and the timers, in one epoll loop.

It is configured over the socketpair it inherits (frames of sectool.api.wire, `t` names the message; see
sectool/agent/worker.py for the other end) and ends when the agent closes it: without an agent no new workload
could be identified, and the kernel rules keep everything new out until both are back.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import ipaddress
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from nfq import datapath, netns, udp
from nfq.accounting import Accounting
from nfq.adoption import Adopted, adopt_established
from nfq.attribution import raise_descriptor_limit
from nfq.bulk import BulkQueue
from nfq.burst import BurstQueue, Packet
from nfq.core import Config, Core, Network, Result, Verdict, reminded
from nfq.flow import Flow, LocalWorkload, Owner, State
from nfq.holding import Holding
from nfq.hugepages import collapse
from nfq.journal import Journal
from nfq.marks import Marks
from nfq.namefile import NameFile, path_of
from nfq.names import TOTAL, NameTable
from nfq.namesources import NameSources
from nfq.noise import KeyPair
from nfq.ports import KernelPorts
from nfq.reconcile import Reconciler
from nfq.recorder import Recorder
from nfq.rules import STRANGERS_AT, RulesConfig
from nfq.steering import worker_of
from nfq.suites import preference
from nfq.udpflow import UdpFlow
from nfq.waiting import Waiting
from sectool.api import wire
from sectool.errors import SectoolError
from sectool.events import DropReason, Point, now_us
from sectool.identity.credential import Credential
from sectool.identity.federation import from_wire
from sectool.identity.revocation import Revocations
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import PeerIdentity, Verifier, path_labels, path_rules
from sectool.labels import LabelSet
from sectool.policy import Engine, parse
from sectool.ring import RingWriter

OUTBOX_LIMIT = 4 << 20
NICE = -5
TICK_US = 1_000_000
STRANGERS_WAITING = 512  # packets in the queue for strangers: those behind them would be answered too late
STRANGERS_AT_ONCE = 4
STRANGERS_US = 20_000  # while others are waiting, strangers have a turn that often
GATHER_US = 50_000
_ONCE = select.EPOLLIN | select.EPOLLONESHOT
_PR_SET_DUMPABLE = 4


class Worker:
    """One share of the packet path: a normal and a bulk queue."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.inbox = wire.Decoder()
        self.packets = 0
        self.restored = 0
        self.observed_until: float | None = None  # seconds as of `_since_boot`; None: until told
        self.early: list[wire.Frame] = []  # what came in one piece with the configuration
        self.core: Core
        self.running = True
        self.has_policy = False
        self.failures = 0
        self.last_failure = ""
        self.failure_said_us = 0
        self.outbox = bytearray()
        self._yielding: dict[Hashable, tuple[Packet, bytes | memoryview | None]] = {}

    # -- start ---------------------------------------------------------------------------------------------

    def stand_by(self) -> bool:
        """Wait until the worker before has let go of everything; False when the agent has closed the line."""
        self._send({"t": "standing_by"})
        while not any(frame.header.get("t") == "go" for frame in self.early):
            data = self.control.recv(1 << 20)
            if not data:
                return False
            self.early += self.inbox.feed(data)
        return True

    def configure(self, header: dict[str, Any], bundle: bytes) -> None:
        """Open everything the configuration names; raises SectoolError with what is missing."""
        config = _config(header)
        verifier = self.verifier = Verifier(
            TrustBundle.from_pem(bundle.decode("ascii")),
            clock_skew_s=int(header["clock_skew_s"]),
            own_domain=str(header["trust_domain"]),
            accepted=from_wire(header.get("accepted") or {}),
            path_labels=path_labels(path_rules((p, m.items()) for p, m in header.get("path_labels") or ())),
        )
        verifier.set_revocations(Revocations.from_wire(bytes.fromhex(header.get("revoked", ""))))
        self.ring = RingWriter.open_or_create(Path(header["ring"]))
        self.journal = Journal(Path(header["journal"]))
        self.ports = KernelPorts(self.journal, int(header["mask"]))
        number = int(header["number"])
        self.names = NameTable(NameFile.create(path_of(Path(header["run_dir"]), number), TOTAL))
        self.name_sources = _name_sources(self.names, header)
        self.core = Core(config, Engine(parse("")), verifier, Recorder(self.ring), self.ports, self.names)
        self.mask = int(header["mask"])
        marks = Marks(self.mask)
        self._marks = {
            Verdict.ACCEPT: marks.passing,
            Verdict.RELEASE: marks.allowed,
            Verdict.ENCRYPT: marks.encrypted,
            Verdict.SMALL: marks.small,
            Verdict.REQUEUE: marks.requeue,
        }
        self.number, self.workers = number, int(header["workers"])
        self.loopback = socket.if_nametoindex("lo")
        self.accounting = Accounting(self.core, self.ports)
        self.holding = Holding(self.ports.facts_later, self._identify, self._give_up)
        self.waiting = Waiting(self._give_up)
        self.reconciler = Reconciler(
            self.core,
            self.ports.conntrack,
            self.mask,
            self._leads_here,
        )
        first = int(header["queue"]) + 2 * number
        self.queue = BurstQueue(first, self._packet, self.mask)
        self.bulk = BulkQueue(first + 1, self._bulk, self.mask)
        self.strangers = BurstQueue(
            int(header["queue"]) + STRANGERS_AT + number, self._packet, self.mask, length=STRANGERS_WAITING
        )
        self._observe(header)
        self.strangers_dropped = 0  # by the kernel because the queue was full, as far as that is recorded

    def restore(self, header: dict[str, Any]) -> None:
        """Take back the live flows of a worker before, as far as the kernel still carries them, encrypted ones too.

        What leads to this worker now may be in `journals` of other numbers: there were more workers before, or fewer.
        With `adopt` (the first start, before the rules are there) connections that exist already are let live.
        """
        now = now_us()
        others = [Path(path) for path in header.get("journals", ())]
        for flow in self.journal.restore(self._leads_here, others):
            self.restored += 1
            reminded(self.core, flow)
            if isinstance(flow, UdpFlow):
                self.accounting.datagrams.restored(flow)
                continue
            self.core.live.add(flow)
            self.accounting.check(flow, now)
        if header.get("adopt"):
            rules = RulesConfig(int(header["queue"]), self.workers, self.mask)
            for found in adopt_established(rules, Path(header["run_dir"]), self._leads_here):
                self._adopt(found, now)
        self._distrust(self.verifier.doubts())
        self._cut_revoked()
        if self.journal.foreign or self.journal.forgotten:
            what = "a journal that this version cannot read" if self.journal.foreign else "some flows"
            sys.stderr.write(f"{self.journal.path}: {what} could not be restored; their connections end\n")
        self.reconciler.start(now)

    def _leads_here(self, key: bytes) -> bool:
        return worker_of(key, self.workers) == self.number

    def _adopt(self, found: Adopted, now: int) -> None:
        ports = found.local_port.to_bytes(2, "big") + found.remote_port.to_bytes(2, "big")
        key = found.local + found.remote + ports
        point = Point.RESPONDER if found.inbound else Point.INITIATOR
        flow = Flow(key, len(found.local) == 16, point, State.AUTHORISED, 0, now)
        flow.adopted = True
        flow.owner = Owner(0, found.uid, found.cgroup_id)
        self.core.recorder.adopted(flow, now)
        self.core.live.add(flow)
        self.journal.add(flow)

    # -- packets -------------------------------------------------------------------------------------------

    def _packet(self, packet: Packet) -> None:
        self.packets += 1
        self._handle(packet)
        if self.core.udp.settled:
            self._settled()

    def _settled(self) -> None:
        """Judge again the datagrams whose flow's handshake has come to an end."""
        settled = self.core.udp.settled
        while settled:
            key, anew = settled.popleft()
            packets = self.waiting.take(key)
            if anew and packets:
                self.queue.flush()  # what made the flow known must have passed before
            for packet in packets:
                if anew:
                    packet.drop()
                    self.ports.repeat(packet.data)
                else:
                    self._handle(packet)

    def _handle(self, packet: Packet) -> None:
        """Judge a packet and give its verdict. Whatever goes wrong in it costs this packet, never the worker."""
        outbound, device = packet.outbound, packet.device
        try:
            local = outbound and device == self.loopback
            result = datapath.handle(self.core, packet.data, outbound, local, now_us(), device)
        except Exception as e:
            self._failed(e)
            result = datapath.broken(self.core, packet.data, outbound, DropReason.INTERNAL_ERROR)
        verdict = result.verdict
        if verdict is Verdict.DROP:
            packet.drop()
        elif verdict is Verdict.HOLD:
            self.holding.hold(packet, result.hold, now_us())
        elif verdict is Verdict.WAIT:
            self.waiting.hold(packet, result.hold, now_us())
        elif verdict is Verdict.YIELD:
            self._yielding[result.hold] = packet, result.packet
        else:
            packet.send_on(self._marks[verdict], result.packet)
            if result.hold is not None and (earlier := self._yielding.pop(result.hold, None)):
                earlier[0].send_on(self._marks[Verdict.ACCEPT], earlier[1])

    def _give_up(self, packet: Packet) -> None:
        """What cannot be judged in time."""
        if self.core.observing:
            packet.send_on(self._marks[Verdict.ACCEPT])
        else:
            packet.drop()

    def _observe(self, header: dict[str, Any]) -> None:
        """Stop denying, or begin again; what ends after `for_us` microseconds ends by itself."""
        on, for_us = bool(header.get("observing")), header.get("for_us")
        self.observed_until = None if not on or for_us is None else _since_boot() + int(for_us) / 1e6
        cut = datapath.observe(self.core, on, now_us())
        if not on:
            cut += self._cut_revoked()[1]
        if cut:
            self._send({"t": "mode", "observing": on, "cut": cut})

    def _yielded(self) -> None:
        """What has let others pass goes now, behind what has come meanwhile."""
        self.queue.drain()
        for packet, replaced in self._yielding.values():
            packet.send_on(self._marks[Verdict.ACCEPT], replaced)
        self._yielding.clear()
        self.queue.flush()

    def _bulk(self, data: memoryview, outbound: bool, gso: bool, room: memoryview | None = None) -> Result:
        try:
            return datapath.bulk(self.core, data, outbound, gso, now_us(), room)
        except Exception as e:
            self._failed(e)
            return self.core.drop(DropReason.INTERNAL_ERROR)

    def _identify(self, key: Hashable, facts: dict[str, Any]) -> None:
        self._send({"t": "identify", "key": key, "facts": facts})

    def _failed(self, error: Exception) -> None:
        """Remember a failure for `status`, and say it in the log at most once a second."""
        self.failures += 1
        self.last_failure = f"{type(error).__name__}: {error}"
        if now_us() - self.failure_said_us > TICK_US:
            self.failure_said_us = now_us()
            traceback.print_exception(error)

    # -- the agent's messages ------------------------------------------------------------------------------

    def _send(self, header: dict[str, Any]) -> None:
        """Queue a message for the agent; a slow agent must not make packets wait."""
        self.outbox += wire.encode(header)
        self._flush()

    def _flush(self) -> None:
        while self.outbox:
            try:
                sent = self.control.send(self.outbox, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if len(self.outbox) > OUTBOX_LIMIT:
                    self.running = False  # the agent has not read for long: let it start another worker
                return
            del self.outbox[:sent]

    def hear(self) -> None:
        """Read what the agent has sent; its end closing ends the worker."""
        data = self.control.recv(1 << 20)
        if not data:
            self.running = False
            return
        for frame in self.inbox.feed(data):
            self._message(frame.header, frame.payload)

    def _message(self, header: dict[str, Any], payload: bytes) -> None:
        match header.get("t"):
            case "policy":
                self._policy(header, payload)
            case "credential":
                self._credential(header, payload)
            case "flush_workloads":
                self.core.credentials.clear()
            case "relabel":
                labels = LabelSet(header["labels"])
                datapath.relabel(self.core, int(header["workload"]), labels, now_us())
            case "settings":
                self.core.reconfigure(_config(header))
                self.verifier.set_clock_skew(int(header["clock_skew_s"]))
                self.name_sources = _name_sources(self.names, header)
            case "mode":
                self._observe(header)
            case "bundle":
                self._trust(header, payload)
            case "revoked":
                self._revoked(payload)
            case "stats":
                self._send_stats()
            case "stop":
                self.running = False

    def _trust(self, header: dict[str, Any], payload: bytes) -> None:
        """Trust this bundle from now on, and cut what rests on domains or roots that have left it, or on labels that
        count no more.
        """
        before, labels_before = self.verifier.bundle, self.verifier.accepted
        then = self.verifier.doubts()
        bundle = TrustBundle.from_pem(payload.decode("ascii"))
        accepted = from_wire(header.get("accepted") or {})
        self.verifier.set_bundle(bundle)
        self.verifier.set_accepted(accepted)
        self.core.sessions.clear()  # whoever is trusted no more must not go on without its credential
        now = self.verifier.doubts()
        # An identity of a workload here may be of a domain that only others trust: it is none that has left.
        self._distrust(lambda peer: None if then(peer) else now(peer))
        changed = {domain for domain in before.roots if labels_before.get(domain) != accepted.get(domain)}
        if changed:
            self._cut(lambda peer: peer.trust_domain in changed, DropReason.UNTRUSTED_DOMAIN)

    def _revoked(self, payload: bytes) -> None:
        """Refuse what these lists revoke from now on, and end at once what rests on it."""
        self.verifier.set_revocations(Revocations.from_wire(payload))
        ended, cut = self._cut_revoked()
        self._send({"t": "revoked", "sessions": ended, "cut": cut})

    def _cut_revoked(self) -> tuple[int, int]:
        revocations = self.verifier.revocations
        if not revocations:
            return 0, 0

        def revoked(peer: PeerIdentity) -> bool:
            return bool(revocations.of(peer))

        gone = self.core.credentials.discard(revoked)
        ended = self.core.sessions.revoke(lambda session: session.local in gone or revoked(session.peer))
        return ended, datapath.distrust(self.core, revoked, DropReason.REVOKED_LIVE, now_us())

    def _distrust(self, doubts: Callable[[PeerIdentity], DropReason | None]) -> None:
        """Cut whom the trust bundle does not vouch for any more."""

        def because(reason: DropReason) -> Callable[[PeerIdentity], bool]:
            return lambda peer: doubts(peer) is reason

        for reason in (DropReason.UNTRUSTED_DOMAIN, DropReason.UNTRUSTED_CHAIN):
            self._cut(because(reason), reason)

    def _cut(self, doubtful: Callable[[PeerIdentity], bool], reason: DropReason) -> None:
        datapath.distrust(self.core, doubtful, reason, now_us())

    def _policy(self, header: dict[str, Any], payload: bytes) -> None:
        revision = int(header["revision"])
        started = time.perf_counter_ns()
        try:
            engine = Engine(parse(payload.decode(), "policy"), revision)
        except (SectoolError, UnicodeDecodeError) as e:
            self._send({"t": "policy_active", "revision": revision, "error": str(e)})
            return
        policy_hash = int(header["hash"][:15] or "0", 16)
        cut = datapath.activate(self.core, engine, revision, policy_hash, now_us())
        self.name_sources.refresh()
        self.has_policy = True
        us = (time.perf_counter_ns() - started) // 1000
        self._send({"t": "policy_active", "revision": revision, "cut": cut, "us": us})

    def _credential(self, header: dict[str, Any], payload: bytes) -> None:
        key = wire.as_key(header["key"])
        error = header.get("error")
        if error:
            self.core.credentials.put(key, str(error), now_us())
        else:
            credential = Credential.from_wire(payload)
            workload = header["workload"]
            self.core.credentials.put(
                key,
                LocalWorkload(
                    int(workload["id"]),
                    str(workload["name"]),
                    KeyPair(credential.x25519_private, credential.x25519_public),
                    credential.blob,
                    credential.peer,
                ),
                now_us(),
            )
        for packet in self.holding.take(key):
            self._handle(packet)

    def _send_stats(self) -> None:
        core = self.core
        usage = os.times()
        self._send(
            {
                "t": "stats",
                "packets": self.packets,
                "held": self.holding.count + self.waiting.count,
                "half_open": sum(
                    map(len, (core.connecting, core.accepting, core.udp.connecting, core.udp.accepting))
                ),
                "live": len(core.live) + len(core.udp.live),
                "sessions": dict(zip(("held", "issued"), core.sessions.counts, strict=True)),
                "verdicts": dict(core.recorder.verdicts),
                "reasons": dict(core.recorder.reasons),
                "queue": self.queue.counters(),
                "bulk": {**self.bulk.counters(), "packets": self.bulk.packets},
                "encrypted": sum(flow.suite != 0 for table in (core.live, core.udp.live) for flow in table),
                "lost": self.ring.lost,
                "journal_skipped": self.journal.skipped,
                "restored": self.restored,
                "forgotten": self.journal.forgotten,
                "endings_missed": self.accounting.missed,
                "cpu_us": int((usage.user + usage.system) * 1e6),
                "failures": self.failures,
                "observing": self.core.observing,
                "last_failure": self.last_failure,
                "uncut": len(core.uncut) + len(core.udp.uncut),
                "revision": core.revision,
                "pid": os.getpid(),
            }
        )

    # -- ends and timers -----------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[int], object]) -> None:
        """Housekeeping that fails is tried again at its next turn."""
        try:
            work(now_us())
        except (SectoolError, OSError) as e:
            self._failed(e)

    def _timers(self, now: int) -> None:
        udp.timers(self.core, now)
        self._settled()

    def _tick(self, now: int) -> None:
        if self.observed_until is not None and _since_boot() >= self.observed_until:
            self._observe({"observing": False})
        dropped = self.strangers.counters()["dropped"]
        turned_away, self.strangers_dropped = dropped - self.strangers_dropped, dropped
        if not self.number:  # the rules have one counter for all workers
            turned_away += self.ports.shed.turned_away()
        self.core.recorder.turned_away(turned_away, now)
        datapath.tick(self.core, now)
        self.name_sources.refresh()
        self.holding.expire(now)
        self.waiting.expire(now)
        self._send_stats()

    def run(self) -> None:
        """Serve until told to stop."""
        poll = select.epoll()
        queue, bulk, strangers = self.queue.fd, self.bulk.fd, self.strangers.fd
        next_strange = 0
        chores: dict[int, Callable[[int], object]] = {
            self.accounting.datagrams.fd: lambda _: self.accounting.datagrams.sockets_closed(),
            self.ports.attributor.fd: lambda _: self.ports.attributor.completed(),
        }
        for fd in (self.control.fileno(), *chores):
            poll.register(fd, select.EPOLLIN)
        # Every connection ends; the news of it may gather for a moment, so that not each of them wakes us.
        news: dict[int, Callable[[int], object]] = {
            self.accounting.sockets_fd: self.accounting.sockets_ended,
            self.accounting.connections_fd: self.accounting.connections_ended,
        }
        for fd in news:
            poll.register(fd, _ONCE)
        told: list[int] = []
        gc.collect()
        gc.freeze()  # what is here now stays: collections need not look at it again
        collapse()
        self._send({"t": "ready"})
        for frame in self.early:
            self._message(frame.header, frame.payload)
        reading = False
        ends, datagrams = self.accounting.due, self.core.udp
        now = now_us()
        next_tick, next_news = now + TICK_US, now + TICK_US
        while self.running:
            if self.has_policy and not reading:
                # Only now: a packet judged under no policy would be denied for the wrong reason. The kernel keeps it.
                poll.register(queue, select.EPOLLIN)
                poll.register(bulk, select.EPOLLIN)
                poll.register(strangers, select.EPOLLIN)
                reading = True
            next_tick, next_news = _soon(next_tick, now), _soon(next_news, now)
            due = min(next_tick, next_news)
            if ends:
                due = min(due, ends[0][0])
            if datagrams.timers or datagrams.ending:
                due = udp.due_us(self.core, due)
            idle = self.core.ephemerals.full and not self.reconciler.busy
            ready = poll.poll(max(0, due - now) / 1e6 if idle else 0)
            now = now_us()
            if not ready and not self.core.ephemerals.full:
                self.core.ephemerals.add()
            busy = strange = False
            for fd, _ in ready:
                if fd == queue:
                    busy = True
                    self.queue.drain()
                elif fd == bulk:
                    busy = True
                    self.bulk.drain()
                elif fd == strangers:
                    strange = True
                elif fd in news:
                    told.append(fd)
                    next_news = min(next_news, now + GATHER_US)
                elif fd in chores:
                    self._guarded(chores[fd])
                else:
                    self.hear()
            if self._yielding:
                self._yielded()
            if self.core.recorder.later:
                self.core.recorder.catch_up()
            if strange and (not busy or now >= next_strange):
                # Not so many that those who are known wait long, and not never.
                self.strangers.drain(STRANGERS_AT_ONCE)
                next_strange = now + STRANGERS_US
            if now >= due:
                self._guarded(self.accounting.settle)
                self._guarded(self._timers)
                if now >= next_news:
                    for fd in told:
                        self._guarded(news[fd])
                        poll.modify(fd, _ONCE)
                    told.clear()
                    next_news = now + TICK_US
                if now >= next_tick:
                    next_tick = now + TICK_US
                    self._guarded(self._tick)
            if self.reconciler.busy or now >= self.reconciler.next_us:
                self._guarded(self.reconciler.step)
            if self.outbox:
                self._flush()
            if self.queue.pending:  # verdicts given outside of `drain`
                self.queue.flush()
            if self.strangers.pending:
                self.strangers.flush()
        poll.close()

    def close(self) -> None:
        """Let go of the queue first: from then on packets are dropped, not held."""
        self.queue.close()
        self.bulk.close()
        self.strangers.close()
        self.accounting.close()
        self.journal.close()
        self.names.close()
        self.ring.close()


def _since_boot() -> float:
    """Seconds since boot, those that the host slept included: a broken glass does not stay so for them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _soon(due_us: int, now_us: int) -> int:
    """When what is done every second is next done, even if the calendar has been set back meanwhile."""
    return min(due_us, now_us + TICK_US)


def _config(header: dict[str, Any]) -> Config:
    networks: list[Network] = [ipaddress.ip_network(n) for n in header["enforced_networks"]]
    return Config(
        enforced=tuple(networks),
        reject=bool(header["reject"]),
        syn_rate=float(header["syn_rate"]),
        syn_burst=2 * float(header["syn_rate"]),
        worker=int(header["number"]),
        workers=int(header["workers"]),
        suites=preference(header.get("suites") or None),
    )


def _name_sources(names: NameTable, header: dict[str, Any]) -> NameSources:
    resolvers, run, number = header.get("resolvers"), Path(header["run_dir"]), int(header["number"])
    return NameSources(
        names,
        None if resolvers is None else [ipaddress.ip_network(n) for n in resolvers],
        [path_of(run, other) for other in range(int(header["workers"])) if other != number],
    )


def _no_core_dump() -> None:
    """The process holds keys: no core dump, and no other process of the same user may look into it (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _ahead_of_others() -> None:
    """Every connection of the host waits for this process. The second is for kernels that share time out by session."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        Path("/proc/self/autogroup").write_text(str(NICE))


def serve(fd: int) -> int:
    """Entry of `python -m nfq --config-fd FD`."""
    raise_descriptor_limit()
    _no_core_dump()
    _ahead_of_others()
    control = socket.socket(fileno=fd)
    worker = Worker(control)
    try:
        frame = _first(control, worker)
        if frame.header.get("standby") and not worker.stand_by():
            return 0
        if inside := frame.header.get("netns"):
            netns.join(str(inside))  # before anything is opened that belongs to a namespace
        worker.configure(frame.header, frame.payload)
        worker.restore(frame.header)
    except SectoolError as e:
        control.sendall(wire.encode({"t": "fatal", "error": e.message, "hint": e.hint}))
        return int(e.exit_code)
    try:
        worker.run()
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the agent is gone; so are we
    finally:
        worker.close()
        control.close()  # all that a successor waits for has been let go
    return 0


def _first(control: socket.socket, worker: Worker) -> wire.Frame:
    """The configuration frame; what follows it stays in the worker's inbox."""
    while True:
        data = control.recv(65_536)
        if not data:
            raise SectoolError("the agent closed the line before configuring the worker")
        frames = worker.inbox.feed(data)
        for frame in frames:
            worker.early = list(frames)
            return frame
