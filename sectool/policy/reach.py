"""What a party could reach, in as many steps as it takes: the blast radius of whoever controls it.

Every step is judged by the engine that enforces. Networks end a path: what happens behind them is not known here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sectool.events import Action
from sectool.labels import LabelError, LabelSet
from sectool.policy.engine import Engine
from sectool.policy.flow import sample
from sectool.policy.model import DocumentSet
from sectool.policy.request import Party, Request
from sectool.policy.selector import Labels, Op
from sectool.policy.service import ICMP, ICMP6, Service, describe

MAX_JUDGED = 60_000  # decisions; what is beyond is said to be left out
MAX_SERVICES = 48


@dataclass(frozen=True, slots=True)
class Reached:
    """One party that can be reached: in how many steps, called by whom, on which services."""

    name: str
    hops: int
    via: str
    services: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Radius:
    """All that can be reached. Not `complete` when there was too much to judge."""

    reached: tuple[Reached, ...]
    complete: bool
    judged: int


def services_of(documents: DocumentSet, seen: Iterable[Service] = ()) -> list[Service]:
    """One service for each that the rules open or that was `seen`: a range stands as its first port."""
    found: dict[tuple[int, int, int], Service] = {}
    rules = [rule.sentence for doc in (*documents.guardrails, *documents.policies) for rule in doc.rules]
    for service in (*seen, *(s for sentence in rules for s in sentence.services)):
        one = Service(service.protocol, service.low, service.low, service.code)
        found.setdefault((one.protocol, one.low, one.code or 0), one)
    if any(not sentence.services for sentence in rules) or not found:
        found.setdefault(
            (6, 1, 0), Service(6, 1, 1)
        )  # a rule for everything opens some port that nobody names
    return list(found.values())[:MAX_SERVICES]


def named_parties(documents: DocumentSet, domain: str = "") -> list[LabelSet]:
    """A party for each selector of the rules, with the least labels it asks for: whom rules speak of, seen or not.

    `domain` is the trust domain they are taken to be of, unless the selector names one.
    """
    out: dict[LabelSet, None] = {}
    for doc in (*documents.guardrails, *documents.policies):
        for rule in doc.rules:
            for selector in (rule.sentence.source, rule.sentence.destination):
                if not isinstance(selector, Labels):
                    continue
                labels = {c.key: c.values[0] for c in selector.clauses if c.op in (Op.EQ, Op.IN)}
                if not labels:
                    continue
                if domain:
                    labels.setdefault("domain", domain)
                try:
                    party = LabelSet(labels)
                except LabelError:
                    continue
                if all(clause.holds(party) for clause in selector.clauses):
                    out[party] = None
    return list(out)


def reach(
    engine: Engine, start: LabelSet, known: Iterable[LabelSet], services: Sequence[Service], now_us: int
) -> Radius:
    """What `start` can call, and what those can call in turn, among `known` label sets and the policy's networks."""
    workloads = [Party(labels) for labels in dict.fromkeys(known) if labels != start]
    networks = [
        (f"net:{doc.name}", Party(address=address))
        for doc in engine.documents.networks
        if (address := sample(doc.spec)) is not None
    ]
    left = {id(party): party for party in workloads}
    waiting: deque[tuple[Party, str, int]] = deque([(Party(start), _name(start), 0)])
    out: list[Reached] = []
    ended: set[str] = set()
    judged = 0
    while waiting:
        source, name, hops = waiting.popleft()
        targets = [(_name(p.labels), p) for p in left.values()] + [n for n in networks if n[0] not in ended]
        for target, party in targets:
            if judged + len(services) > MAX_JUDGED:
                return Radius(tuple(out), False, judged)
            judged += len(services)
            opened = [s for s in services if _allowed(engine, source, party, s, now_us)]
            if not opened:
                continue
            words = tuple(describe(s.protocol, s.low, s.code or 0) for s in opened)
            out.append(Reached(target, hops + 1, name, words))
            if party.labels is None:
                ended.add(target)
            else:
                del left[id(party)]
                waiting.append((party, target, hops + 1))
    return Radius(tuple(out), True, judged)


def _allowed(engine: Engine, source: Party, destination: Party, service: Service, now_us: int) -> bool:
    if destination.labels is None and service.protocol in (ICMP, ICMP6):
        return False  # of no use to whoever wants further
    code = service.code or 0
    request = Request(
        source, destination, service.protocol, service.low, code, destination.labels is not None
    )
    return engine.evaluate(request, now_us).action in (Action.ALLOW, Action.AUDIT)


def _name(labels: LabelSet | None) -> str:
    return str(labels) if labels else "(no labels)"
