"""The back-test against its definition: each recorded flow put to the engine by itself, at its own address and time."""

from __future__ import annotations

import ipaddress
import os
import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pytest

from sectool.events import FLAG_ADOPTED, Action, DropReason, Point
from sectool.labels import LabelSet
from sectool.policy import DocumentSet, Engine, Party, Request, parse
from sectool.policy.places import Places
from sectool.policy.service import describe
from store.backtest import Change, Judge, Kind, Outcome, backtest, difference
from store.situations import History, Situation, Window
from tests.bench.history import DAY, T0, End, Talk, write_history

ROUNDS = int(os.environ.get("BACKTEST_ROUNDS", "3"))

WEB = LabelSet({"app": "web", "env": "prod", "since": "2026-02-22"})
DEV = LabelSet({"app": "web", "env": "dev", "since": "2026-02-23T03:00:00Z"})
DB = LabelSet({"app": "db", "env": "prod"})
LAN, OUT, SIX = End(None, "10.1.0.0/16"), End(None, "198.51.100.0/24"), End(None, "2001:db8::/96")


def documents(*rules: str, kind: str = "Policy", mode: str = "enforce", more: str = "") -> DocumentSet:
    lines = "".join("- '" + rule + "'\n" for rule in rules)
    return parse(f"kind: {kind}\nname: new\nowner: me\nmode: {mode}\nrules:\n{lines}---\n{more}")


def judged(folder: Path, candidate: DocumentSet, window: Window | None = None) -> Outcome:
    history = History(folder)
    try:
        return backtest(history, candidate, window or Window())
    finally:
        history.close()


def one_change(folder: Path, talk: Talk, *rules: str, more: str = "") -> Change | None:
    write_history(folder, [talk], 5, 1)
    outcome = judged(folder, documents(*rules, more=more))
    assert outcome.flows == 5
    assert len(outcome.changes) <= 1
    for change in outcome.changes:
        assert change.flows == 5
        assert (change.first, change.last) == (outcome.first, outcome.last)
    return outcome.changes[0] if outcome.changes else None


WEB_DB = Talk(End(WEB, "10.0.0.1/32"), End(DB, "10.0.0.2/32"), low=5432, high=5432)


@pytest.mark.parametrize(
    ("talk", "rules", "kind"),
    [
        (WEB_DB, ["allow app=web to call app=db on tcp/5432"], None),
        (WEB_DB, ["allow app=web to call app=db on tcp/5433"], Kind.NEWLY_DENIED),
        (WEB_DB, ["allow app=web to call app=db encrypted"], Kind.NEWLY_ENCRYPTED),
        (WEB_DB, ["audit app=web to call app=db"], Kind.NOW_AUDITED),
        (
            Talk(End(WEB, "10.0.0.1/32"), End(DB, "10.0.0.2/32"), encrypted=True),
            ["allow app=web to call app=db"],
            Kind.NO_LONGER_ENCRYPTED,
        ),
        (
            Talk(
                End(WEB, "10.0.0.1/32"), End(DB, "10.0.0.2/32"), point=Point.LOCAL
            ),  # it never leaves the host: plain as it is, it satisfies the rule
            ["allow app=web to call app=db encrypted"],
            None,
        ),
        (
            Talk(LAN, End(DB, "10.0.0.2/32"), action=Action.DENY, drop_reason=1),
            ["allow net:10.0.0.0/8 to call app=db"],
            Kind.NEWLY_ALLOWED,
        ),
        (Talk(LAN, End(DB, "10.0.0.2/32")), ["allow net:10.2.0.0/16 to call app=db"], Kind.NEWLY_DENIED),
        (Talk(SIX, End(DB, "10.0.0.2/32")), ["allow net:2001:db8::/32 to call app=db"], None),
        (
            Talk(LAN, End(DB, "10.0.0.2/32"), protocol=1, low=8, high=8),
            ["allow net:10.0.0.0/8 to call app=db on icmp/echo-request"],
            None,
        ),
        (  # the peer has no enforcer, so it cannot be encrypted
            Talk(LAN, End(DB, "10.0.0.2/32")),
            ["allow net:10.0.0.0/8 to call app=db encrypted"],
            Kind.NEWLY_DENIED,
        ),
    ],
)
def test_differences(tmp_path: Path, talk: Talk, rules: list[str], kind: Kind | None) -> None:
    change = one_change(tmp_path, talk, *rules)
    assert (change.kind if change else None) == kind


