"""The demo's longer cases: a bulk transfer, a policy change and a killed enforcer, each under live traffic."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from labs import netns, records, services
from labs.cases import CURL
from labs.judge import Outcome
from labs.lab import Lab, Node
from labs.topology import POLICIES
from sectool.errors import SectoolError

PLAIN = ("app=warehouse", 5201)
VAULT = ("app=vault", 5202)  # policy wants what goes there encrypted
ENOUGH = 50_000_000  # bytes that count as a moving transfer
BATCH = ("app=batch", "env=prod")


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll until `condition` holds; SectoolError naming `what` when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SectoolError(f"waited {seconds:.0f} s in vain for: {what}")
        time.sleep(0.02)


def serve_iperf(lab: Lab, app: str, port: int) -> subprocess.Popen[str]:
    """iperf3 as a workload on batch."""
    batch = lab["batch"]
    command = batch.workload((app, "env=prod"), ["iperf3", "-s", "-p", str(port)])
    server = batch.popen(command, out=subprocess.DEVNULL)
    wait_until("iperf3 listens on batch", lambda: services.listening(batch.netns, port))
    return server


def start_transfer(lab: Lab, port: int, pace: str = "1G") -> subprocess.Popen[str]:
    """A bulk transfer from web to batch until `stop_transfer`, at `pace` bit/s: unbounded, it leaves no processor time
    to what is shown about it.
    """
    web, batch = lab["web"], lab["batch"]
    command = ["iperf3", "-c", batch.host.ip4, "-p", str(port), "-t", "60", "-b", pace]
    transfer = web.popen(web.workload(("app=web",), command), out=subprocess.DEVNULL)
    wait_until(
        "the transfer is under way", lambda: transferred(web, port) > ENOUGH or transfer.poll() is not None
    )
    return transfer


def stop_transfer(lab: Lab, transfer: subprocess.Popen[str], port: int) -> bool:
    """End it, and wait until the server is ready for the next one. Whether it was still running."""
    running = transfer.poll() is None
    transfer.terminate()
    transfer.communicate(timeout=10)
    server = lab["batch"].netns
    open_on_server = ("ss", "-Htn", "state", "established", f"sport = :{port}")
    wait_until("iperf3 on batch is done", lambda: not netns.run(*open_on_server, netns=server).strip())
    return running


def transferred(node: Node, port: int) -> int:
    """Bytes that connections to an iperf3 port have had acknowledged, by the kernel's own count."""
    text = netns.run("ss", "-Htin", f"dport = :{port}", netns=node.netns)
    return sum(int(word.partition(":")[2]) for word in text.split() if word.startswith("bytes_acked:"))


def moves(node: Node, what: str, port: int) -> int:
    """Wait until ENOUGH more bytes have been acknowledged; how many."""
    start = transferred(node, port)
    wait_until(f"the transfer moves on {what}", lambda: transferred(node, port) - start > ENOUGH, 30.0)
    return transferred(node, port) - start


def bulk(lab: Lab) -> Outcome:
    """Once both ends agree, the kernel carries the flow alone: the count of queued packets stands still."""
    web, batch = lab["web"], lab["batch"]
    _, port = PLAIN
    transfer = start_transfer(lab, port)
    first = (web.queued(), batch.queued())
    moved = moves(web, "while it is watched", port)
    last = (web.queued(), batch.queued())
    running = stop_transfer(lab, transfer, port)
    return Outcome(
        "bulk transfer",
        "iperf3 from web to batch; `sectool status` is asked twice while it runs",
        "web [app=web] $ iperf3 -c 10.77.0.30",
        (
            f"at least {ENOUGH / 1e6:.0f} MB between two looks",
            "queued meanwhile: web 0 packets, batch 0 packets",
        ),
        (
            f"{moved / 1e6:.0f} MB between two looks",
            f"queued meanwhile: web {last[0] - first[0]} packets, batch {last[1] - first[1]} packets"
            f" (in all so far {last[0]} and {last[1]})",
        ),
        running and first == last,
    )


