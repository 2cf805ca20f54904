"""One slot of the journal as bytes: what a flow must not forget when its worker dies, and the flow made from it again.

    0    fixed fields (_SLOT below); byte 0 says whether the slot is used, and how
    192  state of its records or datagrams: nfq.recordstate, which the record layer keeps current
    384

Byte 0 is written last and cleared first, so a slot torn by a crash counts as free.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from nfq.core import address
from nfq.flow import Flow, LocalWorkload, Owner, State
from nfq.ip import TCP, UDP
from nfq.noise import KeyPair
from nfq.packet import RECORD_OPTION_LEN
from nfq.record import Records
from nfq.recordstate import STATE_SIZE
from nfq.udpflow import UdpFlow
from nfq.udprecord import Datagrams
from sectool.events import Auth, AuthResult, ConnState, DropReason, Point
from sectool.identity.verify import PeerIdentity
from sectool.policy import Party, Request

FREE: Final = 0
JUDGED: Final = 1
ADOPTED: Final = 2  # from before the first start: never judged

STATE_AT: Final = 192
SIZE: Final = STATE_AT + STATE_SIZE

# used, point, auth, key length, key, isn, peer isn, revision, pid, uid, protocol, suite, state, flags, mss, cgroup,
# event id, start, local workload, its identity, peer workload (loopback), peer identity or names, socket, proof
_SLOT = struct.Struct("<BBBB36sIIIIIBBBBH6xQ16sqqqqqQ28s")
_KEY = struct.Struct("<BxxB36s")
_STATE_OFFSET: Final = 62
_PROOF_OFFSET: Final = _SLOT.size - RECORD_OPTION_LEN
# The format before: no protocol, records or proof; see `fields_of_1`.
_SLOT_1 = struct.Struct("<BBBB36sIIIIxxxxQ16sqqqqq")
SIZE_1: Final = 160

_CAN_ENCRYPT, _GROUP, _LET_IN = 1, 2, 4  # flags
_NO_KEY: Final = KeyPair.of(bytes(31) + b"\x40")  # stands where a restored workload's key would; never used

assert _SLOT.size <= STATE_AT
assert SIZE % 8 == 0


class Fields(NamedTuple):
    """A slot's fields in order."""

    used: int
    point: int
    auth: int
    key_length: int
    key: bytes
    isn: int
    peer_isn: int
    revision: int
    pid: int
    uid: int
    protocol: int
    suite: int
    state: int
    flags: int
    mss: int
    cgroup: int
    event_id: bytes
    start_us: int
    local_workload: int
    local_identity: int
    peer_workload: int
    peer: int  # an identity; negative: host names of a peer without one
    socket: int
    proof: bytes


class Memory(NamedTuple):
    """What slots refer to by number: identities, and sets of host names under negative numbers."""

    identities: Mapping[int, PeerIdentity]
    names: Mapping[int, frozenset[str]]


def used_as(flow: Flow) -> int:
    """Byte 0 of the flow's slot."""
    return ADOPTED if flow.adopted else JUDGED


def write(flow: Flow, peer: int, slot: memoryview) -> None:
    """Fill a free slot (SIZE bytes), except for byte 0 and the state. `peer`: see Fields."""
    owner, request = flow.owner, flow.request
    flags = _CAN_ENCRYPT if request is not None and request.can_encrypt else 0
    flags |= _LET_IN if flow.let_in else 0
    socket = 0
    if isinstance(flow, UdpFlow):
        flags |= _GROUP if flow.group else 0
        socket = flow.socket
    _SLOT.pack_into(
        slot,
        0,
        *Fields(
            FREE,
            flow.point,
            flow.auth,
            len(flow.key),
            flow.key,
            flow.isn,
            flow.peer_isn,
            flow.revision,
            owner.pid,
            owner.uid,
            flow.protocol,
            flow.suite,
            flow.state,
            flags,
            flow.mss,
            owner.cgroup,
            flow.event_id,
            flow.start_us,
            flow.local.id if flow.local else 0,
            flow.local.identity.id if flow.local else 0,
            flow.peer_local.id if flow.peer_local else 0,
            peer,
            socket,
            flow.proof,
        ),
    )


def note_state(flow: Flow, slot: memoryview) -> None:
    """The flow has gone on from PROVING: its proof is needed no more."""
    slot[_STATE_OFFSET] = flow.state
    slot[_PROOF_OFFSET : _PROOF_OFFSET + RECORD_OPTION_LEN] = bytes(RECORD_OPTION_LEN)


def key_of(slot: memoryview) -> bytes:
    """The flow key, of any format; b'' when it is none."""
    _, length, raw = _KEY.unpack_from(slot)
    return bytes(raw[:length]) if length in (12, 36) else b""


