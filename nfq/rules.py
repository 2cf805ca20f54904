"""The kernel rules that bring TCP to the packet workers: own chains in tables raw and mangle, IPv4 and IPv6.

    raw     PREROUTING, OUTPUT
              our mark bits set ─► SECTOOL-CLEAR       cleared: the packet comes from outside (an application's SO_MARK,
                                                       somebody else's rule, a tunnel)
            OUTPUT
              RST ─► SECTOOL-SENT, UDP ─► SECTOOL-TOLD  what the worker's own raw socket sends is not tracked: a RST for
                                                       a connection that never was would count as invalid, and a
                                                       handshake's datagram is not its flow's
    mangle  OUTPUT ─► SECTOOL-OUT, INPUT ─► SECTOOL-IN
              1 TCP, neither SYN nor SYN-ACK, our mark bits clear, connection marked ALLOWED ─► on
              2 from lo ─► on                                                              (INPUT only)
              3 our mark bits set ─► SECTOOL-VERDICT
              4 sent by the worker's own raw socket ─► on                                 (OUTPUT only)
              5 connection marked ENCRYPTED or SMALL, not SYN ─► SECTOOL-RECORD   (INPUT: SECTOOL-CAME)
              6 what is not TCP ─► SECTOOL-REST, or on
              7 SYN or SYN-ACK: the connection's mark is cleared; queue                   (OUTPUT only)
              8 TCP of no connection yet ─► SECTOOL-NEW                   (INPUT only)
              9 any other TCP ─► queue
            SECTOOL-NEW (unless `strangers` is 0)
              from an address where somebody has proven an identity lately (nfq.shed), within the rate for one ─► queue
              others, within the rates for a prefix and for all of them ─► the queue for strangers, which the worker
              looks at when nothing else waits; what is left is counted and dropped
            SECTOOL-RECORD
              with payload or FIN: ENCRYPTED ─► bulk queue, SMALL ─► queue; others (ACK, RST) ─► on
            SECTOOL-CAME
              with payload or FIN ─► bulk queue, always: that this host's own segments get lost changes nothing in
              what arrives, and in two queues records would overtake each other, at worst by more than the replay
              window; others ─► on
            SECTOOL-REST
              UDP of a connection marked ALLOWED, except control datagrams ─► on
              neighbour and multicast listener discovery, IGMP, DHCP ─► on
              UDP, ICMP, ICMPv6 ─► queue; other protocols ─► on if the settings name them, or dropped
            SECTOOL-VERDICT
              REQUEUE ─► queue; ALLOWED, ENCRYPTED, SMALL: the mark is saved to the connection; the bits are cleared
            SECTOOL-QUEUE, SECTOOL-BULK, SECTOOL-STRANGE (several workers only)
              the queue of the worker that the flow belongs to (nfq.steering)

A released connection's packets pay for every rule they meet, so raw asks one question before any chain of ours is
entered, and rule 1 is theirs. It takes no packet that opens a connection and none that carries a verdict.

The worker answers with NF_REPEAT and a mark (nfq.marks): the kernel calls the same base chain again (nfqnl_reinject),
where rule 3 takes the packet. It goes through the mangle rules of others, too, which NF_ACCEPT would skip. Since raw
runs before mangle and is not repeated, only a verdict can have set these bits. Without a listener a queue drops (no
--queue-bypass, unless nothing is enforced: `observe`): fail closed. Loopback packets are judged once, in OUTPUT.

Rule 7 clears because a connection may find a mark that is not its own: connection tracking goes on with the old entry
when both ends have silently forgotten a connection and its ports are used again, and expected connections (helpers)
inherit their master's mark. It clears only what leaves: the local stack sends a SYN or a SYN-ACK only when it really
opens anew, and no connection opens without one of them leaving, while anybody can send a SYN here under the addresses
of a live connection. A SYN-ACK that is repeated at the very moment of the release clears the mark of a live connection;
its next packet is queued and releases it again.

Installing is one transaction per table; the tables come in the order raw, mangle, so that a mark is never trusted
before it is cleared.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from nfq import bpf
from nfq.conntrack import load_tracking
from nfq.marks import MASK, Marks
from nfq.shed import COUNTER, Shed, set_name
from sectool.errors import PrivilegeError, SectoolError, UsageError

QUEUE: Final = 5300
# Rule 4 knows the worker's raw socket by the file system group id it was opened with: no other program runs with it.
# Above 2^31, where no allocator of group ids gives any (systemd's and subordinate ranges end below).
RAW_GROUP: Final = 0xDEC70001

CLEAR, SENT, TOLD = "SECTOOL-CLEAR", "SECTOOL-SENT", "SECTOOL-TOLD"
OUT, IN, VERDICT = "SECTOOL-OUT", "SECTOOL-IN", "SECTOOL-VERDICT"
RECORD, CAME, REST = "SECTOOL-RECORD", "SECTOOL-CAME", "SECTOOL-REST"
NORMAL, BULK, NEW, STRANGE = "SECTOOL-QUEUE", "SECTOOL-BULK", "SECTOOL-NEW", "SECTOOL-STRANGE"
STRANGERS_AT: Final = 128  # worker n's queue for strangers is the first queue's number plus this plus n
# Shares of the rate for strangers: a source prefix gets a quarter; what shows no identity costs no public-key work and
# gets more, a prefix of that as much as one host that is known.
_PREFIX_SHARE: Final = 4
_CHEAP: Final = 30
_LIMIT_MOST: Final = 10_000  # as fast as xt_limit counts, and its largest burst
_PREFIXES: Final = (
    65_536  # a table's bound: with all in use, packets of further prefixes are dropped, not counted
)
_HOOKS: Final = {
    "raw": (("PREROUTING", CLEAR), ("OUTPUT", CLEAR), ("OUTPUT", SENT), ("OUTPUT", TOLD)),
    "mangle": (("INPUT", IN), ("OUTPUT", OUT)),
}
_CHAINS: Final = {
    "raw": (CLEAR, SENT, TOLD),
    "mangle": (OUT, IN, VERDICT, RECORD, CAME, REST, NEW, NORMAL, BULK, STRANGE),
}
_ALWAYS: Final = {"raw": (CLEAR, SENT, TOLD), "mangle": (OUT, IN, VERDICT, RECORD, CAME)}  # never empty
# Without these a host loses its network: neighbour, router and multicast listener discovery (RFC 4861, 2710, 3810)
_NEIGHBOURHOOD: Final = (130, 131, 132, 133, 134, 135, 136, 143)
_BUILT_IN: Final = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"})
_SYSCTLS: Final = {"net/netfilter/nf_conntrack_acct": "1", "net/netfilter/nf_conntrack_tcp_be_liberal": "0"}
_BEFORE: Final = "rules-before.json"
_ATTEMPTS: Final = 5  # somebody else may change the tables between our look and our transaction
_TIMEOUT_S: Final = 30


@dataclass(frozen=True, slots=True)
class RulesConfig:
    """First queue number, number of workers (two queues each: normal, bulk), and the mask of the bits that are ours.

    `beyond_tcp`: UDP and ICMP are judged too, and other IP protocols dropped unless `others` names their number.
    `strangers`: connection attempts a second and worker from hosts that have proven no identity lately; 0: no bound.
    `known`: attempts a second from one host that has.
    `observe`: what nobody judges passes: without a worker, of other protocols, beyond the bounds. What is to be
    encrypted never does.
    """

    queue: int = QUEUE
    workers: int = 1
    mask: int = MASK
    beyond_tcp: bool = True
    others: tuple[int, ...] = ()
    strangers: int = 0
    known: int = 2000
    observe: bool = False

    def __post_init__(self) -> None:
        last = self.queue + max(2 * self.workers, STRANGERS_AT + self.workers if self.strangers else 0) - 1
        if not (self.queue >= 0 and self.workers >= 1 and last <= 65_535):
            raise UsageError(f"queues {self.queue} to {last} are not within 0 to 65535")
        Marks(self.mask)

    @property
    def marks(self) -> Marks:
        """What our bits say."""
        return Marks(self.mask)


@dataclass(frozen=True, slots=True)
class Family:
    """One address family's tools."""

    name: str  # as nft calls it
    tool: str  # iptables or ip6tables

    def command(self, suffix: str = "") -> str:
        """`iptables-restore`, or `iptables-legacy-restore` and the like."""
        return self.tool + suffix


