"""A suggestion as text: staged policies with their evidence as comments, the networks they name, and tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address

from sectool.labels import LabelSet
from sectool.policy.flow import FlowSpec, PartySpec
from sectool.policy.model import DocumentSet, NetworkDoc
from sectool.policy.selector import Labels
from sectool.policy.service import Service
from sectool.policy.suggest import Observation, Suggested, Suggestion

_WIDTH = 110


def render(suggestion: Suggestion, base: DocumentSet, owner: str) -> str:
    """YAML for `sectool policy test` and `apply`. The same suggestion gives the same text."""
    out = list(_header(suggestion))
    taken = {d.name for d in base.policies}
    taken_tests = {d.name for d in base.tests}
    for network in suggestion.networks:
        out += ["---", *_network(network, owner)]
    for called, rules in _by_called(suggestion.rules):
        name = _free(f"calls to {called}", taken)
        out += ["---", "kind: Policy", f"name: {name}", f"owner: {_quoted(owner)}", "mode: stage", "rules:"]
        for rule in rules:
            out += [f"  # {line}" for line in evidence(rule)]
            out.append(f"  - {_quoted(str(rule.sentence))}")
        test = _free(f"{name} as seen", taken_tests)
        out += ["---", "kind: Test", f"name: {_quoted(test)}", "mode: stage", "allow:"]
        flows = dict.fromkeys(written(example) for rule in rules for example in rule.examples[:2])
        out += [f"  - {_quoted(flow)}" for flow in flows]
    return "\n".join(out) + "\n"


def _header(suggestion: Suggestion) -> Iterator[str]:
    if not suggestion.rules:
        yield "# Nothing to suggest: there is no flow that the policy does not allow already."
    else:
        yield (
            f"# Suggested from {suggestion.flows} flows of {moment(suggestion.first)} to "
            f"{moment(suggestion.last)}: {len(suggestion.rules)} rules."
        )
        yield "# Staged: apply it beside the policy in force, look at what it would change, then set mode: enforce."
    if suggestion.left_out:
        yield "# Left out:"
        for why, flows in suggestion.left_out.items():
            yield f"#   {flows} flows: {why}"


def evidence(rule: Suggested) -> list[str]:
    """What a rule rests on, and where it is wider than that."""
    seen = rule.evidence
    out = [f"{seen.flows} flows from {moment(seen.first)} to {moment(seen.last)}"]
    if rule.covered > rule.pairs:
        out[0] += f"; {rule.pairs} of the {rule.covered} pairs it lets talk were seen"
    elif rule.pairs > 1:
        out[0] += f"; all {rule.pairs} pairs it lets talk were seen"
    out += [f"wider than seen: {note}" for note in rule.wider]
    return out


def moment(us: int) -> str:
    """A UTC time to the minute."""
    return datetime.fromtimestamp(us / 1e6, UTC).strftime("%Y-%m-%dT%H:%MZ")


def written(one: Observation) -> str:
    """A flow as Test documents write it."""
    return str(
        FlowSpec(
            _spec(one.source),
            _spec(one.destination),
            Service(one.protocol, one.port, one.port),
            one.encrypted,
        )
    )


def _spec(party: LabelSet | IPv4Address | IPv6Address) -> PartySpec:
    return PartySpec(labels=party) if isinstance(party, LabelSet) else PartySpec(address=party)


def _by_called(rules: Sequence[Suggested]) -> list[tuple[str, list[Suggested]]]:
    out: dict[str, list[Suggested]] = {}
    for rule in rules:
        out.setdefault(_called(rule), []).append(rule)
    return sorted(out.items())


def _called(rule: Suggested) -> str:
    """Who is called, in a word: the value of the first label asked for."""
    side = rule.sentence.destination
    if not isinstance(side, Labels):
        return "networks" if str(side) != "any" else "anyone"
    clause = side.clauses[0]
    words = clause.values[:2] if clause.values else (clause.key,)
    text = " ".join("".join(c if c.isalnum() or c in "._-" else "-" for c in word) for word in words)
    return text[:40].strip(" ._-") or "others"


def _free(name: str, taken: set[str]) -> str:
    number, out = 1, name
    while out in taken:
        number += 1
        out = f"{name} {number}"
    taken.add(out)
    return out


def _network(doc: NetworkDoc, owner: str) -> Iterator[str]:
    yield "kind: Network"
    yield f"name: {doc.name}"
    yield f"owner: {_quoted(owner)}"
    for field, nets in (("cidrs", doc.spec.cidrs), ("except", doc.spec.excepts)):
        if nets:
            yield f"{field}:"
            yield from (f"  - {_quoted(str(net))}" for net in nets)


def _quoted(text: str) -> str:
    """A YAML scalar: quoted where its signs would mean something else."""
    plain = all(c.isalnum() or c in " .,=_-()/" for c in text) and text[:1].isalpha() and text == text.strip()
    return text if plain else "'" + text.replace("'", "''") + "'"