def encrypted_bulk(lab: Lab) -> Outcome:
    """Every byte passes through both enforcers as records, a super-packet at a time; no program knows of it."""
    web, batch = lab["web"], lab["batch"]
    _, port = VAULT
    transfer = start_transfer(lab, port, "2G")
    first, begin = web.sealed(), time.monotonic()
    moved = moves(web, "encrypted", port)
    seconds, records_ = time.monotonic() - begin, web.sealed() - first
    encrypted = web.encrypted(), batch.encrypted()
    running = stop_transfer(lab, transfer, port)
    return Outcome(
        "encrypted transfer",
        "iperf3 from web to app=vault on batch, which the rule wants encrypted",
        "web [app=web] $ iperf3 -c 10.77.0.30 -p 5202",
        (
            f"at least {ENOUGH / 1e6:.0f} MB between two looks, in records of several segments",
            "an encrypted flow on both hosts",
        ),
        (
            f"{moved / 1e6:.0f} MB in {records_} records between two looks ({moved / 125e6 / seconds:.1f} Gbit/s)",
            f"encrypted flows: web {encrypted[0]}, batch {encrypted[1]}",
        ),
        running and 0 < records_ < moved / 3000 and min(encrypted) > 0,
    )


def policy_change(lab: Lab) -> Outcome:
    """A new revision on web takes back what allowed a download that is under way; then the old one comes back."""
    web, batch = lab["web"], lab["batch"]
    begin = time.time()
    url = f"http://{web.host.ip4}/big"
    download = ["curl", "-sS", "-o", "/dev/null", url]
    client = batch.popen(batch.workload(BATCH, download))
    wait_until(
        "the download is under way",
        lambda: bool(netns.run("ss", "-Htn", "state", "established", "sport = :80", netns=web.netns).strip()),
    )
    web.sectool("policy", "apply", str(POLICIES / "freeze.yaml"), "--reason", "incident: stop all downloads")
    applied = time.monotonic()
    try:
        _, err = client.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        client.kill()
        err = "not cut: still running after 10 s"
        client.communicate()
    took = time.monotonic() - applied
    cut, others = records.await_flow(web, begin, 80, lambda f: f.reason == "policy_changed")
    web.sectool("policy", "rollback", "1", "--reason", "incident is over")
    again = batch.execute(batch.workload(BATCH, [*CURL, f"http://{web.host.ip4}/"]))
    ok = client.returncode == 56 and took < 1.0 and cut is not None and again.exit == 0
    return Outcome(
        "policy change",
        "web gets a revision without the rule under which a download is running; later a rollback",
        f"batch [{','.join(BATCH)}] $ curl {url}",
        (
            "exit 56, cut within 1 s of `policy apply`",
            "web: cut, policy_changed",
            "after the rollback: exit 0",
        ),
        (
            f"exit {client.returncode} after {took:.2f} s, '{err.strip()[:80]}'",
            f"web: cut, {cut.reason}; was {cut.action} [{cut.rule}]"
            if cut
            else "web: " + ("; ".join(map(str, others)) or "no event on record"),
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
    transfers = {port: start_transfer(lab, port) for _, port in (PLAIN, VAULT)}
    for pid in daemon_processes(batch):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    without = shell.connect()
    moved_without = moves(web, "without an enforcer", PLAIN[1])
    lab.start_daemons([batch])
    resumed = shell.connect()
    shell.close()
    moved_after = {port: moves(web, "after the restart", port) for port in transfers}
    running = [stop_transfer(lab, transfer, port) for port, transfer in transfers.items()]
    return Outcome(
        "enforcer killed",
        "kill -9 of agent, worker and store on batch in the middle of two transfers; then `sectool up` again",
        "batch $ kill -9 …; sectool up --background",
        (
            "new connections: exit 0 before, 28 (timed out) without an enforcer, 0 after the restart",
            "the plain transfer goes on throughout, the encrypted one as soon as the enforcer is back",
        ),
        (
            f"new connections: exit {before} before, {without} without an enforcer, {resumed} after the restart",
            f"plain: {moved_without / 1e6:.0f} MB more without an enforcer, {moved_after[PLAIN[1]] / 1e6:.0f} MB"
            f" after the restart; encrypted: {moved_after[VAULT[1]] / 1e6:.0f} MB after the restart",
        ),
        (before, without, resumed, all(running)) == (0, 28, 0, True),
    )
