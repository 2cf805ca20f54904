"""Bulk throughput of one plain allowed flow through both enforcers against the same pair of hosts without any.

iperf3 under reno (labs.netns sets it: a pacing congestion control would cap both). The rounds alternate, and beside
the rate each enforced round counts the packets that reached an enforcer after the transfer had begun.
"""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

from labs.incidents import wait_until
from labs.lab import Lab, Node
from labs.netns import run
from labs.services import listening
from sectool.errors import SectoolError
from tests.bench.pair import pairs
from tests.bench.rows import Row, compare, row

PORT = 5201
SECONDS = 4
SETTLE = 0.7  # seconds after the start at which the flow must have left the queues


def one_round(lab: Lab) -> dict[str, float]:
    """One transfer: Gbit/s at the receiver, packets queued in all and after SETTLE, summed over both hosts."""
    client, server = lab["client"], lab["server"]
    start = sum(node.queued() for node in lab.enforcing)
    command = ["iperf3", "-c", server.host.ip4, "-p", str(PORT), "-t", str(SECONDS), "-O", "1", "-J"]
    process = client.popen(client.workload(("app=client",), command))
    time.sleep(SETTLE)
    settled = sum(node.queued() for node in lab.enforcing)
    out, err = process.communicate(timeout=SECONDS + 30)
    end = sum(node.queued() for node in lab.enforcing)
    report: dict[str, Any] = json.loads(out) if out.strip() else {}
    if process.returncode != 0:
        raise SectoolError(f"iperf3 failed: {report.get('error') or err.strip()}")
    return {
        "rate": report["end"]["sum_received"]["bits_per_second"] / 1e9,
        "queued": end - start,
        "queued late": end - settled,
    }


def track(host: Node) -> None:
    """Make a host's kernel track connections: one rule that asks for their state is enough."""
    rule = ("-t", "mangle", "-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "RETURN")
    run("iptables", *rule, netns=host.netns)


def rows(rounds: int) -> list[Row]:
    """Throughput of bare, tracked and enforced, rounds alternating, and the packets that were queued.

    `tracked` are hosts without an enforcer whose kernels track connections, as any host with a stateful firewall rule.
    """
    measured: dict[str, list[dict[str, float]]] = {"bare": [], "tracked": [], "enforced": []}
    with pairs(*measured) as labs:
        for name in ("client", "server"):
            track(labs["tracked"][name])
        for lab in labs.values():
            server = lab["server"]
            command = server.workload(("app=server",), ["iperf3", "-s", "-p", str(PORT)])
            server.popen(command, out=subprocess.DEVNULL)
            wait_until("iperf3 listens", lambda s=server: listening(s.netns, PORT))  # type: ignore[misc]
        for lab in labs.values():
            one_round(lab)
        for _ in range(rounds):
            for case, lab in labs.items():
                measured[case].append(one_round(lab))
    base = row("throughput", "bare", "rate", "Gbit/s", [r["rate"] for r in measured["bare"]])
    tracked = row("throughput", "tracked", "rate", "Gbit/s", [r["rate"] for r in measured["tracked"]])
    ours = row("throughput", "enforced", "rate", "Gbit/s", [r["rate"] for r in measured["enforced"]])
    return [
        base,
        compare(tracked, base),
        compare(ours, base),
        {**compare(ours, tracked), "metric": "rate beside tracked"},
        row("throughput", "enforced", "queued", "packets", [r["queued"] for r in measured["enforced"]]),
        row(
            "throughput",
            "enforced",
            "queued late",
            "packets",
            [r["queued late"] for r in measured["enforced"]],
        ),
    ]
