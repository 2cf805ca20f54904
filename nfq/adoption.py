"""TCP connections that were there before the first start are let live: an operator's SSH session must not be cut.

The socket table says which connections this host has; each is marked ALLOWED in connection tracking, which is made to
know it where it does not yet (nothing is tracked before a rule asks for it). To be done right before the rules are
installed: what is established between the two is not adopted and has to reconnect.

Until an adopted connection that was opened here has sent its first packet, connection tracking believes a forged
SYN-ACK (it takes itself to have missed the SYN; nf_conntrack_tcp_packet, TCP_CONNTRACK_IGNORE) and calls what
follows invalid: such packets are queued, each, and it is the worker who knows the connection and lets them pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nfq.conntrack import ConntrackControl, FlowTuple
from nfq.rules import RulesConfig, prepare
from nfq.sockdiag import SockDiag, Socket, TcpState

_ESTABLISHED_TIMEOUT_S = 432_000  # nf_conntrack_tcp_timeout_established
_CLOSING_TIMEOUT_S = 120

_OPEN = (TcpState.ESTABLISHED, TcpState.CLOSE_WAIT)
_CLOSING = (TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, TcpState.LAST_ACK, TcpState.CLOSING)
_STATES = sum(1 << state for state in (*_OPEN, *_CLOSING))


@dataclass(frozen=True, slots=True)
class Adopted:
    """A connection let live unjudged, seen from this host. `inbound`: the other side opened it, as listeners tell.

    Addresses have 4 or 16 bytes. A connection within this host is there twice, once from each end.
    """

    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    inbound: bool
    uid: int
    inode: int
    cgroup_id: int


def _all(_key: bytes) -> bool:
    return True


def adopt_established(config: RulesConfig, run: Path, mine: Callable[[bytes], bool] = _all) -> list[Adopted]:
    """Mark the TCP connections of this network namespace ALLOWED; what was adopted. Raises SectoolError.

    `mine` tells by flow key which ones: several workers adopt, each what it will answer for.
    `run` is the daemon's run folder, as for nfq.rules.install: counters are switched on first, since entries made
    without them stay without.
    """
    prepare(run)
    diag, conntrack = SockDiag(), ConntrackControl()
    try:
        sockets: list[Socket] = []
        listening: set[tuple[bytes, int]] = set()
        for v6 in (False, True):
            for found in diag.dump(v6, _STATES | 1 << TcpState.LISTEN):
                if found.state == TcpState.LISTEN:
                    listening.add((found.local, found.local_port))
                else:
                    sockets.append(found)
        adopted = (_adopt(found, conntrack, config, listening) for found in sockets if mine(_key(found)))
        return list(adopted)
    finally:
        diag.close()
        conntrack.close()


def _key(found: Socket) -> bytes:
    ports = found.local_port.to_bytes(2, "big") + found.remote_port.to_bytes(2, "big")
    return found.local + found.remote + ports


def _adopt(
    found: Socket, conntrack: ConntrackControl, config: RulesConfig, listening: set[tuple[bytes, int]]
) -> Adopted:
    # Wildcards: a dual-stack listener takes IPv4, too.
    inbound = any((a, found.local_port) in listening for a in (found.local, bytes(4), bytes(16)))
    outgoing = FlowTuple(found.local, found.remote, found.local_port, found.remote_port)
    first = outgoing.reversed() if inbound else outgoing
    if not conntrack.set_mark(first, config.marks.allowed, config.mask):
        timeout = _CLOSING_TIMEOUT_S if found.state in _CLOSING else _ESTABLISHED_TIMEOUT_S
        conntrack.create(first, config.marks.allowed, timeout)
    return Adopted(
        found.local,
        found.local_port,
        found.remote,
        found.remote_port,
        inbound,
        found.uid,
        found.inode,
        found.cgroup_id,
    )