def references(slot: memoryview) -> tuple[int, int]:
    """The numbers of the identities (or names) that a slot refers to."""
    fields = Fields(*_SLOT.unpack_from(slot))
    return fields.local_identity, fields.peer


def fields_of_1(slot: memoryview) -> Fields:
    """A slot of the first format, which knew only plain TCP flows that were released."""
    (used, point, auth, n, key, isn, revision, pid, uid, cgroup, event_id, start, lw, li, pw, pi) = (
        _SLOT_1.unpack_from(slot)
    )
    rest = (cgroup, event_id, start, lw, li, pw, pi, 0, bytes(RECORD_OPTION_LEN))
    return Fields(
        used, point, auth, n, key, isn, 0, revision, pid, uid, TCP, 0, State.AUTHORISED, 0, 0, *rest
    )


def convert(before: memoryview, slot: memoryview) -> None:
    """Write a slot of the first format as one of today's."""
    _SLOT.pack_into(slot, 0, *fields_of_1(before))


def flow_of(slot: memoryview, memory: Memory) -> Flow:
    """The flow of a used slot, its records going on in the slot's state. Raises ValueError, KeyError."""
    f = Fields(*_SLOT.unpack_from(slot))
    flow = _made(f)
    flow.auth, flow.auth_result = Auth(f.auth), AuthResult.PROVEN if f.auth else AuthResult.NONE
    flow.event_id, flow.revision, flow.recorded = f.event_id, f.revision, True
    flow.owner = Owner(f.pid, f.uid, f.cgroup)
    flow.peer_isn, flow.mss = f.peer_isn, f.mss
    flow.conn_state, flow.reason = ConnState.S1, DropReason.NONE
    mine = memory.identities[f.local_identity] if f.local_identity else None
    theirs = memory.identities[f.peer] if f.peer > 0 else None
    names = memory.names[f.peer] if f.peer < 0 else frozenset[str]()
    if mine is not None:
        flow.local = LocalWorkload(f.local_workload, "", _NO_KEY, b"", mine)
    if f.peer_workload and theirs is not None:
        flow.peer_local = LocalWorkload(f.peer_workload, "", _NO_KEY, b"", theirs)
    else:
        flow.peer = theirs
    if f.used == ADOPTED:
        flow.adopted, flow.conn_state = True, ConnState.OTH
        return flow  # never judged
    if f.flags & _LET_IN:
        flow.let_in = DropReason.NO_IDENTITY  # whatever it was: it goes when denial begins again
        return flow
    here = _party(mine, flow.local_address)
    there = _party(theirs, flow.remote_address, names)
    can_encrypt = bool(f.flags & _CAN_ENCRYPT)
    if flow.point is Point.RESPONDER:
        flow.request = Request(there, here, f.protocol, flow.local_port, can_encrypt=can_encrypt)
    else:
        flow.request = Request(here, there, f.protocol, flow.remote_port, can_encrypt=can_encrypt)
    if f.suite:
        _take_up(flow, f.suite, slot[STATE_AT:SIZE])
    return flow


def _made(f: Fields) -> Flow:
    key, state = f.key[: f.key_length], State(f.state)
    if len(key) not in (12, 36) or state not in (State.AUTHORISED, State.PROVING):
        raise ValueError("not a flow")
    v6, point = len(key) == 36, Point(f.point)
    if f.protocol == UDP:
        datagrams = UdpFlow(key, v6, point, state, f.start_us)
        datagrams.isn, datagrams.group, datagrams.socket = f.isn, bool(f.flags & _GROUP), f.socket
        return datagrams
    if f.protocol != TCP:
        raise ValueError(f"protocol {f.protocol}")
    flow = Flow(key, v6, point, state, f.isn, f.start_us)
    if state is State.PROVING:
        flow.proof = f.proof
    return flow


def _take_up(flow: Flow, suite: int, state: memoryview) -> None:
    """Go on with the flow's keys and counters. Raises StateError: without them the flow is over, never plain."""
    flow.suite = suite
    if isinstance(flow, UdpFlow):
        flow.sealed = Datagrams.restore(state)
        restored = flow.sealed.suite
    else:
        flow.records = Records.restore(state)
        restored = flow.records.suite
    if restored.cipher != suite:
        raise ValueError("the slot and its state name two suites")


def _party(identity: PeerIdentity | None, raw: bytes, names: frozenset[str] = frozenset()) -> Party:
    if identity is None:
        return Party(None, None, address(raw), names)
    return Party(identity.labels, identity.spiffe_id, address(raw))
