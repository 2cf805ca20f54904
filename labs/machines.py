"""Scenarios on machines that are there: reached by ssh as `vagrant ssh-config` describes them, changed by sudo.

A machine has to be enrolled, with what labs.topology says of the host of its name. What it was enrolled with is kept
aside at the first scenario and put back at the start and the end of each: certificates, roots and settings. History
and policy go, so a machine has to say that it is for playing: by the file /etc/sectool-playground.
"""

from __future__ import annotations

import ipaddress
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from labs.lab import Result, Say
from labs.topology import ENFORCED, SHOP
from sectool.errors import SectoolError, UsageError

STANDS_FOR = {"batch": "ops"}  # a host that has no machine of its own, and whose it plays on
PATIENCE_S = 300.0  # for a start on an emulated machine
SLACK = 6.0  # times as long as in a namespace may a command take: the machine may be an emulated one
UNREACHABLE_S = 60.0  # beyond what the command itself may take
TIMED_OUT = 124  # what `timeout` ends with


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are on every machine. `aside`: what it was enrolled with, the work folder, what was left running."""

    state: str = "/var/lib/sectool"
    run: str = "/run/sectool"
    aside: str = "/var/lib/sectool-scenario"
    mark: str = "/etc/sectool-playground"

    @property
    def work(self) -> str:
        return f"{self.aside}/work"

    def fresh(self) -> str:
        """A shell script: nothing runs, the state is what was enrolled, and nothing else."""
        refusal = (
            f"its history and policy would be lost; if that is all right, make the file {self.mark} there"
        )
        return f"""\
set -e
if [ ! -e {self.mark} ]; then
  echo "{refusal}" >&2
  exit 1
fi
systemctl stop sectool 2>/dev/null || true
sectool down >/dev/null 2>&1 || true
mkdir -p {self.aside}
if [ -e {self.aside}/left ]; then
  while read -r group; do kill -- "-$group" 2>/dev/null || true; done <{self.aside}/left
fi
if [ ! -d {self.aside}/enrolled ]; then
  rm -rf {self.aside}/new
  mkdir {self.aside}/new
  for part in host ca trust sectool.yaml ca-service; do
    [ ! -e {self.state}/$part ] || cp -a {self.state}/$part {self.aside}/new/
  done
  mv {self.aside}/new {self.aside}/enrolled
