"""A lab: hosts, services and daemons, made in one go and taken down to the last file.

All names follow from the lab's name (see labs.netns and labs.place), so `down` needs no bookkeeping to be
complete: it works after `kill -9`, after half an `up`, and twice. The file lab.json only says who made the
lab and how far it got.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs import netns, place, services
from labs.topology import ADS, API, DB_NAME, ENFORCED, OUTSIDE, SHOP, Host, Topology
from sectool.errors import SectoolError, UsageError

ROOT = place.in_memory() / "sectool-lab"
SECTOOL = str(Path(sys.executable).with_name("sectool"))
NAME = re.compile(r"[a-z0-9]{1,16}")
STOP_DEADLINE = 20.0  # seconds for daemons to end in order

Say = Callable[[str], None]


def _silent(_: str) -> None:
    return


@dataclass(frozen=True, slots=True)
class Result:
    """What a program did: exit code (negative: signal, None: still running at the deadline) and its words."""

    exit: int | None
    out: str
    err: str
    seconds: float


class Node:
    """One host of a running lab, and how to have programs run on it."""

    def __init__(self, lab: Lab, host: Host) -> None:
        self.lab = lab
        self.host = host
        self.name: str = host.name
        self.folder: Path = lab.folder / host.name
        self.state = lab.authority(host.root_of) if host.root_of else self.folder / "state"
        self.run_folder = self.folder / "run"

    @property
    def netns(self) -> Path:
        return netns.path(self.lab.name, self.name)

    def place(self, group: str = "shell") -> place.Place:
        return place.Place(self.lab.name, self.name, group)

    def environment(self) -> dict[str, str]:
        """What programs on this host find in their environment: the lab's, and where this host's daemon lives.

        `sectool` is the one that runs the lab, whatever else is installed on the machine.
        """
        programs = f"{Path(SECTOOL).parent}:{os.environ.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}"
        state, run = str(self.state), str(self.run_folder)
        return self.place().environment(PATH=programs, SECTOOL_STATE=state, SECTOOL_RUN=run)

    def popen(
        self,
        command: Sequence[str],
        *,
        group: str = "shell",
        out: Any = subprocess.PIPE,
        err: Any = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Start a program on this host, outside any workload."""
        return subprocess.Popen(
            self.place(group).argv(list(command)),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            env=self.environment(),
            cwd="/",
            start_new_session=True,
        )

    def execute(self, command: Sequence[str], *, timeout: float = 20.0, group: str = "shell") -> Result:
        """Run a program on this host to its end, or kill it at `timeout` seconds."""
        begin = time.monotonic()
        process = self.popen(command, group=group)
        try:
            out, err = process.communicate(timeout=timeout)
            return Result(process.returncode, out, err, time.monotonic() - begin)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            return Result(None, out, err, time.monotonic() - begin)

    def workload(self, labels: Sequence[str], command: Sequence[str]) -> list[str]:
        """`command` as a workload with these labels; on a host without an enforcer, the bare command."""
        if self.host.enforcer is None:
            return list(command)
        flags = [part for label in labels for part in ("--label", label)]
        return [SECTOOL, "run", *flags, "--", *command]

    def sectool(self, *args: str, timeout: float = 30.0, group: str = "shell") -> str:
        """Run `sectool ARGS` against this host's daemon; its standard output. SectoolError when it fails."""
        done = self.execute([SECTOOL, *args], timeout=timeout, group=group)
        if done.exit != 0:
            what = "did not end in time" if done.exit is None else f"failed (exit {done.exit})"
            raise SectoolError(
                f"on {self.name}: `sectool {' '.join(args)}` {what}: {done.err.strip() or done.out.strip()}"
            )
        return done.out

    def json(self, *args: str) -> Any:
        """`sectool ARGS -o json`, parsed."""
        return json.loads(self.sectool(*args, "-o", "json"))

    def log_tail(self, lines: int = 15) -> str:
        """The end of the daemon's log, for errors: the file itself goes with the lab."""
        try:
            text = (self.run_folder / "agent.log").read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(f"  | {line}" for line in text.splitlines()[-lines:])

    def workers(self) -> list[dict[str, Any]]:
        """The packet workers of this host's daemon, with `pid` and `stats`, as `sectool status` tells."""
        return list(self.json("status")["workers"])

    def queued(self) -> int:
        """How many packets this host's kernel has handed to its enforcer so far."""
        return sum(int(worker["stats"]["packets"]) for worker in self.workers()) + self.sealed()

    def sealed(self) -> int:
        """How many super-packets of encrypted flows, either way, so far."""
        return sum(int(worker["stats"]["bulk"]["packets"]) for worker in self.workers())

    def encrypted(self) -> int:
        """Encrypted flows that are open now."""
        return sum(int(worker["stats"]["encrypted"]) for worker in self.workers())


