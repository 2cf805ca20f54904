"""The packet socket in a network namespace of its own: both directions, both families, loopback once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import json, socket, subprocess, threading
from nfq.capture import Tap, key_of_text, shape_of
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"], check=True)
tap = Tap()
out = {}
for address in ("127.0.0.1", "::1"):
    server = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    client = socket.create_connection(server.getsockname()[:2])
    peer, _ = server.accept()
    client.sendall(b"hello" * 20)
    assert peer.recv(1000) == b"hello" * 20
    key = key_of_text(6, address, client.getsockname()[1], address, server.getsockname()[1])
    for end in (client, peer, server):
        end.close()
    subprocess.run(["ip", "link", "set", "v0", "up"], check=True)
    subprocess.run(["ip", "link", "set", "v0", "down"], check=True)
    seen = [p for p in tap.packets(1.0) if (s := shape_of(p.data)) is not None and s.key == key]
    out[address] = {
        "data": sum(b"hello" * 20 in p.data for p in seen),
        "syns": sum(len(p.data) > 40 and bool(p.data[(40 if ":" in address else 20) + 13] & 2) for p in seen),
        "ordered": [p.us for p in seen] == sorted(p.us for p in seen),
        "recent": all(p.us > 1_600_000_000_000_000 for p in seen),
        "out": all(p.outbound and p.interface == "lo" for p in seen),
    }
out["dropped"] = tap.count_dropped()
tap.close()
print(json.dumps(out))
"""


@pytest.mark.kernel
def test_what_crosses_a_namespace_is_seen_once() -> None:
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    want = {"data": 1, "syns": 2, "ordered": True, "recent": True, "out": True}
    assert found == {"127.0.0.1": want, "::1": want, "dropped": 0}
