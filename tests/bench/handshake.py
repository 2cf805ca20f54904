"""New connections: how many per second, how long each takes, and what the enforcer's own CPU spends on one.

A client and a server in C (connbench.c) make connections as fast as they can: connect, one byte each way, close.
The first enforced connection is a full handshake, the others have its session. `cpu` is user plus system time of the
packet worker (/proc/PID/stat) over a round, divided by the connections of that round.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from labs.incidents import wait_until
from labs.lab import Lab
from labs.services import listening
from sectool.errors import SectoolError
from tests.bench.pair import pairs
from tests.bench.rows import Row, compare, row

SOURCE = Path(__file__).with_name("connbench.c")
PORT = 7000
SECONDS = 3.0
WAYS = {"sequential": 1, "32 at once": 32}
LATENCIES = ("connect_p50", "connect_p99", "echo_p50", "echo_p99")


def compile_client(folder: Path) -> Path:
    """Build connbench with the system's C compiler."""
    program = folder / "connbench"
    done = subprocess.run(
        ["gcc", "-O2", "-Wall", "-o", str(program), str(SOURCE)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SectoolError(f"gcc could not build {SOURCE.name}: {done.stderr.strip()[-500:]}")
    return program


def cpu_seconds(pid: int) -> float:
    """User plus system time of a process so far (proc(5): utime, stime; children not counted)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker_cpu(lab: Lab) -> dict[str, float]:
    """CPU seconds of the packet workers so far, by host. Empty without enforcers."""
    return {node.name: sum(cpu_seconds(int(w["pid"])) for w in node.workers()) for node in lab.enforcing}


def one_round(lab: Lab, program: Path, at_once: int) -> dict[str, float]:
    """One run of the client: its rate and latencies (µs), and CPU per connection (µs) for each enforcing host."""
    client, server = lab["client"], lab["server"]
    command = [str(program), "client", server.host.ip4, str(PORT), str(at_once), str(SECONDS)]
    before = worker_cpu(lab)
    done = client.execute(client.workload(("app=client",), command), timeout=SECONDS + 20)
    after = worker_cpu(lab)
    if done.exit != 0:
        raise SectoolError(f"connbench failed: {done.err.strip()}")
    result: dict[str, Any] = json.loads(done.out)
    if not result["connections"]:
        raise SectoolError(f"no connection was made between the benchmark's hosts: {done.out.strip()}")
    made = result["connections"]
    return {
        "rate": result["rate"],
        "errors": result["errors"],
        **{name: result[name] for name in LATENCIES},
        **{f"cpu {name}": (after[name] - before[name]) / made * 1e6 for name in before},
    }


def rows(rounds: int) -> list[Row]:
    """Rate, latency and CPU of bare and enforced connections, rounds alternating."""
    measured: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="sectool-bench-") as folder, pairs() as labs:
        program = compile_client(Path(folder))
        for lab in labs.values():
            server = lab["server"]
            server.popen(
                server.workload(("app=server",), [str(program), "server", str(PORT)]), out=subprocess.DEVNULL
            )
            wait_until("the benchmark's server listens", lambda s=server: listening(s.netns, PORT))  # type: ignore[misc]
        for lab in labs.values():  # credentials and caches are warm before the first round
            one_round(lab, program, 1)
        for _ in range(rounds):
            for way, at_once in WAYS.items():
                for case, lab in labs.items():
                    measured.setdefault((way, case), []).append(one_round(lab, program, at_once))
    return _rows(measured)


def _rows(measured: dict[tuple[str, str], list[dict[str, float]]]) -> list[Row]:
    out = []
    for way in WAYS:
        bare, enforced = measured[way, "bare"], measured[way, "enforced"]
        for metric, unit in (("rate", "1/s"), *((name, "µs") for name in LATENCIES)):
            base = row("handshake", f"bare, {way}", metric, unit, [r[metric] for r in bare])
            ours = row("handshake", f"enforced, {way}", metric, unit, [r[metric] for r in enforced])
            out += [base, compare(ours, base)]
        for name in sorted(key for key in enforced[0] if key.startswith("cpu ")):
            out.append(row("handshake", f"enforced, {way}", name, "µs/conn", [r[name] for r in enforced]))
        out.append(row("handshake", f"enforced, {way}", "errors", "count", [r["errors"] for r in enforced]))
    return out
