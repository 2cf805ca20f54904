"""A made-up past: flows of a fleet, written as a segment that the store's readers open. Also used by tests.

A fleet of applications in several environments on several hosts, clients and services outside, a scanner that is
denied. Which pair talks how often follows a power law, as in life.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sectool.events import FLOW_DTYPE, Action, ConnState, Kind, Phase, Point
from sectool.labels import LabelSet, stable_id
from store.columns import dictionary_row, dictionary_table, records_table
from store.schema import SEGMENT_VERSION, segment_ddl
from store.segment import segment_name

T0 = 1_772_330_584_000_000  # 2026-03-01T02:03:04Z
DAY = 86_400_000_000
CHUNK = 200_000  # records written at once


@dataclass(frozen=True, slots=True)
class End:
    """One end of flows: labels (None: no identity), and the network its addresses are drawn from."""

    labels: LabelSet | None
    network: str


@dataclass(frozen=True, slots=True)
class Talk:
    """Flows alike: who, whom, by what, and what became of them."""

    source: End
    destination: End
    protocol: int = 6
    low: int = 443
    high: int = 443
    weight: float = 1.0
    action: Action = Action.ALLOW
    drop_reason: int = 0
    encrypted: bool = False
    point: Point = Point.INITIATOR
    rule: str = ""


def write_history(
    events: Path,
    talks: list[Talk],
    flows: int,
    seed: int,
    *,
    days: float = 1.0,
    ends: bool = True,
    number: int = 1,
) -> int:
    """Write `flows` flows (a VERDICT each, with `ends` an END for those let through) as one segment.

    Returns the last sequence number. The same seed gives the same flows.
    """
    rng = np.random.default_rng(seed)
    events.mkdir(parents=True, exist_ok=True)
    path = events / segment_name(T0, number)
    connection = duckdb.connect(str(path))
    try:
        for statement in segment_ddl(path.stem.replace("-", "_")):
            connection.execute(statement.replace(path.stem.replace("-", "_") + ".", ""))
        connection.execute("INSERT INTO meta VALUES (?, make_timestamp(?), 1, 0)", [SEGMENT_VERSION, T0])
        rows: dict[str, list[dict[str, Any]]] = {}
        ids: dict[tuple[str, int], int] = {}

        def numbered(table: str, key: int) -> int:
            """Small ids, of which no other segment of the folder has any."""
            return ids.setdefault((table, key), number * 1_000_000 + len(ids))

        for blob in _entries(talks):
            named = dictionary_row(blob)
            assert named is not None
            table, row = named
            rows.setdefault(table, []).append({"id": numbered(table, row["key"]), **row})
        for table, entries in rows.items():
            _insert(connection, table, dictionary_table(table, entries))
        weights = np.array([talk.weight for talk in talks])
        step = days * DAY / max(flows, 1)
        seq = number * 1_000_000_000
        for first in range(0, flows, CHUNK):
            count = min(CHUNK, flows - first)
            chosen = rng.choice(len(talks), count, p=weights / weights.sum())
            starts = T0 + ((first + np.arange(count)) * step).astype(np.int64)
            records = _records(talks, chosen, starts, rng)
            if ends:
                ended = records[np.isin(records["action"], (Action.ALLOW, Action.AUDIT))].copy()
                ended["phase"], ended["end"] = Phase.END, ended["start"] + 5_000_000
                ended["conn_state"] = ConnState.SF
                records = np.concatenate([records, ended])
            _insert(connection, "flow_records", records_table(records, seq, numbered))
            seq += len(records)
        connection.execute("CHECKPOINT")
    finally:
        connection.close()
    return seq


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    connection.register("incoming", rows)
    connection.execute(f"INSERT INTO {table} SELECT * FROM incoming")
    connection.unregister("incoming")


def _entries(talks: list[Talk]) -> list[dict[str, Any]]:
    sets = {end.labels for talk in talks for end in (talk.source, talk.destination) if end.labels is not None}
    out: list[dict[str, Any]] = [
        {"type": "dict.labels", "id": labels.id, "labels": dict(labels)} for labels in sorted(sets, key=str)
    ]
    rule = {"type": "dict.rule", "policy": "past", "kind": "Policy", "owner": "team-past", "index": 1}
    return out + [
        {**rule, "id": stable_id(text.encode()), "text": text, "revision": 1}
        for text in sorted({talk.rule for talk in talks if talk.rule})
    ]


def _records(
    talks: list[Talk], chosen: NDArray[np.int64], starts: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.void]:
    count = len(chosen)
    out = np.zeros(count, FLOW_DTYPE)

    def of(values: list[int]) -> NDArray[np.int64]:
        return np.array(values, np.int64)[chosen]

    out["kind"], out["phase"], out["ip_version"], out["flow_count"] = Kind.FLOW, Phase.VERDICT, 4, 1
    out["ts"] = out["start"] = starts
    out["point"] = of([talk.point for talk in talks])
    out["direction"] = of([talk.point for talk in talks])
    out["transport"] = of([talk.protocol for talk in talks])
    out["action"] = of([talk.action for talk in talks])
    out["drop_reason"] = of([talk.drop_reason for talk in talks])
    out["encryption"] = of([2 if talk.encrypted else 1 for talk in talks])
    out["rule"] = of([stable_id(talk.rule.encode()) if talk.rule else 0 for talk in talks])
    for side in ("source", "destination"):
        ends: list[End] = [getattr(talk, side) for talk in talks]
        out[f"{side}_labels"] = of([end.labels.id if end.labels is not None else 0 for end in ends])
    ports = of([talk.low for talk in talks]) + (
        rng.random(count) * of([talk.high - talk.low + 1 for talk in talks])
    ).astype(np.int64)
    icmp = np.isin(out["transport"], (1, 58))
    out["source_port"] = np.where(icmp, ports, rng.integers(10_000, 60_000, count))
    out["destination_port"] = np.where(icmp, 0, ports)
    ids = rng.integers(0, 256, (count, 16), np.uint8)
    out["event_id"] = ids.view("V16")[:, 0]
    out["community"] = rng.integers(0, 256, (count, 20), np.uint8).view("V20")[:, 0]
    for side in ("source", "destination"):
        out[f"{side}_ip"] = _addresses([getattr(talk, side).network for talk in talks], chosen, rng)
    return out


def _addresses(networks: list[str], chosen: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.void]:
    """A random address of the chosen network each, as in a record; of the last 32 bits at most are random."""
    nets = [ipaddress.ip_network(network) for network in networks]
    first = [int(net.network_address) | (0xFFFF << 32 if net.version == 4 else 0) for net in nets]
    base = np.array([np.frombuffer(number.to_bytes(16, "big"), np.uint8) for number in first])[chosen]
    size = np.array([min(net.num_addresses, 1 << 32) for net in nets], np.float64)[chosen]
    low = np.array([number & 0xFFFF_FFFF for number in first], np.int64)[chosen]
    low += (rng.random(len(chosen)) * size).astype(np.int64)
    base[:, 12:] = low.astype(">u4").view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(base).view("V16")[:, 0]


def fleet(apps: int = 40, environments: int = 3, copies: int = 4, seed: int = 1) -> list[Talk]:
    """Talks of a fleet: each application calls some of its environment, is called from outside, and is scanned."""
    rng = np.random.default_rng(seed)
    talks: list[Talk] = []
    outside = End(None, "198.18.0.0/15")
    for env in range(environments):
        members = [
            [
                End(
                    LabelSet({"app": f"app{app}", "env": f"env{env}", "host": f"h{(app + copy) % 24}"}),
                    f"10.{env}.{app}.{copy}/32",
                )
                for copy in range(copies)
            ]
            for app in range(apps)
        ]
        for app in range(apps):
            port = 8000 + app
            for caller in rng.choice(apps, 4, replace=False):
                rule = f"allow app=app{caller},env=env{env} to call app=app{app},env=env{env} on tcp/{port}"
                talks += [
                    Talk(
                        source,
                        destination,
                        low=port,
                        high=port,
                        weight=float(1.0 / rng.integers(1, 200)),
                        encrypted=app % 5 == 0,
                        rule=rule,
                    )
                    for source in members[caller]
                    for destination in members[app]
                ]
            front = members[app][0]
            rule = f"allow net:198.18.0.0/15 to call app=app{app} on tcp/443"
            talks.append(Talk(outside, front, weight=0.5, point=Point.RESPONDER, rule=rule))
            talks.append(
                Talk(
                    End(None, "203.0.113.0/24"),
                    front,
                    low=1,
                    high=1024,
                    weight=0.02,
                    action=Action.DENY,
                    drop_reason=1,
                    point=Point.RESPONDER,
                )
            )
    return talks
