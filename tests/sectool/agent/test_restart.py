"""A daemon that reloads and restarts in place: what changes at once, what waits, and that connections do not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.sectool.agent.conftest import POLICY, Host, alive, until

pytestmark = [pytest.mark.kernel, pytest.mark.long]

SERVER = """
import socket, threading
server = socket.create_server(("127.0.0.1", 5432))
print("listening", flush=True)
def echo(client):
    while data := client.recv(65536):
        client.sendall(data)
while True:
    threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
"""
# Says what the server echoes, line by line.
CLIENT = """
import socket, sys
sock = socket.create_connection(("127.0.0.1", 5432), 10)
print("connected", flush=True)
for line in sys.stdin:
    sock.sendall(line.encode())
    got = b""
    while len(got) < len(line):
        part = sock.recv(65536)
        assert part
        got += part
    print(got.decode().strip(), flush=True)
"""


@pytest.fixture
def up(shared: Host) -> Iterator[Host]:
    """The module's daemon with a policy; its settings are the usual ones again afterwards."""
    shared.apply(POLICY)
    yield shared
    (shared.state / "sectool.yaml").unlink(missing_ok=True)
    shared.ok("reload")


def program(host: Host, label: str, code: str) -> subprocess.Popen[str]:
    """A workload; its first line has been read."""
    process = subprocess.Popen(
        host.argv(sys.executable, "-m", "sectool", "run", "--label", label, "--", sys.executable, "-c", code),
        env=host.environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() in ("listening", "connected")
    return process


@pytest.fixture
def talking(up: Host) -> Iterator[subprocess.Popen[str]]:
    """A client whose connection is authorised."""
    server = program(up, "app=db", SERVER)
    client = program(up, "app=web", CLIENT)
    yield client
    for process in (client, server):
        process.kill()
        process.communicate()


def say(client: subprocess.Popen[str], words: str) -> str:
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(words + "\n")
    client.stdin.flush()
    return client.stdout.readline().strip()


def settings(host: Host, text: str) -> None:
    (host.state / "sectool.yaml").write_text(text)


# -- reload ------------------------------------------------------------------------------------------------------------


def test_settings_change_at_once_or_wait_and_say_so(up: Host) -> None:
    worker = up.status()["workers"][0]["pid"]
    settings(up, "reject: true\nsyn_rate: 77\nworkers: 2\n")
    done = up.ok("reload")
    assert "in force now: reject, syn_rate" in done.err
    assert "wait for `sectool restart`: workers" in done.err
    status = up.status()
    assert status["reject"]
    assert [w["pid"] for w in status["workers"]] == [worker], "nothing was started anew"
    refused = program_refused(up)
    assert "refused" in refused, "the worker answers with RST now"
    assert "workers" in up.ok("reload").err, "what waits is told again"


def program_refused(host: Host) -> str:
    """A connection that policy denies, from a host that answers denials."""
    code = (
        "import socket\ntry: socket.create_connection(('127.0.0.1', 5999), 5)\nexcept OSError as e: print(e)"
    )
    done = host.shell(
        *(sys.executable, "-m", "sectool", "run", "--label", "app=web", "--", sys.executable, "-c", code)
    )
    return done.out


def test_a_mistake_changes_nothing(up: Host) -> None:
    settings(up, "reject: true\nsyn_rate: many\n")
    done = up.sectool("reload")
    assert done.code == 2
    assert "sectool.yaml:2:11" in done.err
    assert not up.status()["reject"]
    assert up.sectool("status").code == 0


def test_sighup_reloads(up: Host) -> None:
    settings(up, "reject: true\n")
    os.kill(up.status()["pid"], signal.SIGHUP)
    until(lambda: up.status()["reject"], "the setting to be in force")
    said = len((up.run / "agent.log").read_text())
    settings(up, "what: true\n")
    os.kill(up.status()["pid"], signal.SIGHUP)
    until(lambda: "not reloaded" in (up.run / "agent.log").read_text()[said:], "the refusal in the log")
    assert up.sectool("status").code == 0


# -- restart -----------------------------------------------------------------------------------------------------------


def test_a_restart_keeps_process_policy_rules_and_connections(
    up: Host, talking: subprocess.Popen[str]
) -> None:
    before, rules = up.status(), up.rules()
    said = len((up.run / "agent.log").read_text())
    assert say(talking, "before") == "before"
    done = up.ok("restart")
    assert "packets waited for" in done.err
    after = up.status()
    assert after["pid"] == before["pid"]
    assert after["state"] == "enforcing"
    assert after["policy"]["revision"] == before["policy"]["revision"]
    assert after["workers"][0]["pid"] != before["workers"][0]["pid"]
    assert after["workers"][0]["stats"]["restored"] >= 1
    assert after["workers"][0]["restarts"] == 0
    assert 0 < after["workers"][0]["gap_ms"] < 10_000
    until(lambda: not alive(before["workers"][0]["pid"]), "the old worker is gone")
    assert say(talking, "after") == "after"
    assert strip(up.rules()) == strip(rules)
    again = program(up, "app=web", CLIENT)
    assert say(again, "new connections are made") == "new connections are made"
    again.kill()
    again.communicate()
    for _ in range(2):
        up.ok("restart")
    assert say(talking, "and again") == "and again"
    log = (up.run / "agent.log").read_text()[said:]
    assert "Traceback" not in log
    assert log.count("took over") == 3


def strip(rules: str) -> list[str]:
    """Rules of ours without counters."""
    return [
        line.partition("] ")[2] or line
        for line in rules.splitlines()
        if "SECTOOL" in line and ":" not in line[:1]
    ]


def test_a_restart_takes_settings_that_reload_cannot(up: Host, talking: subprocess.Popen[str]) -> None:
    """Two workers instead of one, on other queues: each gets the connections that lead to it."""
    settings(up, "workers: 2\nqueue: 6000\n")
    up.ok("restart")
    status = up.status()
    assert len(status["workers"]) == 2
    assert sum(w["stats"]["restored"] for w in status["workers"]) >= 1
    assert "6000" in up.rules()
    assert "5300" not in up.rules()
    assert say(talking, "still here") == "still here"
    settings(up, "workers: 1\n")
    up.ok("restart")
    assert up.status()["workers"][0]["stats"]["restored"] >= 1
    assert say(talking, "and back") == "and back"


def test_a_program_that_cannot_start_is_not_started(up: Host, talking: subprocess.Popen[str]) -> None:
    before = up.status()
    settings(up, "workers: none\n")
    done = up.sectool("restart")
    assert done.code != 0
    assert "sectool.yaml:1:10" in done.err
    after = up.status()
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]
    assert after["started"] == before["started"]
    assert say(talking, "as before") == "as before"


