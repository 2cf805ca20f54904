"""The datapath beside its rivals: throughput, connections, requests, and what each costs, rounds interleaved.

Every case is a pair of hosts of its own, all up at once, so that each round visits all of them in turn. Everything runs
under reno: tests.bench.wire makes sure. What a case is:

    bare                             nothing between the hosts
    plain, encrypted                 two enforcers, a rule without and with `encrypted`
    encrypted-mtu-gro, -nogro        as encrypted, the wire carries segments of MTU size, receivers with or without GRO
    *-loss1, *-loss01                a router loses 1 % or 0.1 % of those segments each way; receivers have GRO
    wireguard-go, nebula, openvpn    tunnels in userspace
    stunnel, haproxy, nginx          TLS 1.3 proxies on both hosts

Latency is from the start of connect(2) to the first byte echoed: a proxy's own accept says nothing about the connection
behind it. CPU is the machine's (/proc/stat), both hosts, client and server included. One round is a quick look: it
measures for a second where it takes three otherwise.
"""

from __future__ import annotations

import importlib
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from labs.incidents import wait_until
from labs.lab import Lab
from labs.services import listening
from labs.topology import Enforcer, Topology, host
from sectool.errors import SectoolError, UsageError
from tests.bench.handshake import compile_client
from tests.bench.meters import Seat, connect, transfer
from tests.bench.pair import DOMAIN, SYSCTLS
from tests.bench.rivals.rival import BULK, ECHO, Endpoint
from tests.bench.rows import PartialError, Row, compare, row
from tests.bench.wire import CLEAR, CONGESTION, Wire, lay

NOTE = (
    f"datapath: congestion control {CONGESTION}; latency to the first byte echoed; CPU of the whole machine"
)
HERE = Path(__file__).parent
AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Case:
    """`policy`: the enforcers' file, none without enforcers. `rival`: its module. `connects`: measure those too."""

    policy: str = ""
    rival: str = ""
    wire: Wire = CLEAR
    connects: bool = True


_PLAIN, _ENCRYPTED = "bench.yaml", "bench-encrypted.yaml"
_ONE_PERCENT = Wire(segments=True, gro=True, loss=0.01)
CASES: dict[str, Case] = {
    "bare": Case(),
    "plain": Case(_PLAIN),
    "encrypted": Case(_ENCRYPTED),
    "encrypted-mtu-gro": Case(_ENCRYPTED, wire=Wire(segments=True, gro=True), connects=False),
    "encrypted-mtu-nogro": Case(_ENCRYPTED, wire=Wire(segments=True), connects=False),
    "encrypted-loss1": Case(_ENCRYPTED, wire=_ONE_PERCENT, connects=False),
    "encrypted-loss01": Case(_ENCRYPTED, wire=Wire(segments=True, gro=True, loss=0.001), connects=False),
    "wireguard-go": Case(rival="wireguard_go"),
    "wireguard-go-loss1": Case(rival="wireguard_go", wire=_ONE_PERCENT, connects=False),
    "nebula": Case(rival="nebula"),
    "openvpn": Case(rival="openvpn"),
    "stunnel": Case(rival="stunnel"),
    "haproxy": Case(rival="haproxy"),
    "nginx": Case(rival="nginx"),
}
UNITS = {
    "throughput_1": "Gbit/s",
    "throughput_8": "Gbit/s",
    "gbit_per_core": "Gbit/s",
    "cpu_per_gb": "s/GB",
    "connects_seq": "1/s",
    "connects_32": "1/s",
    "connect_p50": "µs",
    "connect_p99": "µs",
    "cpu_per_connection": "µs",
    "requests_1": "1/s",
    "requests_32": "1/s",
    "connect_errors": "count",
}
# Ratios beyond those to bare: what the datapath is held against.
BESIDE = (
    ("encrypted", "wireguard-go", ("throughput_1", "throughput_8", "gbit_per_core")),
    ("encrypted", "nebula", ("throughput_1", "connects_seq", "connects_32")),
    ("encrypted", "nginx", ("throughput_1", "throughput_8", "gbit_per_core", "connects_seq", "connects_32")),
    ("encrypted-mtu-gro", "encrypted", ("throughput_1",)),
    ("encrypted-mtu-nogro", "wireguard-go", ("throughput_1",)),
    ("encrypted-loss1", "wireguard-go-loss1", ("throughput_1",)),
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A case that is up: measured again and again."""

    case: Case
    seat: Seat
    to: Endpoint
    program: Path

    def one_round(self, quick: bool) -> dict[str, float]:
        """Every metric of the case once."""
        bulk, small = (1, 0.7) if quick else (3, 2.0)
        rate, busy = transfer(self.seat, self.to, 1, bulk)
        found = {
            "throughput_1": rate,
            "throughput_8": transfer(self.seat, self.to, 8, bulk)[0],
            "gbit_per_core": rate / busy.cores,
            "cpu_per_gb": busy.cores / (rate / 8),
        }
        if not self.case.connects:
            return found
        one, _ = connect(self.seat, self.program, self.to, 1, small)
        many, busy = connect(self.seat, self.program, self.to, AT_ONCE, small)
        asked = {n: connect(self.seat, self.program, self.to, n, small, stay=True)[0] for n in (1, AT_ONCE)}
        return found | {
            "connects_seq": one["rate"],
            "connects_32": many["rate"],
            "connect_p50": one["echo_p50"],
            "connect_p99": one["echo_p99"],
            "cpu_per_connection": busy.cpu_seconds / many["connections"] * 1e6,
            "requests_1": asked[1]["rate"],
            "requests_32": asked[AT_ONCE]["rate"],
            "connect_errors": one["errors"] + many["errors"] + sum(a["errors"] for a in asked.values()),
        }


def topology(case: Case) -> Topology:
    """Two hosts: on a cable, or with a namespace between them that becomes a router."""
    enforcer = Enforcer(DOMAIN, (), ("app=*",)) if case.policy else None
    return Topology(
        hosts=(host("client", 1, enforcer), host("server", 2, enforcer)),
        policies=((DOMAIN, HERE / case.policy),) if case.policy else (),
        bridge=case.wire.routed,
        sysctls=SYSCTLS,
    )


def _serve(lab: Lab, program: Path) -> None:
    server = lab["server"]
    for port, command in (
        (BULK, ["iperf3", "-s", "-p", str(BULK)]),
        (ECHO, [str(program), "server", str(ECHO)]),
    ):
        server.popen(server.workload(("app=server",), command), out=subprocess.DEVNULL)
        wait_until(f"{command[0]} listens", lambda p=port: listening(server.netns, p))  # type: ignore[misc]


def _stage(lab: Lab, case: Case, program: Path, stack: ExitStack) -> Stage:
    lab.up(temporary=True)
    lay(case.wire, lab)
    _serve(lab, program)
    to = Endpoint(lab["server"].host.ip4)
    if case.rival:
        to = importlib.import_module(f"tests.bench.rivals.{case.rival}").start(lab)
    seat = Seat(lab["client"])
    stack.callback(seat.close)
    stage = Stage(case, seat, to, program)

    def warm() -> bool:
        try:
            return connect(seat, program, to, 1, 0.2)[0]["errors"] == 0
        except SectoolError:
            return False

    wait_until("a first connection", warm)
    return stage


class Failures:
    """Cases that did not come through, told at once and again at the end."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}

    def add(self, name: str, error: SectoolError) -> None:
        self.words[name] = error.message
        print(f"  {name} failed: {error.message}", file=sys.stderr)


@contextmanager
def stages(cases: Mapping[str, Case], failures: Failures) -> Iterator[dict[str, Stage]]:
    """All cases, up at once; everything of them removed at the end."""
    token = secrets.token_hex(3)
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="sectool-bench-") as folder:
        program = compile_client(Path(folder))
        labs = {
            name: Lab(f"d{number:02}{token}", topology(case))
            for number, (name, case) in enumerate(cases.items())
        }
        for lab in labs.values():
            stack.callback(lab.down)
        made: dict[str, Stage] = {}
        with ThreadPoolExecutor(2) as pool:
            waiting = {
                name: pool.submit(_stage, lab, cases[name], program, stack) for name, lab in labs.items()
            }
            for name, future in waiting.items():
                try:
                    made[name] = future.result()
                except SectoolError as error:
                    failures.add(name, error)
        yield made


