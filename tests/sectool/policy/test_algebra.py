"""Regions against the engine's own matching: overlap, difference, emptiness and examples."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sectool.policy import Engine, Request, parse
from sectool.policy.algebra import ADDRESSES, SIX, Region, Regions, parties_of
from sectool.policy.network import NetworkSpec
from sectool.policy.rules import CompiledRule
from sectool.policy.selector import Fqdn
from sectool.policy.witness import witness
from tests.sectool.policy.worlds import NETWORKS, requests, sentences

NOW = 1_780_000_000_000_000


def rules(*texts: str) -> tuple[Engine, list[CompiledRule], list[Region | None]]:
    """An engine of these rules, the rules in order of the texts, and their regions."""
    body = "".join(
        f"kind: Policy\nname: p{n}\nowner: o\nrules:\n- {text}\n---\n" for n, text in enumerate(texts)
    )
    documents = parse(NETWORKS + body)
    engine = Engine(documents)
    regions = Regions({doc.name: doc.spec for doc in documents.networks})
    ordered = [next(r for r in engine.compiled if r.rule.policy == f"p{n}") for n in range(len(texts))]
    return engine, ordered, [regions.of(rule.sentence) for rule in ordered]


def matches(engine: Engine, rule: CompiledRule, request: Request) -> bool:
    return rule in engine.matching(request, NOW)[0]


@given(sentences("allow"), sentences("allow"), requests)
@settings(max_examples=120, deadline=None)
def test_regions_are_what_the_engine_matches(one: str, other: str, request: Request) -> None:
    engine, (a, b), (x, y) = rules(one, other)
    in_a, in_b = matches(engine, a, request), matches(engine, b, request)
    if x is None:
        assert not in_a
        return
    common = x.meet(y) if y is not None else None
    if common is None:
        assert not (in_a and in_b)
    found = witness(x, NOW)
    if found is None:
        assert x.conditions  # for sets there is always an example
    else:
        assert matches(engine, a, found.request)
    if common is not None:
        found = witness(common, NOW)
        assert found is not None or common.conditions
        if found is not None:
            assert matches(engine, a, found.request)
            assert matches(engine, b, found.request)


@given(sentences("allow"), sentences("allow"), requests)
@settings(max_examples=120, deadline=None)
def test_what_is_left_is_outside_the_other_and_nothing_is_lost(
    one: str, other: str, request: Request
) -> None:
    engine, (a, b), (x, y) = rules(one, other)
    assume(x is not None and y is not None and x.subtractable(y))
    assert x is not None
    assert y is not None
    pieces = list(x.minus(y))
    assert (not pieces) == x.within(y)
    for piece in pieces:
        found = witness(piece, NOW)
        assert found is not None or piece.conditions
        if found is not None:
            assert matches(engine, a, found.request)
            assert not matches(engine, b, found.request)
    if not pieces:
        assert matches(engine, b, request) or not matches(engine, a, request)


@given(st.sampled_from(("a.x", "*.x", "*.a.x", "b.a.x")), st.sampled_from(("a.x", "*.x", "*.a.x", "*.y")))
def test_names(must: str, never: str) -> None:
    def pattern(text: str) -> Fqdn:
        return Fqdn(text.removeprefix("*."), text.startswith("*."))

    one, other = parties_of(pattern(must), {}), parties_of(pattern(never), {})
    assert one is not None
    assert other is not None
    left = list(one.minus(other))
    covered = {("a.x", "a.x"), ("a.x", "*.x"), ("*.x", "*.x"), ("*.a.x", "*.x"), ("*.a.x", "*.a.x")}
    covered |= {("b.a.x", "*.x"), ("b.a.x", "*.a.x")}
    assert (not left) == ((must, never) in covered)


def test_addresses_end_where_versions_do() -> None:
    import ipaddress

    whole = NetworkSpec((ipaddress.ip_network("::/0"), ipaddress.ip_network("0.0.0.0/0")))
    from sectool.policy.selector import NamedNet

    found = parties_of(NamedNet("all"), {"all": whole})
    assert found is not None
    assert found.addresses == ADDRESSES
    mapped = SIX + int(ipaddress.ip_address("::ffff:10.0.0.1"))
    assert not any(low <= mapped <= high for low, high in ADDRESSES)
