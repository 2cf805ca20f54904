"""The engine against tables, against time, and against a second, naive evaluator written only here."""

from __future__ import annotations

import fnmatch
import ipaddress
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.events import Action, DropReason
from sectool.labels import LabelSet, stable_id
from sectool.policy import DocumentSet, Engine, Mode, Party, Request, explain, parse, parse_flow
from sectool.policy.condition import LabelRef
from sectool.policy.engine import Decision
from sectool.policy.explanation import Remedy
from sectool.policy.model import PolicyDoc
from sectool.policy.network import NetworkSpec
from sectool.policy.selector import Anyone, Cidr, Fqdn, Labels, NamedNet, Op, Selector
from sectool.policy.sentence import Sentence, Verb

NOW = int(datetime(2026, 6, 1, tzinfo=UTC).timestamp()) * 1_000_000
DAY = 86_400_000_000


def policy(*rules: str, kind: str = "Policy", name: str = "p", mode: str = "enforce") -> str:
    lines = "".join("- '" + rule.replace("'", "''") + "'\n" for rule in rules)
    return f"kind: {kind}\nname: {name}\nowner: {name}-team\nmode: {mode}\nrules:\n{lines}---\n"


def guardrail(*rules: str, name: str = "g", mode: str = "enforce") -> str:
    return policy(*rules, kind="Guardrail", name=name, mode=mode)


NETWORKS = """
kind: Network
name: internet
cidrs: [0.0.0.0/0, "::/0"]
except: [10.0.0.0/8, "fd00::/8"]
---
"""


def ask(text: str, flow: str, now_us: int = NOW, **changes: object) -> Decision:
    documents = parse(NETWORKS + text)
    request = parse_flow(flow).request({n.name: n.spec for n in documents.networks})
    for name, value in changes.items():
        object.__setattr__(request, name, value)
    return Engine(documents).decide(request, now_us)


WEB_DB = "app=web,env=prod -> app=db,env=prod tcp/5432"


