"""Turns what happens to flows into event records, and keeps a flood of denials from becoming a flood of events."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, Protocol

from nfq.flow import Flow, State
from sectool.events import (
    FLAG_ADOPTED,
    FLAG_COALESCED,
    FLAG_DEFAULT_DENY,
    FLAG_OBSERVED,
    FLOW_STRUCT,
    Action,
    ConnState,
    DropReason,
    Encryption,
    Kind,
    Phase,
    Point,
    Type,
)
from sectool.flowids import community_id, new_event_id
from sectool.identity.verify import PeerIdentity
from sectool.labels import LabelSet

_MAPPED = bytes(10) + b"\xff\xff"
_DIRECTION = {Point.INITIATOR: 1, Point.RESPONDER: 2, Point.LOCAL: 3}
_LATER_MOST = 64
_KNOWN_LIMIT = 100_000
_BURSTS = 64  # kinds of coalesced denials told apart in one second
_FLOOD_SHARE = 20  # of the budget of rows of their own that is left for the second after one that used all


class EventSink(Protocol):
    """Where records go (sectool.ring.RingWriter)."""

    @property
    def lost(self) -> int:
        """Events dropped so far because the ring was full."""

    def put(self, record: bytes) -> bool:
        """Append one flow record."""

    def put_blob(self, blob: dict[str, object]) -> bool:
        """Append one JSON event."""


class Counts(NamedTuple):
    """Bytes and packets of a flow, by direction of its initiator."""

    source_bytes: int = 0
    source_packets: int = 0
    destination_bytes: int = 0
    destination_packets: int = 0


class _Burst(NamedTuple):
    """What coalesced denials have in common."""

    reason: DropReason
    rule: int
    source: bytes
    destination: bytes
    port: int
    point: Point
    action: Action
    protocol: int


_NO_COUNTS = Counts()


_NAMES = {action: action.name.lower() for action in Action}  # an enum's own name costs two calls


class Recorder:
    """Writes flow records and the dictionary entries they refer to. Counts verdicts by reason for `status`."""

    def __init__(self, sink: EventSink, *, policy_hash: int = 0, denials_per_s: int = 2000) -> None:
        self.sink = sink
        self.policy_hash = policy_hash
        self.reasons: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.denials_per_s = denials_per_s
        # Two purses: a flood of nameless packets must not hide what somebody with a credential was denied.
        self._budget = [denials_per_s, denials_per_s]
        self._bursts: Counter[_Burst] = Counter()
        self._burst_start_us = 0
        self._known: set[int] = set()
        self.later: list[tuple[Flow, Action, int]] = []

    def flow(
        self,
        flow: Flow,
        phase: Phase,
        action: Action,
        now_us: int,
        *,
        counts: Counts = _NO_COUNTS,
        flow_count: int = 1,
        flags: int = 0,
        rule: int = 0,
    ) -> None:
        """Write one record of `flow`. The first one gives the flow its event id."""
        if self.later:
            self.catch_up()
        if not flow.event_id:
            flow.event_id = new_event_id(flow.start_us)
        point = flow.point
        outward = point is not Point.RESPONDER
        local, remote = flow.local_address, flow.remote_address
        if outward:
            src, dst, sport, dport = local, remote, flow.local_port, flow.remote_port
        else:
            src, dst, sport, dport = remote, local, flow.remote_port, flow.local_port
        if not flow.community:
            flow.community = community_id(src, dst, sport, dport, flow.protocol)
        ours = flow.local
        mine: PeerIdentity | None = ours.identity if ours else None
        theirs = flow.peer
        workload = ours.id if ours else 0
        if flow.point is Point.LOCAL and flow.peer_local:
            theirs = flow.peer_local.identity
        for identity in (mine, theirs):
            if identity is not None and identity.id not in self._known:
                self.know(identity)
        mine_ids = (mine.id, mine.labels.id) if mine else (0, 0)
        their_ids = (theirs.id, theirs.labels.id) if theirs else (0, 0)
        s, d = (mine_ids, their_ids) if outward else (their_ids, mine_ids)
        decision = flow.decision
        if decision is not None and decision.rule is not None:
            rule = decision.rule.id
        if flow.adopted:
            flags |= FLAG_ADOPTED
        pending_action, pending_rule = 0, 0
        if decision is not None:
            pending_action = decision.pending_action
            pending_rule = decision.pending_rule.id if decision.pending_rule is not None else 0
        if flow.reason is DropReason.DEFAULT_DENY:
            flags |= FLAG_DEFAULT_DENY
        if action is Action.AUDIT and flow.reason is not DropReason.NONE:
            flags |= FLAG_OBSERVED
        peer_workload = flow.peer_local.id if flow.peer_local else 0
        owner = flow.owner
        passes = action is Action.ALLOW or action is Action.AUDIT
        record = FLOW_STRUCT.pack(
            Kind.FLOW,
            phase,
            point,
            action,
            flow.protocol,
            _DIRECTION[point],
            flow.auth,
            flow.auth_result,
            (Encryption.ENCRYPTED if flow.suite else Encryption.PLAIN) if passes else Encryption.NONE,
            flow.suite if passes else 0,
            flow.conn_state,
            flow.decider,
            pending_action,
            flags,
            flow.reason,
            flow.peer_reason,
            sport,
            dport,
            6 if flow.v6 else 4,
            flow.revision,
            flow_count,
            self.sink.lost & 0xFFFFFFFF,
            owner.pid,
            owner.uid,
            0,
            now_us,
            flow.start_us,
            now_us if phase is Phase.END else 0,
            flow.event_id,
            src if flow.v6 else _MAPPED + src,
            dst if flow.v6 else _MAPPED + dst,
            flow.community,
            flow.history,
            *counts,
            s[0],
            d[0],
            s[1],
            d[1],
            workload if outward else 0,
            peer_workload if outward else workload,
            rule,
            flow.peer_rule,
            pending_rule,
            self.policy_hash,
            owner.cgroup,
        )
        self.sink.put(record)
        flow.recorded = True

    def adopted(self, flow: Flow, now_us: int) -> None:
        """The VERDICT record of a connection that was there before the first start: let live, not judged."""
        flow.conn_state = ConnState.OTH
        self.verdicts["adopted"] += 1
        self.flow(flow, Phase.VERDICT, Action.ALLOW, now_us)

    def allowed(self, flow: Flow, now_us: int, *, later: bool = False) -> None:
        """The VERDICT record of an authorised flow: allow, or audit when an audit rule let it through.

        `later`: its packet is waiting; the record is written by `catch_up`, or ahead of the next one.
        """
        action = flow.decision.action if flow.decision is not None else Action.ALLOW
        flow.conn_state = ConnState.S1
        self.verdicts[_NAMES[action]] += 1
        if not later or len(self.later) >= _LATER_MOST:
            self.flow(flow, Phase.VERDICT, action, now_us)
            return
        flow.event_id = flow.event_id or new_event_id(flow.start_us)
        flow.recorded = True
        self.later.append((flow, action, now_us))

    def catch_up(self) -> None:
        """Write what was put off."""
        later, self.later = self.later, []
        for flow, action, now_us in later:
            self.flow(flow, Phase.VERDICT, action, now_us)

    def denied(self, flow: Flow, reason: DropReason, now_us: int, action: Action = Action.DENY) -> None:
        """The VERDICT record of a refused flow; past the budget of a second it only counts (see `tick`)."""
        flow.reason = reason
        if flow.conn_state is ConnState.NONE:
            flow.conn_state = ConnState.S0
        self.count(reason)
        self.verdicts[action.name.lower()] += 1
        purse = 1 if flow.peer is not None or flow.local is not None else 0
        if self._budget[purse] > 0:
            self._budget[purse] -= 1
            self.flow(flow, Phase.VERDICT, action, now_us)
            return
        rule = flow.decision.rule.id if flow.decision is not None and flow.decision.rule is not None else 0
        inward = flow.point is Point.RESPONDER
        source, destination = flow.local_address, flow.remote_address
        if inward:
            source, destination = destination, source
        self._coalesce(
            _Burst(
                reason,
                rule,
                source,
                destination,
                flow.local_port if inward else flow.remote_port,
                flow.point,
                action,
                flow.protocol,
            ),
            now_us,
        )

    def _coalesce(self, burst: _Burst, now_us: int, n: int = 1) -> None:
        if len(self._bursts) >= _BURSTS and burst not in self._bursts:
            # A spoofed flood: one row for all sources
            burst = burst._replace(source=bytes(len(burst.source)), rule=0)
        if not self._bursts:
            self._burst_start_us = now_us
        self._bursts[burst] += n

    def turned_away(self, n: int, now_us: int) -> None:
        """The kernel rules have dropped `n` attempts to connect to this host, without a look at who and where."""
        if not n:
            return
        self.reasons[DropReason.RATE_LIMITED.name.lower()] += n
        self.verdicts[Action.DENY.name.lower()] += n
        everybody = bytes(4)
        self._coalesce(
            _Burst(DropReason.RATE_LIMITED, 0, everybody, everybody, 0, Point.RESPONDER, Action.DENY, 6),
            now_us,
            n,
        )

    def ended(self, flow: Flow, action: Action, counts: Counts, now_us: int) -> None:
        """The END record of a flow that had been authorised."""
        if flow.conn_state in (ConnState.NONE, ConnState.S1):
            flow.conn_state = ConnState.SF
        self.flow(flow, Phase.END, action, now_us, counts=counts)

    def count(self, reason: DropReason) -> None:
        """Count a dropped packet that is no flow of its own."""
        self.reasons[reason.name.lower()] += 1

    def tick(self, now_us: int) -> None:
        """Once a second: new budget, and one record for each kind of denial that was over the old one."""
        self.catch_up()
        # While a flood lasts a few rows a second tell enough of it beside what is coalesced.
        self._budget = [
            self.denials_per_s if left else max(1, self.denials_per_s // _FLOOD_SHARE)
            for left in self._budget
        ]
        for burst, n in self._bursts.items():
            inward = burst.point is Point.RESPONDER
            local, remote = burst.source, burst.destination
            ports = bytes(2) + burst.port.to_bytes(2, "big")
            if inward:
                local, remote = remote, local
                ports = burst.port.to_bytes(2, "big") + bytes(2)
            flow = Flow(
                local + remote + ports,
                len(local) == 16,
                burst.point,
                State.DENIED,
                0,
                self._burst_start_us,
            )
            flow.protocol = burst.protocol
            flow.reason = burst.reason
            flow.conn_state = ConnState.S0
            self.flow(
                flow,
                Phase.VERDICT,
                burst.action,
                now_us,
                flow_count=n,
                flags=FLAG_COALESCED,
                rule=burst.rule,
            )
        self._bursts.clear()

    def know(self, identity: PeerIdentity) -> None:
        """Write the dictionary entries of an identity ahead of the first record that names it."""
        if len(self._known) >= _KNOWN_LIMIT:
            self._known.clear()  # the store ignores entries it has
        ok = self.sink.put_blob(labels_entry(identity.labels)) and self.sink.put_blob(
            identity_entry(identity)
        )
        if ok:
            self._known.add(identity.id)


def labels_entry(labels: LabelSet) -> dict[str, object]:
    """Dictionary blob of a label set."""
    return {"type": Type.DICT_LABELS, "id": labels.id, "labels": dict(labels)}


def identity_entry(identity: PeerIdentity) -> dict[str, object]:
    """Dictionary blob of an identity version (one certificate)."""
    return {
        "type": Type.DICT_IDENTITY,
        "id": identity.id,
        "spiffe_id": identity.spiffe_id,
        "trust_domain": identity.trust_domain,
        "labels_id": identity.labels.id,
        "fingerprint": identity.fingerprint.hex(),
        "serial": identity.serial,
        "not_before": identity.not_before_us,
        "not_after": identity.not_after_us,
        "issuer": identity.host,
    }
