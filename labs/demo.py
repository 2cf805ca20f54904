"""The main job from end to end: `sudo ./dev demo`.

Brings the lab up, runs every case, shows what was recorded and why, looks at the wire, takes the lab down and
proves that nothing is left. Exit code 0 only if every case came out as expected and nothing stayed behind.
"""

from __future__ import annotations

import re
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.text import Text

from labs import incidents, netns, residue
from labs.capture import Capture, examine, in_clear, read
from labs.cases import CASES, QUERY
from labs.judge import Outcome, judge
from labs.lab import SECTOOL, Lab, Node, sweep
from labs.records import Follower
from sectool.errors import SectoolError

EXPLAIN = "app=web,env=dev,zone=back -> app=db,env=prod,zone=back tcp/5432"


class Report:
    """The demo's voice on the terminal, and its memory of what failed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.outcomes: list[Outcome] = []
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        """One line of talk, with the seconds since the start."""
        self.console.print(Text(f"{time.monotonic() - self._begin:5.1f}s  {text}"), soft_wrap=True)

    def title(self, text: str) -> None:
        """A heading."""
        self.console.print(Text(f"\n{text}", style="bold"), soft_wrap=True)

    def plain(self, text: str) -> None:
        """Text of a program, as it is."""
        self.console.print(Text(text.rstrip()), soft_wrap=True)

    def add(self, outcome: Outcome) -> None:
        """Print a judged case, and remember it."""
        self.outcomes.append(outcome)
        verdict = Text("ok  ", style="green") if outcome.ok else Text("FAIL", style="bold red")
        line = Text("\n") + verdict + Text(f" {len(self.outcomes):2}. {outcome.name}", style="bold")
        self.console.print(line + Text(f": {outcome.what}"), soft_wrap=True)
        if outcome.command:
            self.plain(f"         {outcome.command}")
        for lead, lines in (("expected", outcome.expected), ("got     ", outcome.got)):
            for number, text in enumerate(lines):
                self.plain(f"       {lead if number == 0 else ' ' * 8}  {text}")

    @property
    def failed(self) -> int:
        return sum(not outcome.ok for outcome in self.outcomes)


def wire(captures: list[Capture]) -> Outcome:
    """The capture of the two hosts that spoke SQL: identity in SYN and SYN-ACK, and nowhere else."""
    got: list[str] = []
    ok = True
    for capture in captures:
        finding = examine(read(capture.stop()))
        ok &= bool(finding.syn and finding.syn_ack and finding.with_data and not finding.leaks)
        got.append(
            f"{capture.file.stem}: {finding.packets} packets; identity in {finding.syn} SYN and {finding.syn_ack}"
            f" SYN-ACK, in {len(finding.leaks)} of {finding.with_data} packets with data"
        )
        got += finding.leaks[:3]
    return Outcome(
        "identity on the wire",
        "tcpdump on web and db while they spoke SQL",
        "",
        ("identity in SYN and SYN-ACK only",),
        tuple(got),
        ok,
    )


def in_clear_text(files: list[Path]) -> Outcome:
    """The same capture: what an eavesdropper reads of the query that was encrypted, and of the one that was not."""
    got: list[str] = []
    ok = True
    for file in files:
        found = in_clear(file, QUERY.encode())
        (secret, shown), (_, plain) = found.get(4, (0, 0)), found.get(6, (0, 0))
        ok &= secret > 0 and shown == 0 and plain > 0
        got.append(
            f"{file.stem}: the query of app=web in {shown} of {secret} packets with data; the audited report's, whose"
            f" rule does not say `encrypted`, in {plain}"
        )
    return Outcome(
        "payload on the wire",
        f"searched for '{QUERY}'",
        "",
        ("the query of app=web nowhere; the report's in clear",),
        tuple(got),
        ok,
    )


def invalid_packets(node: Node) -> int:
    """Packets that conntrack of this host called INVALID since the host exists."""
    text = netns.run("conntrack", "-S", netns=node.netns)
    return sum(int(count) for count in re.findall(r"\binvalid=(\d+)", text))


def window_tracking(lab: Lab) -> Outcome:
    """Adding bytes to a handshake must not confuse the kernels' connection tracking."""
    counts = {node.name: invalid_packets(node) for node in lab.nodes.values()}
    strict = all(
        netns.run("sysctl", "-n", "net.netfilter.nf_conntrack_tcp_be_liberal", netns=node.netns).strip()
        == "0"
        for node in lab.nodes.values()
    )
    return Outcome(
        "connection tracking",
        "what every host's conntrack counted as invalid, with strict window tracking",
        "conntrack -S on every host",
        ("nf_conntrack_tcp_be_liberal=0, and 0 invalid everywhere",),
        (f"strict: {'yes' if strict else 'NO'}; " + ", ".join(f"{name} {n}" for name, n in counts.items()),),
        strict and not any(counts.values()),
    )


