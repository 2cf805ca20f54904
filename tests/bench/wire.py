"""What lies between a pair of hosts: nothing that would slow it, segments of MTU size, or loss.

With offloads on, a veth hands a super-packet of 64 KiB from host to host as it is. A device that cannot segment (tso
off) makes the kernel do it, after the rules and queues of the sender: the enforcer still sees super-packets, the wire
carries segments of the MTU's size. A receiver with GRO puts them together again before its rules see them.

Loss needs a place that sees what the wire carries: a router between the hosts, which drops single segments by
`-m statistic` before anything could put them together.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from labs import netns
from labs.lab import Lab
from labs.netns import run
from labs.topology import Topology
from sectool.errors import SectoolError

CONGESTION = "reno"  # labs.netns sets it


@dataclass(frozen=True, slots=True)
class Wire:
    """`segments`: at most MTU size each. `gro`: receivers merge them. `loss`: share of them lost, each way."""

    segments: bool = False
    gro: bool = False
    loss: float = 0.0

    def __post_init__(self) -> None:
        if self.loss and not self.segments:
            raise ValueError("loss of super-packets is not what a wire loses")

    @property
    def routed(self) -> bool:
        return self.loss > 0

    def offloads(self) -> list[str]:
        """Arguments of `ethtool -K DEVICE` for a host's device."""
        return ["tso", "off", "gro", "on" if self.gro else "off"] if self.segments else []

    def losing(self) -> list[str]:
        """Arguments of iptables in the router."""
        chance = ["-m", "statistic", "--mode", "random", "--probability", f"{self.loss:g}"]
        return ["-t", "raw", "-A", "PREROUTING", *chance, "-j", "DROP"]


CLEAR = Wire()


def lay(wire: Wire, lab: Lab) -> None:
    """Make the wire of a lab that is up. A routed one needs a lab with a bridge: that becomes the router."""
    hosts = [lab["client"], lab["server"]]
    if wire.routed:
        _route(lab.topology, netns.path(lab.name, netns.BRIDGE))
        run("iptables", *wire.losing(), netns=netns.path(lab.name, netns.BRIDGE))
        for node in hosts:
            _offloads(netns.path(lab.name, netns.BRIDGE), node.name, ["tso", "off", "gro", "off"])
    if wire.segments:
        for node in hosts:
            _offloads(node.netns, "eth0", wire.offloads())
    for node in hosts:
        used = run("sysctl", "-n", "net.ipv4.tcp_congestion_control", netns=node.netns).strip()
        if used != CONGESTION:
            raise SectoolError(f"congestion control on {node.name} is {used}, not {CONGESTION}")


def _offloads(where: Path, device: str, settings: list[str]) -> None:
    """`ethtool -K`, and a look whether the kernel did it."""
    run("ethtool", "-K", device, *settings, netns=where)
    names = {"tso": "tcp-segmentation-offload", "gro": "generic-receive-offload"}
    shown = run("ethtool", "-k", device, netns=where)
    for short, value in zip(settings[::2], settings[1::2], strict=True):
        if f"{names[short]}: {value}" not in shown:
            raise SectoolError(f"{device} in {where.name} does not turn {short} {value}")


def _route(topology: Topology, router: Path) -> None:
    """Make the bridge's namespace a router that answers for either host to the other, without addresses of its own."""
    for setting in ("ipv4.ip_forward=1", "ipv4.conf.all.proxy_arp=1", "ipv4.conf.all.rp_filter=0"):
        run("sysctl", "-qw", f"net.{setting}", netns=router)
    for host in topology.hosts:
        run("ip", "link", "set", host.name, "nomaster", netns=router)
        run("sysctl", "-qw", f"net.ipv4.conf.{host.name}.proxy_arp=1", netns=router)
        run("ip", "route", "add", f"{host.ip4}/32", "dev", host.name, netns=router)
    subprocess.run(
        ["nsenter", f"--net={router}", "ip", "link", "del", "br0"], capture_output=True, check=False
    )
