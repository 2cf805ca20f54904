"""Programs whose sockets are asked for: a copy of Python under any name, in any cgroup, as any user."""

from __future__ import annotations

import ipaddress
import os
import subprocess
from pathlib import Path

from nfq.attribution import Attributed, Attributor
from nfq.cgroup import join
from tests.kernel.conftest import Namespace

LOCAL = ipaddress.ip_address("127.0.0.1").packed
SILENT = ipaddress.ip_address("127.0.0.9").packed  # never answers

# Binds, listens, begins to connect to itself; says the ports; then does what it is told, line by line.
PROGRAM = """
import os, socket, subprocess, sys
os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
server = socket.create_server(("127.0.0.1", 0))
def connecting():
    client = socket.socket()
    client.setblocking(False)
    client.connect_ex(("127.0.0.9", server.getsockname()[1]))
    return client
client = connecting()
print(server.getsockname()[1], client.getsockname()[1], flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Program:
    """A copy of the interpreter under a name of its own, in a cgroup, with a listener and a connection."""

    def __init__(self, space: Namespace, group: Path, executable: Path | str, uid: int = 0) -> None:
        self.process = space.popen(
            str(executable),
            "-c",
            PROGRAM,
            str(uid),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: join(group, os.getpid()),
        )
        assert self.process.stdout is not None
        self.listening, self.connecting = map(int, self.process.stdout.readline().split())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def do(self, line: str) -> None:
        """Have it run a line of Python."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"done\n"

    def end(self) -> None:
        """Kill it and wait."""
        self.process.kill()
        self.process.wait()


def outgoing(attributor: Attributor, program: Program) -> Attributed:
    """Owner of its socket that connects."""
    found = attributor.outgoing(LOCAL, program.connecting, SILENT, program.listening)
    assert found is not None
    return found


def incoming(attributor: Attributor, program: Program) -> Attributed:
    """Owner of its listener."""
    found = attributor.incoming(LOCAL, program.listening, LOCAL, 1)
    assert found is not None
    return found
