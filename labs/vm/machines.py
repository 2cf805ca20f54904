"""Vagrant's machines by libvirt, where nothing but this process and its children knows of them.

Everything here runs in network, mount and process namespaces of its own (see labs.vm.__main__): libvirtd, its networks
and the machines end with them, however they end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sectool.errors import SectoolError

ROOT = Path(__file__).resolve().parent.parent.parent
MACHINES = ("ops", "web", "db")
TWO = ("ops", "db")  # where three are too many
CALLS_INSTEAD = {
    "web": "ops"
}  # who is told web's commands when there is no web: ops may vouch for app=web as well
BOX = "sectool/lab"
UP_S = 5400.0  # three machines on emulated processors; minutes where they are real ones
COMMAND_S = 300.0
# libvirt here is root's alone, and there is neither systemd nor a security module to tell of the machines.
QEMU_CONF = """
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
"""
LIBVIRTD_CONF = """
auth_unix_ro = "none"
auth_unix_rw = "none"
"""


class FailedError(SectoolError):
    """A machine did not do what it should."""


def say(text: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f">> {text}\n")


def until(what: str, holds: Callable[[], bool], seconds: float) -> float:
    """Wait until something holds; how long it took, in seconds. FailedError when it never does."""
    begin = time.monotonic()
    while not holds():
        if time.monotonic() - begin > seconds:
            raise FailedError(f"{what}: not within {seconds:.0f} s")
        time.sleep(1)
    return time.monotonic() - begin


@contextmanager
def libvirt(work: Path) -> Iterator[None]:
    """libvirtd, with its settings, state and logs below `work`."""
    for name in ("etc", "lib", "cache", "log"):
        (work / name).mkdir()
    _done("cp", "-a", "/etc/libvirt/.", str(work / "etc"))
    for file, text in (("qemu.conf", QEMU_CONF), ("libvirtd.conf", LIBVIRTD_CONF)):
        (work / "etc" / file).write_text(text)
    for name, place in (("etc", "/etc"), ("lib", "/var/lib"), ("cache", "/var/cache"), ("log", "/var/log")):
        Path(place, "libvirt").mkdir(exist_ok=True)
        _done("mount", "--bind", str(work / name), f"{place}/libvirt")
    Path("/run/libvirt").mkdir(exist_ok=True)
    _done("mount", "-t", "tmpfs", "-o", "mode=755", "libvirt", "/run/libvirt")
    _done("ip", "link", "set", "lo", "up")
    _done("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")  # as libvirt wants it, in this namespace
    running = []
    try:
        for name in ("virtlogd", "libvirtd"):
            with (work / f"{name}.out").open("wb") as out:
                command = [name, "-p", str(work / f"{name}.pid")]
                running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
        until(
            "libvirtd answers", lambda: _run("virsh", "-c", "qemu:///system", "version").returncode == 0, 120
        )
        yield
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(60)


class Vagrant:
    """Machines of the Vagrantfile, from a box file. `kvm`: whether real processors run them."""

    def __init__(self, work: Path, box: Path, *, kvm: bool, names: tuple[str, ...] = MACHINES) -> None:
        self.names = names
        self._work = work
        self._config = work / "ssh.conf"
        self._env = {
            **os.environ,
            "HOME": str(work),
            "VAGRANT_HOME": str(work / "vagrant"),
            "VAGRANT_DOTFILE_PATH": str(work / "dot"),
            "VAGRANT_DEFAULT_PROVIDER": "libvirt",
            "VAGRANT_CHECKPOINT_DISABLE": "1",
            "VAGRANT_NO_COLOR": "1",
            "SECTOOL_VM_BOX": BOX,
            "SECTOOL_VM_DRIVER": "kvm" if kvm else "qemu",
        }
        self.tell("validate", seconds=120)
        self.tell("box", "add", "--name", BOX, str(box), seconds=600)

    def tell(self, *words: str, seconds: float, log: Path | None = None) -> str:
        """A command of Vagrant to its end; what it said. FailedError with the end of that when it fails."""
        log = log or self._work / "vagrant.log"
        with log.open("ab") as out:
            begin = out.tell()
            code: int | str
            try:
                code = subprocess.run(
                    ["vagrant", *words],
                    cwd=ROOT,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    check=False,
                    timeout=seconds,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"not within {seconds:.0f} s"
        said = log.read_bytes()[begin:].decode("utf-8", "replace")
        if code != 0:
            raise FailedError(f"vagrant {' '.join(words)}: {code}\n{said[-3000:]}")
        return said

    def up(self, log: Path) -> float:
        """Boot, provision and join the machines; how long it took, in seconds. The whole talk goes to `log`."""
        begin = time.monotonic()
        self.tell("up", *self.names, seconds=UP_S, log=log)
        took = time.monotonic() - begin
        config = self.tell("ssh-config", *self.names, seconds=120)
        self._config.write_text(config[config.index("Host ") :])
        return took

    def destroy(self) -> None:
        """No machine, disk or network is left of it."""
        self.tell("destroy", "--force", seconds=300)

    def run(self, machine: str, command: str, seconds: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """Have root's shell on a machine run something; exit code 255 when the machine does not answer in time."""
        if machine not in self.names:
            machine = CALLS_INSTEAD[machine]
        begin = ["ssh", "-F", str(self._config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=60", machine]
        try:
            return subprocess.run(
                [*begin, "sudo -n env LC_ALL=C.UTF-8 bash -s"],
                input=command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(begin, 255, "", f"no answer within {seconds:.0f} s")

    def ok(self, machine: str, command: str, seconds: float = COMMAND_S) -> str:
        """The same; its output. FailedError when it fails."""
        done = self.run(machine, command, seconds)
        if done.returncode:
            raise FailedError(
                f"on {machine}: {command}: exit {done.returncode}\n{(done.stdout + done.stderr).strip()[-2000:]}"
            )
        return done.stdout.strip()


def _run(*command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, check=False)


def _done(*command: str) -> None:
    done = _run(*command)
    if done.returncode:
        raise FailedError(f"{' '.join(command)}: {done.stderr.decode('utf-8', 'replace').strip()}")
