"""Everything on record about one address, identity, workload, label set, policy or flow, in one document."""

# ruff: noqa: S608 -- SQL is put together from this package's own parts, values are parameters

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import duckdb

from sectool.clock import iso
from sectool.errors import SectoolError
from sectool.events import Action, Phase
from sectool.labels import LabelError, LabelSet
from sectool.policy import Engine, parse
from sectool.policy.reach import named_parties, reach, services_of
from sectool.policy.service import Service
from store.catalog import Catalog
from store.entity import Sort, find_entity
from store.filtersql import Condition
from store.narrowing import narrow
from store.pairs import add_up, named
from store.past import History, open_history
from store.query import small, time_limit
from store.timeline import Timeline, party, reason_text, service_text, timeline

BUCKETS = 60
MAX_ROWS = 50
MAX_KNOWN = 400
_PASSED = f"({Action.ALLOW:d}, {Action.AUDIT:d})"


def investigate(
    catalog: Catalog,
    about: str,
    *,
    since: int | None = None,
    until: int | None = None,
    timeout_ms: int = 60_000,
) -> dict[str, Any]:
    """Timeline, peers, denials, policy, processes and blast radius of `about` in [since, until) (UTC microseconds).

    Without a time: the last hour on record, a flow's whole life. Raises UsageError for what is not on record.
    """
    told: Timeline = timeline(catalog, since=since, until=until, about=about, limit=80)
    since, until = told.since, told.until
    document: dict[str, Any] = {
        "about": about,
        "since": since,
        "until": until,
        "warnings": list(told.warnings),
    }
    with open_history(catalog.events) as history, catalog.reading() as cursor, time_limit(cursor, timeout_ms):
        entity = find_entity(catalog, cursor, about)
        condition = entity.condition(cursor)
        document["sort"] = str(entity.sort)
        scope = _Scope(catalog, cursor, condition, since, until)
        document["activity"] = scope.activity()
        document["peers"] = scope.peers()
        document["denied"] = scope.denied()
        document["parties"] = scope.parties()
        document["processes"] = scope.processes()
        document["policies"] = _policies(history, since, until)
        subjects = _subjects(document["parties"], entity.sort, about)
        document["radius"] = _radius(history, cursor, scope, subjects, until)
    document["timeline"] = told.document()["entries"]
    document["timeline_truncated"] = told.truncated
    return document