def show(lab: Lab, report: Report) -> None:
    """The operator's view: the flow table of two hosts and one explanation."""
    for host in ("db", "web"):
        report.title(f"{host} $ sectool flows --last 12")
        report.plain(lab[host].sectool("flows", "--last", "12"))
    report.title(f"db $ sectool policy explain '{EXPLAIN}'")
    explained = lab["db"].execute([SECTOOL, "policy", "explain", EXPLAIN])
    report.plain(explained.out + explained.err)


def run_cases(lab: Lab, report: Report) -> None:
    """Every case, in the order of the story."""
    report.title("cases: what a real client saw, and what the enforcers on both ends recorded")
    servers = [incidents.serve_iperf(lab, *which) for which in (incidents.PLAIN, incidents.VAULT)]
    followers = {node.name: Follower(node) for node in lab.enforcing}
    captures = [
        Capture(lab["web"], f"tcp port 5432 and (host {lab['db'].host.ip4} or host {lab['db'].host.ip6})"),
        Capture(lab["db"], f"tcp port 5432 and (host {lab['web'].host.ip4} or host {lab['web'].host.ip6})"),
    ]
    for case in CASES:
        report.add(judge(lab, case, followers))
    for follower in followers.values():
        follower.stop()
    report.add(wire(captures))
    report.add(in_clear_text([capture.file for capture in captures]))
    report.add(incidents.bulk(lab))
    report.add(incidents.encrypted_bulk(lab))
    report.add(incidents.policy_change(lab))
    report.add(window_tracking(lab))
    report.add(incidents.enforcer_killed(lab))
    for server in servers:
        server.terminate()
    show(lab, report)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP behave like Ctrl-C, so that every way out of the demo cleans up."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clean_up(lab: Lab, before: residue.Snapshot, had_netns: bool, report: Report) -> bool:
    """Take the lab down, whatever happened, and compare. True when nothing is left."""
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        report.title("taking the lab down")
        cgroups = residue.cgroups_in_use(lab.name)
        lab.down(report.say)
        if not had_netns:
            netns.tidy_mount()
        left = residue.left_behind(before, residue.take(lab.name), cgroups)
        for line in left:
            report.plain(f"FAIL  {line}")
        if not left:
            report.say("rules, interfaces, routes, mounts, namespaces, cgroups, processes, files: as before")
        return not left
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)


def run(console: Console | None = None, name: str = "") -> int:
    """The whole demo; its exit code: 0 as expected, 1 something differs, 130 interrupted."""
    report = Report(console or Console(highlight=False))
    code = 1
    with interruptible():
        sweep(report.say)
        lab = Lab(name or f"demo{secrets.token_hex(3)}")
        had_netns = netns.NETNS.is_dir()
        before = residue.take(lab.name)
        begin = time.monotonic()
        try:
            report.title(f"building lab {lab.name}")
            lab.up(report.say, temporary=True)
            run_cases(lab, report)
            code = 1 if report.failed else 0
        except KeyboardInterrupt:
            report.plain("\ninterrupted")
            code = 130
        except SectoolError as error:
            report.plain(f"\nFAIL  {error.message}" + (f"\n      {error.hint}" if error.hint else ""))
        finally:
            if not clean_up(lab, before, had_netns, report):
                code = code or 1
        passed = len(report.outcomes) - report.failed
        report.title(
            f"{passed} of {len(report.outcomes)} cases as expected, in {time.monotonic() - begin:.0f} s"
            + ("" if code == 0 else "; the demo FAILED" if code == 1 else "; interrupted")
        )
    return code


def main() -> int:
    """Entry point of `python -m labs.demo`."""
    try:
        return run()
    except SectoolError as error:
        print(f"demo: {error.message}" + (f"\n      {error.hint}" if error.hint else ""), file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    raise SystemExit(main())