def _nginx(node: Node) -> services.Service:
    return services.nginx(node.lab.name, node.host, node.folder / "nginx")


def _partner(node: Node) -> services.Service:
    return services.nginx(node.lab.name, node.host, node.folder / "nginx", 8080, "hello from outside")


def _postgres(node: Node) -> services.Service:
    return services.postgres(node.lab.name, node.host, node.folder / "postgres", ENFORCED)


def _names(node: Node) -> services.Service:
    """The name server of the world outside: two names of the partner's, one for each of its addresses."""
    v4, v6 = str(node.host.v4[1].ip), str(node.host.v6[1].ip)
    folder = node.folder / "dnsmasq"
    return services.dnsmasq(node.lab.name, node.host, folder, {API: v4, ADS: v6}, (v4, v6))


def _inside_names(node: Node) -> services.Service:
    """The shop's own name server. It names the hosts that are there: a lab may have fewer."""
    names = {DB_NAME: node.lab["db"].host.ip4} if "db" in node.lab.nodes else {}
    return services.dnsmasq(node.lab.name, node.host, node.folder / "dnsmasq", names)


SERVICES: dict[str, Callable[[Node], services.Service]] = {
    "nginx": _nginx,
    "partner": _partner,
    "postgres": _postgres,
    "names": _names,
    "inside-names": _inside_names,
}


class Lab:
    """Everything under one name. `up` and `down` are the only ways in and out."""

    def __init__(self, name: str, topology: Topology = SHOP) -> None:
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no name for a lab", "use 1 to 16 small letters and digits")
        self.name: str = name
        self.topology = topology
        self.folder: Path = ROOT / name
        self.nodes = {host.name: Node(self, host) for host in topology.hosts}

    def __getitem__(self, host: str) -> Node:
        try:
            return self.nodes[host]
        except KeyError:
            raise UsageError(
                f"there is no host {host!r} in the lab", f"its hosts are: {', '.join(self.nodes)}"
            ) from None

    def authority(self, domain: str) -> Path:
        """State folder in which the root of a trust domain is kept."""
        return self.folder / "ca" / domain

    @property
    def enforcing(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.host.enforcer is not None]

    def record(self) -> dict[str, Any] | None:
        """lab.json, or None when there is none (no lab, or one whose `up` died before its first word)."""
        try:
            return dict(json.loads((self.folder / "lab.json").read_text()))
        except (OSError, ValueError):
            return None

    def _write(self, phase: str, temporary: bool) -> None:
        text = json.dumps(
            {
                "name": self.name,
                "phase": phase,
                "temporary": temporary,
                "owner": os.getpid(),
                "owner_started": _started(os.getpid()),
                "time": int(time.time()),
            }
        )
        new = self.folder / f".lab.json.{secrets.token_hex(4)}"
        new.write_text(text)
        new.replace(self.folder / "lab.json")

    # --- up ------------------------------------------------------------------------------------------------

    def up(self, say: Say = _silent, *, enforce: bool = True, temporary: bool = False) -> None:
        """Build hosts, start services, enrol and start daemons. When it fails it leaves nothing behind.

        `temporary` labs are taken down by whoever finds their owner dead (see `sweep`).
        """
        if os.geteuid() != 0:
            raise UsageError("a lab needs root: it makes network namespaces", "run it with sudo")
        ROOT.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            self.folder.mkdir(mode=0o755)
        except FileExistsError:
            raise UsageError(
                f"lab {self.name} is up already, or was left half-way",
                f"take it down: sectool lab down --name {self.name}",
            ) from None
        try:
            self._write("building", temporary)
            for node in self.nodes.values():
                node.folder.mkdir(mode=0o755)
            say(f"hosts {', '.join(self.nodes)}: network namespaces, joined in a namespace of their own")
            netns.create(self.topology, self.name)
            if names := [f"{s} on {node.name}" for node in self.nodes.values() for s in node.host.services]:
                say(f"services: {', '.join(names)}")
            with ThreadPoolExecutor(1) as beside:
                services_ = beside.submit(self._services)
                if enforce and self.enforcing:
                    self._enforce(say)
                services_.result()
            self._write("up", temporary)
        except BaseException:
            self.down()
            raise

    def _services(self) -> None:
        starting = [SERVICES[name](node) for node in self.nodes.values() for name in node.host.services]
        for service in starting:
            service.wait()

    def _enforce(self, say: Say) -> None:
        domains = sorted({node.host.enforcer.trust_domain for node in self.enforcing if node.host.enforcer})
        say(f"identities: roots of {', '.join(domains)}, and a CA for each host")
        self._enrol(domains)
        files = ", ".join(file.name for _, file in self.topology.policies) or "none"
        say(f"enforcers on {', '.join(node.name for node in self.enforcing)}; policies: {files}")
        self.start_daemons(self.enforcing, self.topology.policies)

    def _enrol(self, domains: Iterable[str]) -> None:
        """What `sectool ca init` and `sectool host enroll` do, without a program started for each."""
        from sectool.identity.enrolment import ca_directory, enroll_host, init_ca
        from sectool.identity.extensions import LabelConstraints
        from sectool.labels import LabelSet

        for domain in domains:
            home = self.authority(domain)
            home.mkdir(parents=True, mode=0o700)
            init_ca(home, domain)
        for node in self.enforcing:
            enforcer = node.host.enforcer
            assert enforcer is not None
            allowed: dict[str, tuple[str, ...]] = {}
            for key, _, value in (each.partition("=") for each in (*enforcer.labels, *enforcer.allow_labels)):
                allowed[key] = (*allowed.get(key, ()), value)
            enroll_host(
                node.state,
                node.name,
                ca_directory(self.authority(enforcer.trust_domain)),
                LabelSet.parse(",".join(enforcer.labels)),
                LabelConstraints(allowed, ""),
                ENFORCED,
            )
            # The machine's resolv.conf is not the lab's: answers of the lab's name servers count.
            settings = f"resolvers: [{', '.join(f'{net!r}' for net in (*ENFORCED, *OUTSIDE))}]\n"
            settings += "reject: true\n" if enforcer.reject else ""
            (node.state / "sectool.yaml").write_text(settings)

    def everywhere(self, commands: Mapping[str, Sequence[str]]) -> None:
        """`sectool ARGS` by host, all at once. SectoolError names the first host where it fails."""
        running = [
            (self[name], args, self[name].popen([SECTOOL, *args], group="sectool"))
            for name, args in commands.items()
        ]
        for node, args, process in running:
            command = f"on {node.name}: `sectool {' '.join(args)}`"
            try:
                _, err = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise SectoolError(f"{command} did not end within 60 s") from None
            if process.returncode != 0:
                raise SectoolError(f"{command} failed: {err.strip()}\n{node.log_tail()}")

    def start_daemons(self, nodes: Sequence[Node], policies: Iterable[tuple[str, Path]] = ()) -> None:
        """`sectool up --background` on these hosts, with the policy of their trust domain if one is given.

        Returns when each of them enforces.
        """
        files = dict(policies)
        commands = {}
        for node in nodes:
            file = files.get(node.host.enforcer.trust_domain) if node.host.enforcer else None
            commands[node.name] = ["up", "--background", *(("--policy", str(file)) if file else ())]
        self.everywhere(commands)

    # --- down ----------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Is there anything of this lab: folder, namespace, cgroup or process?"""
        return bool(
            self.folder.exists()
            or netns.existing(self.name)
            or place.cgroup_of(self.name).exists()
            or place.processes(self.name)
        )

    def down(self, say: Say = _silent) -> None:
        """Stop daemons, end what still runs, remove namespaces, cgroups and files. Safe to repeat."""
        ending = [handle for node in self.nodes.values() if (handle := _stop_daemon(node)) is not None]
        end = time.monotonic() + STOP_DEADLINE
        for handle in ending:
            select.select([handle], [], [], max(0.0, end - time.monotonic()))
            os.close(handle)
        place.end_processes(self.name)
        netns.destroy(self.name)
        place.remove_cgroups(self.name)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            raise SectoolError(f"cannot remove {self.folder}", "something writes to it or is mounted on it")
        if ROOT.is_dir() and not any(ROOT.iterdir()):
            ROOT.rmdir()
        say(f"lab {self.name} is down; nothing of it is left")


