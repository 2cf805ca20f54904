"""What web, db and ops have to stand, each with a kernel of its own: a check returns what it saw, or raises."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from labs.vm.machines import FailedError, until

WEB, DB = "10.77.0.10", "10.77.0.20"
PATIENCE_S = 600.0  # for a boot, or a start, on emulated processors
KNOCK_S = 20.0
COUNT = "select count(*) from orders"


class Machines(Protocol):
    """Where commands are run: labs.vm.machines.Vagrant. `names`: which machines there are."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of ops, web and db those that run; where web does not, what it is told is told to ops."""

    def ok(self, machine: str, command: str, seconds: float = ...) -> str:
        """Output of a command that succeeds."""


Check = Callable[[Machines], str]


def ask(app: str, sql: str = COUNT, env: str = "") -> str:
    """A shell command: have psql ask db as a workload. `env`: what it claims, where its host lets it."""
    labels = f"--label app={app}" + (f" --label env={env}" if env else "")
    return f'PGCONNECT_TIMEOUT=60 sectool run {labels} -- psql -h {DB} -U shop -d postgres -Atc "{sql}" 2>&1'


def one(machines: Machines, machine: str, sql: str) -> str:
    """The one value that a question to a host's own record has."""
    return machines.ok(machine, f'sectool query "{sql}" -o csv').splitlines()[-1]


def answered(machines: Machines, machine: str, command: str, wanted: str) -> str:
    """What a command says, once it says what is wanted."""
    said = machines.ok(machine, f"{command} || true")
    if wanted not in said:
        raise FailedError(f"on {machine}: {command}: {said!r} instead of {wanted!r}")
    return said


def refused(machines: Machines, machine: str, command: str) -> str:
    """A command that must not succeed."""
    said = machines.ok(machine, f"if {command}; then echo PASSED; fi")
    if "PASSED" in said:
        raise FailedError(f"on {machine}: {command}: got through")
    return said


def reason(machines: Machines, machine: str, where: str) -> str:
    """Why the newest such flow was denied, from a host's own record; waits until it is there."""
    sql = f"select arg_max(drop_reason, event_start) from flows where action = 'deny' and {where}"
    found = ""

    def there() -> bool:
        nonlocal found
        found = one(machines, machine, sql).strip()
        return found not in ("", "NULL")

    until(f"{machine} has a denied flow where {where}", there, 60)
    return found


def allowed_and_encrypted(machines: Machines) -> str:
    """web asks db; both have it as encrypted, and on the wire nothing of it can be read."""
    watch = "systemd-run -q --unit=wire tcpdump -i eth1 -U -w /tmp/wire.pcap tcp port 5432"
    machines.ok("db", f"rm -f /tmp/wire.pcap; {watch}")
    until("tcpdump watches", lambda: machines.ok("db", "ls /tmp/wire.pcap || true") != "", 60)
    answered(machines, "web", ask("web"), "1000")
    answered(machines, "web", ask("web", "select article from orders where id = 3"), "article 3")
    packets = int(machines.ok("db", "systemctl stop wire; tcpdump -r /tmp/wire.pcap 2>/dev/null | wc -l"))
    plain = machines.ok("db", "grep -a -c -e article -e 'shop' /tmp/wire.pcap || true")
    if packets < 10 or plain != "0":
        raise FailedError(f"{packets} packets on the wire, {plain} lines of them in plain text")
    sql = "select arg_max(encryption, event_start) from flows where destination_port = 5432 and action = 'allow'"
    kinds = [one(machines, machine, sql) for machine in ("web", "db")]
    if kinds != ["encrypted", "encrypted"]:
        raise FailedError(f"on record as {kinds}")
    return f"1000 orders; {packets} packets on the wire, none with a word of them; on record as encrypted on both"


def pages(machines: Machines) -> str:
    """A job on ops, which stands for batch, may read web's pages."""
    said = answered(
        machines,
        "ops",
        f"sectool run --label app=batch --label env=prod -- curl -sS --max-time 30 http://{WEB}/",
        "hello from web",
    )
    return said.splitlines()[-1]


def denied_by_default(machines: Machines) -> str:
    """No rule lets a job ask db: refused, and both hosts say why."""
    refused(machines, "ops", ask("batch", env="prod"))
    why = reason(machines, "db", "destination_port = 5432 and source_labels like '%app=batch%'")
    if "default" not in why:
        raise FailedError(f"db says {why}")
    return f"db: {why}; ops: {reason(machines, 'ops', 'destination_port = 5432')}"


def denied_by_guardrail(machines: Machines) -> str:
    """dev does not reach prod, whatever intents say: the same question, from the same app, is allowed from prod."""
    refused(machines, "ops", ask("web", env="dev"))
    why = reason(machines, "db", "source_labels like '%env=dev%'")
    if "PCI" not in why and "guardrail" not in why:
        raise FailedError(f"db says {why}")
    return f"db: {why}"


def a_stranger(machines: Machines) -> str:
    """This machine is on their network, and has no identity."""
    for machine, address, port in (("db", DB, 5432), ("web", WEB, 80)):
        if machine not in machines.names:
            continue
        with suppress(OSError), socket.create_connection((address, port), KNOCK_S):
            raise FailedError(f"{address} port {port} lets somebody in who has no identity")
    sql = "source_ip = '10.77.0.1' and destination_port = 5432"
    return f"db: {reason(machines, 'db', sql)}"


