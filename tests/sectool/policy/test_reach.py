"""Blast radius: step by step, never more than the engine allows, and all of it."""

from __future__ import annotations

import pytest

from sectool.labels import LabelSet
from sectool.policy import DocumentSet, Engine, parse
from sectool.policy import reach as reaching
from sectool.policy.reach import named_parties, reach, services_of
from sectool.policy.service import Service

TEXT = """
kind: Policy
name: shop
owner: t
rules:
  - allow app=web to call app=api on tcp/8080
  - allow app=api to call app=db on tcp/5432,tcp/5433
  - allow app=db to call net:backup on tcp/22
  - allow app=batch to call app=db on tcp/5432
---
kind: Guardrail
name: box
owner: t
rules:
  - deny app=api to call app=db on tcp/5433
---
kind: Network
name: backup
owner: t
cidrs: [192.0.2.0/24]
"""
KNOWN = [LabelSet({"app": name}) for name in ("web", "api", "db", "batch", "web")]


def test_steps_are_followed_to_the_end() -> None:
    documents = parse(TEXT)
    radius = reach(Engine(documents), KNOWN[0], KNOWN, services_of(documents), 0)
    assert radius.complete
    assert [(r.name, r.hops, r.via, r.services) for r in radius.reached] == [
        ("app=api", 1, "app=web", ("tcp/8080",)),
        ("app=db", 2, "app=api", ("tcp/5432",)),
        ("net:backup", 3, "app=db", ("tcp/22",)),
    ]


def test_nobody_and_nothing() -> None:
    documents = parse(TEXT)
    assert reach(Engine(documents), LabelSet({}), KNOWN, services_of(documents), 0).reached == ()
    assert reach(Engine(DocumentSet()), KNOWN[0], KNOWN, services_of(DocumentSet()), 0).reached == ()


def test_what_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = parse(TEXT)
    monkeypatch.setattr(reaching, "MAX_JUDGED", 5)
    assert not reach(Engine(documents), KNOWN[0], KNOWN, services_of(documents), 0).complete


def test_services_that_were_seen_count_too() -> None:
    documents = parse("kind: Policy\nname: all\nowner: t\nrules:\n  - allow app=web to call app=db\n")
    radius = reach(Engine(documents), KNOWN[0], KNOWN, services_of(documents, [Service(17, 53, 53)]), 0)
    assert [r.services for r in radius.reached] == [("udp/53", "tcp/1")]


def test_whom_rules_speak_of_is_tried_unseen() -> None:
    documents = parse(TEXT)
    assert [str(p) for p in named_parties(documents)] == ["app=api", "app=db", "app=web", "app=batch"]
    elsewhere = named_parties(documents, "lab.example")
    assert {p["domain"] for p in elsewhere} == {"lab.example"}
    radius = reach(Engine(documents), KNOWN[0], named_parties(documents), services_of(documents), 0)
    assert [r.name for r in radius.reached] == ["app=api", "app=db", "net:backup"]