@pytest.mark.parametrize(
    ("text", "flow", "action", "reason", "rule", "encrypt_rule"),
    [
        # 6: default deny
        ("", WEB_DB, Action.DENY, DropReason.DEFAULT_DENY, None, None),
        (policy("allow app=x to call any"), WEB_DB, Action.DENY, DropReason.DEFAULT_DENY, None, None),
        # 4: allow
        (policy("allow app=web to call app=db"), WEB_DB, Action.ALLOW, DropReason.NONE, ("p", 1), None),
        (
            policy("allow app=web to call app=db encrypted"),
            WEB_DB,
            Action.ALLOW,
            DropReason.NONE,
            ("p", 1),
            ("p", 1),
        ),
        # of several that allow, the one that demands encryption wins, else the first by document name
        (
            policy("allow any to call any", name="a")
            + policy("allow app=web to call any encrypted", name="b"),
            WEB_DB,
            Action.ALLOW,
            DropReason.NONE,
            ("b", 1),
            ("b", 1),
        ),
        (
            policy("allow any to call any", name="b") + policy("allow app=web to call any", name="a"),
            WEB_DB,
            Action.ALLOW,
            DropReason.NONE,
            ("a", 1),
            None,
        ),
        # 2: a guardrail's demand joins any allow rule, and alone allows nothing
        (
            guardrail("require encryption for any to call any") + policy("allow any to call any"),
            WEB_DB,
            Action.ALLOW,
            DropReason.NONE,
            ("p", 1),
            ("g", 1),
        ),
        (
            guardrail("require encryption for any to call any"),
            WEB_DB,
            Action.DENY,
            DropReason.DEFAULT_DENY,
            None,
            None,
        ),
        # encryption that one end cannot do
        (
            guardrail("require encryption for any to call any") + policy("allow any to call any"),
            "app=web -> ip:192.0.2.1 tcp/443",
            Action.DENY,
            DropReason.ENCRYPTION_UNAVAILABLE,
            ("g", 1),
            ("g", 1),
        ),
        (
            policy("allow any to call net:internet encrypted", "allow any to call any"),
            "app=web -> ip:192.0.2.1 tcp/443",
            Action.DENY,
            DropReason.ENCRYPTION_UNAVAILABLE,
            ("p", 1),
            ("p", 1),
        ),
        # 3: an intent's deny beats any allow, wherever it stands
        (
            policy("allow any to call any", "deny app=web to call app=db"),
            WEB_DB,
            Action.DENY,
            DropReason.INTENT_DENY,
            ("p", 2),
            None,
        ),
        # 1: a guardrail's deny beats all
        (
            guardrail("require encryption for any to call any", "deny env=prod to call app=db")
            + policy("allow any to call any", "deny any to call any"),
            WEB_DB,
            Action.DENY,
            DropReason.GUARDRAIL_DENY,
            ("g", 2),
            None,
        ),
        # 5: audit lets through what nothing else speaks of, and weakens nothing
        (policy("audit any to call any"), WEB_DB, Action.AUDIT, DropReason.NONE, ("p", 1), None),
        (
            policy("audit any to call any", "allow app=web to call any"),
            WEB_DB,
            Action.ALLOW,
            DropReason.NONE,
            ("p", 2),
            None,
        ),
        (
            policy("audit any to call any encrypted", "allow app=web to call any"),
            WEB_DB,
            Action.ALLOW,
            DropReason.NONE,
            ("p", 2),
            None,
        ),
        (
            policy("audit any to call any", "deny app=web to call any"),
            WEB_DB,
            Action.DENY,
            DropReason.INTENT_DENY,
            ("p", 2),
            None,
        ),
        (
            guardrail("deny any to call app=db") + policy("audit any to call any"),
            WEB_DB,
            Action.DENY,
            DropReason.GUARDRAIL_DENY,
            ("g", 1),
            None,
        ),
        (
            guardrail("require encryption for any to call any") + policy("audit any to call any"),
            WEB_DB,
            Action.AUDIT,
            DropReason.NONE,
            ("p", 1),
            ("g", 1),
        ),
        (
            guardrail("require encryption for any to call any") + policy("audit any to call any"),
            "ip:192.0.2.1 -> app=web tcp/443",
            Action.DENY,
            DropReason.ENCRYPTION_UNAVAILABLE,
            ("g", 1),
            ("g", 1),
        ),
        (
            policy("audit any to call any", "allow any to call any encrypted"),
            "ip:192.0.2.1 -> app=web tcp/443",
            Action.DENY,
            DropReason.ENCRYPTION_UNAVAILABLE,
            ("p", 2),
            ("p", 2),
        ),
        (
            policy("audit any to call any encrypted"),
            WEB_DB,
            Action.AUDIT,
            DropReason.NONE,
            ("p", 1),
            ("p", 1),
        ),
        # off is off
        (
            policy("allow any to call any", mode="off"),
            WEB_DB,
            Action.DENY,
            DropReason.DEFAULT_DENY,
            None,
            None,
        ),
    ],
)
def test_order_of_evaluation(
    text: str,
    flow: str,
    action: Action,
    reason: DropReason,
    rule: tuple[str, int] | None,
    encrypt_rule: tuple[str, int] | None,
) -> None:
    decision = ask(text, flow)
    assert (decision.action, decision.reason) == (action, reason)
    assert (decision.rule and (decision.rule.policy, decision.rule.index)) == rule
    assert (
        decision.encrypt_rule and (decision.encrypt_rule.policy, decision.encrypt_rule.index)
    ) == encrypt_rule
    assert decision.encrypt == (encrypt_rule is not None)
    assert decision.pending_action is Action.NONE


