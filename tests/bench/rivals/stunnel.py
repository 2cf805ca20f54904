"""stunnel: TLS 1.3 with certificates of both sides, sessions resumed (its default).

Its debug level stays at 4: 6 costs ten times.
"""

from __future__ import annotations

from pathlib import Path

from labs.lab import Lab, Node
from tests.bench.rivals import certificates
from tests.bench.rivals.rival import FAR, LOOPBACK, NEAR, Endpoint, folder, proxies, secret

_HEAD = """\
foreground = yes
pid =
debug = 4
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
sslVersionMin = TLSv1.3
CAfile = {files}/ca.pem
cert = {files}/cert.pem
key = {files}/key.pem
verifyChain = yes
"""


def config(host: str, server: str, files: Path) -> str:
    """The configuration of a host; `server` is the address of the server's."""
    text = _HEAD.format(files=files)
    for port, near in NEAR.items():
        text += f"\n[to-{port}]\n"
        if host == "client":
            text += f"client = yes\naccept = {LOOPBACK}:{near}\nconnect = {server}:{FAR[port]}\ncheckHost = server\n"
        else:
            text += f"requireCert = yes\naccept = {server}:{FAR[port]}\nconnect = {LOOPBACK}:{port}\n"
    return text


def start(pair: Lab) -> Endpoint:
    """Run stunnel on both hosts."""
    certificates.equip(pair)
    server = pair["server"].host.ip4

    def command(node: Node) -> list[str]:
        file = folder(node) / "stunnel.conf"
        return ["stunnel4", str(secret(file, config(node.name, server, folder(node))))]

    return proxies(pair, command)
