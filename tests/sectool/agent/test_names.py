"""fqdn rules through the whole daemon, with two workers: real programs, a real resolver, `sectool names`.

A second namespace is the Internet: dnsmasq on 198.51.100.53, and servers on addresses of the same network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Host, make, remove, until

pytestmark = pytest.mark.kernel

POLICY = """\
kind: Policy
name: out
owner: team-web
rules:
  - allow app=web to call net:198.51.100.53/32 on udp/53
  - allow app=web to call fqdn:api.example.com on tcp/8080
  - allow app=web to call fqdn:*.wild.example on tcp/8080
  - allow app=web to call fqdn:written.example.com on tcp/8080
  - allow net:198.51.100.53/32 to call user=root on icmp/echo-request
"""
SERVER = """
import socket, threading
s = socket.create_server(("0.0.0.0", 8080), backlog=64)
print("listening", flush=True)
while True:
    c, _ = s.accept()
    c.recv(1000)
    c.sendall(b"HTTP/1.0 200 OK\\r\\nContent-Length: 6\\r\\n\\r\\nhello\\n")
    c.close()
"""
# Each name is new, and its connection follows at once: the answer may have met one worker, the SYN meets another.
MANY = """
import socket, sys, time
for n in range(40):
    address = socket.getaddrinfo(f"n{n}.wild.example", 8080, socket.AF_INET, socket.SOCK_STREAM)[0][4]
    started = time.monotonic()
    socket.create_connection(address, timeout=5).close()
    assert time.monotonic() - started < 0.9, f"the SYN of name {n} was lost"
print("all")
"""
INTERNET = "198.51.100"


def batch(namespace: str, *lines: str) -> None:
    subprocess.run(
        ["ip", "-n", namespace, "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A daemon with two workers, and the Internet beside it."""
    folder = tmp_path_factory.mktemp("names")
    host = make(folder)
    other = host.name + "-out"
    processes: list[subprocess.Popen[str]] = []
    try:
        subprocess.run(["ip", "netns", "add", other], check=True)
        batch(
            host.name,
            f"link add eth0 type veth peer name eth0 netns {other}",
            f"addr add {INTERNET}.1/24 dev eth0",
            "link set eth0 up",
        )
        addresses = (10, 11, 12, 53, *range(100, 140))
        batch(
            other,
            *(f"addr add {INTERNET}.{n}/24 dev eth0" for n in addresses),
            "link set eth0 up",
            "link set lo up",
        )
        records = [f"--host-record=n{n}.wild.example,{INTERNET}.{100 + n}" for n in range(40)]
        records += [
            f"--host-record=api.example.com,{INTERNET}.10",
            f"--host-record=other.example.com,{INTERNET}.11",
        ]
        inside = ["nsenter", f"--net=/run/netns/{other}"]
        resolver = [
            "dnsmasq",
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
            "--user=",
        ]
        processes.append(
            subprocess.Popen(
                [*inside, *resolver, "--pid-file=", *records], text=True, stderr=subprocess.DEVNULL
            )
        )
        processes.append(
            subprocess.Popen([*inside, sys.executable, "-c", SERVER], text=True, stdout=subprocess.PIPE)
        )
        assert processes[1].stdout is not None
        assert processes[1].stdout.readline() == "listening\n"
        (folder / "resolv.conf").write_text(f"nameserver {INTERNET}.53\noptions single-request\n")
        (folder / "hosts").write_text(
            f"127.0.0.1 localhost\n{INTERNET}.12 written.example.com ignored.example.com\n"
        )
        (host.state / "sectool.yaml").write_text("workers: 2\nenforced_networks: [10.0.0.0/8]\n")
        up = host.shell(*as_here(host, sys.executable, "-m", "sectool", "up", "--background"))
        assert up.code == 0, up
        assert host.apply(POLICY).code == 0
        yield host
    finally:
        remove(host)
        for process in processes:
            process.kill()
            process.wait()
        subprocess.run(["ip", "netns", "del", other], check=False)


