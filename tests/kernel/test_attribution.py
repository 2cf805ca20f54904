"""Who owns a socket, on a real kernel: one program, many of it, mixed cgroups, deleted programs, races."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import resource
import select
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfq.attribution import Attributed, Attributor, raise_descriptor_limit
from nfq.cgroup import Cgroups, join
from nfq.sockdiag import SockDiag
from tests.kernel.conftest import Namespace, wait_until
from tests.kernel.programs import LOCAL, SILENT, Program, incoming, outgoing

pytestmark = pytest.mark.kernel


@pytest.fixture
def attributor(namespace: Namespace) -> Iterator[Attributor]:
    """Looks at the namespace."""
    namespace.run("iptables", "-A", "INPUT", "-d", "127.0.0.9", "-j", "DROP")
    with namespace.enter():
        diag = SockDiag()
    made = Attributor(diag)
    yield made
    made.close()
    diag.close()


@pytest.fixture
def ended(namespace: Namespace, cgroup: Path) -> Iterator[Path]:
    """The test's cgroup; its processes end before it is removed."""
    yield cgroup
    namespace.close()
    for raw in (cgroup / "cgroup.procs").read_text().split():
        os.kill(int(raw), 9)


@pytest.fixture
def programs(tmp_path: Path) -> tuple[Path, Path]:
    """Two different executables that are both Python."""
    real = Path(os.path.realpath(sys.executable))
    copies = tmp_path / "one", tmp_path / "two"
    for copy in copies:
        shutil.copy(real, copy)
    return copies


