"""What is asked of the record every few seconds, and which findings the answers make.

Each look covers the flows and events numbered from where the last one ended, so that nothing counts twice and nothing
is left out. Nothing is asked that no rule needs.
"""

# ruff: noqa: S608 -- queries are made of numbers and of the constants below

from __future__ import annotations

import ipaddress
import json
import re
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sectool.alerts.rules import AlertRule, AlertSettings, When
from sectool.alerts.watch import Counting, Finding, Places
from sectool.events import Action, DropReason, Phase
from sectool.labels import LabelError, LabelSet
from sectool.policy import Engine, Party, Request
from sectool.policy.rules import Phase as RulePhase
from sectool.policy.selector import Labels, Selector
from sectool.policy.service import describe

ROWS: Final = 5000  # groups per look; a flood has more, of which the largest are looked at
KNOWN_ROWS: Final = 200_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SPIFFE = re.compile(r"spiffe://([^/]+)/host/([^/]+)/(.+)")
_CHANGES: Final = ("policy.applied", "policy.rolled_back")
_LAST_MAPPED: Final = 0xFFFF_FFFF

Ask = Callable[[str, int], list[dict[str, Any]]]  # one SELECT and a bound on its rows


@dataclass(frozen=True, slots=True)
class _Denied:
    """Denied attempts that are alike."""

    source: str
    destination: str
    source_labels: LabelSet | None
    destination_labels: LabelSet | None
    service: str
    place: tuple[str, str]
    count: int


