"""Reading NetworkPolicies: defaults, and refusals that point at the word."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.errors import DocumentError
from sectool.policy import DocumentSet, Engine, diff, parse
from sectool.policy.model import NetworkPolicyDoc

HEAD = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: shop}\n"


def read(spec: str) -> NetworkPolicyDoc:
    (doc,) = parse(f"{HEAD}spec: {spec}\n").network_policies
    return doc


@pytest.mark.parametrize(
    ("spec", "ingress", "egress"),
    [
        ("{podSelector: {}}", 0, None),
        ("{}", 0, None),
        ("{podSelector: {}, ingress: []}", 0, None),
        ("{podSelector: {}, ingress: [{}]}", 1, None),
        ("{podSelector: {}, egress: []}", 0, None),
        ("{podSelector: {}, egress: [{}]}", 0, 1),
        ("{podSelector: {}, policyTypes: [], egress: [{}]}", 0, 1),
        ("{podSelector: {}, policyTypes: [Egress]}", None, 0),
        ("{podSelector: {}, policyTypes: [Ingress], egress: [{}]}", 0, None),
        ("{podSelector: {}, policyTypes: [Egress], ingress: [{}]}", None, 0),
    ],
)
def test_policy_types_and_their_default(spec: str, ingress: int | None, egress: int | None) -> None:
    doc = read(spec)
    assert (None if doc.ingress is None else len(doc.ingress)) == ingress
    assert (None if doc.egress is None else len(doc.egress)) == egress


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        (HEAD + "spec: {podselector: {}}", "4:8", "no field 'podselector'"),
        (HEAD + "spec: {policyTypes: [ingress]}", "4:22", "no policy type 'ingress'"),
        (HEAD + "spec: {ingress: [{from: [{}]}]}", "4:26", "must say whom"),
        (HEAD + "spec: {ingress: [{to: []}]}", "4:19", "no field 'to'"),
        (HEAD + "spec: {ingress: {}}", "4:17", "must be a list"),
        (
            HEAD + "spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}",
            "4:36",
            "beside",
        ),
        (HEAD + "spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]}", "4:43", "not a network"),
        (
            HEAD + "spec: {ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
            "4:64",
            "not a part of",
        ),
        (HEAD + "spec: {ingress: [{ports: [{port: 0}]}]}", "4:34", "not a port"),
        (HEAD + "spec: {ingress: [{ports: [{port: '80'}]}]}", "4:34", "not a port"),
        (HEAD + "spec: {ingress: [{ports: [{port: 80, endPort: 79}]}]}", "4:47", "below port"),
        (HEAD + "spec: {ingress: [{ports: [{endPort: 79}]}]}", "4:37", "needs a port"),
        (HEAD + "spec: {ingress: [{ports: [{port: http, endPort: 79}]}]}", "4:49", "number, not its name"),
        (HEAD + "spec: {ingress: [{ports: [{protocol: tcp}]}]}", "4:38", "no protocol 'tcp'"),
        (HEAD + "spec: {podSelector: {matchLabels: {a: true}}}", "4:39", "not a text"),
        (HEAD + "spec: {podSelector: {matchLabels: {a: }}}", "4:39", "must be a word"),
        (
            HEAD + "spec: {podSelector: {matchExpressions: [{key: a, operator: in}]}}",
            "4:60",
            "no operator 'in'",
        ),
        (HEAD + "spec: {podSelector: {matchExpressions: [{key: a, operator: In}]}}", "4:60", "needs values"),
        (
            HEAD + "spec: {podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
            "4:60",
            "takes no values",
        ),
        (HEAD + f"spec: {{podSelector: {{matchLabels: {{{'k' * 60}: b}}}}}}", "4:36", "cannot bear"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n", "1:13", "is not known"),
        ("kind: NetworkPolicy\nmetadata: {name: x}\n", "1:1", "no 'apiVersion'"),
        ("apiVersion: networking.k8s.io/v1\nkind: Ingress\n", "2:7", "only the kind NetworkPolicy"),
        (HEAD.replace("name: p", "name: P"), "3:18", "is not a name"),
        (HEAD.replace("name: p,", "annotations: {sectool/mod: off}, name: p,"), "3:26", "no annotation"),
        (HEAD.replace("name: p,", "annotations: {sectool/mode: of}, name: p,"), "3:40", "no mode 'of'"),
        (HEAD + "---\n" + HEAD, "7:18", "exists already"),
    ],
)
def test_refusals(refused: Callable[..., DocumentError], text: str, where: str, says: str) -> None:
    error: Any = refused(lambda: parse(text, "f.yaml"))
    assert (error.where, says in str(error)) == (f"f.yaml:{where}", True), str(error)


def test_what_the_server_adds_is_read_over() -> None:
    text = HEAD.replace(
        "name: p,",
        "name: p, uid: x, resourceVersion: '7', generation: 1, creationTimestamp: null, labels: {a: b},",
    )
    assert parse(text + "spec: {podSelector: {}}\nstatus: {}\n").network_policies[0].name == "shop/p"


def test_bits_beyond_the_prefix_are_cut_off() -> None:
    doc = read("{ingress: [{from: [{ipBlock: {cidr: 10.1.2.3/16}}]}]}")
    assert doc.ingress is not None
    assert str(doc.ingress[0].peers[0].block) == str(
        read("{ingress: [{from: [{ipBlock: {cidr: 10.1.0.0/16}}]}]}").ingress[0].peers[0].block  # type: ignore[index]
    )


def test_hash_and_diff_see_every_difference() -> None:
    specs = [
        "{}",
        "{podSelector: {matchLabels: {a: b}}}",
        "{policyTypes: [Egress]}",
        "{policyTypes: [Ingress, Egress]}",
        "{ingress: [{}]}",
        "{ingress: [{from: [{podSelector: {}}]}]}",
        "{ingress: [{from: [{namespaceSelector: {}}]}]}",
        "{ingress: [{from: [{namespaceSelector: {}, podSelector: {}}]}]}",
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}]}]}",
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/9]}}]}]}",
        "{ingress: [{ports: [{}]}]}",
        "{ingress: [{ports: [{protocol: UDP}]}]}",
        "{ingress: [{ports: [{port: 80}]}]}",
        "{ingress: [{ports: [{port: http}]}]}",
        "{ingress: [{ports: [{port: 80, endPort: 90}]}]}",
    ]
    sets = [parse(f"{HEAD}spec: {spec}\n") for spec in specs]
    assert sets[6].hash == sets[7].hash  # all pods of all namespaces, either way
    assert len({s.hash for s in sets}) == len(sets) - 1
    assert [str(change.kind) for change in diff(sets[0], sets[1])] == ["NetworkPolicy"]
    assert diff(DocumentSet(), sets[2])[0].lines()[0] == "+ NetworkPolicy shop/p (owner security)"


EXAMPLE = HEAD + (
    "spec:\n  podSelector: {matchLabels: {app: db}}\n  policyTypes: [Ingress, Egress]\n  ingress:\n"
    "  - from: [{podSelector: {matchExpressions: [{key: a, operator: In, values: [b]}]}, namespaceSelector: {}}]\n"
    "    ports: [{port: 80, endPort: 90, protocol: TCP}, {port: http}]\n"
    "  egress:\n  - to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]\n"
)


PIECES = ["", "{", "}", "[", "null", "{}", "[]", "x", "-1", "'", ": ", "\n", "  ", "é", "\t"]


@settings(max_examples=int(os.environ.get("NETPOL_MUTATIONS", "150")), deadline=None)
@given(st.data())
def test_a_mutilated_document_is_refused_with_its_place_or_read(data: st.DataObject) -> None:
    text = EXAMPLE
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 12))
        put = data.draw(st.sampled_from(PIECES))
        text = text[:at] + put + text[at + cut :]
    try:
        found = parse(text, "f.yaml")
    except DocumentError as error:
        assert error.where.startswith("f.yaml:")
        return
    assert parse(found.text).hash == found.hash
    Engine(found)
