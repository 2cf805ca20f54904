"""Workloads that lie about who they are, each lie told for real: none of them becomes the victim.

The victim is what a document, or `sectool run`, names; an attacker is another process on the same host that opens a
connection. What counts is the workload that its socket resolves to, by the code of the packet worker and the agent.

| lie | what stops it |
|---|---|
| renamed executable, script with the victim's name, forged argv and comm | the path and content of the running image |
| copied binary | path and user, where a document asks for them |
| own mount namespace with another file at the victim's path | a path counts where it leads to that file here, too |
| deleted or replaced executable | the path of a deleted file says so; content is of what runs |
| label in the environment, directory named like a container or a unit | cgroup paths count from the root down |
| moved cgroup, process outside its unit | the kernel binds a socket to the cgroup it was made in |
| socket made by one, handed to another | the same; several holders are nobody in particular |
| set-user-id program, another user | the kernel binds a socket to the user that made it |
| exec of another program | looked at anew for each connection |
| reused process id | facts are of the image that was seen, or there are none |
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nfq.attestation import FOREIGN_ROOT
from nfq.attribution import Attributed, Attributor
from nfq.cgroup import join
from nfq.sockdiag import SockDiag
from sectool.identity.containers import Container, container_of
from sectool.identity.workload import Facts, Workload, resolve
from sectool.policy import parse
from tests.kernel.conftest import Namespace
from tests.kernel.programs import LOCAL, SILENT, Program, outgoing

pytestmark = pytest.mark.kernel

VICTIM_UID, ATTACKER_UID = 65533, 65534
CONTAINER = "5e" * 32


class World:
    """A network namespace, a cgroup to make others in, and the victim's program on disk."""

    def __init__(self, space: Namespace, group: Path, folder: Path) -> None:
        self.space, self.group = space, group
        self.folder = folder
        self.real = Path(os.path.realpath(sys.executable))
        (folder / "bin").mkdir(mode=0o755)
        self.victim = folder / "bin" / "shopd"
        shutil.copy(self.real, self.victim)
        space.run("iptables", "-A", "INPUT", "-d", "127.0.0.9", "-j", "DROP")
        with space.enter():
            self.diag = SockDiag()
        self.attributor = Attributor(self.diag)

    def close(self) -> None:
        self.attributor.close()
        self.diag.close()

    def cgroup(self, *names: str) -> Path:
        """A cgroup below the test's own."""
        folder = self.group.joinpath(*names)
        folder.mkdir(parents=True)
        return folder

    def program(self, executable: Path | str, group: Path, uid: int = ATTACKER_UID) -> Program:
        return Program(self.space, group, executable, uid)

    def facts(self, what: Attributed | None) -> Facts:
        """All that is attested, with the container that the cgroup is by its name."""
        assert what is not None
        found = what.attest()
        assert found is not None
        ref = container_of(found.cgroup)
        return found if ref is None else replace(found, more=Container(ref, name="shop").facts())

    def who(self, facts: Facts, **match: str) -> Workload:
        """What these facts are when a document names a victim by `match`."""
        pairs = ", ".join(f'"{key.replace("__", ".")}": "{value}"' for key, value in match.items())
        text = f"kind: Workload\nname: victim\nmatch: {{{pairs}}}\nlabels: {{app: shop}}\n"
        return resolve(facts, parse(text).workloads, {}, host="h")


@pytest.fixture
def world(namespace: Namespace, cgroup: Path, tmp_path: Path) -> Iterator[World]:
    for folder in (tmp_path, *tmp_path.parents):  # the attacker's user has to get there
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)
    made = World(namespace, cgroup, tmp_path)
    yield made
    made.close()
    namespace.close()
    for procs in (cgroup / "cgroup.procs", *cgroup.rglob("cgroup.procs")):
        with contextlib.suppress(OSError):
            for raw in procs.read_text().split():
                os.kill(int(raw), signal.SIGKILL)


