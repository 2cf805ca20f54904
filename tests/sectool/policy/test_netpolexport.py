"""Intents as NetworkPolicies: what is written means the same, to this engine and to the other evaluator."""

from __future__ import annotations

import os
import random

import pytest
import yaml

from sectool.events import Action
from sectool.policy import Engine, Request, parse
from sectool.policy.netpolexport import export
from tests.sectool.policy.netpolreference import End, allowed
from tests.sectool.policy.test_netpol import NOW, party, pod

CASES = int(os.environ.get("NETPOL_CASES", "2000"))


def policy(*rules: str, kind: str = "Policy", more: str = "") -> str:
    lines = "".join(f"- '{rule}'\n" for rule in rules)
    return f"kind: {kind}\nname: Shop Rules\nowner: me\nrules:\n{lines}---\n{more}"


def test_a_rule_between_pods_is_two_policies() -> None:
    found = export(
        parse(
            policy(
                "allow k8s.ns=shop,k8s.label.app=web to call k8s.ns=data,k8s.label.app=db on tcp/5432-5440"
            )
        )
    )
    assert not found.left_out
    assert [(d["metadata"]["namespace"], d["metadata"]["name"]) for d in found.documents] == [
        ("data", "isolate-all"),
        ("shop", "isolate-all"),
        ("data", "shop-rules-1"),
        ("shop", "shop-rules-1"),
    ]
    ingress = found.documents[2]["spec"]
    assert ingress == {
        "podSelector": {"matchLabels": {"app": "db"}},
        "policyTypes": ["Ingress"],
        "ingress": [
            {
                "from": [
                    {
                        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}},
                        "podSelector": {"matchLabels": {"app": "web"}},
                    }
                ],
                "ports": [{"protocol": "TCP", "port": 5432, "endPort": 5440}],
            }
        ],
    }


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("deny k8s.ns=a to call k8s.ns=b", "only allow"),
        ("audit k8s.ns=a to call k8s.ns=b", "only allow"),
        ("allow k8s.ns=a to call k8s.ns=b encrypted", "'encrypted'"),
        ("allow k8s.ns=a to call k8s.ns=b where source.x = destination.x", "'where'"),
        ("allow k8s.ns=a to call k8s.ns=b until 2030-01-01", "'until'"),
        ("allow k8s.ns=a to call k8s.ns=b on icmp", "no ICMP"),
        ("allow k8s.ns=a to call fqdn:example.com", "no host names"),
        ("allow k8s.ns=a,k8s.label.app=web* to call k8s.ns=b", "no prefixes"),
        ("allow k8s.label.app=web to call k8s.ns=b", "names none"),
        ("allow k8s.ns=a,k8s.nslabel.team=x to call k8s.ns=b", "not by its labels"),
        ("allow app=web to call k8s.ns=b", "no label of a pod"),
        ("allow net:10.0.0.0/8 to call net:192.0.2.0/24", "neither end is a pod"),
        ("allow any to call any", "names a namespace"),
    ],
)
def test_what_cannot_be_said(rule: str, why: str) -> None:
    found = export(parse(policy(rule)))
    assert not found.documents
    (one,) = found.left_out
    assert why in one.why
    assert one.rule == rule


SIDES = [
    "k8s.ns=shop",
    "k8s.ns in (shop,ops),k8s.label.app=a",
    "k8s.ns=shop,k8s.label.app in (a,b),!k8s.label.tier",
    "k8s.ns=ops,k8s.label.app notin (a,c)",
    "k8s.ns=ops,k8s.label.tier",
    "k8s.ns=shop,k8s.label.app!=b",
    "any",
    "net:192.0.2.0/24",
    "net:corner",
]
NETWORK = "kind: Network\nname: corner\ncidrs: [192.0.2.0/24, 198.51.100.0/24]\nexcept: [192.0.2.128/25]\n"
SERVICES = ["", " on tcp/80", " on tcp/80-90,udp/53", " on udp", " on tcp"]


def test_it_means_the_same() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    allowed_at_all = 0
    for _ in range(CASES // 100):
        rules = {
            f"allow {rng.choice(SIDES)} to call {rng.choice(SIDES)}{rng.choice(SERVICES)}"
            for _ in range(rng.randint(1, 4))
        }
        rules = {r for r in rules if r.count("net:") < 2} or {"allow any to call any"}
        documents = parse(policy(*sorted(rules), more=NETWORK))
        found = export(documents)
        assert bool(found.documents) is not bool(found.left_out)
        if not found.documents:
            continue
        spaces = {d["metadata"]["namespace"] for d in found.documents}
        text = yaml.safe_dump_all(map(dict, found.documents))
        ours, theirs = Engine(documents), Engine(parse(text))
        loaded = list(yaml.safe_load_all(text))
        for _ in range(100):
            ends = []
            for _ in range(2):
                if spaces and rng.random() < 0.8:
                    labels = ",".join(
                        f"{k}={rng.choice('abc')}" for k in ("app", "tier") if rng.random() < 0.6
                    )
                    ends.append(pod(rng.choice(sorted(spaces)), labels, address="10.9.0.1"))
                else:
                    ends.append(End(rng.choice(["192.0.2.1", "192.0.2.200", "198.51.100.3", "203.0.113.9"])))
            if all(end.namespace is None for end in ends):
                continue
            protocol, port = rng.choice(["TCP", "UDP"]), rng.choice([53, 80, 85, 443])
            request = Request(party(ends[0]), party(ends[1]), {"TCP": 6, "UDP": 17}[protocol], port)
            expected = ours.evaluate(request, NOW).action is Action.ALLOW
            context = f"seed {seed}\n{sorted(rules)}\n{text}\n{ends} {protocol}/{port}"
            assert (theirs.evaluate(request, NOW).action is Action.ALLOW) is expected, context
            assert allowed(loaded, ends[0], ends[1], protocol, port) is expected, context
            allowed_at_all += expected
    assert allowed_at_all > CASES // 50