def stopped_is_closed(machines: Machines) -> str:
    """While no enforcer runs nothing new passes; afterwards it does."""
    machines.ok("db", "systemctl stop sectool")
    try:
        refused(machines, "web", ask("web"))
    finally:
        machines.ok("db", "systemctl start sectool")
    answered(machines, "web", ask("web"), "1000")
    return "no new connection without the enforcer; the next one after its start"


def killed_and_back(machines: Machines) -> str:
    """A killed enforcer is started again by systemd; a connection that was open before goes on."""
    inner = ask("web", "select pg_sleep(90); select 'still here'").replace("2>&1", "").replace('"', '\\"')
    machines.ok(
        "web",
        f'rm -f /tmp/long; systemd-run -q --unit=long bash -c "{inner} >/tmp/long 2>&1"',
    )
    busy = "ss -Htn state established sport = :5432 | wc -l"
    until("a long question is asked", lambda: machines.ok("db", busy) != "0", 120)
    before = machines.ok("db", "systemctl show -p MainPID --value sectool")
    machines.ok("db", "systemctl kill -s KILL --kill-whom=all sectool")

    def back() -> bool:
        shown = machines.ok(
            "db", "systemctl is-active sectool; systemctl show -p MainPID --value sectool; true"
        )
        state, pid = shown.splitlines()
        return state == "active" and pid not in (before, "0")

    took = until("systemd starts the enforcer again", back, PATIENCE_S)
    answered(machines, "web", ask("web"), "1000")
    said = ""

    def ended() -> bool:
        nonlocal said
        said = machines.ok("web", "systemctl is-active -q long || cat /tmp/long")
        return said != ""

    until("the long question ends", ended, PATIENCE_S)
    if "still here" not in said:
        raise FailedError(f"the connection from before was lost: {said}")
    return f"back after {took:.0f} s; new connections pass, and the one from before ended well"


def boot_of(machines: Machines, machine: str) -> str:
    """Which boot of a machine this is; "" while it does not answer."""
    try:
        return machines.ok(machine, "cat /proc/sys/kernel/random/boot_id", 90)
    except FailedError:
        return ""


def rebooted(machines: Machines) -> str:
    """After a reboot db enforces before anybody says so: its policy, its identities, its refusals."""
    before = boot_of(machines, "db")
    machines.ok("db", "systemd-run -q --on-active=1 systemctl reboot")
    took = until("db boots", lambda: boot_of(machines, "db") not in ("", before), PATIENCE_S)
    active = "systemctl is-active sectool postgresql@15-main || true"
    until("db serves", lambda: machines.ok("db", active).split() == ["active"] * 2, PATIENCE_S)
    mode = machines.ok("db", "sectool mode")
    if "enforce" not in mode:
        raise FailedError(f"db came back with: {mode}")
    answered(machines, "web", ask("web"), "1000")
    refused(machines, "ops", ask("batch", env="prod"))
    since = machines.ok("db", "uptime -s")
    why = reason(machines, "db", f"source_labels like '%app=batch%' and event_start >= '{since}'")
    return f"answers again after {took:.0f} s and enforces; web asks, batch is denied: {why}"


_CHECKS: tuple[tuple[str, Check], ...] = (
    ("web asks db: allowed, encrypted", allowed_and_encrypted),
    ("a job reads web's pages: allowed", pages),
    ("a job asks db: denied, no rule allows it", denied_by_default),
    ("dev calls prod: denied by the guardrail", denied_by_guardrail),
    ("a machine without identity: denied", a_stranger),
    ("no enforcer on db: closed", stopped_is_closed),
    ("db's enforcer killed: back by itself, connections go on", killed_and_back),
    ("db rebooted: enforces again", rebooted),
)


def checks(machines: Machines) -> tuple[tuple[str, Check], ...]:
    """Name and check, of all that these machines can be asked."""
    return tuple((name, check) for name, check in _CHECKS if check is not pages or "web" in machines.names)


def figures(machines: Machines) -> list[str]:
    """What was measured between two kernels, a line each. Of use beside each other only: processors are emulated."""
    connect = f"""sectool run --label app=web -- python3 - <<'END'
import socket, statistics, time
took = []
for _ in range(11):
    begin = time.monotonic()
    socket.create_connection(("{DB}", 5432), 60).close()
    took.append((time.monotonic() - begin) * 1000)
print(f"median {{statistics.median(took):.1f}} ms, worst {{max(took):.1f}} ms of {{len(took)}}")
END"""
    mib = 4
    sql = f"select repeat('x', {mib * 2**20})"
    bulk = ask("web", sql).replace(" -Atc ", r" -At -o /dev/null -c '\timing' -c ")
    said = machines.ok("web", bulk)
    timed = re.search(r"Time: ([0-9.]+) ms", said)
    if timed is None:
        raise FailedError(f"psql does not say how long it took: {said}")
    return [
        f"connect, handshake and verdicts of both hosts included: {machines.ok('web', connect)}",
        f"{mib} MiB, encrypted: {mib * 8.388608 / float(timed[1]) * 1000:.1f} Mbit/s",
    ]
