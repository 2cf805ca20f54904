"""What the lab looks like, as data. `labs.netns` builds it, `labs.lab` starts daemons on it.

                bridge namespace (no addresses, no rules)
    ┌──────────┬──────────┬──────────┬──────────┐
   web         db       batch      rogue      plain
 enforcer   enforcer   enforcer   enforcer   no enforcer
lab.example lab.example lab.example rogue.example
10.77.0.10  10.77.0.20 10.77.0.30 10.77.0.66 10.77.0.99 and, outside the enforced network, 192.0.2.99
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path

POLICIES = Path(__file__).with_name("policies")
ENFORCED = ("10.77.0.0/24", "fd77::/64")
API, ADS = "api.partner.example", "ads.partner.example"  # names the partner's name server has
DB_NAME = "db.shop.example"  # and the shop's own
OUTSIDE = ("192.0.2.0/24", "2001:db8:f::/64")  # documentation ranges (RFC 5737, RFC 3849)


@dataclass(frozen=True, slots=True)
class Enforcer:
    """How a host is enrolled: what its own CA may vouch for, and how it refuses."""

    trust_domain: str
    labels: tuple[str, ...]  # every workload of the host has these
    allow_labels: tuple[str, ...]  # what a workload may claim beyond them
    reject: bool = False  # whom it denies, and its own programs that others deny, get a RST at once


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace. The first address of a family is inside the enforced network, a second one outside."""

    name: str
    v4: tuple[IPv4Interface, ...]
    v6: tuple[IPv6Interface, ...]
    enforcer: Enforcer | None
    services: tuple[str, ...] = ()  # what it serves: names in labs.lab.SERVICES
    root_of: str = ""  # the trust domain whose root is kept there

    @property
    def addresses(self) -> list[str]:
        return [str(a.ip) for a in self.v4] + [str(a.ip) for a in self.v6]

    @property
    def ip4(self) -> str:
        return str(self.v4[0].ip)

    @property
    def ip6(self) -> str:
        return str(self.v6[0].ip)


@dataclass(frozen=True, slots=True)
class Topology:
    """Hosts on one bridge, or two joined directly. `routes` are on-link for all, so no router is needed."""

    hosts: tuple[Host, ...]
    policies: tuple[tuple[str, Path], ...] = ()  # for every trust domain, the file its hosts get
    routes: tuple[str, ...] = (*ENFORCED, *OUTSIDE)
    mtu: int = 1500
    bridge: bool = True
    sysctls: tuple[str, ...] = ()  # beyond labs.netns.SYSCTLS

    def host(self, name: str) -> Host:
        """The host called `name`; KeyError when there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise KeyError(name)


def host(name: str, number: int, enforcer: Enforcer | None, *services: str, outside: bool = False) -> Host:
    """A host with the addresses 10.77.0.`number` and fd77::`number`, and `outside` two more."""
    v4 = [IPv4Interface(f"10.77.0.{number}/24")]
    v6 = [IPv6Interface(f"fd77::{number}/64")]
    if outside:
        v4.append(IPv4Interface(f"192.0.2.{number}/24"))
        v6.append(IPv6Interface(f"2001:db8:f::{number}/64"))
    return Host(name, tuple(v4), tuple(v6), enforcer, services)


def _lab(labels: tuple[str, ...], allow: tuple[str, ...], *, reject: bool = False) -> Enforcer:
    return Enforcer("lab.example", labels, allow, reject)


SHOP = Topology(
    hosts=(
        host(
            "web",
            10,
            _lab(("env=prod", "zone=front"), ("app=*", "vuln=*", "vuln-age=*"), reject=True),
            "nginx",
        ),
        host("db", 20, _lab(("env=prod", "zone=back"), ("app=*",)), "postgres"),
        # A shared machine: jobs say themselves whether they are dev or prod; its CA vouches for no third.
        host("batch", 30, _lab(("zone=back",), ("app=*", "env=dev", "env=prod")), "inside-names"),
        host("rogue", 66, Enforcer("rogue.example", ("env=prod", "zone=front"), ("app=*",))),
        host("plain", 99, None, "partner", "names", outside=True),
    ),
    policies=(("lab.example", POLICIES / "shop.yaml"), ("rogue.example", POLICIES / "rogue.yaml")),
)

# What scenarios choose their hosts from: the shop's, and the desk where its root is kept, which runs no enforcer.
OPS = Host("ops", (IPv4Interface("10.77.0.40/24"),), (IPv6Interface("fd77::40/64"),), None, (), "lab.example")
TRAINING = (*SHOP.hosts, OPS)
