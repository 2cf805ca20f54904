"""The packet path's effects, done on the kernel: attribution, injection, resets, cutting, counters."""

from __future__ import annotations

import contextlib
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from nfq.attribution import Attributed, Attributor
from nfq.cgroup import Cgroups
from nfq.conntrack import ConntrackControl, FlowTuple
from nfq.core import Attribution
from nfq.datagram import Datagram
from nfq.flow import Flow, Owner, reverse_key
from nfq.icmpowner import IcmpOwners
from nfq.journal import Journal
from nfq.marks import Marks
from nfq.packet import TCP, Segment, reply_reset
from nfq.raw import RawSender
from nfq.recorder import Counts
from nfq.routes import Routes
from nfq.shed import Shed
from nfq.sockdiag import SockDiag, UnavailableError
from nfq.udpdiag import DatagramDiag
from nfq.udpowner import DatagramOwners
from sectool.errors import SectoolError
from sectool.events import ConnState, Point

_PORTS = struct.Struct(">HH")
_ASKED_LIMIT = 4096

# nf_conntrack_tcp.c: state of the entry when both sockets are gone -> Zeek's word for the connection.
_CONN_STATE = {
    "CLOSE": ConnState.RSTO,
    "SYN_SENT": ConnState.S0,
    "SYN_RECV": ConnState.SH,
}
# Nothing but acknowledgements can follow; a new connection of the same addresses would be in another state.
_OVER = frozenset(("TIME_WAIT", "LAST_ACK", "CLOSE"))


