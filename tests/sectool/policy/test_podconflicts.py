"""NetworkPolicies of which other rules take something: each way a pod may be labelled, and what is not claimed."""

from __future__ import annotations

import pytest

from sectool.policy import Engine, parse
from sectool.policy.conflicts import Conflict, ConflictKind, find_conflicts

NOW = 1_772_330_584_000_000
POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: web, namespace: shop, annotations: {{sectool/owner: team-shop{more}}}}}
spec:
  podSelector: {{matchLabels: {{app: web}}}}
  policyTypes: [Ingress, Egress]
  {rules}
"""
FROM_SHOP = "ingress: [{from: [{podSelector: {matchLabels: {tier: front}}}], ports: [{port: 80}]}]"


def told(
    rule: str, net: str = FROM_SHOP, kind: str = "Guardrail", owner: str = "security", more: str = ""
) -> list[Conflict]:
    own = f"kind: {kind}\nname: own\nowner: {owner}\nrules: ['{rule}']\n---\n"
    engine = Engine(parse(own + POLICY.format(rules=net, more=more)))
    found = [c for c in find_conflicts(engine, NOW).found if c.rule.kind == "NetworkPolicy"]
    for conflict in found:
        assert conflict.by[0].kind == kind
        assert conflict.example
    return found


@pytest.mark.parametrize(
    ("rule", "net"),
    [
        ("deny any to call any on tcp/80", FROM_SHOP),
        ("deny any to call k8s.ns=shop,app=web", FROM_SHOP),
        ("deny any to call k8s.namespace=shop,k8s.label.app=web", FROM_SHOP),
        ("deny k8s.label.tier=front to call any", FROM_SHOP),
        ("deny tier in (front,back) to call any on tcp/1-100", FROM_SHOP),
        ("deny net:10.1.0.0/16 to call any", "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}]}]"),
        ("deny any to call k8s.ns=kube-system", "egress: [{to: [{namespaceSelector: {}}]}]"),
        (
            "deny any to call k8s.nslabel.team=ops",
            "egress: [{to: [{namespaceSelector: {matchLabels: {team: ops}}, podSelector: {}}]}]",
        ),
        ("deny any to call any on icmp", "egress: [{}]"),
    ],
)
def test_a_guardrail_that_takes_part_is_told_of(rule: str, net: str) -> None:
    (conflict,) = told(rule, net)
    assert conflict.kind is ConflictKind.PARTLY_VOID
    assert conflict.owners == ("team-shop", "security")


@pytest.mark.parametrize(
    ("rule", "net"),
    [
        ("deny any to call any on tcp/81", FROM_SHOP),
        ("deny any to call k8s.ns=other", FROM_SHOP),
        ("deny any to call k8s.namespace=shop,k8s.label.app=db", FROM_SHOP),
        ("deny k8s.ns=other to call any", FROM_SHOP),
        ("deny domain=partner.example,federated=true to call any", FROM_SHOP),
        (
            "deny net:10.1.0.0/16 to call any",
            "ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]}]",
        ),
        ("deny any to call any on icmp", "egress: [{ports: [{port: 80}]}]"),
        ("deny any to call any on tcp/80", "ingress: [{ports: [{port: http}]}]"),  # not known which that is
    ],
)
def test_what_does_not_overlap_is_not(rule: str, net: str) -> None:
    assert told(rule, net) == []


def test_another_owners_denial_and_ones_own() -> None:
    (conflict,) = told("deny any to call any on tcp/80", kind="Policy")
    assert conflict.kind is ConflictKind.PARTLY_SHADOWED
    assert told("deny any to call any on tcp/80", kind="Policy", owner="team-shop") == []


def test_staged_ones_are_pending() -> None:
    (conflict,) = told("deny any to call any", more=", sectool/mode: stage")
    assert conflict.pending