@pytest.mark.parametrize(
    ("rule", "flow", "allowed"),
    [
        ("allow app!=x to call any", "app=web -> app=db tcp/1", True),
        ("allow app!=x to call any", "env=prod -> app=db tcp/1", True),
        ("allow app!=web to call any", "app=web -> app=db tcp/1", False),
        ("allow app notin (x,y) to call any", "env=prod -> app=db tcp/1", True),
        ("allow !app to call any", "env=prod -> app=db tcp/1", True),
        ("allow !app to call any", "app=web -> app=db tcp/1", False),
        ("allow app to call any", "app=web -> app=db tcp/1", True),
        ("allow app=we* to call any", "app=web -> app=db tcp/1", True),
        ("allow app=wex* to call any", "app=web -> app=db tcp/1", False),
        ("allow app in (x,web),env=prod to call any", "app=web -> app=db tcp/1", False),
        ('allow app="" to call any', 'app="" -> app=db tcp/1', True),
        ('allow app="" to call any', "env=prod -> app=db tcp/1", False),
        # no proven identity: no selector matches, a negative one neither
        ("allow app!=x to call any", "ip:192.0.2.1 -> app=db tcp/1", False),
        ("allow !app to call any", "ip:192.0.2.1 -> app=db tcp/1", False),
        ("allow any to call app notin (x)", "app=web -> ip:192.0.2.1 tcp/1", False),
        ("allow any to call any", "ip:192.0.2.1 -> ip:192.0.2.2 tcp/1", True),
        # networks look at the address, whatever the identity
        ("allow net:internet to call any", "ip:192.0.2.1 -> app=db tcp/1", True),
        ("allow net:internet to call any", "app=web,ip:192.0.2.1 -> app=db tcp/1", True),
        ("allow net:internet to call any", "ip:10.0.0.1 -> app=db tcp/1", False),
        ("allow net:internet to call any", "ip:fd00::1 -> app=db tcp/1", False),
        ("allow net:internet to call any", "ip:2001:db8::1 -> app=db tcp/1", True),
        ("allow net:internet to call any", "app=web -> app=db tcp/1", False),
        ("allow net:192.0.2.0/24 to call any", "ip:192.0.2.255 -> app=db tcp/1", True),
        ("allow net:192.0.2.0/24 to call any", "ip:192.0.3.0 -> app=db tcp/1", False),
        ("allow net:192.0.2.0/24 to call any", "ip:::ffff:192.0.2.9 -> app=db tcp/1", True),
        ("allow net:0.0.0.1/32 to call any", "ip:::1 -> app=db tcp/1", False),
        # names
        ("allow any to call fqdn:api.example.com", "app=web -> fqdn:api.example.com tcp/443", True),
        ("allow any to call fqdn:*.example.com", "app=web -> fqdn:a.b.example.com tcp/443", True),
        ("allow any to call fqdn:*.example.com", "app=web -> fqdn:example.com tcp/443", False),
        ("allow any to call fqdn:*.example.com", "app=web -> fqdn:badexample.com tcp/443", False),
        ("allow any to call fqdn:example.com", "app=web -> fqdn:api.example.com tcp/443", False),
        # services
        ("allow any to call any on tcp/443", "app=web -> app=db udp/443", False),
        ("allow any to call any on tcp/8000-8099", "app=web -> app=db tcp/8099", True),
        ("allow any to call any on tcp/8000-8099", "app=web -> app=db tcp/8100", False),
        ("allow any to call any on tcp/8000-8003", "app=web -> app=db tcp/8003", True),
        ("allow any to call any on tcp/8000-8003", "app=web -> app=db tcp/8004", False),
        ("allow any to call any on udp/53,tcp/53", "app=web -> app=db tcp/53", True),
        ("allow any to call any on icmp", "app=web -> app=db icmp/3/9", True),
        ("allow any to call any on icmp/port-unreachable", "app=web -> app=db icmp/3/3", True),
        ("allow any to call any on icmp/port-unreachable", "app=web -> app=db icmp/3/2", False),
        ("allow any to call any on icmp/destination-unreachable", "app=web -> app=db icmp/3/2", True),
        ("allow any to call any on icmp/echo-request", "app=web -> app=db icmp6/echo-request", False),
        ("allow any to call any", "app=web -> app=db icmp6/echo-request", True),
        # conditions
        ("allow any to call any where source.zone != destination.zone", "zone=a -> zone=b tcp/1", True),
        ("allow any to call any where source.zone != destination.zone", "zone=a -> zone=a tcp/1", False),
        ("allow any to call any where source.zone != destination.zone", "zone=a -> app=x tcp/1", True),
        (
            "allow any to call any where source.zone != destination.zone",
            "zone=a -> ip:192.0.2.1 tcp/1",
            False,
        ),
        ("allow any to call any where source.zone = destination.zone", "app=y -> app=x tcp/1", False),
        ("allow any to call any where source.n > 9", "n=10 -> app=x tcp/1", True),
        ("allow any to call any where source.n > 9 and destination.n <= 3", "n=10 -> n=3.0 tcp/1", True),
        ("allow any to call any where source.n > 9 and destination.n < 3", "n=10 -> n=3.0 tcp/1", False),
        ("allow any to call any where source.n > 9", "n=7d -> app=x tcp/1", False),
        ("allow any to call any where source.n <= 9", "n=7d -> app=x tcp/1", False),
        ("allow any to call any where source.age > 7d", "age=169h -> app=x tcp/1", True),
        ("allow any to call any where source.age > 7d", "age=1w -> app=x tcp/1", False),
        ("allow any to call any where source.age > 7d", "age=2026-05-01 -> app=x tcp/1", True),
        ("allow any to call any where source.age > 7d", "age=2026-05-30 -> app=x tcp/1", False),
        ("allow any to call any where source.age > 7d", "age=2026-05-20T10:00:00Z -> app=x tcp/1", True),
        (
            "allow any to call any where source.limit < destination.since",
            "limit=7d -> since=2026-05-01 tcp/1",
            True,
        ),
        ("allow any to call any where source.x < 2026-12-31", "x=2026-05-01 -> app=x tcp/1", True),
        # expiry
        ("allow any to call any until 2026-05-31", "app=x -> app=y tcp/1", False),
        ("allow any to call any until 2026-06-01", "app=x -> app=y tcp/1", True),
        ("allow any to call any until 2026-06-01T00:00:00Z", "app=x -> app=y tcp/1", False),
        ("allow any to call any until 2026-06-01T00:00:00.000001Z", "app=x -> app=y tcp/1", True),
    ],
)
def test_matching(rule: str, flow: str, allowed: bool) -> None:
    assert (ask(policy(rule), flow).action is Action.ALLOW) == allowed
    # The same rule among many others, so that another key of the index may be chosen.
    crowd = [f"allow app=web,x{i}=y to call app=db,z=w{i} on tcp/1" for i in range(40)]
    assert (ask(policy(*crowd, rule), flow).action is Action.ALLOW) == allowed


