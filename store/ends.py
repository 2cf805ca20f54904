"""Both ends of each flow, from two hosts' stores, joined by community id: what only one saw, where they differ.

A flow of host A is expected at B when its other address is one that B's own records name as B's, and B was
recording then. Clocks of hosts differ: records within `SKEW` of each other are of the same flow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sectool.clock import SECOND, iso
from store.query import MAX_ROWS
from store.reader import Reader

SKEW = 30 * SECOND
_FIELDS = (
    "event_id, community_id, epoch_us(event_start) AS start, observation_point, action, drop_reason, peer_reason,"
    " source_ip, source_port, destination_ip, destination_port, transport, source_identity, destination_identity,"
    " encryption, cipher, rule"
)


@dataclass(frozen=True, slots=True)
class Ends:
    """What the join came to. `lonely` and `unlike` are plain rows; `elsewhere` had their other end on no host asked."""

    both: int
    lonely: tuple[dict[str, Any], ...]
    unlike: tuple[dict[str, Any], ...]
    elsewhere: int
    truncated: bool


@dataclass(slots=True)
class _Host:
    name: str
    flows: list[dict[str, Any]]
    truncated: bool
    addresses: set[str] = field(default_factory=set)
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        for row in self.flows:
            if row["observation_point"] == "initiator":
                self.addresses.add(row["source_ip"])
            elif row["observation_point"] == "responder":
                self.addresses.add(row["destination_ip"])
        self.first = min((row["start"] for row in self.flows), default=0)
        self.last = max((row["start"] for row in self.flows), default=0)


def join_ends(hosts: Sequence[tuple[str, Reader]], since: int, until: int) -> Ends:
    """Join the flows that began in [since, until) (UTC microseconds) in the stores of `hosts` (name, reader)."""
    known = [_host(name, reader, since, until) for name, reader in hosts]
    whose = {address: host for host in known for address in host.addresses}
    candidates: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for host in known:
        for row in host.flows:
            candidates[host.name, row["observation_point"] or "", row["community_id"]].append(row)
    both, elsewhere = 0, 0
    lonely: list[dict[str, Any]] = []
    unlike: list[dict[str, Any]] = []
    taken: set[tuple[str, str]] = set()
    for host in known:
        for row in host.flows:
            mine, other_point, far = _sides(row)
            if not mine or (host.name, row["event_id"]) in taken:
                continue
            other = whose.get(far)
            if other is None or other is host:
                elsewhere += 1
                continue
            match = _nearest(
                candidates[other.name, other_point, row["community_id"]], row["start"], other.name, taken
            )
            if match is None:
                covered = other.first - SKEW <= row["start"] <= other.last + SKEW
                lonely.append(
                    {"host": host.name, "missing_at": other.name, "covered": covered, **_shown(row)}
                )
                continue
            taken.add((other.name, match["event_id"]))
            both += 1
            first, second = (row, match) if mine == "initiator" else (match, row)
            names = (host.name, other.name) if mine == "initiator" else (other.name, host.name)
            differences = _differences(first, second)
            if differences:
                unlike.append(
                    {
                        "initiator": names[0],
                        "responder": names[1],
                        "differences": differences,
                        **_shown(first),
                    }
                )
    order = lambda row: row["start"]  # noqa: E731
    return Ends(
        both,
        tuple(sorted(lonely, key=order)),
        tuple(sorted(unlike, key=order)),
        elsewhere,
        any(host.truncated for host in known),
    )


def _host(name: str, reader: Reader, since: int, until: int) -> _Host:
    result = reader.query(
        f"SELECT {_FIELDS} FROM flows_between(make_timestamp({since:d}), make_timestamp({until:d}))"  # noqa: S608
        " ORDER BY event_start",
        limit=MAX_ROWS,
        timeout_ms=120_000,
    )
    return _Host(name, result.table.to_pylist(), result.truncated)


def _sides(row: dict[str, Any]) -> tuple[str, str, str]:
    if row["observation_point"] == "initiator":
        return "initiator", "responder", row["destination_ip"]
    if row["observation_point"] == "responder":
        return "responder", "initiator", row["source_ip"]
    return "", "", ""  # within one host


def _nearest(
    rows: Sequence[dict[str, Any]], start: int, host: str, taken: set[tuple[str, str]]
) -> dict[str, Any] | None:
    free = [r for r in rows if abs(r["start"] - start) <= SKEW and (host, r["event_id"]) not in taken]
    return min(free, key=lambda r: abs(r["start"] - start), default=None)


def _differences(initiator: dict[str, Any], responder: dict[str, Any]) -> list[str]:
    out = []
    passed = [row["action"] in ("allow", "audit") for row in (initiator, responder)]
    if passed[0] != passed[1]:
        words = [
            " ".join(filter(None, (row["action"], row["drop_reason"]))) for row in (initiator, responder)
        ]
        out.append(f"verdict: {words[0]} at the initiator, {words[1]} at the responder")
    for name in ("source_identity", "destination_identity", "encryption", "cipher"):
        a, b = initiator[name], responder[name]
        if a != b and a is not None and b is not None and all(passed):
            out.append(f"{name}: {a} at the initiator, {b} at the responder")
    return out


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "start": row["start"],
        "time": iso(row["start"]),
        "event_id": row["event_id"],
        "community_id": row["community_id"],
        "source": f"{row['source_ip']}:{row['source_port']}",
        "destination": f"{row['destination_ip']}:{row['destination_port']}",
        "transport": row["transport"],
        "action": row["action"],
        "reason": row["drop_reason"],
        "seen_as": row["observation_point"],
    }
