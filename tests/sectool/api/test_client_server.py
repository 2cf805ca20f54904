"""Both ends of the local API over a real unix socket."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sectool.api import wire
from sectool.api.client import Client
from sectool.api.paths import Paths
from sectool.api.server import Operation, Peer, Reply, Request, Server
from sectool.errors import Exit, NoDaemonError, PrivilegeError, SectoolError, StoreError, UsageError

DEADLINE = 10.0


async def echo(request: Request) -> Reply:
    return Reply(
        {"said": request.fields.get("say"), "uid": request.peer.uid, "pid": request.peer.pid}, request.payload
    )


async def refuse(request: Request) -> Reply:
    raise StoreError("half of it is missing", "look there")


async def defect(request: Request) -> Reply:
    raise KeyError("secret key material")


async def typed(request: Request) -> Reply:
    return Reply({"n": request.number("n"), "t": request.text("t", "-")})


OPERATIONS = {
    "echo": Operation(echo, writes=False),
    "refuse": Operation(refuse, writes=False),
    "defect": Operation(defect, writes=False),
    "typed": Operation(typed, writes=False),
    "change": Operation(echo, writes=True),
}


class Running:
    """A server on a thread of its own."""

    def __init__(
        self, path: Path, operations: Mapping[str, Operation] = OPERATIONS, group: str | None = None
    ) -> None:
        self.server = Server(path, operations, group)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.server.start(), self.loop).result(DEADLINE)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(), self.loop).result(DEADLINE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE)
        self.loop.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    running = Running(tmp_path / "control.sock")
    yield tmp_path / "control.sock"
    running.stop()


def test_answers_carry_fields_payload_and_the_kernels_word_on_the_caller(path: Path) -> None:
    with Client(path) as client:
        answer = client.call("echo", b"\x00" * 300_000, say="hello")
        assert (answer["said"], answer["uid"], answer["pid"]) == ("hello", os.geteuid(), os.getpid())
        assert answer.payload == b"\x00" * 300_000
        assert client.call("echo", say=2)["said"] == 2  # the same connection


def test_errors_keep_message_hint_and_exit_code(path: Path) -> None:
    with Client(path) as client, pytest.raises(StoreError) as caught:
        client.call("refuse")
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (
        "half of it is missing",
        "look there",
        Exit.PARTIAL,
    )


def test_a_defect_in_an_operation_tells_its_kind_only_and_the_server_lives_on(path: Path) -> None:
    with Client(path) as client:
        with pytest.raises(SectoolError) as caught:
            client.call("defect")
        assert "KeyError" in caught.value.message
        assert "secret" not in caught.value.message
        assert client.call("echo", say=1)["said"] == 1


@pytest.mark.parametrize(
    ("op", "fields"), [("typed", {"n": "x"}), ("typed", {"n": True}), ("typed", {"t": 1}), ("nope", {})]
)
def test_wrong_fields_and_unknown_operations_are_usage_errors(
    path: Path, op: str, fields: dict[str, Any]
) -> None:
    with Client(path) as client, pytest.raises(UsageError):
        client.call(op, **fields)


def test_the_socket_is_closed_to_others(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


@pytest.mark.parametrize(
    "junk", [b"GET / HTTP/1.0\r\n\r\n", b"\x00\x00\x00\x02[]", b"\xff" * 64, b"\x00\x00\x00\x04null"]
)
def test_junk_gets_a_refusal_and_harms_nobody(path: Path, junk: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(DEADLINE)
        raw.connect(str(path))
        raw.sendall(junk)
        frame = wire.read(raw)
        assert frame is not None
        assert frame.header["ok"] is False
        assert wire.read(raw) is None  # and hangs up
    with Client(path) as client:
        assert client.call("echo", say=1)["said"] == 1


@pytest.mark.kernel
def test_writing_is_for_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent != Path("/tmp") and parent.is_relative_to("/tmp"):
            parent.chmod(0o755)
    running = Running(tmp_path / "s", group="nogroup")
    try:
        program = (
            "import os,sys; from pathlib import Path; from sectool.api.client import Client\n"
            "os.setgroups([]); import grp; os.setgid(grp.getgrnam('nogroup').gr_gid); os.setuid(65534)\n"
            "c = Client(Path(sys.argv[1])); print(c.call('echo', say='read')['uid'])\n"
            "try: c.call('change')\n"
            "except Exception as e: print(type(e).__name__, e.exit_code.value, e.message)\n"
        )
        import subprocess
        import sys

        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "s")],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    finally:
        running.stop()
    assert done.stdout.splitlines() == ["65534", "UsageError 2 change is for root; you are nobody"]


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(NoDaemonError) as caught:
        Client(tmp_path / "none.sock").call("status")
    assert caught.value.exit_code == Exit.NO_DAEMON
    assert "sectool up" in caught.value.hint


def test_stale_socket_means_no_daemon_and_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NoDaemonError):
        Client(path).call("echo")
    running = Running(path)
    try:
        assert Client(path).call("echo", say=1)["said"] == 1
    finally:
        running.stop()
    assert not path.exists()


def test_a_server_that_hangs_up_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        thread = threading.Thread(target=lambda: listening.accept()[0].close())
        thread.start()
        with pytest.raises(NoDaemonError, match="ended the conversation"):
            Client(path).call("echo")
        thread.join()


def test_a_silent_server_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with pytest.raises(SectoolError, match="does not answer"):
            Client(path, timeout=0.2).call("echo")


def test_streams_end_with_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                assert wire.read(connection) is not None
                connection.sendall(wire.encode({"ok": True, "n": 1}) + wire.encode({"ok": True, "end": True}))

        thread = threading.Thread(target=serve)
        thread.start()
        assert [a.get("n") for a in Client(path).stream("tail")] == [1, None]
        thread.join()


def test_an_unknown_group_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no group 'st-none'"):
        Running(tmp_path / "s", group="st-none")


def test_peer_is_what_the_kernel_says() -> None:
    a, b = socket.socketpair()
    with a, b:
        assert Peer.of(a) == Peer(os.getpid(), os.getuid(), os.getgid(), tuple(sorted(os.getgroups())))


def test_paths_from_options_environment_and_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SECTOOL_STATE", raising=False)
    monkeypatch.delenv("SECTOOL_RUN", raising=False)
    assert Paths.resolve() == Paths(Path("/var/lib/sectool"), Path("/run/sectool"))
    monkeypatch.setenv("SECTOOL_RUN", str(tmp_path))
    assert Paths.resolve(state="x").state == Path.cwd() / "x"
    assert Paths.resolve().control_socket == tmp_path / "control.sock"


def test_permission_denied_is_a_privilege_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", denied)
    with pytest.raises(PrivilegeError) as caught:
        Client(tmp_path / "s").call("status")
    assert "sudo" in caught.value.hint
