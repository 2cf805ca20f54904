"""Conflicts: what is told, to whom, and that it is so."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.events import Action
from sectool.policy import DocumentSet, Engine, Request, parse, parse_flow
from sectool.policy.conflicts import Conflict, ConflictKind, Conflicts, find_conflicts
from sectool.policy.model import PolicyDoc
from tests.sectool.policy.worlds import LONG, NETWORKS, documents, enforced, requests

NOW = 1_780_000_000_000_000

BOX = """kind: Guardrail
name: box
owner: security
rules:
- deny env=dev to call env=prod
- require encryption for any to call app=db
- deny any to call app in (old,older)
---
"""


def told(*rules: str, more: str = "", owner: str = "shop") -> Conflicts:
    body = "".join(f"- {rule}\n" for rule in rules)
    text = f"{NETWORKS}{BOX}kind: Policy\nname: shop\nowner: {owner}\nrules:\n{body}---\n{more}"
    return find_conflicts(Engine(parse(text, "shop.yaml")), NOW)


def about(found: Conflicts, number: int) -> list[Conflict]:
    return [c for c in found.found if (c.rule.policy, c.rule.index) == ("shop", number)]


@pytest.mark.parametrize(
    ("rules", "number", "kind", "by", "example"),
    [
        (
            ["allow app=web,env=dev to call app=x,env=prod"],
            1,
            ConflictKind.VOID,
            [("box", 1)],
            "app=web,env=dev -> app=x,env=prod tcp/443",
        ),
        (["allow x=1 to call app=old"], 1, ConflictKind.VOID, [("box", 3)], "x=1 -> app=old tcp/443"),
        (
            ["allow app=web to call app=x"],
            1,
            ConflictKind.PARTLY_VOID,
            [("box", 1)],
            "app=web,env=dev -> app=x,env=prod tcp/443",
        ),
        (
            ["allow net:lan to call app=db,env=test on tcp/5432"],
            1,
            ConflictKind.PARTLY_VOID,
            [("box", 2)],
            "ip:10.0.0.1 -> app=db,env=test tcp/5432",
        ),
        (["allow a=1,a!=1 to call any"], 1, ConflictKind.UNREACHABLE, [], ""),
        (["allow a=1* to call b in (2,3),b notin (2,3)"], 1, ConflictKind.UNREACHABLE, [], ""),
        (["allow a=1 to call any where source.a = 2"], 1, ConflictKind.UNREACHABLE, [], ""),
        (["allow a=1 to call any until 2020-01-01"], 1, ConflictKind.UNREACHABLE, [], ""),
        (
            ["deny app=web to call app=x", "allow app=web to call app=x,env=test on tcp/1"],
            2,
            ConflictKind.SHADOWED,
            [("shop", 1)],
            "app=web -> app=x,env=test tcp/1",
        ),
        (
            ["allow x=1 to call env=test on tcp/1-100", "audit x=1 to call env=test on tcp/7"],
            2,
            ConflictKind.SHADOWED,
            [("shop", 1)],
            "x=1 -> env=test tcp/7",
        ),
        (
            [
                "allow x=1 to call env=test on tcp/1-100",
                "allow x=1 to call env=test on tcp/101-200",
                "allow x=1 to call env=test on tcp/50-150",
            ],
            3,
            ConflictKind.REDUNDANT,
            [("shop", 1), ("shop", 2)],
            "x=1 -> env=test tcp/50",
        ),
        (
            ["allow x in (1,2) to call env=test", "allow x=1 to call env=test encrypted"],
            2,
            None,
            [],
            "",
        ),
        (
            ["allow x=1 to call app=db,env=test", "allow x=1 to call app=db,env=test encrypted"],
            2,
            ConflictKind.REDUNDANT,
            [("box", 2), ("shop", 1)],
            "x=1 -> app=db,env=test tcp/443",
        ),
        (
            ["allow x=1 to call env=test until 2100-01-01", "allow x=1 to call env=test on tcp/1"],
            2,
            None,
            [],
            "",
        ),
        (
            [
                "allow x=1 to call env=test where source.a = destination.a",
                "allow x=1 to call env=test on tcp/1 where source.a = destination.a",
            ],
            2,
            ConflictKind.REDUNDANT,
            [("shop", 1)],
            None,
        ),
        (
            [
                "allow x=1 to call env=test where source.a = destination.a",
                "allow x=1 to call env=test on tcp/1",
            ],
            2,
            None,
            [],
            "",
        ),
    ],
)
def test_kinds(
    rules: list[str], number: int, kind: ConflictKind | None, by: list[tuple[str, int]], example: str | None
) -> None:
    found = about(told(*rules), number)
    if kind is None:
        assert not [c for c in found if c.kind is not ConflictKind.PARTLY_VOID]
        return
    conflict = next(c for c in found if c.kind is kind)
    assert [(r.policy, r.index) for r in conflict.by] == by
    if example is not None:
        assert conflict.example == example


def test_both_owners_are_told_and_lines_name_them() -> None:
    found = told("allow app=web,env=dev to call app=x,env=prod", "allow y=1 to call app=old")
    assert [c.owners for c in found.found] == [("shop", "security")] * 2
    text = "\n".join(found.lines())
    assert "void: Policy shop, rule 1 (owner shop) at shop.yaml:" in text
    assert "because of Guardrail box, rule 1 (owner security) at shop.yaml:" in text
    assert "e.g. app=web,env=dev -> app=x,env=prod tcp/443" in text


def test_alike_conflicts_are_told_once_with_their_number() -> None:
    found = told(*(f"allow app=a{n} to call app=b{n}" for n in range(30)))
    assert len(found.of(ConflictKind.PARTLY_VOID)) == 30
    lines = found.lines()
    assert "  and 29 more rules of shop for the same reason" in lines
    assert len(lines) < 12


def test_another_owner_that_takes_part_of_a_rule_is_told_about_and_one_s_own_exception_is_not() -> None:
    other = "kind: Policy\nname: z\nowner: {}\nrules: ['deny app=web,x=1 to call env=test']\n---\n"
    rules = "allow app=web to call env=test"
    partly = told(rules, more=other.format("them")).of(ConflictKind.PARTLY_SHADOWED)
    assert [(c.owners, c.example) for c in partly] == [(("shop", "them"), "app=web,x=1 -> env=test tcp/443")]
    assert not told(rules, more=other.format("shop")).of(ConflictKind.PARTLY_SHADOWED)


def test_staged_documents_make_pending_conflicts() -> None:
    staged = (
        "kind: Guardrail\nname: z\nowner: security\nmode: stage\nrules: ['deny app=web to call any']\n---\n"
    )
    (found,) = about(told("allow app=web,env=test to call env=test,app=x", more=staged), 1)
    assert (found.kind, found.pending) == (ConflictKind.VOID, True)
    assert found.lines()[0].startswith("void once staged documents are enforced: ")


def without(found: DocumentSet, dropped: set[tuple[str, str, int]]) -> DocumentSet:
    """The same documents without some rules."""

    def kept(docs: tuple[PolicyDoc, ...]) -> tuple[PolicyDoc, ...]:
        return tuple(
            replace(
                doc,
                rules=tuple(
                    rule
                    for number, rule in enumerate(doc.rules, 1)
                    if (doc.kind.value, doc.name, number) not in dropped
                ),
            )
            for doc in docs
        )

    return replace(found, policies=kept(found.policies), guardrails=kept(found.guardrails))


@given(enforced, st.lists(requests, min_size=10, max_size=25))
@settings(max_examples=LONG or 40, deadline=None)
def test_all_redundant_rules_can_go_and_no_verdict_changes(text: str, asked: list[Request]) -> None:
    found = parse(text)
    engine = Engine(found)
    conflicts = find_conflicts(engine, NOW)
    dropped = {
        (c.rule.kind, c.rule.policy, c.rule.index)
        for c in conflicts.of(ConflictKind.REDUNDANT, ConflictKind.UNREACHABLE)
    }
    smaller = Engine(without(found, dropped))
    for request in asked:
        before, after = engine.decide(request, NOW), smaller.decide(request, NOW)
        assert (before.action, before.encrypt) == (after.action, after.encrypt)


@given(documents, st.lists(requests, min_size=10, max_size=25))
@settings(max_examples=LONG or 40, deadline=None)
def test_what_is_claimed_holds(text: str, asked: list[Request]) -> None:
    found = parse(text)
    engine = Engine(found)
    conflicts = find_conflicts(engine, NOW)
    by_id = {rule.rule.id: rule for rule in engine.compiled}
    networks = {doc.name: doc.spec for doc in found.networks}
    nothing = {c.rule.id for c in conflicts.of(ConflictKind.VOID, ConflictKind.SHADOWED) if not c.pending}
    never = {c.rule.id for c in conflicts.of(ConflictKind.UNREACHABLE)}
    for request in asked:
        matching = {rule.rule.id for rule in engine.matching(request, NOW)[0]}
        assert not matching & never
        decision = engine.decide(request, NOW)
        if decision.action is not Action.DENY:
            assert decision.rule is not None
            assert decision.rule.id not in nothing
    for conflict in conflicts.of(ConflictKind.PARTLY_VOID, ConflictKind.PARTLY_SHADOWED):
        if "protocol" in conflict.example:
            continue  # no sentence and no written flow can name those
        request = parse_flow(conflict.example).request(networks)
        matching = {rule.rule.id for rule in engine.matching(request, NOW)[0]}
        assert by_id[conflict.by[0].id].rule.id in matching
        assert conflict.rule.id in matching