class _Scope:
    """The flows of the subject in the window."""

    def __init__(
        self,
        catalog: Catalog,
        cursor: duckdb.DuckDBPyConnection,
        condition: Condition,
        since: int,
        until: int,
    ) -> None:
        self.catalog = catalog
        narrow(catalog, cursor, since, until)
        self.cursor, self.condition, self.since, self.until = cursor, condition, since, until
        cursor.execute(
            "CREATE OR REPLACE TEMP TABLE subject AS SELECT * FROM flow_records"
            f" WHERE phase = {Phase.VERDICT:d} AND event_start >= make_timestamp(?) AND event_start < make_timestamp(?)"
            f" AND ({condition[0]})",
            [since, until, *condition[1]],
        )

    def activity(self) -> list[dict[str, Any]]:
        """Allowed and denied flows over time, in equal steps."""
        step = max(1, -(-(self.until - self.since) // BUCKETS))
        rows = self.cursor.execute(
            f"SELECT (epoch_us(event_start) - {self.since:d}) // {step:d},"
            f" coalesce(sum(flow_count) FILTER (action IN {_PASSED}), 0)::BIGINT,"
            f" coalesce(sum(flow_count) FILTER (action NOT IN {_PASSED}), 0)::BIGINT FROM subject GROUP BY 1"
        ).fetchall()
        counts = {int(slot): (int(a), int(d)) for slot, a, d in rows}
        return [
            {
                "ts": self.since + slot * step,
                "allowed": counts.get(slot, (0, 0))[0],
                "denied": counts.get(slot, (0, 0))[1],
            }
            for slot in range(-(-(self.until - self.since) // step))
        ]

    def peers(self) -> list[dict[str, Any]]:
        """Pairs and services with counts."""
        add_up(self.catalog, self.cursor, "talk", self.since, self.until, self.condition)
        return named(self.cursor, f"(SELECT * FROM talk ORDER BY denied + allowed DESC LIMIT {MAX_ROWS})")

    def denied(self) -> list[dict[str, Any]]:
        """Refused attempts by parties, reason and rule."""
        rows = small(
            self.cursor,
            "SELECT d.*, a.text AS source, b.text AS destination, r.text AS rule, r.policy AS policy, r.owner AS owner"
            " FROM (SELECT source_labels, destination_labels, ip_text(any_value(source_ip_hi), any_value(source_ip_lo))"
            " AS source_ip, ip_text(any_value(destination_ip_hi), any_value(destination_ip_lo)) AS destination_ip,"
            " transport, CASE WHEN transport IN (1, 58) THEN source_port * 256 + destination_port ELSE destination_port"
            " END AS service, drop_reason, peer_reason, rule AS rule_id, sum(flow_count)::BIGINT AS n,"
            " epoch_us(min(event_start)) AS first, epoch_us(max(event_start)) AS last,"
            " event_uuid(arg_max(event_start, seq), arg_max(event_id, seq))::VARCHAR AS event_id FROM subject"
            f" WHERE action NOT IN {_PASSED} GROUP BY ALL ORDER BY n DESC LIMIT {MAX_ROWS}) d"
            " LEFT JOIN labels a ON a.id = d.source_labels LEFT JOIN labels b ON b.id = d.destination_labels"
            " LEFT JOIN rules r ON r.id = d.rule_id ORDER BY n DESC",
        )
        return [
            {
                "source": party(row["source"], None, None, row["source_ip"]),
                "destination": party(row["destination"], None, None, row["destination_ip"]),
                "service": service_text(row["transport"], row["service"]),
                "reason": reason_text(row["drop_reason"]),
                "peer_reason": reason_text(row["peer_reason"]) or None,
                "rule": row["rule"],
                "policy": row["policy"],
                "owner": row["owner"],
                "count": row["n"],
                "first": row["first"],
                "last": row["last"],
                "event_id": row["event_id"],
            }
            for row in rows.to_pylist()
        ]

    def parties(self) -> list[dict[str, Any]]:
        """Who took part, and on which side."""
        each = (
            "SELECT '{0}' AS side, {0}_identity AS i, {0}_labels AS l, ip_text({0}_ip_hi, {0}_ip_lo) AS ip,"
            " sum(flow_count)::BIGINT AS n FROM subject GROUP BY ALL"
        )
        rows = small(
            self.cursor,
            "SELECT p.side, p.ip, p.n AS flows, s.spiffe_id AS identity, l.text AS labels, s.fingerprint"
            f" FROM ({each.format('source')} UNION ALL {each.format('destination')}) p"
            " LEFT JOIN identities s ON s.id = p.i LEFT JOIN labels l ON l.id = p.l"
            f" ORDER BY p.n DESC, p.side, p.ip LIMIT {MAX_ROWS}",
        )
        return list(rows.to_pylist())

    def processes(self) -> list[dict[str, Any]]:
        """Processes and programs on this host."""
        each = (
            "SELECT {0}_workload AS w, nullif(pid, 0) AS pid, nullif(uid, 4294967295) AS uid, flow_count FROM subject"
            " WHERE {0}_workload <> 0"
        )
        rows = small(
            self.cursor,
            "SELECT w.name AS workload, w.executable, w.sha256, w.unit, w.user, p.pid,"
            " sum(p.flow_count)::BIGINT AS flows"
            f" FROM ({each.format('source')} UNION ALL {each.format('destination')}) p JOIN workloads w ON w.id = p.w"
            f" GROUP BY ALL ORDER BY flows DESC, pid LIMIT {MAX_ROWS}",
        )
        return list(rows.to_pylist())

    def services(self) -> list[Service]:
        """Services that were used or tried."""
        rows = self.cursor.execute(
            "SELECT transport, destination_port, count(*) FROM subject WHERE transport IN (6, 17) GROUP BY ALL"
            " ORDER BY 3 DESC LIMIT 16"
        ).fetchall()
        return [Service(int(t), int(p), int(p)) for t, p, _ in rows]


def _policies(history: History, since: int, until: int) -> list[dict[str, Any]]:
    """Revisions in force at any time of the window."""
    out = []
    for version in history.versions("activation"):
        if version.valid_from < until and (version.valid_to is None or version.valid_to > since):
            revision = history.revision(int(version.body["revision"]))
            if revision is not None:
                out.append(
                    {
                        "revision": revision.number,
                        "host": version.key,
                        "since": version.valid_from,
                        "until": version.valid_to,
                        "author": revision.author,
                        "reason": revision.reason,
                        "hash": revision.hash,
                    }
                )
    return sorted(out, key=lambda row: (row["since"], row["host"]))


def _subjects(parties: list[dict[str, Any]], sort: Sort, about: str) -> list[str]:
    """Label sets whose reach is asked for: the subject's own; for a flow, its initiator's."""
    if sort is Sort.POLICY:
        return []
    rows = [row for row in parties if row["labels"]]
    if sort is Sort.ADDRESS:
        rows = [row for row in rows if row["ip"] == about]
    elif sort is Sort.IDENTITY:
        rows = [row for row in rows if row["identity"] == about]
    elif sort is Sort.LABELS:
        wanted = set(about.replace(" ", "").split(","))
        rows = [row for row in rows if wanted <= set(row["labels"].split(","))]
    else:
        rows = [row for row in rows if row["side"] == "source"]
    return list(dict.fromkeys(row["labels"] for row in rows))[:1]


def _radius(
    history: History, cursor: duckdb.DuckDBPyConnection, scope: _Scope, subjects: list[str], then: int
) -> dict[str, Any]:
    """What the subject could reach at the end of the window, and can by what is in force last on record."""
    out: dict[str, Any] = {
        "subject": subjects[0] if subjects else None,
        "then": None,
        "now": None,
        "known": 0,
    }
    if not subjects:
        return out
    newest = max((v.valid_from for v in history.versions("activation") if v.valid_to is None), default=then)
    rows = cursor.execute(f"SELECT DISTINCT text FROM labels ORDER BY text LIMIT {MAX_KNOWN}").fetchall()
    known = [labels for row in rows if (labels := _labels(row[0])) is not None]
    start = _labels(subjects[0])
    for name, moment in (("then", then), ("now", max(newest, then))):
        revision = history.in_force(moment - 1 if name == "then" else moment)
        if revision is None or start is None:
            continue
        try:
            documents = parse(revision.text, f"revision {revision.number}")
            engine = Engine(documents, revision.number)
        except SectoolError:
            continue
        others = [*known, *_unseen(named_parties(documents, start.get("domain", "")), known)]
        out["known"] = len(others)
        radius = reach(engine, start, others, services_of(documents, scope.services()), moment)
        out[name] = {"revision": revision.number, "at": iso(moment), **asdict(radius)}
    return out


def _unseen(named_by_rules: list[LabelSet], known: list[LabelSet]) -> list[LabelSet]:
    """Those that no label set on record stands for already."""
    return [p for p in named_by_rules if not any(p.items() <= labels.items() for labels in known)]


def _labels(text: str) -> LabelSet | None:
    try:
        return LabelSet.parse(text)
    except LabelError:
        return None
