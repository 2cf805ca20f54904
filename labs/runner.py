"""Where a scenario is played: hosts on which commands run and files lie. One scenario file serves all of them.

labs.spaces     network namespaces of this machine, made for the scenario
labs.machines   machines that are there and answer to ssh, such as Vagrant's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from labs.lab import Result, Say


class Runner(Protocol):
    """The hosts of one scenario. Every method raises SectoolError with what to do next when it cannot."""

    @property
    def addresses(self) -> Mapping[str, str]:
        """Host to IPv4 address, of those the scenario asks for."""

    @property
    def memory(self) -> Path:
        """A folder on this machine that lasts as long as the hosts are built: answers lie there."""

    def build(self, say: Say, *, policy: bool, temporary: bool = False) -> None:
        """Have the hosts enforce afresh: enrolled, empty work folders, no history, `policy` or none.

        Leaves nothing behind when it fails. `temporary` ones are removed by whoever finds their owner dead.
        """

    def exists(self) -> bool:
        """Whether they are built."""

    def remove(self) -> None:
        """Take them down, or leave the machines as they were before. Safe to repeat."""

    def work(self, host: str) -> str:
        """Path of the learner's folder, as that host sees it."""

    def run(self, host: str, command: str, labels: Sequence[str] = (), *, timeout: float = 60.0) -> Result:
        """Have a shell run `command` on `host` to its end, as a workload if it has labels."""

    def start(self, host: str, command: str, labels: Sequence[str] = ()) -> None:
        """The same without waiting. It ends with `remove` at the latest."""

    def read(self, host: str, name: str) -> bytes:
        """A file of the work folder."""

    def write(self, host: str, name: str, data: bytes) -> None:
        """Put a file into the work folder."""

    def way_in(self, host: str) -> str:
        """The command by which a learner gets a shell there."""