@pytest.mark.parametrize(
    ("text", "action", "pending", "pending_rule"),
    [
        (policy("allow any to call any", mode="stage"), Action.DENY, Action.ALLOW, "p"),
        (
            policy("allow any to call any") + policy("deny any to call any", name="s", mode="stage"),
            Action.ALLOW,
            Action.DENY,
            "s",
        ),
        (
            policy("allow any to call any") + policy("deny x to call any", name="s", mode="stage"),
            Action.ALLOW,
            Action.ALLOW,
            "p",
        ),
        (policy("deny x to call any", name="s", mode="stage"), Action.DENY, Action.DENY, None),
        (
            policy("allow any to call any")
            + guardrail("require encryption for any to call any", mode="stage"),
            Action.ALLOW,
            Action.DENY,
            "g",
        ),
        (policy("audit any to call any", name="s", mode="stage"), Action.DENY, Action.AUDIT, "s"),
    ],
)
def test_staged_documents_give_a_pending_verdict(
    text: str, action: Action, pending: Action, pending_rule: str | None
) -> None:
    decision = ask(text, "app=web -> app=db tcp/1", can_encrypt=False)
    assert (decision.action, decision.pending_action) == (action, pending)
    assert (decision.pending_rule.policy if decision.pending_rule else None) == pending_rule
    assert not decision.encrypt


