"""Can this host enforce: each thing the packet path needs, tried for real in a throwaway network namespace.

Trying beats asking: modules load on first use and /proc lists only what is loaded. Nothing of the host is changed.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nfq import cgroup, netns, rules
from nfq.conntrack import ConntrackControl, DestroyListener
from nfq.queue import PacketQueue, bound_by
from nfq.raw import RawSender
from nfq.sockdiag import SockDiag
from sectool.errors import SectoolError


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `what` is tried, `message` says what was found, `hint` what to do if not `ok`."""

    what: str
    ok: bool
    message: str
    hint: str = ""


def preflight(config: rules.RulesConfig | None = None, *, bound: bool = False) -> list[Finding]:
    """All checks, good and bad. Without root there is one finding only. Takes some tenths of a second.

    `bound`: the queues may be taken, by workers of our own that go on or are about to end.
    """
    config = rules.RulesConfig() if config is None else config
    if os.geteuid() != 0:
        return [Finding("root", False, "not run as root", "enforcing needs root: use sudo")]
    findings = [
        _try("cgroup v2", lambda: f"mounted at {cgroup.mount()}"),
        _try("packet marks", lambda: _marks(config)),
    ]
    if not bound:
        findings += [_queue_free(config.queue + n) for n in range(2 * config.workers)]
    try:
        with netns.throwaway():
            findings += [
                _try("iptables", lambda: _rules(config)),
                _try("netfilter queue", lambda: _queue(config)),
                _try("connection tracking", _conntrack),
                _try("socket lookup", _sockets),
                _try("raw sockets", _raw),
            ]
    except SectoolError as e:
        findings.append(Finding("network namespaces", False, e.message, e.hint))
    return findings


def conflicts(config: rules.RulesConfig) -> list[str]:
    """Rules of others that write our mark bits, as iptables-save shows them."""
    found = []
    for line in rules.snapshot().splitlines():
        if "SECTOOL-" in line or not re.search(r"-j (MARK|CONNMARK) ", line):
            continue
        masks = re.findall(r"--set-xmark 0x[0-9a-f]+/(0x[0-9a-f]+)|--(?:nf|ct)mask (0x[0-9a-f]+)", line)
        if any(int(a or b, 16) & config.mask for a, b in masks):
            found.append(line)
    return found


def _marks(config: rules.RulesConfig) -> str:
    found = conflicts(config)
    if found:
        raise SectoolError(
            f"{len(found)} rules of others write the mark bits {config.mask:#x}, such as: {found[0]}",
            "set `mask:` in sectool.yaml to three bits that nothing else uses",
        )
    return f"bits {config.mask:#x} are not written by rules of others"


def _try(what: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, attempt())
    except SectoolError as e:
        return Finding(what, False, e.message, e.hint)


def _rules(config: rules.RulesConfig) -> str:
    with tempfile.TemporaryDirectory(prefix="sectool-preflight-") as folder:
        rules.install(config, Path(folder))
        try:
            if not rules.installed():
                raise SectoolError(
                    "the rules were taken but are not there", "is another iptables in front in PATH?"
                )
        finally:
            rules.remove(Path(folder))
    names = " and ".join("IPv4" if f is rules.IPV4 else "IPv6" for f in rules.families())
    return f"the rules install and go again, {names}"


def _queue_free(number: int) -> Finding:
    holder = bound_by(number)
    if holder is None:
        return Finding(f"queue {number}", True, "free")
    return Finding(
        f"queue {number}",
        False,
        f"bound by netlink port {holder}",
        "fine if that is the running daemon; else set `queue:` in sectool.yaml",
    )


def _queue(config: rules.RulesConfig) -> str:
    PacketQueue(config.queue, lambda packet: packet.drop()).close()
    return "a queue can be bound"


def _conntrack() -> str:
    control = ConntrackControl()
    listener = DestroyListener()
    try:
        list(control.dump())
    finally:
        control.close()
        listener.close()
    return "entries can be read and their ends heard"


def _sockets() -> str:
    # A real one: a kernel without tcp_diag answers as if there were no such socket.
    diag = SockDiag()
    try:
        with socket.create_server(("", 0)) as server:
            found = diag.find(bytes(4), server.getsockname()[1], bytes(4), 1)
        if found is None or not found.inode or not found.cgroup_id:
            raise SectoolError(
                "the kernel does not tell a socket's inode and cgroup",
                "it needs inet_diag and tcp_diag (`modprobe tcp_diag`), Linux 5.9 or later, with cgroups",
            )
    except OSError as e:
        raise SectoolError(f"cannot listen in a network namespace: {e.strerror}") from None
    finally:
        diag.close()
    return "the kernel tells sockets by their addresses"


def _raw() -> str:
    RawSender().close()
    return "refusals can be sent"