class Questions:
    """Looks at the record for the rules of one AlertSettings. Not to be used by two threads at once."""

    def __init__(self, settings: AlertSettings) -> None:
        self.settings = settings
        self._labels: dict[int, LabelSet | None] = {0: None}
        self._pairs: set[tuple[int, int]] | None = None
        self._hosts: dict[tuple[str, str], set[str]] | None = None
        self._begun_us: int | None = None
        self._bursts = {r.name: Counting(r.within_us) for r in settings.rules if r.when is When.DENIED_BURST}
        self._scans = {r.name: Places(r.within_us) for r in settings.rules if r.when is When.SCAN}

    def look(
        self, ask: Ask, engine: Engine | None, first: int, end: int, now_us: int
    ) -> Iterator[tuple[AlertRule, list[Finding]]]:
        """Findings in flows and events numbered `first` to below `end`."""
        rules: dict[When, list[AlertRule]] = {}
        for rule in self.settings.rules:
            rules.setdefault(rule.when, []).append(rule)
        span = f"seq >= {first:d} AND seq < {end:d}"
        if When.POLICY_CHANGE in rules or When.LOSSES in rules:
            yield from self._events(ask, span, rules)
        if When.DENIED_BURST in rules or When.SCAN in rules:
            yield from self._denied(ask, span, rules, now_us)
        if When.NEW_PAIR in rules:
            yield from self._new_pairs(ask, span, first, rules[When.NEW_PAIR], now_us)
        if When.NEW_HOST in rules:
            yield from self._new_hosts(ask, span, first, rules[When.NEW_HOST], now_us)
        if When.VIOLATION in rules and engine is not None:
            yield from self._violations(ask, span, rules[When.VIOLATION], engine, now_us)

    # --- events ---

    def _events(
        self, ask: Ask, span: str, rules: Mapping[When, list[AlertRule]]
    ) -> Iterator[tuple[AlertRule, list[Finding]]]:
        wanted = "', '".join((*_CHANGES, "events.lost"))
        rows = ask(
            f"SELECT type, epoch_us(ts) AS at, body FROM events WHERE {span} AND type IN ('{wanted}') ORDER BY seq",
            ROWS,
        )
        changes: list[tuple[int, dict[str, Any]]] = []
        lost: list[tuple[int, dict[str, Any]]] = []
        for row in rows:
            try:
                body = json.loads(row["body"])
            except ValueError:
                continue
            (lost if row["type"] == "events.lost" else changes).append((row["at"], body))
        for rule in rules.get(When.POLICY_CHANGE, ()):
            yield rule, [_changed(rule, at, body) for at, body in changes if _outside(rule, at)]
        for rule in rules.get(When.LOSSES, ()):
            yield rule, [_lost(body) for _, body in lost]

    # --- denials ---

    def _denied(
        self, ask: Ask, span: str, rules: Mapping[When, list[AlertRule]], now_us: int
    ) -> Iterator[tuple[AlertRule, list[Finding]]]:
        found = list(self._denials(ask, span))
        for rule in rules.get(When.DENIED_BURST, ()):
            counting = self._bursts[rule.name]
            out = []
            for one in found:
                if not _fits(rule, one.source_labels, one.destination_labels):
                    continue
                subject = f"{one.source} -> {one.destination} {one.service}"
                total = counting.add(subject, one.count, now_us)
                if total >= rule.count:
                    text = f"{subject} was denied {total} times within {_time(rule.within_us)}"
                    out.append(Finding(subject, text, (), {"count": total}))
            yield rule, out
        for rule in rules.get(When.SCAN, ()):
            places = self._scans[rule.name]
            reached: dict[str, int] = {}
            for one in found:
                if _fits(rule, one.source_labels, one.destination_labels):
                    reached[one.source] = places.add(one.source, one.place, now_us)
            yield (
                rule,
                [
                    Finding(
                        source,
                        f"{source} was denied {n} different addresses and ports within {_time(rule.within_us)}",
                        (),
                        {"places": n},
                    )
                    for source, n in reached.items()
                    if n >= rule.count
                ],
            )

    def _denials(self, ask: Ask, span: str) -> Iterator[_Denied]:
        rows = ask(
            "SELECT source_labels, destination_labels, source_ip_hi, source_ip_lo, destination_ip_hi, "
            "destination_ip_lo, transport, source_port * (transport IN (1, 58))::INT AS kind, destination_port, "
            f"sum(flow_count)::BIGINT AS n FROM flow_records WHERE {span} AND phase = {Phase.VERDICT:d} "
            f"AND action = {Action.DENY:d} GROUP BY ALL ORDER BY n DESC",
            ROWS,
        )
        self._learn_labels(ask, (row[f"{end}_labels"] for row in rows for end in ("source", "destination")))
        for row in rows:
            source, destination = self._label(row["source_labels"]), self._label(row["destination_labels"])
            target = _address(row["destination_ip_hi"], row["destination_ip_lo"])
            service = _service(row)
            yield _Denied(
                str(source or _address(row["source_ip_hi"], row["source_ip_lo"])),
                str(destination or target),
                source,
                destination,
                service,
                (target, service),
                row["n"],
            )

    # --- what was never seen ---

    def _mature(self, ask: Ask, rule: AlertRule, now_us: int) -> bool:
        """Whether the record is old enough to say 'never'."""
        if self._begun_us is None:
            (row,) = ask("SELECT epoch_us(min(ts)) AS begun FROM flow_records", 1)
            if row["begun"] is None:
                return False
            self._begun_us = row["begun"]
        return now_us - self._begun_us >= rule.learn_us

    def _new_pairs(
        self, ask: Ask, span: str, first: int, rules: list[AlertRule], now_us: int
    ) -> Iterator[tuple[AlertRule, list[Finding]]]:
        select = (
            "SELECT DISTINCT source_labels, destination_labels FROM flow_records "
            f"WHERE {{}} AND phase = {Phase.VERDICT:d} AND action IN ({Action.ALLOW:d}, {Action.AUDIT:d})"
        )
        if self._pairs is None:
            rows = ask(select.format(f"seq < {first:d}"), KNOWN_ROWS)
            self._pairs = {(row["source_labels"], row["destination_labels"]) for row in rows}
        now = {(r["source_labels"], r["destination_labels"]) for r in ask(select.format(span), ROWS)}
        fresh = sorted(now - self._pairs - {(0, 0)})
        self._pairs |= now
        self._learn_labels(ask, (number for pair in fresh for number in pair))
        for rule in rules:
            out = []
            for one, other in fresh if self._mature(ask, rule, now_us) else ():
                source, destination = self._label(one), self._label(other)
                if _fits(rule, source, destination):
                    subject = (
                        f"{source or 'a peer without identity'} -> {destination or 'a peer without identity'}"
                    )
                    out.append(Finding(subject, f"{subject}: never seen before"))
            yield rule, out

    def _new_hosts(
        self, ask: Ask, span: str, first: int, rules: list[AlertRule], now_us: int
    ) -> Iterator[tuple[AlertRule, list[Finding]]]:
        select = (
            "SELECT DISTINCT i.spiffe_id AS name FROM (SELECT source_identity AS id FROM flow_records WHERE {0} "
            "UNION SELECT destination_identity FROM flow_records WHERE {0}) u JOIN identities i USING (id)"
        )
        if self._hosts is None:
            self._hosts = {}
            for row in ask(select.format(f"seq < {first:d}"), KNOWN_ROWS):
                found = _SPIFFE.fullmatch(row["name"] or "")
                if found:
                    self._hosts.setdefault((found[1], found[3]), set()).add(found[2])
        fresh: list[tuple[str, str, list[str]]] = []
        for row in ask(select.format(span), ROWS):
            found = _SPIFFE.fullmatch(row["name"] or "")
            if not found:
                continue
            hosts = self._hosts.setdefault((found[1], found[3]), set())
            if hosts and found[2] not in hosts:  # the first host of a new workload is no news
                fresh.append((row["name"], found[2], sorted(hosts)))
            hosts.add(found[2])
        for rule in rules:
            yield (
                rule,
                [
                    Finding(name, f"{name} is used on {host}; so far it was on {', '.join(hosts[:5])}")
                    for name, host, hosts in (fresh if self._mature(ask, rule, now_us) else ())
                ],
            )

    # --- guardrails ---

    def _violations(
        self, ask: Ask, span: str, rules: list[AlertRule], engine: Engine, now_us: int
    ) -> Iterator[tuple[AlertRule, list[Finding]]]:
        rows = ask(
            "SELECT source_labels, destination_labels, transport, destination_port, "
            "any_value(source_port) AS kind, any_value(source_ip_hi) AS sh, any_value(source_ip_lo) AS sl, "
            "any_value(destination_ip_hi) AS dh, any_value(destination_ip_lo) AS dl, sum(flow_count)::BIGINT AS n "
            f"FROM flow_records WHERE {span} AND phase = {Phase.VERDICT:d} AND action = {Action.DENY:d} "
            f"AND drop_reason IN ({DropReason.GUARDRAIL_DENY:d}, {DropReason.ENCRYPTION_UNAVAILABLE:d}) "
            "GROUP BY source_labels, destination_labels, transport, destination_port ORDER BY n DESC",
            ROWS,
        )
        self._learn_labels(ask, (row[f"{end}_labels"] for row in rows for end in ("source", "destination")))
        found: list[tuple[LabelSet | None, LabelSet | None, Finding]] = []
        for row in rows:
            source, destination = self._label(row["source_labels"]), self._label(row["destination_labels"])
            finding = _violation(engine, row, source, destination, now_us)
            if finding is not None:
                found.append((source, destination, finding))
        for rule in rules:
            yield (
                rule,
                [finding for source, destination, finding in found if _fits(rule, source, destination)],
            )

    # --- labels ---

    def _learn_labels(self, ask: Ask, ids: Iterable[int]) -> None:
        missing = sorted({number for number in ids if number not in self._labels})
        if not missing:
            return
        if len(self._labels) > KNOWN_ROWS:
            self._labels = {0: None}
        for row in ask(
            f"SELECT id, text FROM labels WHERE id IN ({', '.join(map(str, missing))})", len(missing)
        ):
            try:
                self._labels[row["id"]] = LabelSet.parse(row["text"] or "")
            except LabelError:
                continue

    def _label(self, number: int) -> LabelSet | None:
        return self._labels.get(number)


