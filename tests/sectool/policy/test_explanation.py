"""Explanations: what they say about each kind of verdict, and that they are safe to print."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime

import pytest

from sectool.events import Action, DropReason
from sectool.labels import LabelSet
from sectool.policy import Engine, Explanation, Party, Request, explain, parse, parse_flow, parse_sentence
from sectool.policy.explanation import MAX_NEAR, Remedy

NOW = int(datetime(2026, 6, 1, tzinfo=UTC).timestamp()) * 1_000_000

SHOP = """
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432 encrypted
  - allow net:lan to call app=web on tcp/443
  - deny app=web to call app=vault because "OPS-1"
  - audit app=batch to call app=db until 2026-05-01
---
kind: Policy
name: later
owner: team-later
mode: stage
rules: [allow app=api to call app=web on tcp/443]
---
kind: Guardrail
name: box
owner: security
rules:
  - deny env=dev to call env=prod
  - require encryption for any to call app=db where source.zone != destination.zone
---
kind: Network
name: lan
cidrs: [10.0.0.0/8]
"""


def why(flow: str, text: str = SHOP, can_encrypt: bool | None = None) -> Explanation:
    documents = parse(text, "shop.yaml")
    request = parse_flow(flow).request({n.name: n.spec for n in documents.networks})
    if can_encrypt is not None:
        object.__setattr__(request, "can_encrypt", can_encrypt)
    return explain(Engine(documents, 4), request, NOW)


def test_allowed() -> None:
    said = why("app=web -> app=db tcp/5432")
    assert said.decision.action is Action.ALLOW
    assert said.remedy is Remedy.NOTHING_NEEDED
    assert said.sentence == ""
    assert [(r.policy, r.index) for r in said.applied] == [("box", 2), ("shop", 1)]
    assert said.lines()[:6] == [
        "ALLOWED: app=web -> app=db tcp/5432",
        "policy revision 4",
        "decided by Policy shop, rule 1 (owner team-shop) at shop.yaml:6:5:",
        "  allow app=web to call app=db on tcp/5432 encrypted",
        "encrypted because of Guardrail box, rule 2 (owner security):",
        "  require encryption for any to call app=db where source.zone != destination.zone",
    ]


def test_default_deny_names_what_nearly_applied_and_the_sentence_that_would_allow() -> None:
    said = why("app=web,env=prod -> app=db,tier=1 tcp/80")
    assert said.decision.reason is DropReason.DEFAULT_DENY
    assert said.nearest_allow is not None
    assert said.nearest_allow.rule.text == "allow app=web to call app=db on tcp/5432 encrypted"
    (miss,) = said.nearest_allow.misses
    assert miss == ("service", "on tcp/5432", "the call is tcp/80")
    assert said.sentence == "allow app=web to call app=db on tcp/80"
    assert said.remedy is Remedy.SENTENCE
    lines = said.lines()
    assert "decided by default: no rule allows it" in lines
    assert "    but on tcp/5432: the call is tcp/80" in lines
    assert lines[-2:] == ["this rule in a Policy would allow it:", "  allow app=web to call app=db on tcp/80"]


@pytest.mark.parametrize(
    ("flow", "rule", "part", "clause", "found"),
    [
        ("app=batch -> app=db tcp/1", "shop 4", "until", "until 2026-05-01", "that time is over"),
        ("env=dev -> env=test tcp/1", "box 1", "destination", "env=prod", "env=test"),
        ("env=dev -> app=x tcp/1", "box 1", "destination", "env=prod", "label env is absent"),
        (
            "env=dev -> ip:10.0.0.1 tcp/1",
            "box 1",
            "destination",
            "env=prod",
            "no proven identity, so no labels",
        ),
        ("ip:11.0.0.1 -> app=web tcp/443", "shop 2", "source", "net:lan", "the address is 11.0.0.1"),
        ("app=x -> app=web tcp/443", "shop 2", "source", "net:lan", "no address"),
        (
            "app=x,zone=a -> app=db,zone=a tcp/1",
            "box 2",
            "where",
            "where source.zone != destination.zone",
            "source.zone is a, destination.zone is a",
        ),
        (
            "ip:11.0.0.1 -> app=db tcp/1",
            "box 2",
            "where",
            "where source.zone != destination.zone",
            "the source has no proven identity, destination.zone is absent",
        ),
    ],
)
def test_near_misses(flow: str, rule: str, part: str, clause: str, found: str) -> None:
    near = {f"{n.rule.policy} {n.rule.index}": n.misses for n in why(flow).near}
    assert near[rule] == ((part, clause, found),)


def test_more_clauses_that_fail() -> None:
    text = """
