"""What the rivals have in common: where a program of the client finds the server through them, and how they start.

A rival is a module of this folder with `start(pair: Lab) -> Endpoint`. The pair has the hosts `client` and `server`
without enforcers; what a rival starts and writes belongs to the lab, and ends and goes with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from labs import services
from labs.lab import Lab, Node

BULK, ECHO = 5201, 7000  # the server's iperf3 and connbench
NEAR = {
    BULK: 6201,
    ECHO: 8000,
}  # where a proxy on the client takes connections for them, on the loopback address
FAR = {BULK: 6301, ECHO: 8100}  # where the proxy on the server takes them, under TLS
LOOPBACK = "127.0.0.1"
TUNNEL = {"client": "10.78.0.1", "server": "10.78.0.2"}
DEVICE = "tun0"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the client's programs reach the server's."""

    address: str
    bulk: int = BULK
    echo: int = ECHO


THROUGH_PROXY = Endpoint(LOOPBACK, NEAR[BULK], NEAR[ECHO])
THROUGH_TUNNEL = Endpoint(TUNNEL["server"])


def secret(file: Path, text: str) -> Path:
    """Write a file that only root can read."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
    return file


def folder(node: Node) -> Path:
    """Where a host's rival keeps its files: root's alone, gone with the lab."""
    made = node.folder / "rival"
    made.mkdir(mode=0o700, exist_ok=True)
    return made


def launch(node: Node, command: list[str], ready: Callable[[], bool]) -> services.Service:
    """Start a rival's program on a host, its words kept in its folder; wait for the service when all are started."""
    return services.start(node.place("rival"), command, folder(node) / "log", ready)


def proxies(pair: Lab, command: Callable[[Node], list[str]]) -> Endpoint:
    """Start a proxy on both hosts and wait until they listen."""
    started = []
    for name, ports in (("server", FAR), ("client", NEAR)):
        node = pair[name]
        started.append(
            launch(
                node,
                command(node),
                lambda n=node, p=ports: all(services.listening(n.netns, one) for one in p.values()),  # type: ignore[misc]
            )
        )
    for service in started:
        service.wait()
    return THROUGH_PROXY