def test_the_victim_itself_is_the_victim(world: World) -> None:
    """The control: every document of the attacks below does name the real one."""
    program = world.program(world.victim, world.cgroup("shop.slice", "shop.service"), VICTIM_UID)
    facts = world.facts(outgoing(world.attributor, program))
    digest = hashlib.sha256(world.victim.read_bytes()).hexdigest()
    assert facts.executable == str(world.victim)
    for match in (
        {"executable": str(world.victim)},
        {"executable": f"{world.victim}*", "user": str(VICTIM_UID)},
        {"sha256": digest, "user": str(VICTIM_UID)},
        {"cgroup": f"/{world.group.name}/shop.slice/*"},
    ):
        assert world.who(facts, **match).labels["app"] == "shop"


def test_a_renamed_executable_with_forged_names(world: World) -> None:
    liar = world.folder / "elsewhere" / "shopd"
    liar.parent.mkdir(mode=0o755)
    shutil.copy(world.real, liar)
    with liar.open("ab") as file:
        file.write(b"another program")
    program = world.program(liar, world.cgroup("x"))
    program.do("import ctypes; ctypes.CDLL(None).prctl(15, b'shopd', 0, 0, 0)")
    facts = world.facts(outgoing(world.attributor, program))
    digest = hashlib.sha256(world.victim.read_bytes()).hexdigest()
    assert world.who(facts, executable=str(world.victim)).automatic
    assert world.who(facts, sha256=digest).automatic


def test_a_script_named_like_the_victim_is_its_interpreter(world: World) -> None:
    script = world.folder / "bin" / "reportd"
    script.write_text(
        f"#!{world.real}\nimport sys; code, uid = sys.argv[2:]; sys.argv = ['{script}', uid]\nexec(code)\n"
    )
    script.chmod(0o755)
    program = world.program(script, world.cgroup("x"))
    facts = world.facts(outgoing(world.attributor, program))
    assert facts.executable == str(world.real)
    assert world.who(facts, executable=str(script)).automatic


def test_a_copied_binary_of_another_user(world: World) -> None:
    copy = world.folder / "copy"
    shutil.copy(world.victim, copy)
    program = world.program(copy, world.cgroup("x"))
    facts = world.facts(outgoing(world.attributor, program))
    digest = hashlib.sha256(world.victim.read_bytes()).hexdigest()
    assert facts.sha256 == digest
    assert world.who(facts, sha256=digest, user=str(VICTIM_UID)).automatic
    assert world.who(facts, sha256=digest, executable=str(world.victim)).automatic


def test_another_file_at_the_victims_path_in_a_mount_namespace_of_the_users_own(world: World) -> None:
    group = world.cgroup("x")
    shell = f'mount --bind {world.real} {world.victim} && exec {world.victim} -c "$0" 0'
    code = _program_code().replace("os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))", "")
    process = world.space.popen(
        "setpriv", f"--reuid={ATTACKER_UID}", f"--regid={ATTACKER_UID}", "--clear-groups",
        "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, code,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=lambda: join(group, os.getpid()),
    )  # fmt: skip
    assert process.stdout is not None
    listening, connecting = map(int, process.stdout.readline().split())
    assert Path(f"/proc/{process.pid}/exe").readlink() == world.victim  # the lie
    facts = world.facts(world.attributor.outgoing(LOCAL, connecting, SILENT, listening))
    assert facts.executable == FOREIGN_ROOT + str(world.victim)
    for pattern in (str(world.victim), f"{world.victim}*", "/*"):
        assert world.who(facts, executable=pattern).automatic