kind: Policy
name: p
owner: o
rules: ['allow a=1,!b,c=x*,d notin (e) to call fqdn:*.example on tcp/1']
"""
    said = why("a=2,b=,c=y,d=e -> fqdn:other.test tcp/2".replace("b=,", 'b="",'), text)
    assert said.nearest_allow is not None
    assert [tuple(m) for m in said.nearest_allow.misses] == [
        ("source", "a=1", "a=2"),
        ("source", "!b", "label b is present"),
        ("source", "c=x*", "c=y"),
        ("source", "d notin (e)", "d=e"),
        ("destination", "fqdn:*.example", "known names: other.test"),
        ("service", "on tcp/1", "the call is tcp/2"),
    ]
    assert said.near == ()


@pytest.mark.parametrize(
    ("flow", "reason", "remedy", "last"),
    [
        (
            "app=web -> app=vault tcp/1",
            DropReason.INTENT_DENY,
            Remedy.OWNER,
            "no rule of yours can allow it: talk to team-shop, who owns the rule that denies",
        ),
        (
            "app=web,env=dev -> app=db,env=prod tcp/5432",
            DropReason.GUARDRAIL_DENY,
            Remedy.OWNER,
            "no rule of yours can allow it: talk to security, who owns the rule that denies",
        ),
    ],
)
def test_a_rule_that_denies_sends_to_its_owner(
    flow: str, reason: DropReason, remedy: Remedy, last: str
) -> None:
    said = why(flow)
    assert (said.decision.reason, said.remedy, said.sentence) == (reason, remedy, "")
    assert said.lines()[-1] == last


def test_encryption_that_cannot_be_had() -> None:
    said = why("app=web -> app=db tcp/5432", can_encrypt=False)
    assert said.decision.reason is DropReason.ENCRYPTION_UNAVAILABLE
    assert said.remedy is Remedy.ENFORCER
    assert (
        "that rule demands encryption, and one of the two ends has no enforcer to encrypt with"
        in said.lines()
    )
    assert "Policy shop, rule 1 (owner team-shop) would allow it, but it is overruled" in said.lines()
    # no rule allows this one either, but with one it would still lack encryption
    said = why("app=x,zone=a -> app=db,zone=b tcp/1", can_encrypt=False)
    assert said.decision.reason is DropReason.DEFAULT_DENY
    assert said.remedy is Remedy.ENFORCER


def test_staged_rules_are_told_apart() -> None:
    said = why("app=api -> app=web tcp/443")
    assert [r.policy for r in said.staged] == ["later"]
    assert said.applied == ()
    lines = said.lines()
    assert (
        "with staged documents enforced: instead ALLOWED by Policy later, rule 1 (owner team-later)" in lines
    )
    assert "Policy later, rule 1 (owner team-later) would allow it, but it is only staged" in lines


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            Party(address=ipaddress.ip_address("192.0.2.1")),
            "allow net:192.0.2.1/32 to call app=web on tcp/80",
        ),
        (
            Party(address=ipaddress.ip_address("2001:db8::1")),
            "allow net:2001:db8::1/128 to call app=web on tcp/80",
        ),
        (
            Party(address=ipaddress.ip_address("::ffff:192.0.2.1")),
            "allow net:192.0.2.1/32 to call app=web on tcp/80",
        ),
        (
            Party(address=ipaddress.ip_address("fe80::1%eth0")),
            "allow net:fe80::1/128 to call app=web on tcp/80",
        ),
        (
            Party(names=frozenset({"b.example", "a.example"})),
            "allow fqdn:a.example to call app=web on tcp/80",
        ),
        (Party(), "allow any to call app=web on tcp/80"),
        (Party(LabelSet({})), "allow any to call app=web on tcp/80"),
        (Party(LabelSet({"zone": "z", "host": "h"})), "allow host=h,zone=z to call app=web on tcp/80"),
    ],
)
def test_the_proposed_sentence_is_narrow_parses_and_works(source: Party, sentence: str) -> None:
    documents = parse(SHOP)
    request = Request(source, Party(LabelSet({"app": "web"})), 6, 80)
    said = explain(Engine(documents), request, NOW)
    assert said.sentence == sentence
    assert str(parse_sentence(said.sentence)) == sentence
    fixed = documents.merge(parse(f"kind: Policy\nname: fix\nowner: me\nrules: ['{sentence}']"))
    assert Engine(fixed).decide(request, NOW).action is Action.ALLOW


def test_other_protocols_have_no_service_to_name() -> None:
    request = Request(Party(LabelSet({"app": "a"})), Party(LabelSet({"app": "b"})), 47, 0)
    said = explain(Engine(parse("")), request, NOW)
    assert said.sentence == "allow app=a to call app=b"
    assert said.nearest_allow is None
    assert said.lines()[0] == "DENIED: app=a -> app=b protocol 47"


def test_many_near_misses_are_counted() -> None:
    rules = "".join(f"- allow app=a to call app=b on tcp/{n}\n" for n in range(1, 31))
    said = why("app=a -> app=b tcp/99", "kind: Policy\nname: p\nowner: o\nrules:\n" + rules)
    assert (len(said.near), said.near_more) == (MAX_NEAR, 20)
    assert "  and 20 more" in said.lines()


def test_names_from_outside_cannot_steer_a_terminal() -> None:
    request = Request(Party(names=frozenset({"evil\x1b[2J\u202e"})), Party(), 6, 80)
    text = "\n".join(explain(Engine(parse("")), request, NOW).lines()[:1])
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_name_that_no_sentence_can_hold_does_not_break_the_explanation() -> None:
    request = Request(
        Party(names=frozenset({"not a name"}), address=ipaddress.ip_address("192.0.2.7")), Party(), 6, 80
    )
    said = explain(Engine(parse("")), request, NOW)
    assert said.sentence == "allow net:192.0.2.7/32 to call any on tcp/80"
