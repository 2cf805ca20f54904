"""Finds the few rules that may match a flow, however many there are.

Each rule is filed under one key of its source and one of its destination: a label value it asks for, a label
key that must be present, a network, or a host name; the one that the fewest other rules ask for, so that
`env=prod` never becomes a crowded drawer while `app=shop-17` exists. Rules with nothing positive to ask for
are filed under EVERY. A look-up tries the keys a party has that some rule uses; behind a pair of keys, rules
for single ports lie by protocol and port.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Final

from sectool.policy.rules import CompiledRule, Facts
from sectool.policy.selector import Fqdn, Labels, Op, Selector

EVERY: Final = 0
_SPREAD: Final = 16  # port ranges up to this size are filed port by port


class _Drawer:
    """Rules of one pair of keys."""

    __slots__ = ("ports", "wide")

    def __init__(self) -> None:
        self.ports: dict[int, list[CompiledRule]] = {}
        self.wide: list[CompiledRule] = []


class _Side:
    """The keys that rules use on one side, numbered from 1."""

    def __init__(self, options: Sequence[list[list[Hashable]]]) -> None:
        """`options`: for each rule, the sets of keys it could be filed under."""
        frequency = Counter(key for alternatives in options for keys in alternatives for key in keys)
        self._numbers: dict[Hashable, int] = {}
        self.chosen: list[list[int]] = []
        for alternatives in options:
            best = min(alternatives, key=lambda keys: sum(frequency[k] for k in keys), default=[])
            numbers = [self._numbers.setdefault(key, len(self._numbers) + 1) for key in best]
            self.chosen.append(numbers or [EVERY])
        # Split by what a party has, so that a look-up asks only for what it can have.
        self.values: dict[str, dict[str, int]] = {}
        self.present: dict[str, int] = {}
        self.networks: dict[int, int] = {}
        self.names: dict[str, int] = {}
        self.below: dict[str, int] = {}
        for key, number in self._numbers.items():
            match key:
                case ("value", str(label), str(value)):
                    self.values.setdefault(label, {})[value] = number
                case ("present", str(label)):
                    self.present[label] = number
                case ("network", int(network)):
                    self.networks[network] = number
                case ("name", str(name)):
                    self.names[name] = number
                case ("below", str(name)):
                    self.below[name] = number

    def label_keys(self, labels: dict[str, str]) -> list[int]:
        out = []
        for key, value in labels.items():
            values = self.values.get(key)
            if values is not None and (number := values.get(value)) is not None:
                out.append(number)
            if (number := self.present.get(key)) is not None:
                out.append(number)
        return out

    def other_keys(self, facts: Facts) -> list[int]:
        """Keys by address and host names, and EVERY."""
        out = [EVERY]
        if self.networks:
            out.extend(self.networks[n] for n in facts.networks if n in self.networks)
        if facts.names:
            out.extend(self.names[n] for n in facts.names if n in self.names)
            if self.below:
                tails = {name[i + 1 :] for name in facts.names for i, char in enumerate(name) if char == "."}
                out.extend(self.below[t] for t in tails if t in self.below)
        return out


def _options(selector: Selector, network: int) -> list[list[Hashable]]:
    if network >= 0:
        return [[("network", network)]]
    if isinstance(selector, Fqdn):
        return [[("below" if selector.wildcard else "name", selector.name)]]
    out: list[list[Hashable]] = []
    if isinstance(selector, Labels):
        for clause in selector.clauses:
            if clause.op in (Op.EQ, Op.IN):
                out.append([("value", clause.key, value) for value in clause.values])
            elif clause.op in (Op.EXISTS, Op.PREFIX):
                out.append([("present", clause.key)])
    return out


class RuleIndex:
    """All rules, filed. `find` gives every rule that may match (and some that do not)."""

    def __init__(self, rules: Sequence[CompiledRule]) -> None:
        self.source = _Side([_options(r.sentence.source, r.source_network) for r in rules])
        self.destination = _Side([_options(r.sentence.destination, r.destination_network) for r in rules])
        self._drawers: dict[int, dict[int, _Drawer]] = {}
        for number, rule in enumerate(rules):
            ports = _ports(rule)
            for source in self.source.chosen[number]:
                row = self._drawers.setdefault(source, {})
                for destination in self.destination.chosen[number]:
                    drawer = row.setdefault(destination, _Drawer())
                    if ports is None:
                        drawer.wide.append(rule)
                    else:
                        for port in ports:
                            drawer.ports.setdefault(port, []).append(rule)

    def find(
        self, source: Sequence[int], destination: Sequence[int], protocol: int, port: int
    ) -> list[CompiledRule]:
        """Candidates for a flow between parties with these keys; each at most once, in no order."""
        out: list[CompiledRule] = []
        service = protocol << 16 | port
        for key in source:
            row = self._drawers.get(key)
            if row is None:
                continue
            for other in destination:
                drawer = row.get(other)
                if drawer is not None:
                    if drawer.wide:
                        out += drawer.wide
                    found = drawer.ports.get(service)
                    if found is not None:
                        out += found
        return out


def _ports(rule: CompiledRule) -> set[int] | None:
    """protocol << 16 | port of all ports of a rule, or None if they are too many to file one by one."""
    out: set[int] = set()
    for service in rule.sentence.services:
        if service.high - service.low >= _SPREAD:
            return None
        out.update(service.protocol << 16 | port for port in range(service.low, service.high + 1))
    return out or None