def select(names: Collection[str]) -> dict[str, Case]:
    """The cases of these names, all if none is named, in their order. UsageError if there is no such case."""
    if unknown := sorted(set(names) - set(CASES)):
        raise UsageError(f"there is no case {', '.join(unknown)}", f"the cases are: {', '.join(CASES)}")
    return {name: case for name, case in CASES.items() if not names or name in names}


def rows(rounds: int, cases: Collection[str] = ()) -> list[Row]:
    """All metrics of the cases (default: all). PartialError, with the rows of the others, when a case failed."""
    chosen, failures = select(cases), Failures()
    measured: dict[str, list[dict[str, float]]] = {}
    with stages(chosen, failures) as running:
        for _ in range(rounds):
            for name, stage in running.items():
                if name in failures.words:
                    continue
                try:
                    measured.setdefault(name, []).append(stage.one_round(quick=rounds == 1))
                except SectoolError as error:
                    failures.add(name, error)
    for name in failures.words:
        measured.pop(name, None)
    made = summarize(measured)
    if failures.words:
        raise PartialError(f"these cases failed: {', '.join(failures.words)}", made)
    return made


def summarize(measured: Mapping[str, list[dict[str, float]]]) -> list[Row]:
    """Rows of what was measured, by case and round: each beside bare, then what the datapath is held against."""
    table: dict[tuple[str, str], Row] = {}
    for name, found in measured.items():
        for metric in found[0]:
            values = [one[metric] for one in found]
            if metric != "connect_errors" or any(values):
                table[name, metric] = row("datapath", name, metric, UNITS[metric], values)
    out = []
    for (name, metric), one in table.items():
        base = table.get(("bare", metric))
        out.append(one if base is None or name == "bare" else compare(one, base))
    for name, other, metrics in BESIDE:
        for metric in metrics:
            if (name, metric) in table and (other, metric) in table:
                beside = compare(table[name, metric], table[other, metric])
                out.append({**beside, "metric": f"{metric} beside {other}"})
    return out
