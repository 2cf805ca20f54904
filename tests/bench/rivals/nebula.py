"""nebula: an overlay in userspace, AES, certificates of its own kind."""

from __future__ import annotations

from pathlib import Path

import yaml

from labs.lab import Lab
from labs.netns import run
from tests.bench.rivals.rival import DEVICE, THROUGH_TUNNEL, TUNNEL, Endpoint, folder, launch, secret

PORT = 4242
MTU = 1300


def config(files: Path, peer_tunnel: str, peer: str) -> str:
    """A host's configuration: it knows the other's address, and lets everything in."""
    anyone = [{"port": "any", "proto": "any", "host": "any"}]
    return yaml.safe_dump(
        {
            "pki": {"ca": f"{files}/ca.crt", "cert": f"{files}/host.crt", "key": f"{files}/host.key"},
            "static_host_map": {peer_tunnel: [f"{peer}:{PORT}"]},
            "lighthouse": {"am_lighthouse": False, "hosts": []},
            "listen": {"host": "0.0.0.0", "port": PORT},
            "cipher": "aes",
            "tun": {"dev": DEVICE, "mtu": MTU},
            "logging": {"level": "warning", "format": "text"},
            "firewall": {"outbound": anyone, "inbound": anyone},
        }
    )


def _certify(pair: Lab) -> None:
    """A CA on the client's side signs for both; nebula-cert writes keys 0600."""
    home = folder(pair["client"])
    own = ["nebula-cert", "ca", "-name", "bench", "-duration", "24h"]
    run(*own, "-out-crt", f"{home}/ca.crt", "-out-key", f"{home}/ca.key")
    for name, address in TUNNEL.items():
        into = folder(pair[name])
        if name != "client":
            secret(into / "ca.crt", (home / "ca.crt").read_text())
        sign = [
            "nebula-cert",
            "sign",
            "-ca-crt",
            f"{home}/ca.crt",
            "-ca-key",
            f"{home}/ca.key",
            "-name",
            name,
        ]
        run(*sign, "-ip", f"{address}/24", "-out-crt", f"{into}/host.crt", "-out-key", f"{into}/host.key")


def start(pair: Lab) -> Endpoint:
    """Bring the tunnel up on both hosts."""
    _certify(pair)
    started = []
    for name, other in (("server", "client"), ("client", "server")):
        node = pair[name]
        text = config(folder(node), TUNNEL[other], pair[other].host.ip4)
        command = ["nebula", "-config", str(secret(folder(node) / "nebula.yaml", text))]

        def ready(address: str = TUNNEL[name], netns: Path = node.netns) -> bool:
            return address in run("ip", "-br", "address", "show", netns=netns)

        started.append(launch(node, command, ready))
    for service in started:
        service.wait()
    return THROUGH_TUNNEL