def test_a_rule_names_itself() -> None:
    engine = Engine(parse(guardrail("deny a to call b") + policy("allow  any  to call any on tcp/1")), 7)
    assert engine.revision == 7
    deny, allow = engine.rules
    assert (allow.policy, allow.kind, allow.owner, allow.index, allow.mode) == (
        "p",
        "Policy",
        "p-team",
        1,
        Mode.ENFORCE,
    )
    assert allow.text == "allow any to call any on tcp/1"
    assert allow.id == stable_id(b"Policy/p/allow any to call any on tcp/1")
    assert allow.where == "<text>:13:3"
    assert engine.rule(deny.id) is deny
    assert engine.rule(1) is None


def test_a_cached_verdict_ends_when_time_changes_it() -> None:
    text = policy("allow any to call any until 2026-06-02", "deny any to call any where source.since > 2d")
    engine = Engine(parse(text))
    request = parse_flow("since=2026-05-31T12:00:00Z -> app=x tcp/1").request()
    flip = NOW + DAY // 2 * 3 + 1
    first = engine.decide(request, NOW)
    assert (first.action, first.valid_until_us) == (Action.ALLOW, flip)
    assert engine.decide(request, flip - 1) is first
    later = engine.decide(request, flip)
    assert (later.reason, later.valid_until_us) == (DropReason.INTENT_DENY, NOW + 2 * DAY)
    # and when the clock is set back
    assert engine.decide(request, NOW).action is Action.ALLOW
    over = engine.decide(request, NOW + 2 * DAY)
    assert (over.reason, over.valid_until_us) == (DropReason.INTENT_DENY, None)


def test_the_cache_keeps_apart_what_differs_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(
        parse(NETWORKS + policy("allow net:internet to call app=db,!x on tcp/1,icmp/3/1 encrypted"))
    )
    db, no = Party(LabelSet({"app": "db"})), Party(LabelSet({"app": "db", "x": ""}))
    outside, inside = (
        Party(address=ipaddress.ip_address("192.0.2.1")),
        Party(address=ipaddress.ip_address("10.0.0.1")),
    )
    table = [
        (Request(outside, db, 6, 1, 0, True), Action.ALLOW),
        (Request(outside, db, 6, 1, 0, False), Action.DENY),
        (Request(inside, db, 6, 1, 0, True), Action.DENY),
        (Request(outside, no, 6, 1, 0, True), Action.DENY),
        (Request(outside, db, 6, 2, 0, True), Action.DENY),
        (Request(outside, db, 17, 1, 0, True), Action.DENY),
        (Request(outside, db, 1, 3, 1, True), Action.ALLOW),
        (Request(outside, db, 1, 3, 0, True), Action.DENY),
        (Request(Party(), db, 6, 1, 0, True), Action.DENY),
    ]
    for _ in range(2):
        for request, action in table:
            assert engine.decide(request, NOW).action is action
    monkeypatch.setattr("sectool.policy.engine.CACHE_SIZE", 50)
    for port in range(1000):
        engine.decide(Request(inside, db, 6, port), NOW)
        engine.decide(table[0][0], NOW)
    assert len(engine._young) <= 50
    assert len(engine._old) <= 60
    assert engine.decide(table[0][0], NOW).action is Action.ALLOW


def test_the_cache_keeps_names_apart() -> None:
    engine = Engine(parse(policy("allow app=a to call fqdn:x.example")))
    a = Party(LabelSet({"app": "a"}))
    for _ in range(2):
        for name, action in (("x.example", Action.ALLOW), ("y.example", Action.DENY)):
            assert engine.decide(Request(a, Party(names=frozenset({name})), 6, 1), NOW).action is action


def test_the_earliest_of_several_changes_ends_a_verdict() -> None:
    days = ["2026-06-09", "2026-06-03", "2026-06-07"]
    rules = [f"allow app=a to call any on tcp/{n + 1},tcp/9 until {day}" for n, day in enumerate(days)]
    for order in (rules, rules[::-1]):
        assert ask(policy(*order), "app=a -> app=b tcp/9").valid_until_us == NOW + 3 * DAY


