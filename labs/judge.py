"""Expected against got: run one case of the table and compare both the client's words and the record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from labs import records
from labs.cases import Case
from labs.lab import Lab


@dataclass(frozen=True, slots=True)
class Outcome:
    """One judged case. `expected` and `got` are what is printed side by side."""

    name: str
    what: str
    command: str
    expected: tuple[str, ...]
    got: tuple[str, ...]
    ok: bool


def _words(text: str) -> str:
    """The last line a program said, short enough for a line of the report."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


def shown(command: tuple[str, ...] | list[str]) -> str:
    """A command as one would type it."""
    return " ".join(f"'{part}'" if " " in part or not part else part for part in command)


def judge(lab: Lab, case: Case, followers: Mapping[str, records.Follower] | None = None) -> Outcome:
    """Make the connection and look at what both ends say of it (through `followers`, by host, where there are any)."""
    node = lab[case.host]
    begin = time.time() - 0.001
    result = node.execute(node.workload(case.labels, case.command))
    said = result.out + result.err
    ok = result.exit == case.exit and case.says in said
    expected = [f"exit {case.exit}, '{case.says}'"]
    got = [f"exit {result.exit}, '{_words(result.out) or _words(result.err)}' after {result.seconds:.2f} s"]
    for seen in case.events:
        wanted = partial(records.matches, seen=seen, port=case.port)
        follower = (followers or {}).get(seen.host)
        flow, others = records.await_flow(lab[seen.host], begin, case.port, wanted, follower)
        expected.append(str(seen))
        if flow is not None:
            got.append(f"{seen.host}: {flow}")
        else:
            ok = False
            got.append(f"{seen.host}: " + ("; ".join(map(str, others)) or "no event on record"))
    labels = f"[{','.join(case.labels)}] " if case.labels else ""
    return Outcome(
        case.name, case.what, f"{case.host} {labels}$ {shown(case.command)}", tuple(expected), tuple(got), ok
    )
