"""The demo's longer cases: a bulk transfer, a policy change and a killed enforcer, each under live traffic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from labs import netns, records, services
from labs.cases import CURL
from labs.judge import Outcome
from labs.lab import SECTOOL, Lab, Node
from labs.topology import POLICIES
from sectool.errors import SectoolError

IPERF_PORT = 5201
BATCH = ("app=batch", "env=prod")


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll until `condition` holds; SectoolError naming `what` when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SectoolError(f"waited {seconds:.0f} s in vain for: {what}")
        time.sleep(0.02)


def serve_iperf(lab: Lab) -> subprocess.Popen[str]:
    """iperf3 as the workload app=warehouse on batch."""
    batch = lab["batch"]
    command = batch.workload(("app=warehouse", "env=prod"), ["iperf3", "-s", "-p", str(IPERF_PORT)])
    server = batch.popen(command, out=subprocess.DEVNULL)
    wait_until("iperf3 listens on batch", lambda: services.listening(batch.netns, IPERF_PORT))
    return server


def start_transfer(lab: Lab, seconds: int) -> subprocess.Popen[str]:
    """A bulk transfer from web to batch, as fast as it goes."""
    web, batch = lab["web"], lab["batch"]
    command = ["iperf3", "-c", batch.host.ip4, "-p", str(IPERF_PORT), "-t", str(seconds), "-i", "0.5", "-J"]
    transfer = web.popen(web.workload(("app=web",), command))
    wait_until(
        "the transfer is under way", lambda: transferred(web) > 10_000_000 or transfer.poll() is not None
    )
    return transfer


def transferred(node: Node) -> int:
    """Bytes that acknowledged connections to the iperf3 port have sent, by the kernel's own count."""
    text = netns.run("ss", "-Htin", f"dport = :{IPERF_PORT}", netns=node.netns)
    return sum(int(word.partition(":")[2]) for word in text.split() if word.startswith("bytes_acked:"))


def _report(transfer: subprocess.Popen[str]) -> tuple[int, int, float]:
    """Wait for iperf3: exit code, bytes sent, and the least megabytes in any half second."""
    out, _ = transfer.communicate(timeout=30)
    if transfer.returncode != 0:
        return transfer.returncode, 0, 0.0
    report = json.loads(out)
    whole = [i["sum"]["bytes"] / 1e6 for i in report["intervals"] if i["sum"]["seconds"] > 0.4]
    return 0, int(report["end"]["sum_sent"]["bytes"]), min(whole)


def bulk(lab: Lab) -> Outcome:
    """Once both ends agree, the kernel carries the flow alone: the count of queued packets stands still."""
    web, batch = lab["web"], lab["batch"]
    transfer = start_transfer(lab, 3)
    first_bytes, first = transferred(web), (web.queued(), batch.queued())
    time.sleep(0.5)
    last, last_bytes = (web.queued(), batch.queued()), transferred(web)
    code, sent, _ = _report(transfer)
    moved = last_bytes - first_bytes
    ok = code == 0 and first == last and moved > 50_000_000
    return Outcome(
        "bulk transfer",
        "iperf3 from web to batch; `sectool status` is asked twice while it runs",
        "web [app=web] $ iperf3 -c batch -t 3",
        ("exit 0", "queued packets between the two looks: web +0, batch +0"),
        (
            f"exit {code}, {sent / 1e9:.2f} GB sent",
            f"queued packets: web +{last[0] - first[0]}, batch +{last[1] - first[1]}"
            f" (totals {last[0]} and {last[1]}), while {moved / 1e6:.0f} MB went over",
        ),
        ok,
    )