IPV4, IPV6 = Family("ip", "iptables"), Family("ip6", "ip6tables")


def families() -> tuple[Family, ...]:
    """IPv4, and IPv6 unless the kernel has none. Looked at anew each time, since IPv6 may be a module loaded later."""
    return (IPV4, IPV6) if Path("/proc/net/if_inet6").exists() else (IPV4,)


# -- what the rules are -----------------------------------------------------------------------------------------


def _queues(
    config: RulesConfig, chain: str, offset: int, v6: bool, each: int = 2, match: str = "", bypass: str = ""
) -> list[str]:
    """The chain that picks a worker's queue; empty for one worker. `match`: what a packet must be besides."""
    last = config.workers - 1
    numbers = [config.queue + each * worker + offset for worker in range(config.workers)]
    if not last:
        return []
    steered = [
        f'-A {chain} {match}-m bpf --bytecode "{bpf.steered_to(worker, config.workers, v6)}"'
        f" -j NFQUEUE --queue-num {numbers[worker]}{bypass}"
        for worker in range(last)
    ]
    return [*steered, f"-A {chain} {match}-j NFQUEUE --queue-num {numbers[last]}{bypass}"]


def _sure(config: RulesConfig, chain: str, match: str, v6: bool) -> list[str]:
    """What matches goes to its worker's normal queue, or nowhere."""
    if config.workers == 1:
        return [f"-A {chain} {match} -j NFQUEUE --queue-num {config.queue}"]
    return _queues(config, chain, 0, v6, match=f"{match} ")


