"""A made-up world for `suggest`: a fleet, the policy that holds in it, and the traffic that it lets through.

Every draw of the random numbers is another world: other applications, teams, environments, hosts and rules.
"""

from __future__ import annotations

import ipaddress
import random
from dataclasses import dataclass, field

from sectool.events import Action
from sectool.labels import LabelSet
from sectool.policy import DocumentSet, Engine, Party, Request, parse
from sectool.policy.network import IPAddress
from sectool.policy.suggest import Observation

T0 = 1_772_330_584_000_000  # 2026-03-01T02:03:04Z
End = LabelSet | IPAddress


@dataclass
class World:
    """A fleet and its true policy. `calls` are all legitimate calls, each with how often it happens."""

    members: list[LabelSet]
    documents: DocumentSet
    outside: list[IPAddress]  # addresses, legitimate or not, to count pairs by
    ports: list[tuple[int, int]]  # protocol, port
    calls: list[tuple[End, End, int, int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def draw(self, rng: random.Random, count: int) -> list[tuple[End, End, int, int]]:
        """Legitimate flows, as often as they happen."""
        return rng.choices(self.calls, self.weights, k=count)


def request(call: tuple[End, End, int, int]) -> Request:
    source, destination, protocol, port = call
    return Request(_party(source), _party(destination), protocol, port, can_encrypt=True)


def _party(end: End) -> Party:
    return Party(end) if isinstance(end, LabelSet) else Party(None, None, end)


def make_world(rng: random.Random) -> World:
    """A world: 6 to 14 applications in 2 or 3 environments."""
    environments = rng.sample(["prod", "staging", "dev", "test"], rng.choice([2, 2, 3]))
    teams = ["red", "blue", "green"]
    hosts = [f"host{n}" for n in range(rng.randint(5, 12))]
    apps = [f"app{n}" for n in range(rng.randint(6, 14))]
    team = {app: rng.choice(teams) for app in apps}
    tier = {app: rng.choice(["front", "middle", "back"]) for app in apps}
    members: list[LabelSet] = []
    for env in environments:
        for app in apps:
            for _ in range(rng.randint(2, 5)):
                labels = {
                    "app": app,
                    "env": env,
                    "team": team[app],
                    "tier": tier[app],
                    "exe": f"/usr/bin/{app}".rsplit("/", 1)[1],
                    "host": rng.choice(hosts),
                    "version": rng.choice(["1.0", "1.1"]),
                }
                members.append(LabelSet(labels))
    members = sorted(set(members), key=str)
    rules, nets = _rules(rng, apps, environments, teams)
    text = "kind: Policy\nname: truth\nowner: nobody\nrules:\n" + "".join(f"- '{rule}'\n" for rule in rules)
    documents = parse(text)
    outside: list[IPAddress] = []
    for net in [*nets, "10.0.0.0/8", "192.0.2.0/24", "198.18.0.0/15", "172.16.0.0/12"]:
        inside = ipaddress.ip_network(net)
        outside += [inside[rng.randrange(inside.num_addresses)] for _ in range(6)]
    world = World(members, documents, outside, _ports(documents, rng))
    _fill(world, rng)
    return world


def _rules(
    rng: random.Random, apps: list[str], environments: list[str], teams: list[str]
) -> tuple[list[str], list[str]]:
    rules: set[str] = set()
    nets: list[str] = []
    for number in range(rng.randint(8, 16)):
        a, b = rng.choice(apps), rng.choice(apps)
        port = rng.choice([443, 5432, 6379, 8080, 9000 + number])
        env = rng.choice(environments)
        match rng.randrange(8):
            case 0 | 1:
                for one in environments:
                    rules.add(f"allow app={a},env={one} to call app={b},env={one} on tcp/{port}")
            case 2:
                rules.add(f"allow app={a},env={env} to call app={b},env={env} on tcp/{port}")
            case 3:
                rules.add(
                    f"allow team={rng.choice(teams)},env={env} to call app={b},env={env} on tcp/{port},udp/{port}"
                )
            case 4:
                rules.add(f"allow app to call app={b} on udp/53")
            case 5:
                net = (
                    f"10.{rng.randrange(100)}.0.0/16"
                    if rng.random() < 0.5
                    else f"172.20.{rng.randrange(200)}.0/24"
                )
                nets.append(net)
                rules.add(f"allow net:{net} to call app={b},env={env} on tcp/443")
            case 6:
                net = f"198.18.{rng.randrange(200)}.0/24"
                nets.append(net)
                rules.add(f"allow app={a} to call net:{net} on tcp/443")
            case 7:
                low = rng.choice([7000, 20000])
                rules.add(f"allow app={a},env={env} to call app={b},env={env} on tcp/{low}-{low + 59}")
    return sorted(rules), nets


def _ports(documents: DocumentSet, rng: random.Random) -> list[tuple[int, int]]:
    out = {(6, 22), (6, 443), (17, 53), (6, 6999), (6, 7060)}
    for rule in documents.policies[0].rules:
        for service in rule.sentence.services:
            out.add((service.protocol, service.low))
            out.add((service.protocol, service.high))
            out.add((service.protocol, rng.randint(service.low, service.high)))
    return sorted(out)


def _fill(world: World, rng: random.Random) -> None:
    """All legitimate calls, rule by rule: instances talk about evenly, rules do not."""
    for rule in world.documents.policies[0].rules:
        one = parse(f"kind: Policy\nname: one\nowner: me\nrules: ['{rule.sentence}']\n")
        engine = Engine(one)
        inside: list[tuple[End, End, int, int]] = []
        ends: list[list[End]] = []
        for side in (rule.sentence.source, rule.sentence.destination):
            text = str(side)
            if text.startswith("net:"):
                net = ipaddress.ip_network(text[4:])
                ends.append([net[rng.randrange(net.num_addresses)] for _ in range(120)])
            else:
                ends.append(list(world.members))
        for service in rule.sentence.services:
            ports = range(service.low, service.high + 1)
            for source in ends[0]:
                for destination in ends[1]:
                    call = (source, destination, service.protocol, rng.choice(ports))
                    if engine.decide(request(call), T0).action is Action.ALLOW:
                        more = [
                            (source, destination, service.protocol, p)
                            for p in rng.sample(ports, min(8, len(ports)))
                        ]
                        inside += more if len(ports) > 1 else [call]
        if not inside:
            continue
        share = rng.uniform(0.5, 2.0)
        for call in inside:
            world.calls.append(call)
            world.weights.append(share * rng.uniform(0.5, 2.0))


def observed(calls: list[tuple[End, End, int, int]]) -> list[Observation]:
    """Flows as `suggest` takes them: those alike counted."""
    counted: dict[tuple[End, End, int, int], list[int]] = {}
    for number, call in enumerate(calls):
        counted.setdefault(call, []).append(T0 + number * 1_000_000)
    return [Observation(*call, len(times), min(times), max(times)) for call, times in counted.items()]


def pairs(world: World, documents: DocumentSet) -> set[tuple[str, str, int, int]]:
    """All pairs of parties and services that a policy lets through."""
    engine = Engine(documents)
    out = set()
    parties: list[End] = [*world.members, *world.outside]
    for source in parties:
        for destination in parties:
            if not isinstance(source, LabelSet) and not isinstance(destination, LabelSet):
                continue
            for protocol, port in world.ports:
                call = (source, destination, protocol, port)
                if engine.evaluate(request(call), T0).action is Action.ALLOW:
                    out.add((str(source), str(destination), protocol, port))
    return out
