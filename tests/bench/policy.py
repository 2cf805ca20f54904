"""Speed of the policy engine: `./dev bench policy`.

Rule sets of 10 and 10,000 rules over 2,000 identities; each identity has eight labels, each rule asks for two on
either side, most name a port, some speak of networks or compare labels. The requests are a fixed mix of flows between
random identities and from random addresses, mostly denied by default, as most pairs are.
"""

from __future__ import annotations

import ipaddress
import random
import time
from collections.abc import Callable

from sectool.agent.revisions import draft
from sectool.labels import LabelSet
from sectool.policy import DocumentSet, Engine, Party, Request, diff, parse
from sectool.policy.conflicts import find_conflicts
from tests.bench.rows import Row, compare, row

IDENTITIES = 2_000
COUNTS = (10, 10_000)
REQUESTS = 20_000
NOW = 1_780_000_000_000_000


def rule_text(count: int) -> str:
    """A Policy of about `count` rules, with a Guardrail and a Network beside it."""
    draw = random.Random(count)
    rules: dict[str, None] = {}
    while len(rules) < count:
        one, two = draw.randrange(IDENTITIES), draw.randrange(IDENTITIES)
        port = draw.randrange(1000, 1050)
        form = draw.randrange(10)
        if form == 0:
            rule = f"allow net:lan to call app=app{two},env=prod on tcp/{port}"
        elif form == 1:
            rule = f"allow app=app{one} to call net:10.{two % 250}.{one % 250}.0/24 on tcp/{port}-{port + 40}"
        elif form == 2:
            rule = f"allow app=app{one},env=prod to call app=app{two} where source.zone = destination.zone"
        else:
            rule = f"allow app=app{one},env=prod to call app=app{two},env=prod on tcp/{port} encrypted"
        rules[rule] = None
    return (
        "kind: Network\nname: lan\ncidrs: [192.168.0.0/16]\n---\n"
        "kind: Guardrail\nname: box\nowner: security\nrules:\n"
        "- deny env=dev to call env=prod\n"
        "- require encryption for any to call any where source.zone != destination.zone\n---\n"
        "kind: Policy\nname: apps\nowner: teams\nrules:\n" + "".join(f"- {rule}\n" for rule in rules)
    )


def requests() -> list[Request]:
    """The mix of flows, the same in every run."""
    draw = random.Random(1)
    parties = [
        Party(
            LabelSet(
                {
                    "app": f"app{number}",
                    "env": "prod",
                    "zone": f"zone{number % 3}",
                    "team": f"team{number % 40}",
                    "tier": f"t{number % 4}",
                    "region": "eu",
                    "host": f"host{number % 100}",
                    "domain": "example.org",
                }
            ),
            None,
            ipaddress.IPv4Address(0x0A000000 | number),
        )
        for number in range(IDENTITIES)
    ]
    strangers = [Party(address=ipaddress.IPv4Address(draw.getrandbits(32))) for _ in range(200)]
    out = []
    for _ in range(REQUESTS):
        source = draw.choice(strangers) if draw.random() < 0.1 else draw.choice(parties)
        port = draw.randrange(1000, 1050)
        out.append(Request(source, draw.choice(parties), 6, port, 0, source.labels is not None))
    return out


def _per_call(action: Callable[[Request, int], object], asked: list[Request]) -> float:
    """Microseconds per call, the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for request in asked:
            action(request, NOW)
        best = min(best, (time.perf_counter() - begin) / len(asked))
    return best * 1e6


def _apply(text: str) -> float:
    """Seconds of work between `policy apply` and the last worker's switch, one step after the other.

    What the command does (read and check the files), the agent (parse, compile, lint, conflicts, difference to what was
    in force), and a worker (parse, compile). Storing, sending and the live flows come on top.
    """
    begin = time.perf_counter()
    candidate = draft(parse(text).text)
    diff(DocumentSet(), candidate.documents)
    Engine(parse(text))
    return time.perf_counter() - begin


def measure() -> dict[tuple[str, str, str], float]:
    """One round: (case, metric, unit) -> value."""
    asked = requests()
    out: dict[tuple[str, str, str], float] = {}
    for count in COUNTS:
        case = f"{count:,} rules"
        begin = time.perf_counter()
        documents = parse(rule_text(count))
        parsed = time.perf_counter()
        engine = Engine(documents)
        compiled = time.perf_counter()
        for request in asked:  # index keys of label sets and addresses are remembered, as in a worker
            engine.evaluate(request, NOW)
        found = time.perf_counter()
        find_conflicts(engine, NOW)
        conflicts = time.perf_counter() - found
        out[case, "decide, not cached", "µs"] = _per_call(engine.evaluate, asked)
        for request in asked:
            engine.decide(request, NOW)
        out[case, "parse", "s"] = parsed - begin
        out[case, "compile", "s"] = compiled - parsed
        out[case, "conflicts", "s"] = conflicts
        out[case, "apply", "s"] = _apply(rule_text(count))
        out[case, "decide, cached", "µs"] = _per_call(engine.decide, asked)
    return out


def rows(rounds: int) -> list[Row]:
    """Speed of small and large rule sets, the large one compared with the small one."""
    measured = [measure() for _ in range(rounds)]
    made = {key: row("policy", key[0], key[1], key[2], [one[key] for one in measured]) for key in measured[0]}
    small, large = (f"{count:,} rules" for count in COUNTS)
    for case, metric, unit in list(made):
        if case == large and metric.startswith("decide"):
            made[case, metric, unit] = compare(made[case, metric, unit], made[small, metric, unit])
    return list(made.values())