@pytest.mark.parametrize(
    ("talk", "why"),
    [
        (Talk(LAN, OUT, action=Action.DENY, drop_reason=DropReason.CREDENTIAL_EXPIRED), "credential_expired"),
        (Talk(LAN, OUT, action=Action.DENY, drop_reason=DropReason.PEER_DENIED), "peer_denied"),
    ],
)
def test_what_policy_did_not_decide_is_counted_and_stays(tmp_path: Path, talk: Talk, why: str) -> None:
    write_history(tmp_path, [talk], 7, 1)
    outcome = judged(tmp_path, documents("allow any to call any"))
    assert outcome.unjudged == {why: 7}
    assert not outcome.changes


def test_host_names_are_those_that_the_recorded_rule_proves(tmp_path: Path) -> None:
    known = "allow app=web to call fqdn:api.example.com on tcp/443"
    talk = Talk(End(WEB, "10.0.0.1/32"), OUT, rule=known)
    write_history(tmp_path, [talk], 4, 1)
    assert not judged(tmp_path, documents("allow app=web to call fqdn:*.example.com")).changes
    denied = judged(tmp_path, documents("allow app=web to call app=db"))
    assert [c.kind for c in denied.changes] == [Kind.NEWLY_DENIED]
    # Whether the peer goes by this name as well nobody recorded.
    unknown = judged(tmp_path, documents("allow app=web to call fqdn:other.example.com"))
    assert unknown.unjudged == {"host_names_unknown": 4}


def test_time_of_the_flow_decides(tmp_path: Path) -> None:
    write_history(tmp_path, [WEB_DB], 1000, 1, days=2)
    half = datetime.fromtimestamp((T0 + DAY) / 1e6, UTC).isoformat().replace("+00:00", "Z")
    outcome = judged(tmp_path, documents(f"allow app=web to call app=db until {half}"))
    assert [(c.kind, c.flows) for c in outcome.changes] == [(Kind.NEWLY_DENIED, 500)]
    aged = judged(tmp_path, documents("allow app=web to call app=db where source.since < 8d"))
    (change,) = aged.changes  # 2026-02-22 is eight days old on 2026-03-02, some 22 hours after the first flow
    assert change.kind is Kind.NEWLY_DENIED
    assert 500 < change.flows < 550
    assert change.first >= int(datetime(2026, 3, 2, tzinfo=UTC).timestamp() * 1e6)


