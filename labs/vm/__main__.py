"""Boot the lab's machines and see whether they stand the acceptance test: `sudo ./dev vm-test`.

    python -m labs.vm [--box FILE] [--kvm] [--two] [--work DIR] [--report FILE]

The box is built once for each requirements.lock and kept in .dev/vm. libvirtd and the machines run in namespaces of
their own, which end with this process: nothing of them is left. Needs root, and the packages that ./dev names.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from labs.vm.acceptance import checks, figures
from labs.vm.machines import MACHINES, ROOT, TWO, FailedError, Vagrant, libvirt, say
from sectool.errors import SectoolError

FOLDER = ROOT / ".dev" / "vm"
MAKES_A_BOX = (ROOT / "labs/vm/box.sh", ROOT / "requirements.lock")
FACTS = (
    ("system", "echo Debian $(cat /etc/debian_version), Linux $(uname -r) $(uname -v | cut -d' ' -f5-)"),
    ("sectool", "sectool --version"),
    ("unit", "systemd-analyze security --no-pager sectool.service | tail -n 1"),
)
EXCERPTS = (
    ("web", "sectool flows --last 6"),
    ("db", "sectool flows --last 10"),
    ("db", "journalctl -u sectool --no-pager -o short-monotonic -n 25"),
    ("ops", "journalctl -u sectool-ca --no-pager -o short-monotonic -n 10"),
    ("ops", "sectool ca hosts"),
)


def box() -> Path:
    """The box of this checkout; built if it is not there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    stamp = hashlib.sha256(b"".join(file.read_bytes() for file in MAKES_A_BOX)).hexdigest()[:12]
    file = FOLDER / f"sectool-{stamp}.box"
    if not file.exists():
        say(f"building {file.relative_to(ROOT)}")
        done = subprocess.run([str(ROOT / "labs/vm/box.sh"), str(file)], check=False)
        if done.returncode:
            raise FailedError("the box could not be built", f"see {file}.log")
    return file


def outside(arguments: argparse.Namespace) -> int:
    """Make a work folder and the namespaces, and go on inside of them."""
    if os.geteuid() != 0:
        raise SectoolError("this needs root: it makes namespaces and boots machines", "sudo ./dev vm-test")
    file = Path(arguments.box) if arguments.box else box()
    work = Path(tempfile.mkdtemp(prefix="sectool-vm-", dir=arguments.work))
    options = ["--inside", str(work), "--box", str(file.resolve()), "--report", str(arguments.report)]
    options += ["--kvm"] * arguments.kvm + ["--two"] * arguments.two
    try:
        return subprocess.run(
            [
                *("unshare", "--net", "--mount", "--propagation", "private"),
                *("--pid", "--fork", "--kill-child", "--mount-proc"),
                # libvirt's orphans become its children: it buries them.
                *("bash", "-c", '"$@"; exit $?', "init"),
                *(sys.executable, "-m", "labs.vm", *options),
            ],
            cwd=ROOT,
            check=False,
        ).returncode
    finally:
        shutil.rmtree(work, ignore_errors=True)


def inside(arguments: argparse.Namespace) -> int:
    """Boot, test, tell, destroy. 1 when a check failed."""
    work, report = Path(arguments.inside), Path(arguments.report)
    report.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"date: {dt.datetime.now(dt.UTC):%F %H:%M} UTC", f"host: Linux {os.uname().release}"]
    lines.append(f"processors of the machines: {'real (KVM)' if arguments.kvm else 'emulated (TCG)'}")
    failed = 0
    with libvirt(work):
        names = TWO if arguments.two else MACHINES
        machines = Vagrant(work, Path(arguments.box), kvm=arguments.kvm, names=names)
        asked = checks(machines)
        log = report.with_suffix(".log")
        log.unlink(missing_ok=True)
        try:
            say(f"vagrant up: {', '.join(names)} (its talk: {log})")
            took = machines.up(log)
            lines.append(f"vagrant up: {took:.0f} s, machines {', '.join(names)}")
            for machine in names:
                for name, command in FACTS:
                    lines.append(f"{machine}, {name}: {machines.ok(machine, command)}")
            for name, check in asked:
                begin = time.monotonic()
                try:
                    verdict = f"ok    {name}: {check(machines)}"
                except SectoolError as error:
                    verdict, failed = f"FAIL  {name}: {error.message}", failed + 1
                lines.append(f"{verdict} ({time.monotonic() - begin:.0f} s)")
                say(lines[-1])
            lines += figures(machines)
            for machine, command in EXCERPTS:
                said = machines.run(machine, command)
                lines.append(f"\n[{machine}] {command}\n{said.stdout.rstrip()}")
        except SectoolError as error:
            lines.append(f"FAIL  {error.message}")
            raise
        finally:
            report.write_text("\n".join(lines) + "\n", encoding="utf-8")
            begin = time.monotonic()
            machines.destroy()
            say(f"vagrant destroy: {time.monotonic() - begin:.0f} s")
    say(f"{len(asked) - failed} of {len(asked)} checks passed; {report}")
    return 1 if failed else 0


def main() -> int:
    """Exit code: 0 when everything passed."""
    parser = argparse.ArgumentParser(prog="./dev vm-test", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--box", help="a box for libvirt with labs/vm/box.sh's packages [default: built once]"
    )
    parser.add_argument("--kvm", action="store_true", help="real processors run the machines, by /dev/kvm")
    parser.add_argument("--two", action="store_true", help="only ops and db: ops asks what web would ask")
    parser.add_argument("--work", default="/var/tmp", help="where disks lie meanwhile, some GB [/var/tmp]")
    parser.add_argument("--report", default=FOLDER / "report.txt", help="what was seen [.dev/vm/report.txt]")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        return inside(arguments) if arguments.inside else outside(arguments)
    except SectoolError as error:
        sys.stderr.write(f"vm-test: {error.message}\n" + (f"         {error.hint}\n" if error.hint else ""))
        return 1


if __name__ == "__main__":
    sys.exit(main())
