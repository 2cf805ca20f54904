"""openvpn: point to point over UDP, TLS 1.3 for the control channel, AES-256-GCM for the data, all in userspace."""

from __future__ import annotations

from pathlib import Path

from labs.lab import Lab, Node
from tests.bench.rivals import certificates
from tests.bench.rivals.rival import DEVICE, THROUGH_TUNNEL, TUNNEL, Endpoint, folder, launch, secret

PORT = 1194
UP = "Initialization Sequence Completed"


def config(host: str, own: str, peer: str, files: Path) -> str:
    """A host's configuration; `own` and `peer` are the addresses of the underlay."""
    other = "server" if host == "client" else "client"
    role = (
        "tls-client\nremote-cert-tls server"
        if host == "client"
        else "tls-server\nremote-cert-tls client\ndh none"
    )
    return (
        f"mode p2p\ndev {DEVICE}\ndev-type tun\nproto udp\nlocal {own}\nremote {peer}\nport {PORT}\n{role}\n"
        f"ifconfig {TUNNEL[host]} {TUNNEL[other]}\n"
        f"ca {files}/ca.pem\ncert {files}/cert.pem\nkey {files}/key.pem\n"
        "tls-version-min 1.3\ndata-ciphers AES-256-GCM\ndisable-dco\nping 10\nverb 3\n"
    )


def start(pair: Lab) -> Endpoint:
    """Bring the tunnel up on both hosts."""
    certificates.equip(pair)
    started = []
    for name, other in (("server", "client"), ("client", "server")):
        node: Node = pair[name]
        text = config(name, node.host.ip4, pair[other].host.ip4, folder(node))
        log = folder(node) / "log"
        command = ["openvpn", "--config", str(secret(folder(node) / "openvpn.conf", text))]
        started.append(launch(node, command, lambda log=log: UP in log.read_text()))  # type: ignore[misc]
    for service in started:
        service.wait()
    return THROUGH_TUNNEL
