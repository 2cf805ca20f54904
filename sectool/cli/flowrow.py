"""A flow of the store as one row of the event format: ECS, OCSF and Zeek names, plain JSON types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sectool.cli.output import Column, Row
from sectool.clock import from_datetime
from sectool.policy.service import ICMP, ICMP6, describe

SCHEMA = "sectool.flow/1"

# Column of the store's `flows` view -> field of the event format, in the order they are shown.
FIELDS: dict[str, str] = {
    "event_id": "event.id",
    "event_start": "event.start",
    "event_end": "event.end",
    "duration_us": "event.duration",
    "open": "open",
    "action": "event.action",
    "drop_reason": "drop_reason",
    "decider": "decider",
    "peer_reason": "peer_reason",
    "observation_point": "observation_point",
    "direction": "network.direction",
    "transport": "network.transport",
    "community_id": "network.community_id",
    "source_ip": "source.ip",
    "source_port": "source.port",
    "source_identity": "source.identity",
    "source_labels": "source.labels",
    "source_workload": "source.workload",
    "source_bytes": "source.bytes",
    "source_packets": "source.packets",
    "destination_ip": "destination.ip",
    "destination_port": "destination.port",
    "destination_identity": "destination.identity",
    "destination_labels": "destination.labels",
    "destination_workload": "destination.workload",
    "destination_bytes": "destination.bytes",
    "destination_packets": "destination.packets",
    "auth_method": "auth.method",
    "auth_result": "auth.result",
    "policy_revision": "policy.revision",
    "policy_hash": "policy.hash",
    "rule_id": "rule.id",
    "rule": "rule.text",
    "policy": "rule.policy",
    "owner": "rule.owner",
    "default_deny": "default_deny",
    "peer_rule": "peer_rule.text",
    "pending_action": "pending.action",
    "pending_rule": "pending.rule",
    "encryption": "encryption.state",
    "cipher": "encryption.cipher",
    "conn_state": "conn_state",
    "history": "history",
    "pid": "process.pid",
    "uid": "user.id",
    "cgroup": "cgroup",
    "flow_count": "flow.count",
    "adopted": "adopted",
    "restored": "restored",
    "observed": "observed",
    "missed": "missed",
}


def flow_row(stored: Mapping[str, Any]) -> dict[str, Any]:
    """One flow for programs: every field of the format, null where nothing is known. Durations in nanoseconds (ECS)."""
    out = {name: plain(stored.get(column)) for column, name in FIELDS.items()}
    if out["event.duration"] is not None:
        out["event.duration"] *= 1000
    out["rule.id"] = out["rule.id"] or None  # 0: no rule
    for side in ("source.labels", "destination.labels"):
        out[side] = _labels(out[side])
    return out


def plain(value: Any) -> Any:
    """A stored value as JSON has it: times as RFC 3339 in UTC."""
    if isinstance(value, datetime):
        moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond:06d}Z"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):  # JSON has none of them
        return None if math.isnan(value) else str(value)
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def _labels(text: Any) -> dict[str, str] | None:
    if not isinstance(text, str):
        return None
    return dict(part.partition("=")[::2] for part in text.split(",") if part)


def start_us(row: Row) -> int:
    """UTC microseconds of event.start."""
    return from_datetime(datetime.fromisoformat(row["event.start"]))


_MESSAGES = {"icmp": ICMP, "icmpv6": ICMP6}  # type and code stand where others have ports
_STYLE = {"allow": "good", "deny": "bad", "audit": "warn", "error": "bad"}
# What tells workloads apart, most telling first; the rest is in `-o wide` and in the data formats.
_TELLING = ("app", "env", "exe")


def _end(row: Row, side: str) -> str:
    """Who: telling labels, or the name in the SPIFFE ID; and always the address."""
    labels = row[f"{side}.labels"] or {}
    name = ",".join(f"{k}={labels[k]}" for k in _TELLING[:2] if k in labels)
    name = name or labels.get("exe", "") or (row[f"{side}.identity"] or "").rpartition("/")[2]
    address = row[f"{side}.ip"] or "?"
    return f"{name} ({address})" if name else str(address)


def _service(row: Row) -> str:
    protocol = _MESSAGES.get(row["network.transport"])
    if protocol is not None:
        return describe(protocol, row["source.port"], row["destination.port"])
    return f"{row['network.transport']}/{row['destination.port']}"


def _verdict(row: Row) -> str:
    action = "would-deny" if row["observed"] else row["event.action"] or "?"
    count = row["flow.count"] or 1
    return f"{action} x{count}" if count > 1 else str(action)


def _why(row: Row) -> str:
    reason = row["drop_reason"]
    if reason is None:
        return row["rule.text"] or ""
    text = str(reason)
    if row["peer_reason"]:
        text += f"/{row['peer_reason']}"
    rule = row["rule.text"] or row["peer_rule.text"]
    return f"{text}: {rule}" if rule else text


def _when(row: Row) -> str:
    moment: str = row["event.start"] or "-"
    return moment[:23] + "Z" if len(moment) > 23 else moment


def _volume(row: Row) -> str:
    if row["event.action"] == "deny":
        return ""
    out, back = row["source.bytes"] or 0, row["destination.bytes"] or 0
    return f"{out}/{back}" if out or back else ("open" if row["open"] else "")


COLUMNS = (
    Column("TIME", _when, least=24),
    Column("VERDICT", _verdict, style=lambda r: _STYLE.get(r["event.action"], ""), least=7),
    Column("SOURCE", lambda r: _end(r, "source"), least=28),
    Column("DESTINATION", lambda r: _end(r, "destination"), least=28),
    Column("SERVICE", _service, least=9),
    Column("BYTES", _volume, least=11),
    Column("WHY", _why),
    Column("SIDE", lambda r: r["observation_point"] or "", wide=True),
    Column("STATE", lambda r: r["conn_state"] or "", wide=True),
    Column("REV", lambda r: r["policy.revision"] or "", wide=True),
    Column("OWNER", lambda r: r["rule.owner"] or "", wide=True),
    Column("SOURCE IDENTITY", lambda r: r["source.identity"] or "", wide=True),
    Column("DESTINATION IDENTITY", lambda r: r["destination.identity"] or "", wide=True),
    Column("PID", lambda r: r["process.pid"] or "", wide=True),
    Column("EVENT ID", lambda r: r["event.id"], wide=True),
)
