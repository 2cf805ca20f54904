"""Hosts as network namespaces: each joined by a veth to a bridge that lives in a namespace of its own.

Nothing is added to the namespace the lab is started from: no interface, no address, no rule, no sysctl. Every
name follows from the lab's name alone, so that `destroy` works after a crash, with nothing but that name.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path

from labs.topology import Host, Topology
from sectool.errors import SectoolError

NETNS = Path("/run/netns")
PREFIX = "stlab"
BRIDGE = "bridge"

SYSCTLS = (
    "net.ipv4.ip_unprivileged_port_start=1",  # nginx listens on port 80 as www-data
    "net.ipv4.conf.all.rp_filter=0",
    "net.netfilter.nf_conntrack_tcp_be_liberal=0",  # strict windows: an enforcer that moved one would show up
    "net.ipv4.tcp_congestion_control=reno",  # a pacing default (bbr) holds a veth far below its speed
)


def namespace(lab: str, host: str) -> str:
    """Name of a host's namespace, as `ip netns list` shows it."""
    return f"{PREFIX}-{lab}-{host}"


def path(lab: str, host: str) -> Path:
    """What `nsenter --net=` takes. (Not `ip netns exec`: that remounts /sys and hides the cgroups.)"""
    return NETNS / namespace(lab, host)


def existing(lab: str) -> list[Path]:
    """Namespaces of this lab that are there now, whether or not its bookkeeping knows them."""
    return sorted(NETNS.glob(f"{PREFIX}-{lab}-*")) if NETNS.is_dir() else []


def run(*argv: str, netns: Path | None = None) -> str:
    """Run a system command, inside a namespace if one is given; its standard output.

    Raises SectoolError with the command's own words when it fails.
    """
    inside = (f"nsenter --net={netns}".split()) if netns else []
    done = subprocess.run([*inside, *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SectoolError(f"`{' '.join(argv)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _batch(netns: Path, commands: Iterable[str]) -> None:
    text = "\n".join(commands) + "\n"
    done = subprocess.run(
        ["nsenter", f"--net={netns}", "ip", "-batch", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SectoolError(f"cannot configure {netns.name}: {done.stderr.strip()}")


def create(topology: Topology, lab: str) -> None:
    """Build all namespaces, links, addresses and routes. A namespace that exists already is an error."""
    for host in topology.hosts:
        run("ip", "netns", "add", namespace(lab, host.name))
    if topology.bridge:
        _join_by_bridge(topology, lab)
    else:
        one, other = topology.hosts
        cable = f"link add eth0 mtu {topology.mtu} type veth peer name eth0 mtu {topology.mtu}"
        _batch(path(lab, one.name), [f"{cable} netns {namespace(lab, other.name)}"])
    for host in topology.hosts:
        _configure(topology, lab, host)


def _join_by_bridge(topology: Topology, lab: str) -> None:
    run("ip", "netns", "add", namespace(lab, BRIDGE))
    commands = [
        "link set lo up",
        "link add br0 type bridge forward_delay 0 mcast_snooping 0",
        "link set br0 up",
    ]
    for host in topology.hosts:
        commands += [
            f"link add {host.name} mtu {topology.mtu} type veth"
            f" peer name eth0 mtu {topology.mtu} netns {namespace(lab, host.name)}",
            f"link set {host.name} master br0",
            f"link set {host.name} up",
        ]
    _batch(path(lab, BRIDGE), commands)


def _configure(topology: Topology, lab: str, host: Host) -> None:
    addresses: list[IPv4Interface | IPv6Interface] = [*host.v4, *host.v6]
    routes = [
        f"route replace {route} dev eth0"
        for route in topology.routes
        if not any(str(address.network) == route for address in addresses)
    ]
    _batch(
        path(lab, host.name),
        [
            "link set lo up",
            *(
                f"addr add {address} dev eth0 {'nodad' if address.version == 6 else ''}"
                for address in addresses
            ),
            "link set eth0 up",
            *routes,
        ],
    )
    # Some exist only with their module loaded, or cannot be set here; none is needed for being correct.
    subprocess.run(
        ["nsenter", f"--net={path(lab, host.name)}", "sysctl", "-qw", *SYSCTLS, *topology.sysctls],
        capture_output=True,
        check=False,
    )


def inodes(lab: str) -> set[int]:
    """Inode numbers of this lab's namespaces: what /proc/PID/ns/net of a process inside shows."""
    found = set()
    for name in existing(lab):
        try:
            found.add(name.stat().st_ino)
        except OSError:
            continue
    return found


def processes(namespaces: set[int]) -> set[int]:
    """Process ids that live in one of these network namespaces."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "ns/net").stat().st_ino in namespaces:
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def destroy(lab: str) -> None:
    """Remove every namespace of this lab; interfaces, rules and routes go with them. Safe to repeat."""
    for name in existing(lab):
        subprocess.run(["ip", "netns", "del", name.name], capture_output=True, check=False)
        if name.exists():  # a plain file: the mount was never made, or is gone
            subprocess.run(["umount", "-l", str(name)], capture_output=True, check=False)
            name.unlink(missing_ok=True)


def tidy_mount() -> None:
    """Undo what the first `ip netns add` of a machine does (/run/netns, mounted on itself), when empty."""
    if NETNS.is_dir() and not any(NETNS.iterdir()):
        subprocess.run(["umount", str(NETNS)], capture_output=True, check=False)
        try:
            NETNS.rmdir()
        except OSError:
            return