def test_a_deleted_or_replaced_executable(world: World) -> None:
    spare = world.folder / "bin" / "spare"
    shutil.copy(world.real, spare)
    program = world.program(spare, world.cgroup("x"))
    spare.unlink()
    shutil.copy(world.victim, spare)  # at its path is something else now
    facts = world.facts(outgoing(world.attributor, program))
    assert facts.executable == f"{spare} (deleted)"
    assert facts.sha256 == hashlib.sha256(world.real.read_bytes()).hexdigest()
    assert world.who(facts, executable=str(spare)).automatic


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("user@1000.service", f"docker-{CONTAINER}.scope"), {"container__name": "shop"}),
        (("ssh.service", "docker", CONTAINER), {"container__id": CONTAINER}),
        (("user@1000.service", "shop.service"), {"systemd__unit": "shop.service"}),
        (("session-1.scope", "system.slice", "shop.service"), {"systemd__unit": "shop.service"}),
    ],
)
def test_a_directory_named_like_a_container_or_unit(
    world: World, names: tuple[str, ...], match: dict[str, str]
) -> None:
    """In the hierarchy as seen from the test's own cgroup, as whoever was given a subtree would make it."""
    program = world.program(world.victim, world.cgroup(*names))
    program.do("os.environ['container'] = 'docker'; os.environ['KUBERNETES_POD'] = 'shop'")
    facts = world.facts(outgoing(world.attributor, program))
    inside = replace(facts, cgroup=facts.cgroup.removeprefix(f"/{world.group.name}"))
    assert container_of(inside.cgroup) is None
    assert world.who(replace(inside, unit=_unit(inside.cgroup)), **match).automatic
    assert world.who(facts, **match).automatic


def test_moving_into_the_victims_cgroup_is_for_root_and_does_not_move_sockets(world: World) -> None:
    mine, victims = world.cgroup("mine"), world.cgroup("shop.service")
    program = world.program(world.victim, mine)
    program.do(
        f"""exec("try: open('{victims}/cgroup.procs', 'w').write('0')\\nexcept OSError as e: moved = e.errno")"""
    )
    program.do("assert moved == 13")
    join(victims, program.pid)  # as root would
    facts = world.facts(outgoing(world.attributor, program))
    assert facts.cgroup.endswith("/mine")
    assert world.who(facts, cgroup=f"/{world.group.name}/shop.service").automatic


def test_a_process_of_the_units_program_outside_the_unit(world: World) -> None:
    program = world.program(world.victim, world.cgroup("x"), VICTIM_UID)
    facts = world.facts(outgoing(world.attributor, program))
    assert world.who(facts, systemd__unit="shop.service", executable=str(world.victim)).automatic


def test_a_socket_handed_to_the_victim_stays_the_attackers(world: World) -> None:
    """SCM_RIGHTS to a process of another cgroup and user, and closed at home: it carries where it was made."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        mine, victims = world.cgroup("mine"), world.cgroup("shop.service")
        giver = _with_descriptor(world, world.real, mine, ATTACKER_UID, ours)
        taker = _with_descriptor(world, world.victim, victims, VICTIM_UID, theirs)
        giver.do(
            f"end = socket.socket(fileno={ours.fileno()}); socket.send_fds(end, [b'x'], [client.fileno()])"
        )
        giver.do("client.close()")
        taker.do(f"end = socket.socket(fileno={theirs.fileno()}); got = socket.recv_fds(end, 1, 1)[1]")
        facts = world.facts(outgoing(world.attributor, giver))
    assert facts.uid == ATTACKER_UID
    assert facts.cgroup.endswith("/mine")
    assert facts.executable == str(world.real)  # what runs where it was made; who holds it now is not asked
    for match in ({"user": str(VICTIM_UID)}, {"executable": str(world.victim)}, {"cgroup": "/shop.service"}):
        assert world.who(facts, **match).automatic


def test_a_set_user_id_program_after_the_connection(world: World) -> None:
    """The attacker opens a connection and becomes a set-user-id program of the victim, which inherits it."""
    program = world.program(world.real, world.cgroup("x"))
    shutil.copy(world.real, world.folder / "suid")
    os.chown(world.folder / "suid", VICTIM_UID, VICTIM_UID)
    (world.folder / "suid").chmod(0o6755)
    program.do("client.set_inheritable(True)")
    _become(program, world.folder / "suid")
    status = Path(f"/proc/{program.pid}/status").read_text().split("Uid:")[1].split()
    assert int(status[1]) == VICTIM_UID  # it runs as the victim now
    facts = world.facts(outgoing(world.attributor, program))
    assert facts.uid == ATTACKER_UID
    assert world.who(facts, user=str(VICTIM_UID)).automatic


def test_exec_of_another_program_is_seen_with_the_next_connection(world: World) -> None:
    """Within BELIEVED_S, in the same process, cgroup and user: the victim's program connected a moment ago."""
    program = world.program(world.victim, world.cgroup("x"))
    first = world.facts(outgoing(world.attributor, program))
    assert world.who(first, executable=str(world.victim)).name == "victim"
    # Everything is loaded before the exec, so that the second connection comes at once.
    code = "import socket;c=socket.socket();c.setblocking(False);"
    code += f"c.connect_ex(('127.0.0.9',{program.listening}));"
    code += "print(c.getsockname()[1],flush=True);input()"
    program.process.stdin.write(f"os.execv({str(world.real)!r}, ['x', '-S', '-c', {code!r}])\n".encode())  # type: ignore[union-attr]
    program.process.stdin.flush()  # type: ignore[union-attr]
    port = int(program.process.stdout.readline())  # type: ignore[union-attr]
    # However long that took: as if what was found before had been found just now.
    world.attributor._uniform = {
        group: known._replace(until=float("inf")) for group, known in world.attributor._uniform.items()
    }
    facts = world.facts(world.attributor.outgoing(LOCAL, port, SILENT, program.listening))
    assert facts.executable == str(world.real)
    assert world.who(facts, executable=str(world.victim)).automatic


