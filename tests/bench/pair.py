"""Two hosts joined by a veth, with or without enforcers: what every network benchmark runs on."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from labs.lab import Lab
from labs.topology import Enforcer, Topology, host

POLICY = Path(__file__).with_name("bench.yaml")
DOMAIN = "bench.example"
# Ports are the scarce thing when connections are only made and closed.
SYSCTLS = (
    "net.ipv4.ip_local_port_range=10000 65000",
    "net.ipv4.tcp_tw_reuse=1",
    "net.core.somaxconn=4096",
    "net.ipv4.tcp_max_syn_backlog=8192",
)


def _topology(enforced: bool) -> Topology:
    enforcer = Enforcer(DOMAIN, (), ("app=*",)) if enforced else None
    return Topology(
        hosts=(host("client", 1, enforcer), host("server", 2, enforcer)),
        policies=((DOMAIN, POLICY),),
        bridge=False,
        sysctls=SYSCTLS,
    )


@contextmanager
def pairs(*cases: str) -> Iterator[dict[str, Lab]]:
    """Pairs of hosts, `bare` and `enforced` unless named, up at once so that rounds can alternate; removed at the end.

    Only the case `enforced` has enforcers.
    """
    token = secrets.token_hex(3)
    with ExitStack() as stack:
        made = {}
        for case in cases or ("bare", "enforced"):
            lab = Lab(f"b{case}{token}", _topology(case == "enforced"))
            stack.callback(lab.down)
            lab.up(temporary=True)
            made[case] = lab
        yield made