class KernelPorts:
    """`nfq.core.Ports` over sock_diag, ctnetlink, /proc and raw sockets of this network namespace."""

    def __init__(self, journal: Journal, mask: int) -> None:
        self.sockdiag = SockDiag()
        self.conntrack = ConntrackControl()
        cgroups = Cgroups()
        self.attributor = Attributor(self.sockdiag, cgroups)
        self._messages = IcmpOwners(self.attributor, cgroups)
        self.datagrams = DatagramDiag()
        self._datagrams = DatagramOwners(self.attributor, self.datagrams)
        self._routes = Routes()
        self.shed = Shed()
        self.raw = RawSender()
        self.own = RawSender(group=os.getegid())
        self._journal = journal
        self._mask = mask
        marks = Marks(mask)
        self._records = (marks.encrypted, marks.small)
        self._asked: OrderedDict[Hashable, Attributed] = OrderedDict()

    def attribute(self, seg: Segment, *, listener: bool) -> Attribution | None:
        """See nfq.core.Ports. Raises UnavailableError when the kernel does not answer: that is no denial."""
        unanswered = self.sockdiag.unavailable
        key, n = seg.key, 16 if seg.v6 else 4
        if listener and seg.outbound:  # within the host: who is called is the other end of what leaves
            key = reverse_key(key)
        local, remote = key[:n], key[n : 2 * n]
        local_port, remote_port = _PORTS.unpack_from(key, 2 * n)
        ask = self.attributor.incoming if listener else self.attributor.outgoing
        found = ask(local, local_port, remote, remote_port, seg.device)
        if found is None:
            if self.sockdiag.unavailable != unanswered:
                raise UnavailableError("the kernel did not say whose socket it is")
            return None
        return self._attribution(found)

    def attribute_datagram(
        self, d: Datagram, *, receiver: bool, group: bool = False
    ) -> tuple[Attribution, ...]:
        """See nfq.core.Ports. Raises UnavailableError when the kernel does not answer: that is no denial."""
        if not receiver:
            found = self._datagrams.senders(d)
        elif group:
            found = self._datagrams.members(d)
        else:
            found = self._datagrams.receivers(d)
        return tuple(self._attribution(owner)._replace(socket=cookie) for owner, cookie in found)

    def is_broadcast(self, raw: bytes) -> bool:
        """See nfq.core.Ports."""
        return self._routes.is_broadcast(raw)

    def path_mtu(self, raw: bytes, device: int) -> int:
        """See nfq.core.Ports."""
        return self._routes.mtu(raw, device)

    def sender(self, v6: bool, identifier: bytes) -> Attribution:
        """See nfq.core.Ports."""
        return self._attribution(self._messages.sender(v6, int.from_bytes(identifier, "big")))

    def host(self) -> Attribution:
        """See nfq.core.Ports."""
        return self._attribution(self.attributor.host())

    def _attribution(self, found: Attributed) -> Attribution:
        asked = self._asked
        asked[found.key] = found
        if len(asked) > _ASKED_LIMIT:
            asked.popitem(last=False)
        return Attribution(found.key, Owner(found.pid, found.uid, found.cgroup_id))

    def facts_later(self, key: Hashable, done: Callable[[dict[str, Any] | None], None]) -> None:
        """Gather everything the kernel attests about a key just attributed; None when it is gone again.

        `done` is called at once or from `attributor.completed`: hashing a large executable takes a while.
        """
        found = self._asked.get(key)
        if found is None:
            done(None)
        else:
            self.attributor.facts_later(found, done)

    def proven(self, raw: bytes, now_us: int) -> None:
        """See nfq.core.Ports."""
        with contextlib.suppress(OSError):
            self.shed.known(raw, now_us)

    def sealed(self, seg: Segment) -> bool:
        """See nfq.core.Ports."""
        source, destination = seg.source, seg.destination
        where = FlowTuple(source, destination, seg.source_port, seg.destination_port)
        try:
            entry = self.conntrack.get(where)
        except SectoolError:
            return True
        return entry is not None and entry.mark & self._mask in self._records

    def inject(self, packet: bytes) -> None:
        """See nfq.core.Ports."""
        with contextlib.suppress(OSError):  # no route: there is nobody to tell
            self.raw.send(packet)

    def inject_large(self, packet: bytes) -> None:
        """See nfq.core.Ports."""
        with contextlib.suppress(OSError):
            self.raw.send_large(packet)

    def repeat(self, packet: bytes) -> None:
        """See nfq.core.Ports. Unlike `inject` it is tracked, and judged like any other."""
        with contextlib.suppress(OSError):
            self.own.send(packet)

    def reset_local(self, seg: Segment) -> None:
        """Answer the segment with a RST as if from its destination: connect(2) fails at once (ECONNREFUSED)."""
        self.inject(reply_reset(seg))

    def _tuple(self, flow: Flow) -> FlowTuple:
        """The conntrack tuple in the direction of the initiator."""
        local, remote = (flow.local_address, flow.local_port), (flow.remote_address, flow.remote_port)
        if flow.point is Point.RESPONDER:
            local, remote = remote, local
        return FlowTuple(local[0], remote[0], local[1], remote[1], flow.protocol)

    def cut(self, flow: Flow) -> Counts:
        """Take the connection's mark away, so that its packets are queued again, and abort its local socket."""
        where = self._tuple(flow)
        counts, _, _ = self.counters(flow)
        self.conntrack.set_mark(where, 0, self._mask)
        if flow.protocol == TCP:
            self.sockdiag.destroy(flow.local_address, flow.local_port, flow.remote_address, flow.remote_port)
        return counts or Counts()

    def counters(self, flow: Flow) -> tuple[Counts | None, ConnState | None, bool]:
        """What conntrack has counted, how the connection stands, and whether both sides have ended it.

        None when it has no such entry.
        """
        entry = self.conntrack.get(self._tuple(flow))
        if entry is None:
            return None, None, False
        counts = Counts(entry.orig_bytes, entry.orig_packets, entry.reply_bytes, entry.reply_packets)
        return counts, _CONN_STATE.get(entry.tcp_state, ConnState.SF), entry.tcp_state in _OVER

    def journal(self, flow: Flow) -> memoryview | None:
        """See nfq.core.Ports."""
        self._journal.add(flow)
        return self._journal.state(flow)

    def unjournal(self, flow: Flow) -> None:
        """See nfq.core.Ports."""
        self._journal.remove(flow)
