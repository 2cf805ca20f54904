"""haproxy in TCP mode: TLS 1.3 with certificates of both sides."""

from __future__ import annotations

from pathlib import Path

from labs.lab import Lab, Node
from tests.bench.rivals import certificates
from tests.bench.rivals.rival import FAR, LOOPBACK, NEAR, Endpoint, folder, proxies, secret

_HEAD = """\
global
  maxconn 4096
  nbthread 2
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode tcp
  timeout connect 5s
  timeout client 1m
  timeout server 1m
"""


def config(host: str, server: str, files: Path) -> str:
    """The configuration of a host; `server` is the address of the server's."""
    both, ca = files / "both.pem", files / "ca.pem"
    text = _HEAD
    for port, near in NEAR.items():
        text += f"listen to-{port}\n"
        if host == "client":
            tls = f"ssl crt {both} ca-file {ca} verify required verifyhost server"
            text += f"  bind {LOOPBACK}:{near}\n  server far {server}:{FAR[port]} {tls}\n"
        else:
            text += f"  bind {server}:{FAR[port]} ssl crt {both} ca-file {ca} verify required\n"
            text += f"  server near {LOOPBACK}:{port}\n"
    return text


def start(pair: Lab) -> Endpoint:
    """Run haproxy on both hosts."""
    certificates.equip(pair)
    server = pair["server"].host.ip4

    def command(node: Node) -> list[str]:
        file = folder(node) / "haproxy.cfg"
        return ["haproxy", "-db", "-f", str(secret(file, config(node.name, server, folder(node))))]

    return proxies(pair, command)