def rules(config: RulesConfig, family: Family = IPV4) -> dict[str, list[str]]:
    """The chains' contents in iptables-restore syntax, by table."""
    v6, marks = family is IPV6, config.marks
    mask = f"{config.mask:#x}"
    one = config.workers == 1
    bypass = " --queue-bypass" if config.observe else ""
    normal = f"-j NFQUEUE --queue-num {config.queue}{bypass}" if one else f"-g {NORMAL}"
    bulk = f"-j NFQUEUE --queue-num {config.queue + 1}" if one else f"-g {BULK}"
    clear = f"-m mark --mark 0x0/{mask}"
    opening, later = "-p tcp -m tcp --tcp-flags SYN SYN", "-p tcp -m tcp ! --tcp-flags SYN SYN"
    released = f"-m connmark --mark {marks.allowed:#x}/{mask} -j RETURN"
    recorded = f"{marks.encrypted:#x}/{marks.encrypted | marks.passing:#x}"  # with ALLOWED's bit or without
    carrying = f'-m bpf --bytecode "{bpf.carries(v6)}"'
    # What is to be encrypted must not go out plain, whatever else passes without a worker.
    small, sealed = [f"-A {RECORD} {carrying} {normal}"], list[str]()
    if config.observe:
        small = _sure(config, RECORD, carrying, v6)
        sealed = _sure(config, REST, f"-p udp -m connmark --mark {recorded}", v6)
    first = f"{later} {clear} {released}"
    verdict = f"-m mark ! --mark 0x0/{mask} -g {VERDICT}"
    by_worker = f"-m owner --gid-owner {RAW_GROUP} -j RETURN"
    # UDP of one way stays NEW for ever, so what has a mark is none.
    fresh = "-m conntrack --ctstate INVALID,NEW"
    bounded = bool(config.strangers) and not config.observe
    strangers = [f"-p tcp {fresh} -g {NEW}"] if bounded else []
    datagrams = [f"-p udp {fresh} -m connmark --mark 0x0/{mask} -g {NEW}"] if bounded else []
    records = f"{later} -m connmark --mark {recorded} -g"
    rest = f"! -p tcp {f'-g {REST}' if config.beyond_tcp else '-j RETURN'}"
    return {
        "raw": [
            f"-A {CLEAR} -j MARK --set-xmark 0x0/{mask}",
            *(f"-A {chain} -m owner --gid-owner {RAW_GROUP} -j CT --notrack" for chain in (SENT, TOLD)),
        ],
        "mangle": [
            *(f"-A {OUT} {rule}" for rule in (first, verdict, by_worker, f"{records} {RECORD}", rest)),
            f"-A {OUT} {opening} -j CONNMARK --set-xmark 0x0/{mask}",
            f"-A {OUT} {opening} {normal}",
            f"-A {OUT} {normal}",
            *(f"-A {IN} {rule}" for rule in (first, "-i lo -j RETURN", verdict)),
            *(f"-A {IN} {rule}" for rule in (datagrams if config.beyond_tcp else [])),
            *(f"-A {IN} {rule}" for rule in (f"{records} {CAME}", rest, *strangers)),
            f"-A {IN} {normal}",
            *([f"-A {NEW} {rule}" for rule in _new(config, v6, normal)] if bounded else []),
            f"-A {RECORD} {carrying} -m connmark --mark {marks.encrypted:#x}/{mask} {bulk}",
            *small,
            f"-A {CAME} {carrying} {bulk}",
            *(
                [
                    *(f"-A {REST} {rule}" for rule in _handed_on(v6, released)),
                    *sealed,
                    *(f"-A {REST} {rule}" for rule in _rest(config, v6, normal)),
                ]
                if config.beyond_tcp
                else []
            ),
            f"-A {VERDICT} -m mark --mark {marks.requeue:#x}/{mask} {normal}",
            f"-A {VERDICT} -m mark ! --mark {marks.passing:#x}/{mask}"
            f" -j CONNMARK --save-mark --nfmask {mask} --ctmask {mask}",
            f"-A {VERDICT} -j MARK --set-xmark 0x0/{mask}",
            *_queues(config, NORMAL, 0, v6, bypass=bypass),
            *_queues(config, BULK, 1, v6),
            *(_queues(config, STRANGE, STRANGERS_AT, v6, 1) if bounded else []),
        ],
    }