def test_the_first_policy_given_to_up_does_not_come_back(host: Host) -> None:
    first = host.folder / "first.yaml"
    first.write_text(POLICY)
    host.ok("up", "--background", "--policy", first)
    host.apply(POLICY.replace("allow app=web", "deny app=web"))
    host.ok("restart")
    assert host.status()["policy"]["revision"] == 2


def test_in_the_foreground_too(host: Host) -> None:
    """As systemd starts it: the main process id stays."""
    process = host.popen(sys.executable, "-m", "sectool", "up", stderr=subprocess.PIPE)
    until(host.enforces, "it enforces")
    assert host.status()["pid"] == process.pid
    host.ok("restart")
    assert host.status()["pid"] == process.pid
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "took over from version" in err
    assert "the kernel rules stay" in err


def test_rules_of_an_older_version_are_replaced_and_nothing_is_adopted(up: Host) -> None:
    """A daemon killed, its rules as another version would have left them, an unjudged connection beside them."""
    up.kill_daemon()
    up.shell("iptables", "-t", "mangle", "-F", "SECTOOL-OUT")
    up.shell("iptables", "-t", "mangle", "-A", "SECTOOL-OUT", "-p", "tcp", "-j", "DROP")
    up.ok("up", "--background")
    assert "-A SECTOOL-OUT -p tcp -j DROP" not in up.rules()
    assert up.status()["rules_installed"]
    assert "adopted" not in str(up.json("events"))