def as_here(host: Host, *argv: str) -> list[str]:
    """A command line that sees this host's hosts file and resolv.conf as those in /etc."""
    mounts = " && ".join(
        f"mount --bind {host.folder}/{name} /etc/{name}" for name in ("hosts", "resolv.conf")
    )
    return ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *argv]


def web(host: Host, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program as app=web."""
    done = host.shell(
        *as_here(host, sys.executable, "-m", "sectool", "run", "--label", "app=web", "--", *argv)
    )
    return subprocess.CompletedProcess(argv, done.code, done.out, done.err)


def curl(host: Host, name: str) -> subprocess.CompletedProcess[str]:
    return web(host, "curl", "--silent", "--show-error", "--max-time", "3", f"http://{name}:8080/")


def test_a_name_that_a_rule_allows_and_another(host: Host) -> None:
    assert curl(host, "api.example.com").stdout == "hello\n"
    denied = curl(host, "other.example.com")
    assert denied.returncode == 28, denied  # curl's word for a timeout
    rows = host.json("names")["items"]
    known = {row["name"]: row for row in rows}
    api = known["api.example.com"]
    assert (api["addresses"], api["resolver"], api["in_policy"]) == (
        [f"{INTERNET}.10"],
        f"{INTERNET}.53",
        True,
    )
    assert known["other.example.com"]["in_policy"] is False
    assert rows.index(api) < rows.index(known["other.example.com"])
    assert "api.example.com" in host.ok("names").out


def test_every_worker_knows_a_name_before_its_answer_arrives(host: Host) -> None:
    done = web(host, sys.executable, "-c", MANY)
    assert done.stdout == "all\n", done
    packets = [worker["stats"]["packets"] for worker in host.status()["workers"]]
    assert min(packets) > 20, "both workers had their share"


def test_the_hosts_file_counts(host: Host) -> None:
    assert curl(host, "written.example.com").stdout == "hello\n"
    assert curl(host, f"{INTERNET}.12").stdout == "hello\n"


def test_names_survive_their_workers(host: Host) -> None:
    assert curl(host, "api.example.com").stdout == "hello\n"
    workers = [worker["pid"] for worker in host.status()["workers"]]
    for pid in workers:
        subprocess.run(["kill", "-9", str(pid)], check=True)
    until(
        lambda: (s := host.status())["enforcing"] and not {w["pid"] for w in s["workers"]} & set(workers),
        "other workers",
    )
    assert curl(host, f"{INTERNET}.10").stdout == "hello\n"


PING = """
import socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.bind((sys.argv[1], 0))
s.settimeout(2)
body = struct.pack(">HH", 77, 1) + b"ping"
total = sum(struct.unpack(">4H", body)) + 0x0800
total = (total >> 16) + (total & 0xFFFF)
s.sendto(struct.pack(">BBH", 8, 0, 0xFFFF - total) + body, ("198.51.100.1", 0))
try:
    while s.recv(100)[20] != 0:
        pass
    print("answered")
except TimeoutError:
    print("silence")
"""


def test_the_host_itself_answers_pings_by_rule(host: Host) -> None:
    """Nobody's socket answers: it is the host, which is user root without an executable."""
    inside = ["nsenter", f"--net=/run/netns/{host.name}-out", sys.executable, "-c", PING]
    said = [
        subprocess.run(
            [*inside, f"{INTERNET}.{n}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for n in (53, 10)
    ]
    assert said == ["answered", "silence"]

    def pings() -> list[dict[str, str]]:
        return [row for row in host.json("flows")["items"] if row["network.transport"] == "icmp"]

    found = until(lambda: len(pings()) >= 2 and pings(), "both on record")
    assert {row["event.action"] for row in found} == {"allow", "deny"}
    assert "icmp/echo-request" in host.ok("flows").out


def test_down_removes_what_was_known(host: Host) -> None:
    run = Path(json.loads(host.sectool("status", "-o", "json").out)["run_dir"])
    assert run.is_dir()
    assert host.sectool("down").code == 0
    assert not list(run.glob("names-worker-*"))
