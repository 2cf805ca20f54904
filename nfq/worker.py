"""The packet worker process: its queue, its line to the agent, and the timers, in one epoll loop.

It is configured over the socketpair it inherits (frames of sectool.api.wire, `t` names the message; see
sectool/agent/worker.py for the other end) and ends when the agent closes it: without an agent no new workload
could be identified, and the kernel rules keep everything new out until both are back.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import select
import socket
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from nfq import datapath
from nfq.adoption import Adopted, adopt_established
from nfq.conntrack import DestroyListener
from nfq.core import Config, Core, Network, Result, Verdict
from nfq.endings import SocketEndings
from nfq.flow import Flow, LocalWorkload, Owner, State, reverse_key
from nfq.journal import Journal
from nfq.noise import KeyPair
from nfq.ports import KernelPorts
from nfq.queue import LOCAL_OUT, PacketQueue, QueuedPacket, release
from nfq.reconcile import Reconciler
from nfq.recorder import Counts, Recorder
from nfq.rules import RulesConfig
from nfq.sockdiag import TcpState
from sectool.api import wire
from sectool.errors import SectoolError
from sectool.events import ConnState, DropReason, Point, now_us
from sectool.identity.credential import Credential
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import Verifier
from sectool.policy import Engine, parse
from sectool.ring import RingWriter

ENDING_DELAY_US = 20_000  # lets the last ACK be counted before the counters are read
HOLD_TIMEOUT_US = 5_000_000
HOLD_LIMIT = 1024
ASK_AGAIN_US = 100_000
OUTBOX_LIMIT = 4 << 20
TICK_US = 1_000_000
_OPEN = (
    TcpState.ESTABLISHED,
    TcpState.FIN_WAIT1,
    TcpState.CLOSE_WAIT,
    TcpState.LAST_ACK,
    TcpState.CLOSING,
)


class _Held:
    """Packets waiting for one workload to be identified."""

    __slots__ = ("asked_us", "packets")

    def __init__(self, asked_us: int) -> None:
        self.asked_us = asked_us
        self.packets: list[tuple[QueuedPacket, bytes, bool, bool]] = []


class Worker:
    """One queue's worth of packet path."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.inbox = wire.Decoder()
        self.held: dict[Hashable, _Held] = {}
        self.held_packets = 0
        self.asked: OrderedDict[Hashable, int] = OrderedDict()  # when the agent was last asked about a key
        self.packets = 0
        self.endings_due: deque[tuple[int, bytes]] = deque()
        self.early: list[wire.Frame] = []  # what came in one piece with the configuration
        self.core: Core
        self.running = True
        self.has_policy = False
        self.failures = 0
        self.last_failure = ""
        self.failure_said_us = 0
        self.outbox = bytearray()

    # -- start ---------------------------------------------------------------------------------------------

    def configure(self, header: dict[str, Any], bundle: bytes) -> None:
        """Open everything the configuration names; raises SectoolError with what is missing."""
        networks: list[Network] = [ipaddress.ip_network(n) for n in header["enforced_networks"]]
        config = Config(
            enforced=tuple(networks),
            reject=bool(header["reject"]),
            syn_rate=float(header["syn_rate"]),
            syn_burst=2 * float(header["syn_rate"]),
        )
        verifier = Verifier(
            TrustBundle.from_pem(bundle.decode("ascii")), clock_skew_s=int(header["clock_skew_s"])
        )
        self.verifier = verifier
        self.ring = RingWriter.open_or_create(Path(header["ring"]))
        self.journal = Journal(Path(header["journal"]))
        self.ports = KernelPorts(self.journal, int(header["mask"]))
        self.core = Core(config, Engine(parse("")), verifier, Recorder(self.ring), self.ports)
        self.mark, self.mask = int(header["mark"]), int(header["mask"])
        self.loopback = socket.if_nametoindex("lo")
        self.endings = SocketEndings()
        self.destroyed = DestroyListener()
        self.reconciler = Reconciler(
            self.core, self.ports.conntrack, self.mark, self.mask, alone=int(header["queues"]) == 1
        )
        self.queue = PacketQueue(int(header["queue"]), self._packet)

    def restore(self, header: dict[str, Any]) -> None:
        """Take back the released flows of a worker before, as far as the kernel still carries them.

        With `adopt` (the first start, before the rules are there) connections that exist already are let live.
        """
        now = now_us()
        for flow in self.journal.restore():
            self.core.live.add(flow)
            if not self._open(flow.key, flow):
                self.endings_due.append((now, flow.key))  # it ended while nobody listened
        if header.get("adopt"):
            rules = RulesConfig(int(header["queue"]), int(header["queues"]), self.mark, self.mask)
            for found in adopt_established(rules, Path(header["run_dir"])):
                self._adopt(found, now)
        self.reconciler.start(now)

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

    def _packet(self, packet: QueuedPacket) -> None:
        self.packets += 1
        outbound = packet.hook == LOCAL_OUT
        local = outbound and packet.outdev == self.loopback
        data = packet.get_payload()
        self._apply(packet, data, outbound, local, self._judge(data, outbound, local))

    def _judge(self, data: bytes, outbound: bool, local: bool) -> Result:
        """The packet path's verdict; whatever goes wrong in it costs this packet, never the worker."""
        try:
            return datapath.handle(self.core, data, outbound, local, now_us())
        except Exception as e:
            self._failed(e)
            return self.core.drop(DropReason.INTERNAL_ERROR)

    def _failed(self, error: Exception) -> None:
        """Remember a failure for `status`, and say it in the log at most once a second."""
        self.failures += 1
        self.last_failure = f"{type(error).__name__}: {error}"
        if now_us() - self.failure_said_us > TICK_US:
            self.failure_said_us = now_us()
            traceback.print_exception(error)

    def _apply(self, packet: QueuedPacket, data: bytes, outbound: bool, local: bool, result: Result) -> None:
        verdict = result.verdict
        if verdict is Verdict.DROP:
            packet.drop()
        elif verdict is Verdict.HOLD:
            self._hold(packet, data, outbound, local, result.hold)
        else:
            if result.packet is not None:
                packet.set_payload(result.packet)
            # Not accept(): the packet shall meet the mangle rules of others, too.
            release(packet, self.mark if verdict is Verdict.RELEASE else self.mask & ~self.mark, self.mask)

    def _hold(self, packet: QueuedPacket, data: bytes, outbound: bool, local: bool, key: Hashable) -> None:
        if self.held_packets >= HOLD_LIMIT:
            packet.drop()
            return
        held = self.held.get(key)
        if held is None:
            if now_us() - self.asked.get(key, 0) < ASK_AGAIN_US:
                packet.drop()  # what the agent just gave is of no use (expired): do not ask in a circle
                return
            self.asked[key] = now_us()
            if len(self.asked) > HOLD_LIMIT:
                self.asked.popitem(last=False)
            facts = self.ports.facts(key)
            if facts is None:
                packet.drop()
                return
            held = self.held[key] = _Held(now_us())
            self._send({"t": "identify", "key": key, "facts": facts})
        packet.retain()
        held.packets.append((packet, data, outbound, local))
        self.held_packets += 1

    def _resume(self, key: Hashable) -> None:
        held = self.held.pop(key, None)
        if held is None:
            return
        self.held_packets -= len(held.packets)
        for packet, data, outbound, local in held.packets:
            self._apply(packet, data, outbound, local, self._judge(data, outbound, local))

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
                    self.running = (
                        False  # the agent has not read for a long time: let it start another worker
                    )
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
            case "bundle":
                self.verifier.set_bundle(TrustBundle.from_pem(payload.decode("ascii")))
            case "stats":
                self._send_stats()
            case "stop":
                self.running = False

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
        self._resume(key)

    def _send_stats(self) -> None:
        core = self.core
        usage = os.times()
        self._send(
            {
                "t": "stats",
                "packets": self.packets,
                "held": self.held_packets,
                "half_open": len(core.connecting) + len(core.accepting),
                "live": len(core.live),
                "verdicts": dict(core.recorder.verdicts),
                "reasons": dict(core.recorder.reasons),
                "queue": self.queue.counters(),
                "lost": self.ring.lost,
                "journal_skipped": self.journal.skipped,
                "endings_missed": self.endings.missed,
                "cpu_us": int((usage.user + usage.system) * 1e6),
                "failures": self.failures,
                "last_failure": self.last_failure,
                "uncut": len(core.uncut),
                "revision": core.revision,
                "pid": os.getpid(),
            }
        )

    # -- ends and timers -----------------------------------------------------------------------------------

    def _sockets_ended(self, now: int) -> None:
        for key in self.endings.drain():
            if self._live(key) is not None:
                self.endings_due.append((now + ENDING_DELAY_US, key))
            elif not self._connects(key):
                datapath.abandoned(self.core, key, now)

    def _connects(self, key: bytes) -> bool:
        """Whether a new attempt has taken the ports of the one that ended."""
        n = (len(key) - 4) // 2
        ports = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
        found = self.ports.sockdiag.lookup(key[:n], ports[0], key[n : 2 * n], ports[1])
        return found is not None and found.state == TcpState.SYN_SENT

    def _live(self, key: bytes) -> Flow | None:
        return self.core.live.get(key) or self.core.live.get(reverse_key(key))

    def _open(self, key: bytes, flow: Flow) -> bool:
        """Whether the connection has a socket all the same.

        When the proving ACK and the first data are taken in on two CPUs at once, the kernel makes two sockets and
        destroys one of them (inet_csk_complete_hashdance).
        """
        n = flow.address_size
        ports = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
        found = self.ports.sockdiag.lookup(key[:n], ports[0], key[n : 2 * n], ports[1])
        # A FIN_WAIT2 that belongs to nobody is what TIME_WAIT begins as.
        return found is not None and (
            found.state in _OPEN or (found.state == TcpState.FIN_WAIT2 and found.inode != 0)
        )

    def _connections_ended(self, now: int) -> None:
        """conntrack has forgotten connections: the end of those whose socket's end nobody told (an abort, a router)."""
        for entry in self.destroyed.drain():
            key = entry.src + entry.dst + entry.sport.to_bytes(2, "big") + entry.dport.to_bytes(2, "big")
            flow = self._live(key)
            if (
                flow is not None
                and flow.start_us * 1000 < (entry.stop_ns or now * 1000)
                and not self._open(flow.key, flow)
            ):
                counts = Counts(entry.orig_bytes, entry.orig_packets, entry.reply_bytes, entry.reply_packets)
                datapath.ended(self.core, flow.key, counts, ConnState.SF, now)

    def _guarded(self, work: Callable[[int], None]) -> None:
        """Housekeeping that fails is tried again at its next turn."""
        try:
            work(now_us())
        except (SectoolError, OSError) as e:
            self._failed(e)

    def _account(self, now: int) -> None:
        while self.endings_due and self.endings_due[0][0] <= now:
            _, key = self.endings_due.popleft()
            flow = self._live(key)
            if flow is not None and not self._open(key, flow):
                counts, state = self.ports.counters(flow)
                datapath.ended(self.core, flow.key, counts or Counts(), state or ConnState.SF, now)

    def _tick(self, now: int) -> None:
        datapath.tick(self.core, now)
        self._send_stats()
        for key, held in list(self.held.items()):
            if now - held.asked_us > HOLD_TIMEOUT_US:
                self.held_packets -= len(held.packets)
                del self.held[key]
                for packet, *_ in held.packets:
                    packet.drop()  # the program's stack will try again

    def run(self) -> None:
        """Serve until told to stop."""
        poll = select.epoll()
        control, queue, endings = self.control.fileno(), self.queue.fd, self.endings.fd
        destroyed = self.destroyed.fd
        for fd in (control, endings, destroyed):
            poll.register(fd, select.EPOLLIN)
        gc.collect()
        gc.freeze()  # what is here now stays: collections need not look at it again
        self._send({"t": "ready"})
        for frame in self.early:
            self._message(frame.header, frame.payload)
        reading = False
        next_tick = now_us() + TICK_US
        while self.running:
            if self.has_policy and not reading:
                # Only now: a packet judged under no policy would be denied for the wrong reason. The kernel keeps it.
                poll.register(queue, select.EPOLLIN)
                reading = True
            due = self.endings_due[0][0] if self.endings_due else next_tick
            idle = self.core.ephemerals.full and not self.reconciler.busy
            wait_us = max(0, min(due, next_tick) - now_us()) if idle else 0
            ready = poll.poll(wait_us / 1e6)
            if not ready and not self.core.ephemerals.full:
                self.core.ephemerals.add()
            for fd, _ in ready:
                if fd == queue:
                    self.queue.drain()
                elif fd == endings:
                    self._guarded(self._sockets_ended)
                elif fd == destroyed:
                    self._guarded(self._connections_ended)
                else:
                    self.hear()
            self._guarded(self._account)
            self._guarded(self.reconciler.step)
            self._flush()
            if now_us() >= next_tick:
                next_tick = now_us() + TICK_US
                self._guarded(self._tick)
        poll.close()

    def close(self) -> None:
        """Let go of the queue first: from then on packets are dropped, not held."""
        self.queue.close()
        self.endings.close()
        self.destroyed.close()
        self.journal.close()
        self.ring.close()


def serve(fd: int) -> int:
    """Entry of `python -m nfq --config-fd FD`."""
    control = socket.socket(fileno=fd)
    worker = Worker(control)
    try:
        frame = _first(control, worker)
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