def _new(config: RulesConfig, v6: bool, normal: str) -> list[str]:
    """What becomes of packets that may open a connection, before any of them costs the worker something."""
    end, prefix = ("6", 48) if v6 else ("4", 24)
    strange = (
        f"-j NFQUEUE --queue-num {config.queue + STRANGERS_AT}" if config.workers == 1 else f"-g {STRANGE}"
    )

    def each(rate: int, name: str, mask: str = "") -> str:
        """At most `rate` a second of each source."""
        return (
            f"-m hashlimit --hashlimit-upto {rate}/sec --hashlimit-burst {2 * rate} --hashlimit-mode srcip"
            f" --hashlimit-name sectool-{name}{end} --hashlimit-htable-max {_PREFIXES}"
            f" --hashlimit-htable-expire 10000{mask}"
        )

    def strangers(rate: int, of_one: int, name: str) -> str:
        most = min(rate, _LIMIT_MOST)
        in_all = f"-m limit --limit {most}/sec --limit-burst {min(2 * most, _LIMIT_MOST)}"
        return f"{each(of_one, name, f' --hashlimit-srcmask {prefix}')} {in_all} {strange}"

    rate = config.strangers * config.workers
    hello = f'-p udp -m bpf --bytecode "{bpf.greets(v6)}"'
    dropped = f"-m nfacct --nfacct-name {COUNTER} -j DROP"
    return [
        f"-p udp {_dhcp(v6)} -j RETURN",
        f"-m set --match-set {set_name(v6)} src {each(config.known, 'known')} {normal}",
        f"-p tcp -m tcp --tcp-option 253 {strangers(rate, max(1, rate // _PREFIX_SHARE), 'shown')}",
        f"-p tcp -m tcp ! --tcp-option 253 {strangers(_CHEAP * rate, config.known, 'bare')}",
        f"{hello} {strangers(rate, max(1, rate // _PREFIX_SHARE), 'hello')}",
        f"{hello} {dropped}",
        f"-p udp {strangers(_CHEAP * rate, config.known, 'data')}",
        dropped,
    ]