def test_equal_but_different_label_sets_share_a_verdict() -> None:
    engine = Engine(parse(policy("allow app=a to call app=b")))
    one = Request(Party(LabelSet({"app": "a"})), Party(LabelSet({"app": "b"})), 6, 1)
    two = Request(Party(LabelSet({"app": "a"}), "spiffe://x/y"), Party(LabelSet({"app": "b"})), 6, 1)
    assert engine.decide(one, NOW) is engine.decide(two, NOW)


# --- the naive evaluator ------------------------------------------------------------------------------------
# It reads the documents' sentences one after the other, knows no index, cache or compiled rule, and spells the
# semantics out anew.


def _selector(sel: Selector, party: Party, nets: Mapping[str, NetworkSpec]) -> bool:
    if isinstance(sel, Anyone):
        return True
    if isinstance(sel, (NamedNet, Cidr)):
        if party.address is None:
            return False
        address = getattr(party.address, "ipv4_mapped", None) or party.address
        if isinstance(sel, Cidr):
            return address in sel.network
        spec = nets[sel.name]
        return any(address in n for n in spec.cidrs) and all(address not in n for n in spec.excepts)
    if isinstance(sel, Fqdn):
        pattern = ("*." if sel.wildcard else "") + sel.name
        return any(fnmatch.fnmatchcase(name, pattern) for name in party.names)
    assert isinstance(sel, Labels)
    if party.labels is None:
        return False
    for clause in sel.clauses:
        here = clause.key in party.labels
        value = party.labels[clause.key] if here else None
        good = {
            Op.EQ: here and value == clause.values[:1][0] if clause.values else False,
            Op.NE: not here or value not in clause.values,
            Op.IN: here and value in clause.values,
            Op.NOTIN: not here or value not in clause.values,
            Op.EXISTS: here,
            Op.ABSENT: not here,
            Op.PREFIX: here and (value or "").startswith(clause.values[0] if clause.values else ""),
        }[clause.op]
        if not good:
            return False
    return True


