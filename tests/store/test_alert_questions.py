"""What alerts ask of a real store, and what they make of the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sectool.alerts.questions import Questions
from sectool.alerts.rules import parse_alerts
from sectool.alerts.watch import Finding
from sectool.events import Action, DropReason
from sectool.policy import Engine, parse

HOUR = 3_600_000_000
POLICY = """kind: Guardrail
name: box
owner: security
rules: ['deny env=dev to call app=db']
---
kind: Policy
name: shop
owner: team-shop
rules: [allow app=web to call app=db on tcp/5432]
"""


class Asked:
    """A store lab with its question-asker and the number where the next look begins."""

    def __init__(self, lab: Any, text: str) -> None:
        self.lab = lab
        self.questions = Questions(parse_alerts(text))
        self.engine = Engine(parse(POLICY))
        self.first = self.end()

    def ask(self, sql: str, limit: int) -> list[dict[str, Any]]:
        return list(self.lab.live().query(sql, limit=limit).table.to_pylist())

    def end(self) -> int:
        (row,) = self.ask(
            "SELECT greatest((SELECT coalesce(max(seq), 0) FROM flow_records), "
            "(SELECT coalesce(max(seq), 0) FROM events)) + 1 AS n",
            1,
        )
        return int(row["n"])

    def look(self, now_us: int) -> list[Finding]:
        end = self.end()
        found = [
            finding
            for _, findings in self.questions.look(self.ask, self.engine, self.first, end, now_us)
            for finding in findings
        ]
        self.first = end
        return found


@pytest.fixture
def filled(lab: Any) -> Any:
    """A store with one old flow from app=web to app=db."""
    lab.web, lab.db, lab.dev = lab.labels("app=web"), lab.labels("app=db"), lab.labels("app=web,env=dev")
    lab.start()
    lab.count = 0
    put(lab, source_labels=lab.web, destination_labels=lab.db)
    return lab


def put(lab: Any, n: int = 1, **fields: Any) -> None:
    for _ in range(n):
        lab.count += 1
        lab.ring().put(lab.record(flow=lab.count, start=lab.T0 + lab.count, **fields))
    lab.stored(lab.count)


DENIED: dict[str, Any] = {
    "action": Action.DENY,
    "drop_reason": DropReason.DEFAULT_DENY,
    "destination_port": 22,
}


def test_bursts_are_summed_over_looks_and_filtered(filled: Any) -> None:
    asked = Asked(filled, "alerts: [{name: b, when: denied-burst, count: 5, within: 1m, from: app=web}]")
    put(filled, 3, **DENIED, source_labels=filled.web)
    put(filled, 9, **DENIED, source_labels=filled.db)
    assert asked.look(filled.T0) == []
    put(filled, 1, **DENIED, source_labels=filled.web, flow_count=2)
    (finding,) = asked.look(filled.T0 + 1)
    assert finding.subject == "app=web -> 10.0.0.2 tcp/22"
    assert "denied 5 times within 1m" in finding.text
    assert asked.look(filled.T0 + 2) == []


def test_scans_count_places(filled: Any) -> None:
    asked = Asked(filled, "alerts: [{name: s, when: scan, count: 4, within: 1m}]")
    put(filled, 20, **DENIED)
    assert asked.look(filled.T0) == []  # one place, many times
    for port in (23, 24, 25):
        put(filled, **{**DENIED, "destination_port": port})
    (finding,) = asked.look(filled.T0 + 1)
    assert finding.subject == "10.0.0.1"
    assert finding.details == {"places": 4}


def test_new_pairs_once_the_record_is_old_enough(filled: Any) -> None:
    asked = Asked(filled, "alerts: [{name: n, when: new-pair, to: app=db, learn: 1h}]")
    put(filled, source_labels=filled.web, destination_labels=filled.db)  # known
    put(filled, source_labels=filled.dev, destination_labels=filled.db)
    put(filled, source_labels=filled.dev, destination_labels=filled.web)  # not to app=db
    put(filled, **DENIED, source_labels=filled.db, destination_labels=filled.db)  # they never talked
    (finding,) = asked.look(filled.T0 + 2 * HOUR)
    assert finding.subject == "app=web,env=dev -> app=db"
    put(filled, source_labels=filled.dev, destination_labels=filled.db)
    assert asked.look(filled.T0 + 2 * HOUR) == []
    young = Asked(filled, "alerts: [{name: n, when: new-pair, learn: 1h}]")
    put(filled, source_labels=filled.db, destination_labels=filled.db)
    assert young.look(filled.T0 + HOUR // 2) == []


def test_an_identity_on_another_host(filled: Any) -> None:
    def identity(number: int, host: str, name: str) -> None:
        spiffe_id = f"spiffe://shop.example/host/{host}/wl/{name}"
        filled.ring().put_blob(
            {"type": "dict.identity", "ts": filled.T0, "id": number, "spiffe_id": spiffe_id}
        )

    identity(11, "web-1", "nginx")
    put(filled, source_identity=11)
    asked = Asked(filled, "alerts: [{name: h, when: new-host, learn: 1h}]")
    identity(12, "rogue", "nginx")
    identity(13, "web-1", "cron")
    put(filled, destination_identity=12)
    put(filled, source_identity=13)
    (finding,) = asked.look(filled.T0 + 2 * HOUR)
    assert (
        finding.text == "spiffe://shop.example/host/rogue/wl/nginx is used on rogue; so far it was on web-1"
    )


def test_a_guardrail_that_denies_what_a_policy_allows_names_both_owners(filled: Any) -> None:
    asked = Asked(filled, "alerts: [{name: v, when: guardrail-violation}]")
    box: dict[str, Any] = {
        **DENIED,
        "drop_reason": DropReason.GUARDRAIL_DENY,
        "destination_labels": filled.db,
    }
    put(filled, 2, **{**box, "destination_port": 5432}, source_labels=filled.dev)
    put(filled, **{**box, "destination_port": 80}, source_labels=filled.dev)  # no policy allows that one
    (finding,) = asked.look(filled.T0)
    assert finding.owners == ("security", "team-shop")
    assert (
        "Guardrail box, rule 1 (owner security) denies what Policy shop, rule 1 (owner team-shop) allows"
        in finding.text
    )
    assert json.dumps(dict(finding.details))


def test_policy_changes_outside_hours_and_losses(filled: Any) -> None:
    # T0 is a Sunday, 02:03:04 UTC: 03:03 in Berlin.
    asked = Asked(
        filled,
        'alerts: [{name: l, when: losses}, {name: c, when: policy-change, hours: "03:00-04:00", days: [Sun], '
        "zone: Europe/Berlin}, {name: d, when: policy-change, hours: '02:00-03:00', days: [Sun], zone: Europe/Berlin}]",
    )
    body = {"type": "policy.applied", "ts": filled.T0, "revision": 7, "author": "mallory", "reason": "hurry"}
    filled.ring().put_blob(body)
    filled.ring().put_blob(
        {"type": "events.lost", "ts": filled.T0, "where": "ring-worker-0", "count": 9, "why": "full"}
    )
    filled.wait("both events", lambda: asked.end() >= asked.first + 2)
    lost, changed = sorted(asked.look(filled.T0), key=lambda f: f.subject.startswith("revision"))
    assert lost.text == "9 events were lost in ring-worker-0: full"
    assert changed.text.startswith(
        "mallory changed policy to revision 7 at 2026-03-01T02:03:04Z: hurry (outside Sun 02:00"
    )
