"""What a measurement reads: iperf3, connbench, and how busy the machine was meanwhile."""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs.lab import Node
from sectool.errors import SectoolError
from tests.bench.rivals.rival import Endpoint

LABELS = ("app=client",)
OMIT = 1  # seconds of slow start that iperf3 leaves out
PATIENCE = 20.0  # seconds beyond its own time after which a program counts as stuck


def busy_ticks(stat: str) -> int:
    """Ticks that all CPUs spent on something, from /proc/stat: all but idle, iowait and what the host took (steal).

    Softirq and kernel threads, where much of a packet's way is walked, are in it. Guest time is within user time.
    """
    for line in stat.splitlines():
        if line.startswith("cpu "):
            user, nice, system, _idle, _iowait, irq, softirq = (int(word) for word in line.split()[1:8])
            return user + nice + system + irq + softirq
    raise SectoolError("/proc/stat has no line of all CPUs")


def iperf_gbit(text: str) -> float:
    """The receiver's rate in Gbit/s from what `iperf3 -J` says. SectoolError with its own words if it failed."""
    report = _report("iperf3", text)
    if "error" in report:
        raise SectoolError(f"iperf3 failed: {report['error']}")
    try:
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (KeyError, TypeError):
        raise SectoolError("iperf3 ended without a sum of what was received") from None


def connections(text: str) -> dict[str, float]:
    """What connbench says. SectoolError when nothing came through."""
    report = _report("connbench", text)
    if not report.get("connections"):
        raise SectoolError(f"no connection was made: {text.strip()}")
    return report


def _report(program: str, text: str) -> dict[str, Any]:
    try:
        report = json.loads(text)
    except ValueError:
        report = None
    if not isinstance(report, dict):
        raise SectoolError(f"{program} said no JSON object: {text.strip()[-200:] or 'nothing'}")
    return report


@dataclass(frozen=True, slots=True)
class Busy:
    """How busy the machine was in a span of time."""

    cpu_seconds: float
    seconds: float

    @property
    def cores(self) -> float:
        return self.cpu_seconds / self.seconds


class Stopwatch:
    """CPU of the whole machine from here on."""

    def __init__(self) -> None:
        self._ticks, self._begun = self._read(), time.monotonic()

    @staticmethod
    def _read() -> int:
        return busy_ticks(Path("/proc/stat").read_text())

    def stop(self) -> Busy:
        """The span since the start."""
        ticks = self._read() - self._ticks
        return Busy(ticks / os.sysconf("SC_CLK_TCK"), time.monotonic() - self._begun)


class Seat:
    """A shell as the workload app=client, in which measuring programs run: none of them waits to become a workload."""

    def __init__(self, client: Node) -> None:
        self._out, self._err = client.folder / "seat.out", client.folder / "seat.err"
        self._program = ""
        command = client.workload(LABELS, ["sh", "-c", 'while read -r line; do eval "$line"; done'])
        self._shell = subprocess.Popen(
            client.place("seat").argv(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=client.environment(),
            cwd="/",
            start_new_session=True,
        )

    def begin(self, command: list[str]) -> None:
        """Start a program."""
        self._program = Path(command[0]).name
        line = f"{shlex.join(command)} </dev/null >{self._out} 2>{self._err}; echo done\n"
        assert self._shell.stdin is not None
        self._shell.stdin.write(line.encode())
        self._shell.stdin.flush()

    def end(self, seconds: float) -> str:
        """What it said on its standard output, once it has ended."""
        assert self._shell.stdout is not None
        if not select.select([self._shell.stdout], [], [], seconds)[0]:
            raise SectoolError(f"{self._program} did not end within {seconds:.0f} s")
        if not os.read(self._shell.stdout.fileno(), 64):
            raise SectoolError("the workload app=client ended", f"its exit code is {self._shell.wait()}")
        return self._out.read_text() or self._err.read_text()

    def close(self) -> None:
        """No more programs."""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.kill()
        self._shell.wait()
        self._shell.stdin.close()
        self._shell.stdout.close()


def transfer(seat: Seat, to: Endpoint, flows: int, seconds: int) -> tuple[float, Busy]:
    """iperf3 for so many seconds after slow start: Gbit/s, and the machine in the middle of that time."""
    command = ["iperf3", "-c", to.address, "-p", str(to.bulk), "-t", str(seconds), "-O", str(OMIT), "-J"]
    for left in (1, 0):
        seat.begin([*command, "-P", str(flows)])
        time.sleep(OMIT + 0.1)
        watch = Stopwatch()
        time.sleep(seconds - 0.2)
        busy = watch.stop()
        said = seat.end(PATIENCE)
        try:
            return iperf_gbit(said), busy
        except SectoolError as error:
            if not left:
                raise
            # Its server may still be at the end of the transfer before, and takes one at a time.
            print(f"  {to.address}: {error.message}; again", file=sys.stderr)
            time.sleep(1)
    raise AssertionError


def connect(
    seat: Seat, program: Path, to: Endpoint, at_once: int, seconds: float, *, stay: bool = False
) -> tuple[dict[str, float], Busy]:
    """connbench: its report, and the machine meanwhile. `stay`: requests on connections that stay."""
    watch = Stopwatch()
    kind = "requests" if stay else "client"
    seat.begin([str(program), kind, to.address, str(to.echo), str(at_once), str(seconds)])
    return connections(seat.end(seconds + PATIENCE)), watch.stop()