fi
rm -rf {self.aside}/left {self.work}
find {self.state} -mindepth 1 -delete
cp -a {self.aside}/enrolled/. {self.state}/
"""

    def begin(self) -> str:
        """A shell script: ready for a scenario."""
        return self.fresh() + f"mkdir -p {self.work}\n"

    def end(self) -> str:
        """A shell script: as before the first scenario, but for history and policy."""
        return (
            self.fresh()
            + f"rm -rf {self.aside}\nsystemctl start sectool 2>/dev/null || sectool up --background\n"
        )


class Machines:
    """A Runner whose hosts are machines. `config` is a file for `ssh -F` with a Host for each."""

    def __init__(
        self,
        config: Path,
        memory: Path,
        hosts: Sequence[str],
        bare: Sequence[str] = (),
        layout: Layout | None = None,
    ) -> None:
        """UsageError when a host of the scenario has no machine."""
        try:
            words = [line.split() for line in config.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {config}: {error}", "make it: vagrant ssh-config > FILE") from None
        there = {name for line in words if line[:1] == ["Host"] for name in line[1:]}
        self.machines = {host: host if host in there else STANDS_FOR.get(host, host) for host in hosts}
        if missing := sorted(h for h, m in self.machines.items() if m not in there):
            raise UsageError(
                f"no machine for {', '.join(missing)} in {config}; it has {', '.join(sorted(there)) or 'none'}",
                "play this scenario on namespaces: leave --machines out",
            )
        self.config = config
        self.layout = layout or Layout()
        self.bare = frozenset(bare)
        self._memory = memory
        self._addresses: dict[str, str] = {}

    @property
    def addresses(self) -> Mapping[str, str]:
        if not self._addresses:
            self._addresses = {host: self._address(host) for host in self.machines}
        return self._addresses

    @property
    def memory(self) -> Path:
        return self._memory

    def build(self, say: Say, *, policy: bool, temporary: bool = False) -> None:
        """See Runner."""
        self._memory.mkdir(parents=True, exist_ok=True)
        try:
            self._build(say, policy)
        except BaseException:
            shutil.rmtree(self._memory, ignore_errors=True)
            raise

    def _build(self, say: Say, policy: bool) -> None:
        for machine in dict.fromkeys(self.machines.values()):  # each once
            say(f"{machine}: enrolled as before, no history, no policy")
            self._told(machine, self.layout.begin())
        files = {domain: file.read_text(encoding="utf-8") for domain, file in SHOP.policies}
        for host, machine in self.machines.items():
            enforcer = SHOP.host(host).enforcer if any(h.name == host for h in SHOP.hosts) else None
            if enforcer is None or host in self.bare:
                continue
            say(f"{machine}: enforces")
            self._told(machine, "sectool up --background")
            if policy:
                file = f"{self.layout.aside}/first-policy.yaml"
                apply = f"cat > {file} && sectool policy apply {file} --reason 'first policy'"
                self._told(machine, apply, files[enforcer.trust_domain])

    def exists(self) -> bool:
        """See Runner."""
        return self._memory.is_dir()

    def remove(self) -> None:
        """See Runner."""
        for machine in dict.fromkeys(self.machines.values()):
            self._told(machine, self.layout.end())
        shutil.rmtree(self._memory, ignore_errors=True)

    def work(self, host: str) -> str:
        """See Runner."""
        return self.layout.work

    def run(self, host: str, command: str, labels: Sequence[str] = (), *, timeout: float = 60.0) -> Result:
        """See Runner."""
        return self._ssh(self.machines[host], self._as(host, command, labels), timeout=timeout * SLACK)

    def start(self, host: str, command: str, labels: Sequence[str] = ()) -> None:
        """See Runner."""
        inner = shlex.quote(f"echo $$ >> {self.layout.aside}/left; {self._as(host, command, labels)}")
        self._told(self.machines[host], f"setsid nohup sh -c {inner} >/dev/null 2>&1 </dev/null &")

    def read(self, host: str, name: str) -> bytes:
        """See Runner."""
        done = self._raw(self.machines[host], f"cat {shlex.quote(f'{self.layout.work}/{name}')}", b"", 60.0)
        if done.returncode:
            raise SectoolError(
                f"cannot read {name} on {host}: {done.stderr.decode(errors='replace').strip()}"
            )
        return done.stdout

    def write(self, host: str, name: str, data: bytes) -> None:
        """See Runner."""
        done = self._raw(
            self.machines[host], f"cat > {shlex.quote(f'{self.layout.work}/{name}')}", data, 60.0
        )
        if done.returncode:
            raise SectoolError(
                f"cannot write {name} on {host}: {done.stderr.decode(errors='replace').strip()}"
            )

    def way_in(self, host: str) -> str:
        """See Runner."""
        return (
            f"ssh -t -F {self.config} {self.machines[host]} \"sudo sh -c 'cd {self.layout.work}; exec bash'\""
        )

    def _address(self, host: str) -> str:
        """The machine's address inside the enforced networks."""
        told = self._told(self.machines[host], "ip -4 -o address show scope global")
        inside = [ipaddress.ip_network(network) for network in ENFORCED]
        for word in told.split():
            try:
                address = ipaddress.ip_interface(word).ip
            except ValueError:
                continue
            if "/" in word and any(address in network for network in inside):
                return str(address)
        raise SectoolError(
            f"{self.machines[host]} has no address in {', '.join(ENFORCED)}", "see the Vagrantfile"
        )

    @staticmethod
    def _as(host: str, command: str, labels: Sequence[str]) -> str:
        known = [h for h in SHOP.hosts if h.name == host and h.enforcer is not None]
        if not labels or not known:
            return command
        flags = " ".join(f"--label {shlex.quote(label)}" for label in labels)
        return f"sectool run {flags} -- sh -c {shlex.quote(command)}"

    def _told(self, machine: str, command: str, stdin: str = "") -> str:
        done = self._ssh(machine, command, stdin=stdin, timeout=PATIENCE_S)
        if done.exit != 0:
            what = "did not end in time" if done.exit is None else (done.err or done.out).strip()
            raise SectoolError(f"on {machine}: `{command.splitlines()[-1]}`: {what}")
        return done.out

    def _ssh(self, machine: str, command: str, *, stdin: str = "", timeout: float) -> Result:
        begin = time.monotonic()
        done = self._raw(machine, command, stdin.encode(), timeout)
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        return Result(
            None if done.returncode == TIMED_OUT else done.returncode, out, err, time.monotonic() - begin
        )

    def _raw(
        self, machine: str, command: str, stdin: bytes, timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        """The machine itself ends what takes too long, with TIMED_OUT as its exit code."""
        folders = f"SECTOOL_STATE={self.layout.state} SECTOOL_RUN={self.layout.run}"
        inside = shlex.quote(f"export {folders} LC_ALL=C.UTF-8; {command}")
        ssh = ["ssh", "-F", str(self.config), "-o", "BatchMode=yes", machine]
        try:
            return subprocess.run(
                [*ssh, f"sudo -n timeout -k 5 {timeout} sh -c {inside}"],
                input=stdin,
                capture_output=True,
                check=False,
                timeout=timeout + UNREACHABLE_S,
            )
        except subprocess.TimeoutExpired:
            raise SectoolError(f"{machine} does not answer", "does it run? vagrant status") from None
        except FileNotFoundError:
            raise SectoolError(
                "there is no `ssh` on this machine", "install it: apt install openssh-client"
            ) from None