def _stop_daemon(node: Node) -> int | None:
    """Ask a host's daemon to go, as `sectool down` does; a handle that tells its end. None when there is none."""
    from sectool.api.client import Client
    from sectool.api.paths import Paths

    paths = Paths.resolve(str(node.state), str(node.run_folder))
    if not paths.control_socket.exists():
        return None
    try:
        with Client(paths.control_socket, timeout=STOP_DEADLINE) as control:
            return os.pidfd_open(int(control.call("down")["pid"]))
    except (SectoolError, OSError):  # dead already, or it hangs: the end of all processes is next
        return None


def _started(pid: int) -> int:
    """Start time of a process in clock ticks since boot (/proc/PID/stat field 22); 0 when it is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def labs() -> Iterator[Lab]:
    """Labs with a folder on this machine."""
    if ROOT.is_dir():
        for folder in sorted(ROOT.iterdir()):
            if NAME.fullmatch(folder.name):
                yield Lab(folder.name)


def sweep(say: Say = _silent) -> None:
    """Take down temporary labs whose owner is dead (a demo or a check of scenarios that was killed)."""
    for lab in labs():
        record = lab.record()
        if record and record["temporary"] and _started(int(record["owner"])) != record["owner_started"]:
            say(f"taking down lab {lab.name}, left by a program that was killed")
            lab.down()
