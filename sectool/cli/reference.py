"""docs/reference.md, made from the program itself: `python -m sectool.cli.reference > docs/reference.md`.

A test compares the two, so a command, option, exit code or drop reason cannot go undocumented.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from sectool.agent.settings import Settings
from sectool.cli.lazy import Unloaded
from sectool.cli.main import app
from sectool.cli.reasons import MEANING
from sectool.errors import Exit
from sectool.events import DropReason, Type

WIDTH = 100

EXITS = {
    Exit.OK: "fine, or allowed",
    Exit.DENIED: "denied, different, degraded, or a check that failed",
    Exit.USAGE: "the command line, a document or a privilege is not what the command needs",
    Exit.NO_DAEMON: "no daemon answers where one is needed",
    Exit.PARTIAL: "the data is incomplete: a damaged segment, a full disk",
}

SETTINGS = {
    "enforced_networks": "networks inside which a peer must have an identity (default: what enrolment declared)",
    "queue": "first NFQUEUE number; each worker takes two from here on",
    "workers": "packet workers, among which connections are spread; as many as there are processors at most",
    "mask": "which bits of packet and connection marks are sectool's; three or more",
    "reject": "answer denied connections with a RST instead of silence",
    "svid_lifetime_s": "lifetime of an identity in seconds; renewed at half of it",
    "spire_socket": "Workload API of a SPIRE agent; a workload for which it has an SVID (by its hint, or the last part "
    "of the SPIFFE ID) presents that",
    "path_labels": "labels of SVIDs that carry none, by SPIFFE ID or by the beginning of one with a `*` behind it",
    "context": "what of this host's surroundings makes labels: `cloud` (cloud, region, zone, instance, asked of the "
    "metadata service at each start), `os` (os, kernel); `[]` for none",
    "workload_api": "serve the SPIFFE Workload API at `workload.sock` in the run folder, for all users of the host",
    "revocation_expired": "when a list of revocations has expired: `closed` refuses whom it speaks of, `open` lets "
    "them pass",
    "revocation_required": "trust domains of which a list of revocations has to be there, `['*']` for all that are "
    "trusted; a missing one counts as expired",
    "clock_skew_s": "how far a peer's clock may be off, in seconds",
    "resolvers": "networks whose DNS answers count for `fqdn:` rules (default: the resolvers of resolv.conf)",
    "syn_rate": "inbound handshakes per second and source prefix",
    "stranger_rate": "inbound handshakes per second and worker, all sources together, from hosts that have proven no "
    "identity within the last hour; a quarter of it from one prefix; 30 times as many connections without a "
    "handshake; what is more is dropped by kernel rules and counted as rate_limited; 0: no bound",
    "activation_timeout_s": "how long a worker may take to switch the policy, in seconds",
    "suites": "cipher suites for encrypted flows, best first (default: by what the processor is good at)",
    "other_protocols": "IP protocols beside TCP, UDP and ICMP that pass, by name or number; all others are dropped",
    "enforce_inside": "containers, pods and named network namespaces to enforce in from outside: a list of "
    "`container:NAME`, `pod:NAMESPACE/NAME` and `netns:NAME`, with `*` and `?`",
    "kubernetes_namespaces": "file with the labels of namespaces, as `kubectl get namespaces -o json` prints them; "
    "root's, and read again when it changes",
    "pod_labels": "which labels of a pod its workloads bear, by key, with `*` (default: all that do not pass "
    "with a rollout)",
    "roles": "who may change what of the policy: role to the unix groups that hold it (default: root alone, all of it)",
    "socket_group": "group that may read over the local API (default: root only)",
}

EVENTS = {
    Type.DICT_IDENTITY: "an SVID that flows refer to: SPIFFE ID, labels, validity, issuer",
    Type.DICT_LABELS: "a set of labels that flows refer to",
    Type.DICT_WORKLOAD: "a workload that flows refer to: name, user, executable and its hash, unit, cgroup",
    Type.DICT_RULE: "a rule that flows refer to: policy, owner, text, revision",
    Type.WORKLOAD_START: "a workload was seen for the first time, or again after it had ended",
    Type.WORKLOAD_STOP: "the last process of a workload has ended",
    Type.WORKLOAD_CHANGE: "something about a workload changed: labels, ports, package; the event says what",
    Type.IDENTITY_ISSUED: "this host's CA issued an SVID",
    Type.IDENTITY_ROTATED: "a workload got a new SVID in place of one that lives still",
    Type.IDENTITY_REVOKED: "a list of revocations was taken, or a workload of this host revoked",
    Type.POLICY_APPLIED: "a policy was given to the daemon, as a new revision: by whom, why, what changed",
    Type.POLICY_ACTIVATED: "all packet workers judge by this revision now",
    Type.POLICY_ROLLED_BACK: "an earlier revision was applied again, as a new one",
    Type.ENFORCER_START: "the daemon began to enforce",
    Type.ENFORCER_STOP: "the daemon stopped",
    Type.ENFORCER_DEGRADED: "something does not work as it should; the event says what",
    Type.ENFORCER_RECOVERED: "it works again",
    Type.EVENTS_LOST: "events, never packets, were lost: where, how many, why",
    Type.STORE_DAMAGED: "a segment or log could not be read, and was set aside",
    Type.STORE_RETENTION: "what is kept of the history from now on: by whom, why",
    Type.STORE_PRUNED: "the oldest segments were deleted: for age or size, to make room, or because somebody asked",
    Type.ALERT_RAISED: "something is wrong now",
    Type.ALERT_CLEARED: "it has not been found again for a while",
    Type.TRUST_CHANGED: "a trust domain was added, removed, or has other roots or labels that count",
    Type.CAPTURE_STARTED: "packets are copied to a file: by whom, why, of which flows, with payload or without",
    Type.CAPTURE_ENDED: "the copying has ended: packets, SHA-256 of the file",
    Type.VULN_CHANGED: "a scanner's report was imported or forgotten: what is known to be vulnerable changed",
    Type.MODE_CHANGED: "enforcing or observing from now on: by whom, why",
    Type.BREAK_GLASS: "denial is suspended: by whom, why, until when",
    Type.BREAK_GLASS_ENDED: "denial is in force again",
}


def reference() -> str:
    """The whole document."""
    parts = [
        "# Reference",
        "Made from the program by `python -m sectool.cli.reference`; a test keeps it up to date.",
        "## Exit codes",
        _table(("code", "meaning"), [(str(int(code)), EXITS[code]) for code in Exit]),
        "130: interrupted with Ctrl-C. `sectool run` exits with the program's own code.",
        "## Commands",
        *_commands(),
        "## Settings",
        "`sectool.yaml` in the state folder; every field is optional, an unknown one is an error.",
        _table(
            ("setting", "default", "meaning"),
            [(f"`{n}`", f"`{getattr(Settings(), n)}`", SETTINGS[n]) for n in Settings.__dataclass_fields__],
        ),
        "## Drop reasons",
        "The `drop_reason` of a flow event. Numbers are on the wire and in the store; they never change.",
        _table(
            ("number", "reason", "meaning"),
            [(str(int(r)), f"`{r.name.lower()}`", MEANING[r]) for r in DropReason],
        ),
        "## Event types",
        "Everything that is not a flow (`sectool events`); `dict.*` entries are dictionaries behind the flows. "
        "Columns of flows, records and events: [the store](store.md#flows).",
        _table(("type", "meaning"), [(f"`{t}`", EVENTS[t]) for t in Type]),
    ]
    return "\n\n".join(parts) + "\n"


def _commands() -> Iterator[str]:
    root = typer.main.get_command(app)
    yield from _command(root, None, "sectool")


def _command(command: Any, parent: Any, path: str) -> Iterator[str]:
    if isinstance(command, Unloaded):
        command = command.real()
    context = command.context_class(
        command,
        info_name=path,
        parent=None,
        max_content_width=WIDTH,
        terminal_width=WIDTH,
        help_option_names=["-h", "--help"],
    )
    yield f"### {path}"
    yield f"```text\n{command.get_help(context).rstrip()}\n```"
    if path == "sectool lab":  # the lab documents itself; here it is one entry
        return
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        yield from _command(command.get_command(context, name), context, f"{path} {name}")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(reference())