def test_facts_of_a_reused_process_id_are_not_the_next_ones(world: World) -> None:
    """Attributed, ended, and the very process id taken by a process of another user in another cgroup."""
    program = world.program(world.victim, world.cgroup("shop"), VICTIM_UID)
    what = outgoing(world.attributor, program)
    taker = world.folder / "taker"
    shutil.copy(world.real, taker)
    program.end()
    group = world.cgroup("mine")
    pid = _process_with_id(program.pid, taker, group, ATTACKER_UID)
    try:
        assert pid == program.pid
        assert what.attest() is None
        # And of one that runs the same file, only what was attested of the socket.
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    pid = _process_with_id(program.pid, world.victim, group, ATTACKER_UID)
    try:
        facts = what.attest()
        assert facts is None or (facts.uid, facts.cgroup.rpartition("/")[2]) == (VICTIM_UID, "shop")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# -- tools of the attacks -------------------------------------------------------------------------------------------


def _program_code() -> str:
    from tests.kernel.programs import PROGRAM

    return PROGRAM


def _unit(cgroup: str) -> str:
    from sectool.identity.workload import systemd_unit

    return systemd_unit(cgroup)


def _with_descriptor(world: World, executable: Path, group: Path, uid: int, end: socket.socket) -> Program:
    end.set_inheritable(True)
    made = Program.__new__(Program)
    made.process = world.space.popen(
        str(executable), "-c", _program_code(), str(uid),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(end.fileno(),),
        preexec_fn=lambda: join(group, os.getpid()),
    )  # fmt: skip
    assert made.process.stdout is not None
    made.listening, made.connecting = map(int, made.process.stdout.readline().split())
    return made


def _become(program: Program, executable: Path) -> None:
    """Have a program exec `executable`, a Python, with all its open files; returns once it runs."""
    assert program.process.stdin is not None
    assert program.process.stdout is not None
    line = f"os.execv({str(executable)!r}, ['x', '-I', '-S', '-c', 'print(1, flush=True); input()'])\n"
    program.process.stdin.write(line.encode())
    program.process.stdin.flush()
    assert program.process.stdout.readline() == b"1\n"


def _process_with_id(pid: int, executable: Path, group: Path, uid: int) -> int:
    """Start a process under a given, free process id: clone3(2) with set_tid. Returns once it runs `executable`."""
    number = ctypes.c_int32(pid)
    args = (ctypes.c_uint64 * 11)()
    args[4] = signal.SIGCHLD
    args[8], args[9] = ctypes.addressof(number), 1
    libc = ctypes.CDLL(None, use_errno=True)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = libc.syscall(435, args, ctypes.sizeof(args))
    if child == 0:
        try:
            join(group, os.getpid())
            os.setgid(uid)
            os.setuid(uid)
            os.execv(executable, ["x", "-S", "-c", "import time; time.sleep(600)"])
        finally:
            os._exit(1)
    os.close(writer)
    assert child > 0, os.strerror(ctypes.get_errno())
    os.read(reader, 1)  # ends with the exec
    os.close(reader)
    return int(child)