def _dhcp(v6: bool) -> str:
    return "-m udp --sport 546:547 --dport 546:547" if v6 else "-m udp --sport 67:68 --dport 67:68"


def _handed_on(v6: bool, released: str) -> list[str]:
    """What passes of packets that are not TCP, unseen."""
    if v6:
        stay = [f"-p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j RETURN" for kind in _NEIGHBOURHOOD]
    else:
        stay = ["-p igmp -j RETURN"]
    return [
        f'-p udp -m bpf --bytecode "{bpf.ordinary(v6)}" {released}',
        *stay,
        f"-p udp {_dhcp(v6)} -j RETURN",
    ]


def _rest(config: RulesConfig, v6: bool, normal: str) -> list[str]:
    """What becomes of the others."""
    icmp = "ipv6-icmp" if v6 else "icmp"
    return [
        f"-p udp {normal}",
        f"-p {icmp} {normal}",
        *(f"-p {number} -j RETURN" for number in config.others),
        "-j RETURN" if config.observe else "-j DROP",
    ]


def _jumps(table: str, config: RulesConfig) -> list[str]:
    """What leads to our chains, each to be put first in its built-in chain, in this order."""
    return [f"{hook} 1 {_only(chain, f'{config.mask:#x}')}-j {chain}" for hook, chain in _HOOKS[table]]


def _only(chain: str, mask: str) -> str:
    """The condition of the jumps to a chain, as iptables-save shows it."""
    only = {
        CLEAR: f"-m mark ! --mark 0x0/{mask} ",
        SENT: "-p tcp -m tcp --tcp-flags RST RST ",
        TOLD: "-p udp ",
    }
    return only.get(chain, "")


def _install_tables(config: RulesConfig, family: Family, saved: str) -> list[str]:
    """Each table is a transaction of its own, in this order: no mark is trusted before it is cleared."""
    return [line for table in ("raw", "mangle") for line in _install_table(table, config, saved, family)]


def _remove_tables(saved: str) -> list[str]:
    """mangle first: as long as a verdict's mark counts for something, marks from outside are cleared."""
    return [line for table in ("mangle", "raw") for line in _remove_table(table, saved)]


def _install_table(table: str, config: RulesConfig, saved: str, family: Family = IPV4) -> list[str]:
    lines = [f"*{table}"]
    # Naming a chain of one's own empties it in the same transaction; built-in chains must not be named.
    lines += [f":{chain} - [0:0]" for chain in _CHAINS[table]]
    lines += rules(config, family)[table]
    lines += _drop_jumps(table, saved)
    lines += [f"-I {jump}" for jump in _jumps(table, config)]
    return [*lines, "COMMIT"]


def _remove_table(table: str, saved: str) -> list[str]:
    present = [c for c in _CHAINS[table] if f":{c} " in _table(saved, table)]
    if not present:
        return []
    return [
        f"*{table}",
        *_drop_jumps(table, saved),
        *(f"-F {chain}" for chain in present),
        *(f"-X {chain}" for chain in present),
        "COMMIT",
    ]