def test_facts_of_a_program(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    program = Program(namespace, ended, programs[0], uid=65534)
    for found in (outgoing(attributor, program), incoming(attributor, program)):
        assert (found.pid, found.uid, found.cgroup_id) == (program.pid, 65534, ended.stat().st_ino)
        assert found.facts() == {
            "uid": 65534,
            "user": "nobody",
            "executable": str(programs[0]),
            "sha256": hashlib.sha256(programs[0].read_bytes()).hexdigest(),
            "cgroup": f"/{ended.name}",
            "unit": "",
            "pid": program.pid,
        }
    assert outgoing(attributor, program).key == incoming(attributor, program).key
    assert attributor.outgoing(LOCAL, 1, LOCAL, 2) is None
    assert attributor.incoming(LOCAL, 1, LOCAL, 2) is None


def test_many_processes_of_one_executable_share_a_key(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    several = [Program(namespace, ended, programs[0]) for _ in range(3)]
    keys = {outgoing(attributor, program).key for program in several}
    assert len(keys) == 1
    found = outgoing(attributor, several[2])
    assert not found.ambiguous
    assert found.pid == 0, "which of them is not claimed"
    facts = found.attest()
    assert facts is not None
    assert facts.executable == str(programs[0])
    assert facts.pid in {program.pid for program in several}


def test_another_user_cgroup_or_executable_is_another_key(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    inner = ended / "inner"
    inner.mkdir()
    base = outgoing(attributor, Program(namespace, ended, programs[0])).key
    others = [
        outgoing(attributor, Program(namespace, inner, programs[0])).key,
        outgoing(attributor, Program(namespace, ended, programs[0], uid=65534)).key,
        outgoing(attributor, Program(namespace, ended, programs[1])).key,
    ]
    assert len({base, *others}) == 4
    namespace.close()
    wait_until(lambda: not (inner / "cgroup.procs").read_text(), "the inner program to end")


def test_in_a_mixed_cgroup_each_socket_is_its_holders(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    one, two = (Program(namespace, ended, executable) for executable in programs)
    for program, executable in ((one, programs[0]), (two, programs[1])):
        for found in (outgoing(attributor, program), incoming(attributor, program)):
            assert found.pid == program.pid
            facts = found.attest()
            assert facts is not None
            assert facts.executable == str(executable)


def test_a_socket_held_by_two_executables_is_nobodys(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    one = Program(namespace, ended, programs[0])
    one.do(
        "child = subprocess.Popen(['sleep', '600'], pass_fds=[client.fileno()], stdin=-3, stdout=-3)"
    )  # -3: DEVNULL
    found = outgoing(attributor, one)
    assert found.ambiguous
    assert found.pid == 0
    facts = found.attest()
    assert facts is not None
    assert (facts.executable, facts.sha256, facts.uid) == ("", "", 0)
    assert facts.cgroup == f"/{ended.name}"
    assert not incoming(attributor, one).ambiguous, "the listener was not handed on"


def test_a_root_parent_does_not_stand_in_for_a_child_of_another_user(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    """The socket is root's, made before privileges were dropped; the only root process left is another program."""
    shell = Program(namespace, ended, programs[1])
    worker = Program(namespace, ended, programs[0])
    worker.do("os.setuid(65534)")
    found = incoming(attributor, worker)
    assert found.uid == 0
    facts = found.attest()
    assert facts is not None
    assert facts.executable == str(programs[0])
    assert found.pid == worker.pid != shell.pid


def test_without_any_process_left_it_is_ambiguous(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    """Its owner moved away: the cgroup the socket was made in is empty."""
    program = Program(namespace, ended, programs[0])
    before = outgoing(attributor, program)
    elsewhere = ended / "elsewhere"
    elsewhere.mkdir()
    join(elsewhere, program.pid)
    after = outgoing(attributor, program)
    assert after.ambiguous
    assert after.key[:2] == before.key[:2]
    program.end()
    wait_until(lambda: not (elsewhere / "cgroup.procs").read_text(), "the program to end")


def test_a_program_deleted_or_replaced_on_disk_is_what_runs(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    digest = hashlib.sha256(programs[0].read_bytes()).hexdigest()
    program = Program(namespace, ended, programs[0])
    fresh = outgoing(attributor, program)
    programs[0].unlink()
    programs[0].write_text("#!/bin/sh\necho something else\n")
    changed = "its link count and so its ctime changed"
    wait_until(lambda: outgoing(attributor, program).key != fresh.key, changed)  # within BELIEVED_S
    replaced = outgoing(attributor, program)
    facts = replaced.attest()
    assert facts is not None
    assert facts.executable == f"{programs[0]} (deleted)"
    assert facts.sha256 == digest
    assert fresh.attest() is None, "what the old key stood for is not there any more"


def test_facts_are_refused_when_the_process_has_become_another_program(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    program = Program(namespace, ended, programs[0])
    found = outgoing(attributor, program)
    assert program.process.stdin is not None
    program.process.stdin.write(b"os.execv('/bin/sleep', ['sleep', '600'])\n")
    program.process.stdin.flush()
    sleep = os.path.realpath("/bin/sleep")
    wait_until(lambda: str(Path(f"/proc/{program.pid}/exe").readlink()) == sleep, "the exec")
    assert found.attest() is None
    program.end()
    assert found.facts() is None


def ask(attributor: Attributor, what: Attributed) -> list[dict[str, Any] | None]:
    """Facts asked for without waiting: a list that fills when they are there."""
    answers: list[dict[str, Any] | None] = []
    attributor.facts_later(what, answers.append)
    return answers


def wait(attributor: Attributor, *answers: list[dict[str, Any] | None]) -> None:
    """Serve the attributor's descriptor until all these have come."""
    with select.epoll() as poll:
        poll.register(attributor.fd, select.EPOLLIN)

        def step() -> bool:
            if poll.poll(0.05):
                attributor.completed()
            return all(answers)

        wait_until(step, "the facts")


def test_facts_come_later_and_then_at_once(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    found = outgoing(attributor, Program(namespace, ended, programs[0], uid=65534))
    first, second = ask(attributor, found), ask(attributor, found)
    assert (first, second) == ([], [])
    wait(attributor, first, second)
    assert first == second == [found.facts()]
    assert first[0] is not None
    assert first[0]["sha256"] == hashlib.sha256(programs[0].read_bytes()).hexdigest()
    assert ask(attributor, found) == first, "known now"
    assert attributor._attestor.background.refused == 0


def test_a_giant_executable_stalls_nothing_and_has_no_hash(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    """Sparse files cost nothing to make. Nobody waits for one: the asker, or the facts of others behind it."""
    os.truncate(programs[0], (1 << 30) + 1)
    giants = [programs[0]]
    for n in range(3):
        giants.append(programs[0].with_name(f"giant{n}"))
        shutil.copy(programs[1], giants[-1])
        os.truncate(giants[-1], 1 << 30)
    found = [outgoing(attributor, Program(namespace, ended, giant)) for giant in giants]
    small = outgoing(attributor, Program(namespace, ended, programs[1]))
    started = time.monotonic()
    later = [ask(attributor, each) for each in found]
    behind = ask(attributor, small)
    assert time.monotonic() - started < 0.2
    wait(attributor, behind)
    assert not all(later[1:]), "the giants were not done first"
    wait(attributor, later[0])
    assert later[0][0] is not None
    assert (later[0][0]["executable"], later[0][0]["sha256"]) == (str(giants[0]), "")
    started = time.monotonic()
    at_once = found[1].attest()
    assert time.monotonic() - started < 0.2
    assert at_once is not None
    assert at_once.sha256 == ""


def test_facts_that_cannot_be_given_are_none(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    program = Program(namespace, ended, programs[0])
    found = outgoing(attributor, program)
    program.end()
    assert ask(attributor, found) == [None]


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Every call that would open a file fails with EMFILE."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[0]), before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in held:
            os.close(fd)


def test_without_descriptors_the_answer_is_ambiguous_and_nothing_raises(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    one, _ = (Program(namespace, ended, executable) for executable in programs)
    known = outgoing(attributor, one)
    attributor._holders.clear()
    with no_descriptors_left():
        mixed = outgoing(attributor, one)
        facts = ask(attributor, known), known.attest()
    assert mixed.ambiguous
    assert facts == ([None], None)
    assert attributor.undecided
    assert not outgoing(attributor, one).ambiguous, "as soon as there are some again"


def test_few_files_are_kept_open(attributor: Attributor, ended: Path) -> None:
    inner = [ended / f"g{n}" for n in range(300)]
    for folder in inner:
        folder.mkdir()
        attributor._members(folder.stat().st_ino)
    assert len(attributor._procs) == 256
    assert raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_a_forged_syn_does_not_get_the_owner_of_the_connection_it_names(
    namespace: Namespace, attributor: Attributor
) -> None:
    server = namespace.listen()
    port = server.getsockname()[1]
    client = namespace.connect("127.0.0.1", port)
    own = client.getsockname()[1]
    assert attributor.outgoing(LOCAL, own, LOCAL, port) is None, "connected"
    assert attributor.outgoing(LOCAL, port, LOCAL, own) is None, "accepted"
    assert attributor.outgoing(LOCAL, port, LOCAL, 1) is None, "listening"
    assert attributor.incoming(LOCAL, own, LOCAL, port) is None, "nobody listens where the client is"
    waiting = namespace.new_socket()
    waiting.setblocking(False)
    waiting.connect_ex(("127.0.0.9", port))
    own = waiting.getsockname()[1]
    assert attributor.outgoing(LOCAL, own, SILENT, port) is not None
    assert attributor.incoming(LOCAL, own, SILENT, port) is None


@pytest.mark.parametrize("family", ["v4", "link-local"])
def test_a_socket_bound_to_a_device_that_calls_its_own_host(
    namespace: Namespace, attributor: Attributor, family: str
) -> None:
    """The SYN leaves by the loopback device, its socket and listener are those of the device it is bound to."""
    v6 = family == "link-local"
    where = "fe80::77" if v6 else "10.78.0.1"
    namespace.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    for device in ("eth0", "eth1"):
        namespace.run("ip", "link", "set", device, "up")
    namespace.run("ip", "addr", "add", f"{where}/64" if v6 else f"{where}/24", "dev", "eth0", *["nodad"] * v6)
    kind = "ip6tables" if v6 else "iptables"
    namespace.run(kind, "-A", "OUTPUT", "-p", "tcp", "--dport", "7", "-j", "DROP")
    server, client = (namespace.new_socket(socket.AF_INET6 if v6 else socket.AF_INET) for _ in range(2))
    for sock in (server, client):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    server.bind(("::" if v6 else "0.0.0.0", 7))
    server.listen()
    with namespace.enter():
        index = socket.if_nametoindex("eth0")
    client.setblocking(False)
    client.connect_ex((where, 7, 0, index) if v6 else (where, 7))
    own, raw = client.getsockname()[1], ipaddress.ip_address(where).packed
    assert attributor.outgoing(raw, own, raw, 7) is None
    assert attributor.incoming(raw, 7, raw, own) is None
    for number in (index, 1):
        assert attributor.outgoing(raw, own, raw, 7, number) is not None
        assert attributor.incoming(raw, 7, raw, own, number) is not None
    with namespace.enter():
        other = socket.if_nametoindex("eth1")
    assert attributor.outgoing(raw, own, raw, 7, other) is None
    assert attributor.incoming(raw, 7, raw, own, other) is None


def test_a_syn_on_an_accepted_connection_is_the_listeners(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    """Accepted by another user than the one that listens: the listener's owner would take the next connection."""
    program = Program(namespace, ended, programs[0])
    listener = incoming(attributor, program)
    program.do("server.setblocking(True)")
    client = namespace.connect("127.0.0.1", program.listening)
    program.do("peer = server.accept()[0]; os.fchown(peer.fileno(), 65534, 65534)")
    found = attributor.incoming(LOCAL, program.listening, LOCAL, client.getsockname()[1])
    assert found is not None
    assert (found.uid, found.key) == (0, listener.key)


def test_many_descriptors_make_it_ambiguous_and_cost_is_bounded(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    hoarder, other = (Program(namespace, ended, executable) for executable in programs)
    assert not outgoing(attributor, other).ambiguous
    attributor._holders.clear()
    hoarder.do("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))")
    hoarder.do("kept = [os.dup(0) for _ in range(10000)]")
    started = time.process_time()
    for _ in range(100):
        assert outgoing(attributor, other).ambiguous
    assert time.process_time() - started < 1.5, "after some 32,768 looks in one second none are made"
    assert attributor.undecided == 100


def test_a_holder_is_remembered_and_verified(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    one, two, _ = (Program(namespace, ended, executable) for executable in (*programs, programs[0]))
    first = incoming(attributor, one)
    assert len(attributor._holders) == 1
    looked = dict(attributor._spent)
    assert looked[first.cgroup_id] > 0
    assert incoming(attributor, one).key == first.key
    assert attributor._spent == looked, "found without a search"
    elsewhere = ended / "elsewhere"
    elsewhere.mkdir()
    join(elsewhere, one.pid)
    assert incoming(attributor, one).ambiguous, "its holder left the cgroup"
    join(ended, one.pid)
    assert incoming(attributor, one).key == first.key
    one.do("server.close()")
    assert attributor.incoming(LOCAL, one.listening, LOCAL, 1) is None
    assert not incoming(attributor, two).ambiguous
    one.end()
    wait_until(lambda: not (elsewhere / "cgroup.procs").read_text(), "the program to end")


def test_a_process_that_cannot_be_looked_at_makes_it_ambiguous(
    namespace: Namespace, ended: Path, programs: tuple[Path, Path], tmp_path: Path
) -> None:
    """A /proc in which one process's executable is a link that cannot be followed (ELOOP), the other's is real."""
    one, two = Program(namespace, ended, programs[0]), Program(namespace, ended, programs[0])
    proc = tmp_path / "proc"
    for program in (one, two):
        (proc / str(program.pid)).mkdir(parents=True)
        (proc / str(program.pid) / "exe").symlink_to(programs[0])
    with namespace.enter():
        diag = SockDiag()
    made = Attributor(diag, proc=proc)
    assert not incoming(made, one).ambiguous
    (proc / str(two.pid) / "exe").unlink()
    (proc / str(two.pid) / "exe").symlink_to("exe")
    wait_until(lambda: incoming(made, one).ambiguous, "it to be noticed")  # within BELIEVED_S
    assert made.undecided == 1
    made.close()
    diag.close()


def test_a_half_open_connection_does_not_hide_the_listener(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    program = Program(namespace, ended, programs[0])
    client = namespace.new_socket()
    client.bind(("127.0.0.1", 0))
    client.connect(
        ("127.0.0.1", program.listening)
    )  # not accepted: the kernel's own socket, without an inode
    found = attributor.incoming(LOCAL, program.listening, LOCAL, client.getsockname()[1])
    assert found is not None
    assert found.pid == program.pid
    assert found.key == incoming(attributor, program).key


def test_caches_do_not_keep_dead_cgroups_alive(
    namespace: Namespace, attributor: Attributor, ended: Path, programs: tuple[Path, Path]
) -> None:
    inner = ended / "inner"
    inner.mkdir()
    program = Program(namespace, inner, programs[0])
    found = outgoing(attributor, program)
    assert found.attest() is not None
    program.end()
    wait_until(lambda: not (inner / "cgroup.procs").read_text(), "the program to end")
    inner.rmdir()
    assert found.attest() is None
    assert attributor._members(found.cgroup_id) == b""


def test_cgroup_ids_and_paths(ended: Path) -> None:
    groups = Cgroups()
    odd = ended / "a b\\c"
    odd.mkdir()
    number = odd.stat().st_ino
    assert groups.path(number) == f"/{ended.name}/a b\\c"
    assert groups.id_of(f"/{ended.name}/a b\\c") == number
    assert groups.path(1) == "/"
    assert groups.folder(number) == odd
    groups._by_handle = False
    groups._paths.clear()
    assert groups.path(number) == f"/{ended.name}/a b\\c", "and by searching, where handles are not permitted"
    odd.rmdir()
    assert groups.path(number) is None
    assert groups.path(2**63) is None
    groups.close()


def test_the_socket_of_a_dead_listener_is_nobodys(namespace: Namespace, attributor: Attributor) -> None:
    server = namespace.listen()
    port = server.getsockname()[1]
    assert attributor.incoming(LOCAL, port, LOCAL, 1) is not None
    server.shutdown(socket.SHUT_RDWR)
    assert attributor.incoming(LOCAL, port, LOCAL, 1) is None
