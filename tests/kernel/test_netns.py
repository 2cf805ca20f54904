"""Entering namespaces, and one daemon in each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nfq import cgroup, netns
from sectool.errors import SectoolError
from tests.kernel.conftest import Namespace, Pair, make_namespace, wait_until

pytestmark = pytest.mark.kernel


def test_entering_by_path_or_process_and_coming_back(pair: Pair) -> None:
    home = netns.namespace_id()
    mount = cgroup.mount()
    sleeper = pair.b.popen("sleep", "60")
    with pair.a.enter():
        assert netns.namespace_id() == netns.namespace_id(pair.a.path) != home
        assert cgroup.mount() == mount, "mounts are what they were"
        with netns.enter(sleeper.pid):
            assert netns.namespace_id() == netns.namespace_id(pair.b.path)
        assert netns.namespace_id() == netns.namespace_id(pair.a.path)
    assert netns.namespace_id() == home


def test_an_error_inside_still_brings_the_thread_back(namespace: Namespace) -> None:
    home = netns.namespace_id()
    with pytest.raises(ZeroDivisionError), namespace.enter():
        _ = 1 / 0
    assert netns.namespace_id() == home


def test_only_the_thread_that_enters_moves(namespace: Namespace) -> None:
    seen: list[netns.NamespaceId] = []
    home = netns.namespace_id()
    with namespace.enter():
        thread = threading.Thread(target=lambda: seen.append(netns.namespace_id(os.getpid())))
        thread.start()
        thread.join()
    other: list[netns.NamespaceId] = []

    def inside() -> None:
        with namespace.enter():
            other.append(netns.namespace_id())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert other == [netns.namespace_id(namespace.path)]
    assert netns.namespace_id() == home


def test_a_throwaway_namespace_is_empty_and_gone_afterwards() -> None:
    home = netns.namespace_id()
    with netns.throwaway():
        assert netns.namespace_id() != home
        assert "eth0" not in Path("/proc/thread-self/net/dev").read_text()
    assert netns.namespace_id() == home


@pytest.mark.parametrize("what", ["/run/netns/st-none", 2**22 + 1, "/etc/hostname"])
def test_what_is_no_namespace_is_told(what: str | int) -> None:
    home = netns.namespace_id()
    with pytest.raises(SectoolError) as caught, netns.enter(what):
        pytest.fail("entered")
    assert caught.value.hint
    assert netns.namespace_id() == home


def test_one_daemon_in_each_namespace(namespace: Namespace, tmp_path: Path) -> None:
    with namespace.enter(), netns.NamespaceLock(tmp_path):
        assert netns.lock_holder() == os.getpid()
        with pytest.raises(SectoolError, match=f"process {os.getpid()} is the sectool daemon") as caught:
            netns.NamespaceLock(tmp_path).acquire()
        assert str(tmp_path) in caught.value.hint, "it is not the daemon of this run folder"
        (tmp_path / "agent.pid").write_text(f"{os.getpid()}\n")
        with pytest.raises(SectoolError) as caught:
            netns.NamespaceLock(tmp_path).acquire()
        assert str(tmp_path) not in caught.value.hint
        with make_namespace("two") as other, other.enter():
            assert netns.lock_holder() is None
            with netns.NamespaceLock():
                pass
    with namespace.enter():
        assert netns.lock_holder() is None
        with netns.NamespaceLock():
            pass


def test_the_lock_of_a_killed_daemon_is_free(namespace: Namespace) -> None:
    code = (
        "import sys\n"
        "from nfq.netns import NamespaceLock\n"
        "lock = NamespaceLock(); lock.acquire()\n"
        "print('locked', flush=True); sys.stdin.read()\n"
    )
    daemon = namespace.popen(sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == b"locked\n"
    with namespace.enter():
        assert netns.lock_holder() == daemon.pid
        with pytest.raises(SectoolError, match=f"process {daemon.pid} "):
            netns.NamespaceLock().acquire()
        daemon.kill()
        daemon.wait()
        wait_until(lambda: netns.lock_holder() is None, "the kernel to free the name")
        with netns.NamespaceLock():
            pass
