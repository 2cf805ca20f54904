"""Enforcing inside a container's network namespace from outside: a real container of runc, with a cable to the host."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Host, make, remove, until

pytestmark = pytest.mark.kernel

POLICY = """\
kind: Workload
name: shop
match: {container.name: CONTAINER, container.label.team: shop}
labels: {app: web}
---
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432
"""
SERVER = (
    "import socket\n"
    "s = socket.create_server(('10.211.0.1', 5432))\n"
    "print('listening', flush=True)\n"
    "while True:\n"
    "    c, _ = s.accept()\n"
    "    c.sendall(b'hello')\n"
    "    c.close()\n"
)
# On each line of its input, a connection: what it got.
CLIENT = (
    "import socket, sys\n"
    "for line in sys.stdin:\n"
    "    try:\n"
    "        s = socket.create_connection(('10.211.0.1', int(line)), timeout=1)\n"
    "        print(s.recv(5).decode(), flush=True)\n"
    "    except OSError as e: print(type(e).__name__, flush=True)\n"
)
# runc wants a pure cgroup v2 hierarchy, which a mount namespace of its own gives it. $0: folder, $1: container.
RUN = """
set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup 2>/dev/null || umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
cd "$0"
exec runc --root /run/runc run --bundle "$0" "$1"
"""


class Container:
    """A container to be, in a namespace that has a cable to the host's."""

    def __init__(self, name: str, bundle: Path) -> None:
        self.name = self.namespace = name
        self.bundle = bundle
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Have runc run it."""
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", RUN, str(self.bundle), self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def end(self) -> None:
        """Its program ends with its input."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)

    def call(self, port: int) -> str:
        """What a connection of its program gets."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{port}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def bundle(folder: Path, name: str, namespace: str) -> None:
    """An OCI bundle whose root has the host's /usr, in a network namespace that is there already."""
    root = folder / "rootfs"
    for made in ("usr", "proc", "dev", "sys", "etc", "tmp"):
        (root / made).mkdir(parents=True)
    for link in ("bin", "lib", "lib64", "sbin"):
        (root / link).symlink_to(f"usr/{link}")
    subprocess.run(["runc", "spec", "--bundle", folder], check=True)
    spec = json.loads((folder / "config.json").read_text())
    spec["process"] |= {"terminal": False, "args": ["/usr/bin/python3", "-S", "-c", CLIENT]}
    spec["annotations"] = {"team": "shop"}
    spec["mounts"].append(
        {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]}
    )
    for each in spec["linux"]["namespaces"]:
        if each["type"] == "network":
            each["path"] = f"/run/netns/{namespace}"
    spec["linux"]["cgroupsPath"] = f"/{name}"
    (folder / "config.json").write_text(json.dumps(spec))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = make(tmp_path)
    yield made
    remove(made)


@pytest.fixture
def container(host: Host, tmp_path: Path) -> Iterator[Container]:
    name = f"st-{secrets.token_hex(4)}"
    cable = secrets.token_hex(3)
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for command in (
            f"link add st{cable}a netns {host.name} type veth peer name st{cable}b netns {name}",
            f"-n {host.name} addr add 10.211.0.1/24 dev st{cable}a", f"-n {host.name} link set st{cable}a up",
            f"-n {name} addr add 10.211.0.2/24 dev st{cable}b", f"-n {name} link set st{cable}b up",
        ):  # fmt: skip
            subprocess.run(["ip", *command.split()], check=True)
        bundle(tmp_path / "bundle", name, name)
        made = Container(name, tmp_path / "bundle")
        yield made
        if made.process is not None:
            made.end()
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def choose(host: Host, what: str) -> None:
    networks = "[127.0.0.0/8, 10.211.0.0/24]"
    (host.state / "sectool.yaml").write_text(f"enforced_networks: {networks}\nenforce_inside: ['{what}']\n")


def rules_inside(container: Container) -> str:
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{container.namespace}", "iptables-save"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_containers_connections_have_its_identity(host: Host, container: Container, tmp_path: Path) -> None:
    choose(host, f"container:{container.name}")
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.replace("CONTAINER", container.name))
    host.ok("up", "--background", "--policy", policy)
    server = host.popen(
        sys.executable, "-m", "sectool", "run", "--label", "app=db", "--", sys.executable, "-c", SERVER,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        container.start()
        until(lambda: [i for i in host.status()["inside"] if i["enforcing"]], "a worker is inside")
        assert "SECTOOL-OUT" in rules_inside(container)
        assert container.call(5432) == "hello"
        rows = until(
            lambda: (
                found
                if len(found := host.json("flows", "--port", 5432, "--from-label", "app=web")["items"]) == 2
                else []
            ),
            "both sides of the connection are on record",
        )
        assert {row["event.action"] for row in rows} == {"allow"}
        assert len({row["observation_point"] for row in rows}) == 2
        shown = host.json("workload", "list", "--container", container.name)["items"]
        assert [w["name"] for w in shown] == ["shop"]
        assert shown[0]["container"]["container.label.team"] == "shop"
        assert shown[0]["origins"]["app"] == "operator"
        assert shown[0]["origins"]["container"] == "attested"
        # The container ends, and with it the worker.
        worker = host.status()["inside"][0]["pid"]
        container.end()
        until(lambda: host.status()["inside"] == [], "the worker inside ends")
        assert not Path(f"/proc/{worker}").exists()
        assert "SECTOOL" not in rules_inside(container)
        assert list(host.run.glob("*ns-*")) == []
    finally:
        server.kill()
        server.wait()


def test_down_leaves_nothing_in_a_named_namespace(host: Host, container: Container) -> None:
    choose(host, f"netns:{container.namespace}")
    container.start()
    host.ok("up", "--background")
    until(lambda: [i for i in host.status()["inside"] if i["enforcing"]], "a worker is inside")
    assert container.call(5432) == "TimeoutError"
    host.ok("down")
    assert "SECTOOL" not in rules_inside(container)
    assert container.call(5432) == "ConnectionRefusedError"