def _drop_jumps(table: str, saved: str) -> list[str]:
    """Deletions of every jump to our chains that is there now, however often."""
    found = [
        line
        for line in _table(saved, table).splitlines()
        if re.fullmatch(r"-A \S+ .*-[jg] SECTOOL-\S+", line)
    ]
    outside = [line for line in found if not line.startswith("-A SECTOOL-")]
    return ["-D" + line.removeprefix("-A") for line in outside]


def _table(saved: str, table: str) -> str:
    """One table of an iptables-save text; '' when it is not there."""
    match = re.search(rf"^\*{table}$(.*?)^COMMIT$", saved, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


# -- doing it ---------------------------------------------------------------------------------------------------


def install(config: RulesConfig, run: Path) -> None:
    """Put the rules in place, replacing older ones of ours without a moment in between.

    `run` is the daemon's run folder: what was there before is remembered in it. Raises SectoolError.
    """
    saved = prepare(run)
    if config.strangers:
        with contextlib.closing(Shed()) as shed:
            shed.prepare()
    for family, text in saved.items():
        _transact(family, partial(_install_tables, config, family), text)


def prepare(run: Path) -> dict[Family, str]:
    """What comes before the rules: remember in `run` how things are, and switch connection counters on.

    Returns the rules that are there now.
    """
    if any(_get_sysctl(name) is None for name in _SYSCTLS):
        load_tracking()
    saved = {family: _save(family) for family in families()}
    _remember(run, saved)
    for name, value in _SYSCTLS.items():
        _set_sysctl(name, value)
    return saved


def remove(run: Path) -> None:
    """Take the rules away and restore what install changed. Nothing of others is touched; safe to repeat."""
    before = _recall(run)
    for family in families():
        _transact(family, _remove_tables)
        _drop_empty_tables(family, before.get("tables", {}).get(family.name))
    with contextlib.suppress(OSError), contextlib.closing(Shed()) as shed:
        shed.remove()
    for name, value in before.get("sysctls", {}).items():
        if name in _SYSCTLS and value is not None and _get_sysctl(name) == _SYSCTLS[name]:
            _set_sysctl(name, str(value))
    (run / _BEFORE).unlink(missing_ok=True)


def installed() -> bool:
    """Whether all our chains and the jumps to them are in place, in both families.

    False, too, once IPv6 has come after `install` (a kernel that has it as a module): install again. Until that is
    asked, IPv6 is not enforced there.
    """
    return all(_complete(_save(family)) for family in families())


def present() -> bool:
    """Whether anything of ours is there, be it of an older version or incomplete."""
    return any(re.search(r"^:SECTOOL-", _save(family), re.MULTILINE) for family in families())


def _complete(saved: str) -> bool:
    for table, jumps in _HOOKS.items():
        text = _table(saved, table)
        for hook, chain in jumps:
            if not re.search(rf"^-A {hook} {_only(chain, '0x[0-9a-f]+')}-j {chain}$", text, re.MULTILINE):
                return False
        if any(f"-A {chain} " not in text for chain in _ALWAYS[table]):
            return False
    return True


def snapshot() -> str:
    """All rules of both families without counters, times and comments, for comparing."""
    parts = []
    for family in families():
        text = re.sub(r"\[\d+:\d+\]", "[0:0]", _save(family))
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        parts.append(f"{family.name}\n" + "\n".join(lines) + "\n")
    return "".join(parts)


def _transact(family: Family, make: Callable[[str], list[str]], saved: str | None = None) -> None:
    """Apply what `make` makes of the present rules (`saved`, if known); make it anew when they change meanwhile."""
    error = SectoolError("")
    for attempt in range(_ATTEMPTS):
        if saved is None or attempt:
            saved = _save(family)
        lines = make(saved)
        if not lines:
            return
        try:
            _run(family, "-restore", "--noflush", "-w", "5", stdin="\n".join(lines) + "\n")
        except PrivilegeError:
            raise
        except SectoolError as e:
            error = e
            if _save(family) == saved:
                break
        else:
            return
    raise error


def _save(family: Family) -> str:
    return _run(family, "-save")


def _run(family: Family, suffix: str, *arguments: str, stdin: str | None = None) -> str:
    command = family.command(suffix)
    try:
        done = subprocess.run(
            [command, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            env={"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise SectoolError(
            f"there is no program {command}", "install the package iptables (Debian, Fedora: iptables)"
        ) from None
    except OSError as e:
        raise SectoolError(
            f"cannot run {command}: {e.strerror}",
            "install the package iptables anew (apt-get install --reinstall)",
        ) from None
    except subprocess.TimeoutExpired:
        raise SectoolError(
            f"{command} did not answer within {_TIMEOUT_S} s", "does another program hold the lock?"
        ) from None
    if done.returncode:
        raise _explain(command, done.stderr.strip() or done.stdout.strip())
    return done.stdout


def _explain(command: str, said: str) -> SectoolError:
    if "Permission denied" in said or "Operation not permitted" in said:
        return PrivilegeError(f"{command}: not permitted", "run as root (CAP_NET_ADMIN)")
    hint = ""
    if re.search(
        r"not supported|No such file or directory|No chain/target/match|missing kernel module", said
    ):
        hint = (
            "the kernel needs xt_NFQUEUE, xt_connmark, xt_mark, xt_owner, xt_bpf and xt_CT (`modprobe xt_NFQUEUE`; some"
            " distributions ship them in a package such as linux-modules-extra)"
        )
    return SectoolError(f"{command} refuses our rules: {said}", hint)


# -- what was there before --------------------------------------------------------------------------------------


def _remember(run: Path, saved: dict[Family, str]) -> None:
    """Write down tables and sysctls as they are, unless an earlier install that was not removed did."""
    path = run / _BEFORE
    if path.exists():
        return
    record = {
        "sysctls": {name: _get_sysctl(name) for name in _SYSCTLS},
        "tables": {f.name: re.findall(r"^\*(\w+)$", text, re.MULTILINE) for f, text in saved.items()},
    }
    try:
        path.write_text(json.dumps(record), encoding="ascii")
    except OSError as e:
        raise SectoolError(
            f"cannot write {path}: {e.strerror}", "the run folder must exist and be writable"
        ) from None


def _recall(run: Path) -> dict[str, Any]:
    try:
        record = json.loads((run / _BEFORE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _drop_empty_tables(family: Family, before: list[str] | None) -> None:
    """Delete tables that only came with our rules. The kernel refuses, as a whole, if a chain holds a rule.

    iptables-nft makes tables and keeps them; without the program nft (or with iptables-legacy) they stay, empty.
    """
    nft = shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if before is None or nft is None:
        return
    for table in _HOOKS:
        if table in before:
            continue
        # iptables-save shows built-in chains that do not exist; nft shows what is there.
        listed = subprocess.run(
            [nft, "list", "table", family.name, table], capture_output=True, text=True, check=False
        )
        chains = re.findall(r"^\tchain (\S+) \{$", listed.stdout, re.MULTILINE)
        if listed.returncode or not set(chains) <= _BUILT_IN or "policy drop" in listed.stdout:
            continue
        batch = [f"delete chain {family.name} {table} {chain}" for chain in chains]
        batch.append(f"delete table {family.name} {table}")
        subprocess.run(
            [nft, "-f", "-"], input="\n".join(batch) + "\n", capture_output=True, text=True, check=False
        )


def _get_sysctl(name: str) -> str | None:
    try:
        return Path("/proc/sys", name).read_text(encoding="ascii").strip()
    except OSError:
        return None


def _set_sysctl(name: str, value: str) -> None:
    path = Path("/proc/sys", name)
    try:
        path.write_text(value, encoding="ascii")
    except OSError as e:
        raise SectoolError(
            f"cannot set {path} to {value}: {e.strerror}",
            "the kernel needs connection tracking (`modprobe nf_conntrack`) and root",
        ) from None
