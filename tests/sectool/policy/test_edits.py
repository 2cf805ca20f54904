"""Promoting staged documents rewrites one word and nothing else."""

from __future__ import annotations

import pytest

from sectool.errors import UsageError
from sectool.policy import Mode, parse
from sectool.policy.edits import choose, promoted, staged

TEXT = """# the shop
kind: Policy
name: shop
owner: team-shop
mode: 'stage'   # until Friday
rules: [allow app=web to call app=db]
---
{kind: Guardrail, name: shop, owner: security, mode: stage, rules: [deny env=dev to call env=prod]}
---
kind: Policy
name: later
owner: team-shop
rules:
- allow app=x to call app=y   # mode: stage
mode: stage
"""


def test_only_the_mode_of_what_is_chosen_changes() -> None:
    documents = parse(TEXT)
    text = promoted(documents, choose(documents, ["Policy/shop", "later"]))
    assert text == TEXT.replace("mode: 'stage'   #", "mode: enforce   #").replace(
        "\nmode: stage\n", "\nmode: enforce\n"
    )
    after = parse(text)
    assert [(d.kind.value, d.name) for d in staged(after)] == [("Guardrail", "shop")]
    assert all(d.mode is Mode.ENFORCE for d in after.policies)


def test_files_stay_files() -> None:
    documents = parse(
        '--- # file: "a.yaml"\n'
        + TEXT
        + '--- # file: "b.yaml"\nkind: Network\nname: n\ncidrs: [10.0.0.0/8]\n'
    )
    after = parse(promoted(documents, choose(documents, ["later"])))
    assert [name for name, _ in after.sources] == ["a.yaml", "b.yaml"]


@pytest.mark.parametrize(
    ("name", "says", "hint"),
    [
        ("shop", "staged as Guardrail and as Policy", "Guardrail/shop or Policy/shop"),
        (
            "lter",
            "no staged document is named 'lter'",
            "staged is: Guardrail/shop, Policy/later, Policy/shop",
        ),
    ],
)
def test_names_that_do_not_say_which(name: str, says: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(parse(TEXT), [name])
    assert says in caught.value.message
    assert hint in caught.value.hint


PODS = """apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop, annotations: {sectool/mode: stage}}   # soon
spec: {podSelector: {}, ingress: [{}]}
---
"""


@pytest.mark.parametrize("name", ["shop/db", "NetworkPolicy/shop/db"])
def test_network_policies_of_kubernetes_are_promoted_by_their_annotation(name: str) -> None:
    documents = parse(PODS + PODS.replace("name: db", "name: web"))
    text = promoted(documents, choose(documents, [name]))
    assert text == PODS.replace("sectool/mode: stage", "sectool/mode: enforce") + PODS.replace(
        "name: db", "name: web"
    )
    assert [d.name for d in staged(parse(text))] == ["shop/web"]