_UNIT = {"d": DAY, "h": DAY // 24}


def _read(text: str) -> tuple[str, float]:
    if text[:2] == "20":
        return "date", datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1e6
    if text[-1:] in _UNIT and text[:-1].isdigit():
        return "duration", int(text[:-1]) * _UNIT[text[-1]]
    return ("number", float(text)) if text.isdigit() else ("text", 0)


def _condition(left: LabelRef, op: str, right: LabelRef | str, request: Request, now: int) -> bool:
    found: list[str | None] = []
    for operand in (left, right):
        if isinstance(operand, LabelRef):
            party = request.source if operand.side == "source" else request.destination
            if party.labels is None:
                return False
            found.append(party.labels.get(operand.key))
        else:
            found.append(operand)
    a, b = found
    if a is None or b is None:
        return op == "!="
    if op in ("=", "!="):
        return (a == b) == (op == "=")
    (kind_a, x), (kind_b, y) = _read(a), _read(b)
    if (kind_a, kind_b) == ("date", "duration"):
        x, kind_a = now - x, "duration"
    elif (kind_a, kind_b) == ("duration", "date"):
        y, kind_b = now - y, "duration"
    if kind_a != kind_b or kind_a == "text":
        return False
    return {"<": x < y, ">": x > y, "<=": x <= y, ">=": x >= y}[op]


def _applies(s: Sentence, request: Request, nets: Mapping[str, NetworkSpec], now: int) -> bool:
    if s.until is not None and now >= s.until.us:
        return False
    if s.services and not any(
        x.protocol == request.protocol
        and x.low <= request.port <= x.high
        and x.code in (None, request.icmp_code)
        for x in s.services
    ):
        return False
    return (
        _selector(s.source, request.source, nets)
        and _selector(s.destination, request.destination, nets)
        and all(_condition(c.left, c.operator, c.right, request, now) for c in s.conditions)
    )


Answer = tuple[Action, DropReason, tuple[str, int] | None, tuple[str, int] | None]


def naive(documents: DocumentSet, modes: set[Mode], request: Request, now: int) -> Answer:
    nets = {n.name: n.spec for n in documents.networks}

    def hits(docs: tuple[PolicyDoc, ...], verb: Verb) -> list[tuple[str, int, bool]]:
        return [
            (doc.name, number, rule.sentence.encrypted)
            for doc in sorted(docs, key=lambda d: d.name)
            if doc.mode in modes
            for number, rule in enumerate(doc.rules, 1)
            if rule.sentence.verb is verb and _applies(rule.sentence, request, nets, now)
        ]

    if denied := hits(documents.guardrails, Verb.DENY):
        return Action.DENY, DropReason.GUARDRAIL_DENY, denied[0][:2], None
    if denied := hits(documents.policies, Verb.DENY):
        return Action.DENY, DropReason.INTENT_DENY, denied[0][:2], None
    demands = hits(documents.guardrails, Verb.REQUIRE)
    for verb, action in ((Verb.ALLOW, Action.ALLOW), (Verb.AUDIT, Action.AUDIT)):
        if passing := hits(documents.policies, verb):
            encrypted = [hit for hit in passing if hit[2]]
            chosen = (encrypted or passing)[0][:2]
            demand = demands[0][:2] if demands else chosen if encrypted else None
            if demand and not request.can_encrypt:
                return Action.DENY, DropReason.ENCRYPTION_UNAVAILABLE, demand, demand
            return action, DropReason.NONE, chosen, demand
    return Action.DENY, DropReason.DEFAULT_DENY, None, None


_SELECTORS = st.sampled_from(
    [
        "any",
        "app=web",
        "app=db",
        "env=prod",
        "app!=db",
        "app in (web,db)",
        "env notin (dev)",
        "!app",
        "env",
        "app=w*",
        "app=web,env=prod",
        "env=dev,!app",
        "net:lan",
        "net:world",
        "net:10.1.0.0/16",
        "net:fd00::/8",
        "fqdn:a.example",
        "fqdn:*.example",
        "n,app!=web",
        "app in (db,api),env!=prod",
    ]
)
_ON = st.sampled_from(
    [
        "",
        "",
        " on tcp/80",
        " on tcp/80,udp/53",
        " on tcp/1-100",
        " on icmp/8",
        " on icmp/3/3,tcp",
        " on udp/50-60",
    ]
)
_WHERE = st.sampled_from(
    [
        "",
        "",
        "",
        " where source.env = destination.env",
        " where source.env != destination.env",
        " where source.n > 3",
        " where source.n < destination.n",
        " where source.n >= 2d and destination.env = prod",
        ' where source.app != ""',
        " where destination.n <= 36h",
    ]
)
_UNTIL = st.sampled_from(
    ["", "", "", " until 2026-05-31", " until 2026-06-01", " until 2026-06-02T12:00:00Z"]
)
_ENC = st.sampled_from(["", "", " encrypted"])


@st.composite
def _documents(draw: st.DrawFn) -> str:
    out = (
        "kind: Network\nname: lan\ncidrs: [10.0.0.0/8, 'fd00::/16']\nexcept: [10.2.0.0/16]\n---\n"
        "kind: Network\nname: world\ncidrs: [0.0.0.0/0]\nexcept: [10.0.0.0/8]\n---\n"
    )
    for name in draw(st.lists(st.sampled_from("abcdef"), max_size=4, unique=True)):
        is_guardrail = draw(st.booleans())
        mode = draw(st.sampled_from(["enforce", "enforce", "enforce", "stage", "off"]))
        rules: list[str] = []
        for _ in range(draw(st.integers(1, 4))):
            verbs = (
                ["deny", "require encryption for"] if is_guardrail else ["allow", "allow", "deny", "audit"]
            )
            verb = draw(st.sampled_from(verbs))
            encrypted = draw(_ENC) if verb in ("allow", "audit") else ""
            rules.append(
                f"{verb} {draw(_SELECTORS)} to call {draw(_SELECTORS)}{draw(_ON)}"
                f"{encrypted}{draw(_WHERE)}{draw(_UNTIL)}"
            )
        out += policy(
            *dict.fromkeys(rules), kind="Guardrail" if is_guardrail else "Policy", name=name, mode=mode
        )
    return out


_PARTIES = st.builds(
    Party,
    st.none()
    | st.fixed_dictionaries(
        {},
        optional={
            "app": st.sampled_from(["web", "db", "api", ""]),
            "env": st.sampled_from(["prod", "dev"]),
            "n": st.sampled_from(["1", "5", "1d", "50h", "2026-05-30", "2026-05-31", "word"]),
        },
    ).map(LabelSet),
    st.none(),
    st.none()
    | st.sampled_from(
        ["10.0.0.1", "10.1.2.3", "10.2.0.1", "192.0.2.1", "fd00::1", "fd00:1::1", "::ffff:10.1.2.3"]
    ).map(ipaddress.ip_address),
    st.sampled_from(
        [frozenset(), frozenset({"a.example"}), frozenset({"b.a.example", "x.test"}), frozenset({"example"})]
    ),
)
_SERVICES = st.sampled_from(
    [(6, 80, 0), (17, 53, 0), (6, 101, 0), (1, 8, 0), (1, 3, 3), (1, 3, 1), (47, 0, 0), (58, 8, 0)]
)
_TIMES = st.sampled_from([NOW - DAY, NOW - 1, NOW, NOW + DAY // 2, NOW + DAY, NOW + 2 * DAY])


def _short(decision: Decision) -> Answer:
    return (
        decision.action,
        decision.reason,
        (decision.rule.policy, decision.rule.index) if decision.rule else None,
        (decision.encrypt_rule.policy, decision.encrypt_rule.index) if decision.encrypt_rule else None,
    )


_FLOWS = st.lists(st.tuples(_PARTIES, _PARTIES, _SERVICES, st.booleans()), min_size=1, max_size=12)


@settings(max_examples=250, deadline=None)
@given(_documents(), _FLOWS, _TIMES)
def test_agrees_with_the_naive_evaluator(
    text: str, flows: list[tuple[Party, Party, tuple[int, int, int], bool]], now: int
) -> None:
    documents = parse(text)
    engine = Engine(documents)
    staged = any(d.mode is Mode.STAGE for d in (*documents.policies, *documents.guardrails))
    for source, destination, service, can in flows:
        request = Request(source, destination, *service, can)
        decision = engine.decide(request, now)
        assert _short(decision) == naive(documents, {Mode.ENFORCE}, request, now)
        assert decision.encrypt == (decision.encrypt_rule is not None)
        pending = naive(documents, {Mode.ENFORCE, Mode.STAGE}, request, now)
        assert decision.pending_action is (pending[0] if staged else Action.NONE)
        if staged:
            shown = (
                (decision.pending_rule.policy, decision.pending_rule.index) if decision.pending_rule else None
            )
            assert shown == pending[2]

        # the verdict holds up to the moment it names
        end = decision.valid_until_us
        assert end is None or end > now
        for moment in (now, (now + (end or now + 9 * DAY)) // 2, (end or now + 9 * DAY) - 1):
            assert naive(documents, {Mode.ENFORCE}, request, moment) == _short(decision)
            assert _short(engine.decide(request, moment)) == _short(decision)

        explanation = explain(engine, request, now)
        assert explanation.decision == decision
        matching, _ = engine.matching(request, now)
        facts = engine.facts(source), engine.facts(destination)
        assert [r for r in engine.compiled if not r.misses(request, *facts, now)] == matching
        assert (explanation.remedy is Remedy.NOTHING_NEEDED) == (decision.action is Action.ALLOW)
        if explanation.sentence:
            fixed = parse(text + policy(explanation.sentence, name="zz"))
            assert Engine(fixed).decide(request, now).action is Action.ALLOW
        assert explanation.lines()
