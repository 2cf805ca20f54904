"""What the host around the daemon is like: other firewalls, connection tracking, devices, clock, memory for keys.

Each check gives (name, level, message, hint); level as in sectool.agent.doctor.Level. Nothing is changed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nfq import rules
from sectool.agent.settings import Settings
from sectool.errors import SectoolError

Checked = tuple[str, str, str, str]

LEAST_MTU: Final = 1280  # a SYN with a credential has some 900 bytes; 1280 is what IPv6 promises
FULL: Final = 0.8  # of the connection tracking table
_SIOCGIFFLAGS: Final = 0x8913
_SIOCGIFMTU: Final = 0x8921
_IFF_UP: Final = 1
_IFF_LOOPBACK: Final = 8
_NAME_LEN: Final = 16
_short, _int = struct.Struct("=H"), struct.Struct("=i")
_TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised
_SYS: Final = Path("/proc/sys")


def checks(settings: Settings) -> Iterator[Checked]:
    """All of them."""
    yield from _clock()
    yield from _devices()
    yield from _forwarding()
    yield from _swap()
    yield from _processors(settings)
    if os.geteuid() == 0:
        yield from _conntrack()
        yield from _firewalls(settings)


def _sysctl(name: str) -> str | None:
    try:
        return (_SYS / name).read_text().strip()
    except OSError:
        return None


def _clock() -> Iterator[Checked]:
    libc = ctypes.CDLL(None, use_errno=True)
    timex = ctypes.create_string_buffer(512)  # struct timex has 208; modes 0: only read
    if libc.adjtimex(timex) == _TIME_ERROR:
        yield (
            "clock",
            "warning",
            "not synchronised: identities are valid for an hour, and peers allow a minute of difference",
            "run an NTP client: apt-get install chrony (or systemd-timesyncd)",
        )
    else:
        yield "clock", "good", "synchronised", ""


def _devices() -> Iterator[Checked]:
    # Asked by socket: /sys shows the devices of the network namespace it was mounted in.
    narrow = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                (flags,) = _short.unpack_from(fcntl.ioctl(sock, _SIOCGIFFLAGS, _request(name)), _NAME_LEN)
                (mtu,) = _int.unpack_from(fcntl.ioctl(sock, _SIOCGIFMTU, _request(name)), _NAME_LEN)
            except OSError:
                continue  # it has gone meanwhile
            if flags & _IFF_UP and not flags & _IFF_LOOPBACK and mtu < LEAST_MTU:
                narrow.append((name, mtu))
    if narrow:
        yield (
            "MTU",
            "bad",
            f"below {LEAST_MTU}: {', '.join(f'{n} ({m})' for n, m in narrow)}; a SYN with an identity does not fit",
            f"ip link set {narrow[0][0]} mtu {LEAST_MTU}, or more",
        )
    else:
        yield "MTU", "good", f"every device takes {LEAST_MTU} bytes or more", ""


def _request(name: str) -> bytes:
    """struct ifreq (netdevice(7)) asking about a device."""
    return name.encode()[: _NAME_LEN - 1].ljust(40, b"\0")


def _forwarding() -> Iterator[Checked]:
    names = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
    if any(_sysctl(name) == "1" for name in names):
        yield (
            "forwarding",
            "note",
            "this host forwards packets; what it only forwards (containers behind a bridge) is not judged",
            "enforce inside the containers' network namespaces, or on the hosts behind",
        )


def _swap() -> Iterator[Checked]:
    try:
        areas = Path("/proc/swaps").read_text().splitlines()[1:]
    except OSError:
        return
    disks = [area.split()[0] for area in areas if area and not area.startswith("/dev/zram")]
    if disks:
        yield (
            "swap",
            "note",
            f"in use ({', '.join(disks)}): keys of connections are locked in memory while a worker runs, but not in "
            "the moment in which one is replaced",
            "encrypt the swap space, or run without (docs/operations.md, Where keys are)",
        )


def _processors(settings: Settings) -> Iterator[Checked]:
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = None
    if flags is not None and "avx" not in flags[1].split():
        yield (
            "processor",
            "bad",
            "has no AVX, with which DuckDB's package begins: the store ends in SIGILL, and nothing is recorded",
            "give the virtual machine the host's processor (libvirt: host-passthrough), or another host",
        )
    count = len(os.sched_getaffinity(0))
    if settings.workers > count:
        yield (
            "workers",
            "warning",
            f"{settings.workers} packet workers for {count} processors",
            f"set `workers: {count}` in sectool.yaml, then sectool restart",
        )


def _conntrack() -> Iterator[Checked]:
    if _sysctl("net/netfilter/nf_conntrack_tcp_be_liberal") == "1":
        yield (
            "connection tracking",
            "warning",
            "takes TCP segments outside of their windows (nf_conntrack_tcp_be_liberal=1): forged segments come further",
            "sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=0",
        )
    try:
        count = int(_sysctl("net/netfilter/nf_conntrack_count") or "")
        most = int(_sysctl("net/netfilter/nf_conntrack_max") or "")
    except ValueError:
        return
    if most and count >= FULL * most:
        yield (
            "connection tracking",
            "bad",
            f"its table is {100 * count // most} % full ({count} of {most}): new connections will be dropped",
            f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}",
        )
    else:
        yield "connection tracking", "good", f"{count} of {most} connections", ""


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout


def _firewalls(settings: Settings) -> Iterator[Checked]:
    try:
        own = rules.snapshot()
    except SectoolError:
        return  # the kernel's own checks say so
    foreign = "\n".join(line for line in own.splitlines() if "SECTOOL-" not in line)
    everything = foreign + _output("nft", "list", "ruleset")
    yield from _queues(settings, own)
    if legacy := [line for line in _output("iptables-legacy-save").splitlines() if line.startswith("-A")]:
        yield (
            "legacy iptables",
            "warning",
            f"{len(legacy)} rules are in the old iptables beside nf_tables; both judge every packet",
            "move them: iptables-legacy-save | iptables-nft-restore, then flush the old ones",
        )
    for name, sign, message in _OTHERS:
        if re.search(sign, everything, re.MULTILINE):
            yield name, "note", message[0], message[1]


def _queues(settings: Settings, saved: str) -> Iterator[Checked]:
    """Rules of others that send packets to queues which are ours."""
    mine = range(settings.queue, settings.queue + 2 * settings.workers)
    for line in saved.splitlines():
        found = re.search(r"-j NFQUEUE .*?--queue-(?:num (\d+)|balance (\d+):(\d+))", line)
        if not found or "SECTOOL-" in line:
            continue
        first = int(found[1] or found[2])
        last = int(found[1] or found[3])
        if first < mine.stop and last >= mine.start:
            yield (
                "packet queues",
                "bad",
                f"a rule of somebody else uses our queues: {line}",
                "set `queue:` in sectool.yaml to a number that nobody uses, then sectool restart",
            )
        else:
            yield (
                "packet queues",
                "note",
                f"another program judges packets, too: {line}",
                "what either of the two drops is dropped",
            )


_OTHERS: Final[tuple[tuple[str, str, tuple[str, str]], ...]] = (
    (
        "firewalld",
        r"table inet firewalld|^:?-?A? ?IN_public",
        (
            "firewalld is active: its rules hold beside policy, and a connection passes only if both allow it",
            "open the ports of allowed services in its zones",
        ),
    ),
    (
        "ufw",
        r"ufw6?-before-input",
        (
            "ufw is active: its rules hold beside policy, and a connection passes only if both allow it",
            "allow the ports of allowed services: ufw allow PORT/tcp",
        ),
    ),
    (
        "Docker",
        r"DOCKER(-USER|-ISOLATION|-FORWARD)?\b",
        (
            "Docker's rules are here: published ports are translated and forwarded, which is not judged by this daemon",
            "enforce inside the containers' network namespaces (sectool workload list shows them)",
        ),
    ),
    (
        "Kubernetes",
        r"KUBE-SERVICES|cali-|CILIUM_|FLANNEL-FWD",
        (
            "a Kubernetes network plugin's rules are here: pods' traffic is forwarded and not judged by this daemon",
            "NetworkPolicy of the cluster holds for pods; this daemon holds for the node",
        ),
    ),
)
