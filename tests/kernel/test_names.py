"""fqdn rules on real packets: a real resolver outside, real lookups, and the connections that follow.

The plain host on the wire is the Internet: dnsmasq on 192.0.2.3, servers on 192.0.2.10 and after.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest
from scapy.layers.dns import DNS, DNSQR, DNSRR
from scapy.layers.inet import IP, UDP

from nfq.namefile import path_of
from sectool.events import DropReason
from tests.kernel.conftest import DEADLINE_S, wait_until
from tests.kernel.hosts import SHORT_S, Lan, as_user, port_of
from tests.kernel.wire import OUTSIDE

pytestmark = pytest.mark.kernel

POLICY = """
kind: Policy
name: out
owner: team-shop
rules:
  - allow app=web to call app=db
  - allow app=web to call net:resolvers on udp/53
  - allow app=web to call fqdn:api.example.com
  - allow app=web to call fqdn:*.wild.example
---
kind: Network
name: resolvers
cidrs: [192.0.2.3/32, 192.0.2.4/32, "2001:db8::3/128"]
"""
TRUSTED = ["192.0.2.3/32", "2001:db8::3/128"]
RECORDS = (
    "--host-record=api.example.com,192.0.2.10,2001:db8::10,120",
    "--host-record=other.example.com,192.0.2.11,2001:db8::11",
    "--cname=www.wild.example,edge.cdn.example",
    "--host-record=edge.cdn.example,192.0.2.12",
    "--host-record=short.wild.example,192.0.2.13,1",
)
FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
API, OTHER = {False: "192.0.2.10", True: "2001:db8::10"}, {False: "192.0.2.11", True: "2001:db8::11"}


@pytest.fixture
def net(lan: Lan) -> Iterator[Lan]:
    """The lan with resolvers and servers outside; a trusts the first resolver."""
    space = lan.wire.space
    lines = [f"addr add 192.0.2.{n}/24 dev br0" for n in (4, 10, 11, 12, 13)]
    lines += [f"addr add {address}/64 dev br0 nodad" for address in (API[True], OTHER[True])]
    space.run("ip", "-batch", "-", stdin="\n".join(lines) + "\n")
    argv = [
        "dnsmasq",
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--user=",
    ]
    resolver = space.popen(*argv, "--pid-file=", "--port=53", *RECORDS, stderr=subprocess.DEVNULL)
    wait_until(lambda: ":53 " in space.run("ss", "-Hlnu"), "the resolver")
    lan.a.stop()
    path_of(lan.a.run, 0).unlink()  # what was learnt in another test
    lan.a.restart(POLICY, resolvers=TRUSTED)
    yield lan
    resolver.terminate()
    resolver.wait(DEADLINE_S)
    lan.a.stop()
    lan.a.restart()
    for line in lines:
        space.run("ip", *line.replace("addr add", "addr del").removesuffix(" nodad").split())


def lookup(net: Lan, name: str, v6: bool = False, resolver: str = "192.0.2.3") -> str:
    """What dig says, as the web user of host a."""
    argv = ["setpriv", f"--reuid={net.a.own}", f"--regid={net.a.own}", "--clear-groups"]
    argv += ["dig", "+short", "+tries=2", "+time=3", f"@{resolver}", name, "AAAA" if v6 else "A"]
    return net.a.space.run(*argv).split()[-1]


def serving(net: Lan, address: str) -> socket.socket:
    """A server outside."""
    sock = net.wire.space.new_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.bind((address, 0))
    sock.listen()
    return sock


def reaches(net: Lan, server: socket.socket) -> bool:
    """Whether a can connect."""
    try:
        net.a.connect(str(server.getsockname()[0]), port_of(server), timeout_s=SHORT_S).close()
    except TimeoutError:
        return False
    return True


@FAMILIES
def test_a_name_opens_its_addresses_and_no_others(net: Lan, v6: bool) -> None:
    api, other = serving(net, API[v6]), serving(net, OTHER[v6])
    assert not reaches(net, api)
    assert lookup(net, "api.example.com", v6) == API[v6]
    assert lookup(net, "other.example.com", v6) == OTHER[v6]
    assert reaches(net, api)
    assert not reaches(net, other)
    assert net.a.denial(port_of(other), DropReason.DEFAULT_DENY) is not None


def test_an_alias_counts_by_both_names(net: Lan) -> None:
    server = serving(net, "192.0.2.12")
    assert lookup(net, "www.wild.example") == "192.0.2.12"
    assert reaches(net, server)


def datagrams(net: Lan) -> socket.socket:
    """A UDP socket of the web user's."""
    with net.a.space.enter(), as_user(net.a.own):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(DEADLINE_S)
    net.a.space.opened.append(sock)
    return sock


def test_datagrams_go_by_names_too(net: Lan) -> None:
    server = net.wire.space.new_socket(kind=socket.SOCK_DGRAM)
    server.bind((API[False], 0))
    datagrams(net).sendto(b"too early", (API[False], port_of(server)))
    net.a.denial(port_of(server), DropReason.DEFAULT_DENY)
    lookup(net, "api.example.com")
    datagrams(net).sendto(b"now", (API[False], port_of(server)))
    assert server.recv(100) == b"now"


def test_a_resolver_that_is_not_trusted_names_nothing(net: Lan) -> None:
    server = serving(net, API[False])
    assert lookup(net, "api.example.com", resolver="192.0.2.4") == API[False]
    assert not reaches(net, server)


def test_an_answer_nobody_asked_for_names_nothing(net: Lan) -> None:
    server, client = serving(net, API[False]), datagrams(net)
    client.bind((net.a.space.v4, 0))
    client.sendto(b"no question", ("192.0.2.3", 53))  # opens the flow, and is no DNS
    record = DNSRR(rrname="api.example.com", rdata=API[False])
    answer = DNS(id=1, qr=1, qd=[DNSQR(qname="api.example.com")], an=[record])
    head = IP(src=OUTSIDE[False], dst=net.a.space.v4) / UDP(sport=53, dport=port_of(client))
    net.wire.send("a", head / answer)
    assert client.recv(1000)
    assert not reaches(net, server)


def test_a_name_survives_its_worker_and_a_connection_its_name(net: Lan) -> None:
    """The worker is killed: the next one knows the name, and another policy leaves the restored connection alone."""
    server = serving(net, API[False])
    lookup(net, "api.example.com")
    client = net.a.connect(API[False], port_of(server))
    peer, _ = server.accept()
    net.a.kill()
    net.a.restart(POLICY, resolvers=TRUSTED)
    assert reaches(net, server)
    assert net.a.policy(POLICY.replace("team-shop", "team-web")) == 0
    client.sendall(b"still here")
    peer.settimeout(DEADLINE_S)
    assert peer.recv(100) == b"still here"
    assert net.a.policy(POLICY.replace("api.example.com", "gone.example.com")) >= 1
