"""Whom rules mean: those that let pass speak of our own trust domain unless they say another."""

from __future__ import annotations

import pytest

from sectool.events import Action
from sectool.labels import LabelSet
from sectool.policy import Engine, parse
from sectool.policy.explanation import explain
from sectool.policy.request import Party, Request

OURS = {"domain": "ours.example"}
THEIRS = {"domain": "partner.example", "federated": "true"}
NOW = 1_800_000_000_000_000


def engine(*rules: str, kind: str = "Policy") -> Engine:
    lines = "\n".join(f"  - {rule}" for rule in rules)
    return Engine(parse(f"kind: {kind}\nname: p\nowner: o\nrules:\n{lines}\n"))


def request(source: dict[str, str], destination: dict[str, str]) -> Request:
    return Request(Party(LabelSet(source)), Party(LabelSet(destination)), 6, 443, can_encrypt=True)


WEB, DB = {"app": "web"}, {"app": "db"}


@pytest.mark.parametrize(
    ("rule", "ours", "theirs"),
    [
        ("allow app=web to call app=db", True, False),
        ("audit app=web to call app=db", True, False),
        ("allow app!=batch to call app=db", True, False),
        ("allow !legacy to call app=db", True, False),
        ("allow app to call app=db", True, False),
        ("allow domain=partner.example,app=web to call app=db", False, True),
        ("allow domain in (partner.example,ours.example),app=web to call app=db", True, True),
        ("allow domain!=ours.example to call app=db", False, True),
        ("allow federated to call app=db", False, True),
        ("allow any to call app=db", True, True),
    ],
)
def test_who_may_call(rule: str, ours: bool, theirs: bool) -> None:
    judge = engine(rule)
    found = [
        judge.decide(request({**WEB, **domain}, {**DB, **OURS}), NOW).action is not Action.DENY
        for domain in (OURS, THEIRS)
    ]
    assert found == [ours, theirs]


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        ("allow app=web to call app=db", False),
        ("allow app=web to call domain=partner.example,app=db", True),
        ("allow app=web to call !legacy", False),
    ],
)
def test_who_may_be_called(rule: str, allowed: bool) -> None:
    action = engine(rule).decide(request({**WEB, **OURS}, {**DB, **THEIRS}), NOW).action
    assert (action is Action.ALLOW) is allowed


@pytest.mark.parametrize("rule", ["deny app=web to call app=db", "deny !vetted to call app=db"])
def test_what_denies_speaks_of_everybody(rule: str) -> None:
    judge = Engine(
        parse(
            "kind: Policy\nname: p\nowner: o\nrules:\n  - allow domain=partner.example to call app=db\n"
            f"---\nkind: Guardrail\nname: g\nowner: s\nrules:\n  - {rule}\n"
        )
    )
    assert judge.decide(request({**WEB, **THEIRS}, {**DB, **OURS}), NOW).action is Action.DENY


def test_an_explanation_says_what_is_missing_and_proposes_it() -> None:
    judge = engine("allow app=web to call app=db")
    asked = request({**WEB, **THEIRS}, {**DB, **OURS})
    told = explain(judge, asked, NOW)
    (miss,) = told.near[0].misses
    assert (miss.part, miss.clause) == ("source", "app=web")
    assert "trust domain partner.example" in miss.found
    assert told.sentence == "allow domain=partner.example,app=web to call app=db on tcp/443"
    assert engine(told.sentence).decide(asked, NOW).action is Action.ALLOW
