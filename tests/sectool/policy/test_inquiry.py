"""Inquiries: both sides, the beginnings of rules, and what a proposed sentence lets in."""

from __future__ import annotations

from sectool.events import Action
from sectool.labels import LabelSet
from sectool.policy import Engine, parse, parse_flow
from sectool.policy.explanation import Remedy
from sectool.policy.inquiry import Inquiry, Origin, inquire, origin, widening, widening_lines

NOW = 1_780_000_000_000_000
SHOP = """kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432
  - allow app=web to call fqdn:api.example.com on tcp/443
  - allow app=web to call app=db on tcp/22 encrypted
---
kind: Guardrail
name: box
owner: security
rules: [deny env=dev to call env=prod]
"""


def ask(flow: str, text: str = SHOP) -> tuple[Engine, Inquiry]:
    engine = Engine(parse(text), 5)
    return engine, inquire(engine, parse_flow(flow).request(), NOW)


def test_both_ends_judge_when_both_have_an_identity() -> None:
    _, found = ask("app=web -> app=db tcp/5432")
    assert found.allowed
    assert [side.line() for side in found.sides] == [
        "initiator (egress): ALLOWED by Policy shop, rule 1 (owner team-shop)",
        "responder (ingress): ALLOWED by Policy shop, rule 1 (owner team-shop)",
    ]
    assert ask("app=web -> app=db tcp/22")[1].sides[1].line().endswith(", encrypted")


def test_an_end_without_identity_judges_nothing() -> None:
    _, found = ask("app=web -> fqdn:api.example.com tcp/443")
    assert found.allowed
    assert found.sides[0].explanation is not None
    assert found.sides[1].line() == "responder (ingress): has no proven identity, so no enforcer judges there"
    _, found = ask("ip:192.0.2.1 -> app=db tcp/5432")
    assert not found.allowed
    assert found.sides[0].explanation is None
    assert not ask("ip:192.0.2.1 -> ip:192.0.2.2 tcp/1")[1].allowed


def test_host_names_are_known_at_the_initiator_alone() -> None:
    _, found = ask("app=web -> app=x,fqdn:api.example.com tcp/443")
    first, second = (side.explanation for side in found.sides)
    assert first is not None
    assert second is not None
    assert first.decision.action is Action.ALLOW
    assert second.decision.action is Action.DENY
    assert found.main is second
    assert not found.allowed


def labels(*texts: str) -> list[LabelSet]:
    return [LabelSet.parse(text) for text in texts]


def test_what_a_sentence_lets_in_beside_the_flow_asked_about() -> None:
    engine, found = ask("app=web,host=a -> app=db,host=b tcp/80")
    assert found.main.sentence == "allow app=web to call app=db on tcp/80"
    known = labels(
        "app=web,host=a", "app=db,host=b", "app=web,host=c", "app=db,env=prod", "app=web,env=dev", "app=x"
    )
    lets_in = widening(engine, found.main, known, NOW)
    assert {(str(s), str(d)) for s, d in lets_in.pairs} == {
        ("app=web,host=a", "app=db,env=prod"),
        ("app=web,host=c", "app=db,host=b"),
        ("app=web,host=c", "app=db,env=prod"),
        ("app=web,env=dev", "app=db,host=b"),
    }  # env=dev to env=prod stays denied
    assert (lets_in.count, lets_in.tried, lets_in.partial) == (4, 5, False)
    lines = widening_lines(lets_in, found.main.sentence)
    assert lines[0] == "it would also let in 4 of 5 other known pairs that fit it:"
    assert widening_lines(widening(engine, found.main, known[:2], NOW), "x") == [
        "nobody else that is known here fits that rule"
    ]


def test_what_is_allowed_already_is_not_let_in_and_long_lists_are_counted() -> None:
    text = SHOP + "---\nkind: Policy\nname: more\nowner: o\nrules: ['allow app=web,old=1 to call app=db']\n"
    engine, found = ask("app=web,host=a -> app=db tcp/80", text)
    assert found.main.remedy is Remedy.SENTENCE
    many = [LabelSet({"app": "web", "host": f"h{n}"}) for n in range(30)]
    lets_in = widening(engine, found.main, [*labels("app=db", "app=web,old=1"), *many], NOW)
    assert (lets_in.count, lets_in.tried, len(lets_in.pairs)) == (30, 31, 10)
    assert widening_lines(lets_in, found.main.sentence)[-1] == "  and 20 more"


def test_the_beginning_of_a_rule_is_where_it_came_to_stay() -> None:
    one, two = SHOP, SHOP.replace("tcp/5432", "tcp/1")
    rule = Engine(parse(one)).rules[0]
    texts = [
        (7, one),
        (6, "# only the spelling\n" + one.replace("app=web to", "app=web  to")),
        (5, two),
        (4, one),
    ]
    history = [(Origin(n, n * 1000, "alice", ("team-shop",), "because"), text) for n, text in texts]
    changed = next(r for r in Engine(parse(one)).rules if r.text.endswith("tcp/5432"))
    assert rule.kind == "Guardrail"
    begun = origin(changed.id, history)
    assert begun is not None
    assert (begun.revision, begun.exact) == (6, True)
    whole = origin(rule.id, history)
    assert whole is not None
    assert whole.revision == 4
    least = origin(rule.id, history, still=iter([True, True, False]).__next__)
    assert least is not None
    assert (least.revision, least.exact) == (6, False)
    assert origin(12345, history) is None