def policy_change(lab: Lab) -> Outcome:
    """A new revision on web takes back what allowed a download that is under way; then the old one comes back."""
    web, batch = lab["web"], lab["batch"]
    begin = time.time()
    url = f"http://{web.host.ip4}/big"
    download = ["curl", "-sS", "--limit-rate", "2M", "-o", "/dev/null", url]
    client = batch.popen(batch.workload(BATCH, download))
    wait_until(
        "the download is under way",
        lambda: bool(netns.run("ss", "-Htn", "state", "established", "sport = :80", netns=web.netns).strip()),
    )
    web.sectool("policy", "apply", str(POLICIES / "freeze.yaml"), "--reason", "incident: stop all downloads")
    applied = time.monotonic()
    _, err = client.communicate(timeout=20)
    took = time.monotonic() - applied
    cut, others = records.await_flow(
        web, begin, 80, lambda f: f.action == "deny" and f.reason == "policy_changed"
    )
    web.sectool("policy", "rollback", "1", "--reason", "incident is over")
    again = batch.execute(batch.workload(BATCH, [*CURL, f"http://{web.host.ip4}/"]))
    ok = client.returncode == 56 and took < 1.0 and cut is not None and again.exit == 0
    return Outcome(
        "policy change",
        "web gets a revision without the rule under which a download is running; later a rollback",
        f"batch [{','.join(BATCH)}] $ curl --limit-rate 2M {url}",
        (
            "exit 56, cut within 1 s of `policy apply`",
            "web: deny policy_changed",
            "after the rollback: exit 0",
        ),
        (
            f"exit {client.returncode} after {took:.2f} s, '{err.strip()[:80]}'",
            f"web: {cut}" if cut else "web: " + ("; ".join(map(str, others)) or "no event on record"),
            f"after the rollback: exit {again.exit}",
        ),
        ok,
    )


def daemon_processes(node: Node) -> list[int]:
    """The daemon of a host with its children, by its pid file: the agent first."""
    agent = int((node.run_folder / "agent.pid").read_text().split()[0])
    found = [agent]
    for pid in found:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        found += [int(child) for child in children.read_text().split()] if children.exists() else []
    return found


class Shell:
    """A long-lived workload that opens a connection whenever it is told to."""

    def __init__(self, node: Node, url: str) -> None:
        script = (
            f"while read -r _; do curl -sS -o /dev/null --connect-timeout 1 {url} 2>/dev/null; echo $?; done"
        )
        self._process = subprocess.Popen(
            node.place().argv(node.workload(BATCH, ["sh", "-c", script])),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=node.environment(),
            cwd="/",
            start_new_session=True,
        )

    def connect(self) -> int:
        """curl's exit code of one more connection."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """Let it end."""
        self._process.communicate(timeout=5)


def enforcer_killed(lab: Lab) -> Outcome:
    """kill -9 of batch's whole daemon while it receives: that flow goes on, no new one passes, a restart resumes."""
    web, batch = lab["web"], lab["batch"]
    shell = Shell(batch, f"http://{web.host.ip4}/")
    before = shell.connect()
    transfer = start_transfer(lab, 6)
    for pid in daemon_processes(batch):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    at_kill = transferred(web)
    without = shell.connect()
    moved = transferred(web) - at_kill
    lab.start_daemons([batch])
    resumed = shell.connect()
    shell.close()
    still_running = transfer.poll() is None
    code, sent, least = _report(transfer)
    ok = (
        (before, without, resumed, code) == (0, 28, 0, 0)
        and moved > 50_000_000
        and still_running
        and least > 0
    )
    return Outcome(
        "enforcer killed",
        "kill -9 of agent, worker and store on batch in the middle of a transfer; then `sectool up` again",
        f"batch $ kill -9 …; {SECTOOL.rpartition('/')[2]} up --background",
        (
            "new connections: exit 0 before, 28 (timed out) without an enforcer, 0 after the restart",
            "the transfer goes on throughout and ends with exit 0",
        ),
        (
            f"new connections: exit {before} before, {without} without an enforcer, {resumed} after the restart",
            f"{moved / 1e6:.0f} MB without an enforcer, {sent / 1e9:.2f} GB in all, exit {code},"
            f" at least {least:.0f} MB in every half second",
        ),
        ok,
    )