def _violation(
    engine: Engine, row: Mapping[str, Any], source: LabelSet | None, destination: LabelSet | None, now_us: int
) -> Finding | None:
    """The finding of a denied flow that a policy allows and a guardrail does not; None when no policy does."""
    icmp = row["transport"] in (1, 58)
    request = Request(
        Party(source, None, ipaddress.ip_address(_address(row["sh"], row["sl"]))),
        Party(destination, None, ipaddress.ip_address(_address(row["dh"], row["dl"]))),
        row["transport"],
        row["kind"] if icmp else row["destination_port"],
        row["destination_port"] if icmp else 0,
        source is not None and destination is not None,
    )
    matching = [rule for rule in engine.matching(request, now_us)[0] if not rule.staged]
    guards = [r for r in matching if r.phase in (RulePhase.GUARDRAIL_DENY, RulePhase.GUARDRAIL_ENCRYPTION)]
    intents = [r for r in matching if r.phase in (RulePhase.INTENT_ALLOW, RulePhase.INTENT_AUDIT)]
    if not guards or not intents:
        return None
    guard, intent = guards[0].rule, intents[0].rule
    where = (
        f"{source or request.source.address} -> {destination or request.destination.address} {_service(row)}"
    )
    return Finding(
        f"{guard.policy}/{guard.index} {where}",
        f"{where}: {guard.title} denies what {intent.title} allows",
        tuple(dict.fromkeys((guard.owner, intent.owner))),
        {"count": row["n"], "guardrail": guard.describe(), "policy": intent.describe()},
    )