def test_the_window(tmp_path: Path) -> None:
    write_history(tmp_path, [WEB_DB], 100, 1)
    candidate = documents("allow app=web to call app=web")
    half = judged(tmp_path, candidate, Window(T0 + DAY // 2, None))
    assert half.flows == 50
    assert judged(tmp_path, candidate, Window(T0 + 2 * DAY, None)).flows == 0


def test_other_workload_documents_mean_other_labels(tmp_path: Path) -> None:
    old = parse("kind: Workload\nname: web\nmatch: {user: www}\nlabels: {app: web, env: prod}\n")
    labels = LabelSet({"app": "web", "env": "prod", "user": "www", "zone": "z1"})
    write_history(tmp_path, [Talk(End(labels, "10.0.0.1/32"), End(DB, "10.0.0.2/32"))], 3, 1)
    (segment,) = tmp_path.glob("*.duckdb")
    with duckdb.connect(str(segment)) as connection:
        connection.execute(
            "INSERT INTO workloads SELECT 77, 1077, 'web', id, 33, 'www', '/usr/sbin/nginx', '', '', '/'"
            " FROM labels WHERE key = ?",
            [labels.id],
        )
        connection.execute("UPDATE flow_records SET source_workload = 77")
    rules = "kind: Policy\nname: p\nowner: me\nrules: ['allow app=shop,zone=z1 to call app=db']\n---\n"
    changed = rules + "kind: Workload\nname: web\nmatch: {user: www}\nlabels: {app: shop}\n"
    history = History(tmp_path)
    try:
        outcome = backtest(history, parse(changed), before=old.workloads)
        assert (outcome.relabelled, outcome.changes) == (3, ())
        as_recorded = backtest(history, parse(changed))
        assert [c.kind for c in as_recorded.changes] == [Kind.NEWLY_DENIED]
        same = backtest(history, parse(rules + old.text), before=old.workloads)
        assert same.relabelled == 0
        assert [c.kind for c in same.changes] == [Kind.NEWLY_DENIED]
    finally:
        history.close()


def test_adopted_flows_were_never_judged(tmp_path: Path) -> None:
    write_history(tmp_path, [WEB_DB], 2, 1)
    (segment,) = tmp_path.glob("*.duckdb")
    with duckdb.connect(str(segment)) as connection:
        connection.execute("UPDATE flow_records SET flags = ?", [FLAG_ADOPTED])
    assert judged(tmp_path, documents("allow app=db to call app=db")).unjudged == {"adopted": 2}


RULES = [
    "allow app=web to call app=db on tcp/443",
    "allow env=dev to call env=prod on tcp/1-6000 encrypted",
    "deny env=dev to call app=db on tcp/5000-9000",
    "allow net:10.1.0.0/20 to call app=db",
    "allow net:corner to call any on udp/53,tcp/443",
    "deny net:2001:db8::/112 to call any",
    "allow net:2001:db8::/32 to call app=web on tcp/1-700",
    "audit any to call app=web",
    "allow app=web to call net:198.51.100.128/25",
    "allow app=web to call app=db on tcp/5432 where source.since < 8d",
    "deny app=web to call app=db where source.since > 8d and destination.env = source.env",
    "allow app=web to call any until 2026-03-01T12:00:00Z",
    "allow any to call net:198.51.100.0/25 until 2026-03-01",
    "allow !legacy to call app!=web on tcp/100-200",
]
CORNER = "kind: Network\nname: corner\ncidrs: [10.1.0.0/16]\nexcept: [10.1.128.0/18]\n"


def random_talks(rng: random.Random) -> list[Talk]:
    ends = [End(WEB, "10.0.0.1/32"), End(DEV, "10.0.0.3/32"), End(DB, "10.0.0.2/32"), LAN, OUT, SIX]
    out = []
    for _ in range(40):
        low = rng.choice([53, 100, 443, 650, 5432, 8000])
        allowed = rng.random() < 0.7
        out.append(
            Talk(
                rng.choice(ends),
                rng.choice(ends),
                protocol=rng.choice([6, 6, 6, 17, 1]),
                low=8 if (icmp := rng.random() < 0.1) else low,
                high=8 if icmp else low + rng.choice([0, 0, 100]),
                weight=rng.random(),
                action=rng.choice([Action.ALLOW, Action.AUDIT]) if allowed else Action.DENY,
                drop_reason=0 if allowed else rng.choice([1, 2, 3, 4, 25]),
                encrypted=allowed and rng.random() < 0.3,
                point=rng.choice([Point.INITIATOR, Point.RESPONDER, Point.LOCAL]),
            )
        )
    return [t for t in out if t.protocol != 1 or t.high < 256] or [WEB_DB]


def flow_by_flow(folder: Path, candidate: DocumentSet) -> Counter[tuple[str, str]]:
    """What the back-test claims to give, the slow way: kinds of changes by service, and flows policy has no say in."""
    history = History(folder)
    engine = Engine(candidate)
    out: Counter[tuple[str, str]] = Counter()
    try:
        words = history.words()
        judge = Judge(engine, Places(engine.network_specs), words)
        table = history.table(
            "SELECT * REPLACE (event_id::VARCHAR AS event_id) FROM flow_records WHERE phase = 1"
        )
        for row in table.to_pylist():
            icmp = row["transport"] in (1, 58)
            start = round(row["event_start"].replace(tzinfo=UTC).timestamp() * 1e6)
            port = row["source_port"] if icmp else row["destination_port"]
            situation = Situation(
                row["source_labels"],
                row["destination_labels"],
                0,
                0,
                0,
                0,
                row["point"],
                row["transport"],
                port,
                row["destination_port"] if icmp else 0,
                row["action"],
                row["drop_reason"],
                row["encryption"] == 2,
                0,
                0,
                0,
                0,
                1,
                1,
                start,
                start,
                row["event_id"],
            )
            why = judge.unjudged(situation)
            if why:
                out["", why] += 1
                continue
            plain = judge.request(situation)
            source, destination = (
                Party(party.labels, None, address(row[f"{side}_ip_hi"], row[f"{side}_ip_lo"]))
                for side, party in (("source", plain.source), ("destination", plain.destination))
            )
            request = Request(
                source, destination, plain.protocol, plain.port, plain.icmp_code, plain.can_encrypt
            )
            kind = difference(situation, engine.evaluate(request, start))
            if kind is not None:
                out[kind, describe(request.protocol, port, request.icmp_code)] += 1
    finally:
        history.close()
    return out


def address(high: int, low: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    if high == 0 and low >> 32 == 0xFFFF:
        return ipaddress.IPv4Address(low & 0xFFFF_FFFF)
    return ipaddress.IPv6Address(high << 64 | low)


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_exact_as_flow_by_flow(tmp_path: Path, round_: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    write_history(tmp_path, random_talks(rng), 700, seed, days=1.5, ends=False)
    candidate = documents(*rng.sample(RULES, rng.randint(1, 8)), more=CORNER)
    outcome = judged(tmp_path, candidate)
    found: Counter[tuple[str, str]] = Counter()
    for change in outcome.changes:
        found[change.kind, change.service] += change.flows
    for why, count in outcome.unjudged.items():
        found["", why] += count
    assert found == flow_by_flow(tmp_path, candidate), f"seed {seed}"
