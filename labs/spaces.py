"""Scenarios on network namespaces: a lab of the scenario's own, gone without a trace afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from labs import place
from labs.lab import Lab, Node, Result, Say
from labs.topology import SHOP, TRAINING
from sectool.errors import SectoolError


class Spaces:
    """A Runner whose hosts are namespaces of this machine."""

    def __init__(self, name: str, hosts: Sequence[str], bare: Sequence[str] = ()) -> None:
        """`bare`: hosts without an enforcer."""
        chosen = tuple(
            replace(host, enforcer=None) if host.name in bare else host
            for host in TRAINING
            if host.name in hosts
        )
        self.lab = Lab(name, replace(SHOP, hosts=chosen, policies=()))

    @property
    def addresses(self) -> Mapping[str, str]:
        return {name: node.host.ip4 for name, node in self.lab.nodes.items()}

    @property
    def memory(self) -> Path:
        return self.lab.folder

    def build(self, say: Say, *, policy: bool, temporary: bool = False) -> None:
        """See Runner."""
        domains = {node.host.enforcer.trust_domain for node in self.lab.enforcing if node.host.enforcer}
        policies = tuple(p for p in SHOP.policies if policy and p[0] in domains)
        self.lab.topology = replace(self.lab.topology, policies=policies)
        self.lab.up(say, temporary=temporary)
        for node in self.lab.nodes.values():
            (node.folder / "work").mkdir()

    def exists(self) -> bool:
        """See Runner."""
        return self.lab.exists()

    def remove(self) -> None:
        """See Runner."""
        self.lab.down()

    def work(self, host: str) -> str:
        """See Runner."""
        return str(self.lab[host].folder / "work")

    def run(self, host: str, command: str, labels: Sequence[str] = (), *, timeout: float = 60.0) -> Result:
        """See Runner."""
        node = self.lab[host]
        return node.execute(self._argv(node, command, labels), timeout=timeout)

    def start(self, host: str, command: str, labels: Sequence[str] = ()) -> None:
        """See Runner."""
        node = self.lab[host]
        node.popen(self._argv(node, command, labels), out=subprocess.DEVNULL, err=subprocess.DEVNULL)

    def read(self, host: str, name: str) -> bytes:
        """See Runner."""
        try:
            return (self.lab[host].folder / "work" / name).read_bytes()
        except OSError as error:
            raise SectoolError(f"cannot read {name} on {host}: {error.strerror}") from None

    def write(self, host: str, name: str, data: bytes) -> None:
        """See Runner."""
        (self.lab[host].folder / "work" / name).write_bytes(data)

    def way_in(self, host: str) -> str:
        """See Runner."""
        return f"sudo sectool lab exec --name {self.lab.name} {host} -- bash"

    def processor_s(self) -> float:
        """Processor time of everything that ran on the hosts so far, in seconds; 0 when nothing did."""
        try:
            first, *_ = (place.cgroup_of(self.lab.name) / "cpu.stat").read_text().splitlines()
            return int(first.removeprefix("usage_usec ")) / 1e6
        except (OSError, ValueError):
            return 0.0

    @staticmethod
    def _argv(node: Node, command: str, labels: Sequence[str]) -> list[str]:
        shell = ["sh", "-c", command]
        return node.workload(labels, shell) if labels else shell