def _fits(rule: AlertRule, source: LabelSet | None, destination: LabelSet | None) -> bool:
    return _selected(rule.source, source) and _selected(rule.destination, destination)


def _selected(selector: Selector, labels: LabelSet | None) -> bool:
    if not isinstance(selector, Labels):
        return True
    return labels is not None and all(clause.holds(labels) for clause in selector.clauses)


def _address(high: int, low: int) -> str:
    if high == 0 and low >> 32 == 0xFFFF:
        return str(ipaddress.IPv4Address(low & _LAST_MAPPED))
    return str(ipaddress.IPv6Address(high << 64 | low))


def _service(row: Mapping[str, Any]) -> str:
    if row["transport"] in (1, 58):
        return describe(row["transport"], row["kind"], row["destination_port"])
    return describe(row["transport"], row["destination_port"])


def _time(us: int) -> str:
    seconds = us // 1_000_000
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _outside(rule: AlertRule, at_us: int) -> bool:
    hours = rule.hours
    if hours is None:
        return True
    local = (_EPOCH + timedelta(microseconds=at_us)).astimezone(zoneinfo.ZoneInfo(hours.zone))
    minutes = local.hour * 60 + local.minute
    return local.weekday() not in hours.days or not hours.begin <= minutes < hours.end


def _changed(rule: AlertRule, at_us: int, body: Mapping[str, Any]) -> Finding:
    when = (_EPOCH + timedelta(microseconds=at_us)).strftime("%Y-%m-%dT%H:%M:%SZ")
    why = f": {body['reason']}" if body.get("reason") else ""
    text = (
        f"{body.get('author', 'somebody')} changed policy to revision {body.get('revision')} at {when}{why}"
    )
    return Finding(f"revision {body.get('revision')}", f"{text} (outside {rule.hours})")


def _lost(body: Mapping[str, Any]) -> Finding:
    where = str(body.get("where", "somewhere"))
    why = f": {body['why']}" if body.get("why") else ""
    return Finding(where, f"{body.get('count', 'some')} events were lost in {where}{why}")
