"""What differs in effect: against written cases, and against asking for every flow of a small world."""

from __future__ import annotations

import ipaddress
import itertools
import os

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sectool.events import Action
from sectool.labels import LabelSet
from sectool.policy import Engine, Party, Request, parse
from sectool.policy.effective import Effect, Effective, effective

NOW = 1_772_330_584_000_000
WEB, DB, DEV = (
    LabelSet(labels)
    for labels in (
        {"app": "web", "env": "prod", "host": "h1"},
        {"app": "db", "env": "prod"},
        {"app": "web", "env": "dev"},
    )
)


def engine(*rules: str, kind: str = "Policy", more: str = "") -> Engine:
    lines = "".join(f"- '{rule}'\n" for rule in rules)
    text = f"kind: {kind}\nname: p\nowner: me\nrules:\n{lines}---\n" if rules else ""
    return Engine(parse(text + more))


def compare(old: Engine, new: Engine, *known: LabelSet) -> Effective:
    return effective(old, new, known or (WEB, DB, DEV), NOW)


def said(found: Effective) -> list[tuple[str, str, str, str, int]]:
    return [(str(d.effect), d.source, d.destination, d.services, d.pairs) for d in found.known]


def test_pairs_and_services_that_change() -> None:
    old = engine("allow app=web to call app=db on tcp/5432")
    new = engine("allow app=web,env=prod to call app=db on tcp/5432,tcp/22")
    found = compare(old, new)
    assert said(found) == [
        ("newly allowed", "app=web,env=prod", "app=db,env=prod", "tcp/22", 1),
        ("newly denied", "app=web,env=dev", "app=db,env=prod", "tcp/5432", 1),
    ]
    assert {d.effect for d in found.possible} == {Effect.ALLOWED, Effect.DENIED}


def test_other_words_for_the_same_are_no_difference() -> None:
    old = engine("allow app=web to call app=db on tcp/5432", "allow app=web to call app=db on tcp/22")
    new = engine("allow app in (web) to call app=db on tcp/22,tcp/5432")
    assert not compare(old, new)
    net = "kind: Network\nname: {}\ncidrs: [10.0.0.0/8]\n"
    one = engine("allow net:a to call app=db", more=net.format("a"))
    other = engine("allow net:10.0.0.0/8 to call app=db", more="")
    assert not compare(one, other)


def test_what_no_known_workload_shows() -> None:
    """Nobody has this label yet: only looking at all labels there could be finds it."""
    found = compare(engine("allow app=web to call app=db"), engine("allow app in (web,new) to call app=db"))
    assert found.known == ()
    (one,) = found.possible
    assert (one.effect, one.source, one.destination) == (Effect.ALLOWED, "app=new", "app=db")


def test_an_added_rule_under_a_guardrail_changes_nothing() -> None:
    box = "kind: Guardrail\nname: box\nowner: security\nrules: [deny env=dev to call any]\n"
    old, new = engine(more=box), engine("allow env=dev to call app=db", more=box)
    assert not compare(old, new)


def test_encryption_and_strangers() -> None:
    old = engine("allow app=web to call app=db", "allow net:10.0.0.0/8 to call app=web on tcp/443")
    new = engine("allow app=web to call app=db encrypted", "allow net:10.1.0.0/16 to call app=web on tcp/443")
    found = compare(old, new)
    effects = {(d.effect, d.source.partition(":")[0]) for d in found.known}
    assert effects == {
        (Effect.ENCRYPTED, "app=web"),
        (Effect.DENIED, "app=web"),  # ICMP cannot be encrypted
        (Effect.DENIED, "ip"),
    }


def test_network_policies() -> None:
    head = (
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec: {podSelector: {}, "
    )
    rule = "ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [%s]}]}\n"
    pods = [
        LabelSet({"k8s.ns": "default", "k8s.label.app": app, "k8s.port.http": "8080"})
        for app in ("web", "db")
    ]
    old, new = engine(more=head + rule % "{port: 80}"), engine(more=head + rule % "{port: http}")
    found = compare(old, new, *pods)
    web = "k8s.label.app=web,k8s.ns=default,k8s.port.http=8080"
    db = web.replace("web", "db")
    assert said(found) == [
        ("newly allowed", web, db, "tcp/8080", 1),
        ("newly allowed", web, web, "tcp/8080", 1),
        ("newly denied", web, db, "tcp/80", 1),
        ("newly denied", web, web, "tcp/80", 1),
    ]
    assert not compare(old, engine(more=head + rule % "{port: 80, endPort: 80}"), *pods)


RULES = [
    "allow app=web to call app=db on tcp/5432",
    "allow app=web to call app=db",
    "allow env=prod to call env=prod on tcp/1-1000",
    "deny env=dev to call env=prod",
    "deny !env to call app=db on tcp/22",
    "allow app=w* to call any on udp/53",
    "allow net:10.0.0.0/8 to call app=web on tcp/443",
    "deny net:10.1.0.0/16 to call any",
    "allow any to call app=web on tcp/443 encrypted",
    "audit any to call any on tcp/1-100",
]
LABELS = [
    LabelSet({k: v for k, v in zip(("app", "env"), values, strict=True) if v})
    for values in itertools.product(("web", "db", "wide", ""), ("prod", "dev", "qa", ""))
]
ADDRESSES = [Party(None, None, address) for address in ipaddress.ip_network("10.0.0.0/30").hosts()]
PORTS = [(6, 1), (6, 22), (6, 443), (6, 5432), (6, 9999), (17, 53), (17, 54), (1, 8), (132, 5)]

EXAMPLES = int(os.environ.get("EFFECTIVE_EXAMPLES", "15"))
chosen = st.lists(st.sampled_from(RULES), max_size=5, unique=True)


@settings(max_examples=EXAMPLES, deadline=None)
@example(
    [],
    ["allow net:10.0.0.0/8 to call app=web on tcp/443", "allow any to call app=web on tcp/443 encrypted"],
)
@given(chosen, chosen)
def test_it_finds_a_difference_exactly_where_there_is_one(first: list[str], second: list[str]) -> None:
    old, new = engine(*first), engine(*second)
    found = effective(old, new, LABELS, NOW)
    different = False
    for source, destination in itertools.product([*map(Party, LABELS), *ADDRESSES], repeat=2):
        if source.labels is None and destination.labels is None:
            continue
        for protocol, port in PORTS:
            can = protocol != 1 and source.labels is not None and destination.labels is not None
            request = Request(source, destination, protocol, port, can_encrypt=can)
            a, b = old.evaluate(request, NOW), new.evaluate(request, NOW)
            one, two = ((d.action in (Action.ALLOW, Action.AUDIT), d.encrypt) for d in (a, b))
            if one != two or (one[0] and a.action is not b.action):
                different = True
    if different:
        assert found.known
        assert found.possible
    if not found.possible:
        assert not found.known
