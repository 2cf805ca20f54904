"""nginx's stream module: TLS 1.3 with certificates of both sides, 64 KB buffers, sessions resumed."""

from __future__ import annotations

from pathlib import Path

from labs.lab import Lab, Node
from tests.bench.rivals import certificates
from tests.bench.rivals.rival import FAR, LOOPBACK, NEAR, Endpoint, folder, proxies, secret

MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
_HEAD = """\
load_module {module};
user root;
worker_processes 2;
daemon off;
pid {files}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
stream {{
  tcp_nodelay on;
  proxy_buffer_size 64k;
"""
_CLIENT = """\
  proxy_ssl on;
  proxy_ssl_protocols TLSv1.3;
  proxy_ssl_certificate {files}/cert.pem;
  proxy_ssl_certificate_key {files}/key.pem;
  proxy_ssl_trusted_certificate {files}/ca.pem;
  proxy_ssl_verify on;
  proxy_ssl_name server;
  proxy_ssl_session_reuse on;
"""
_SERVER = """\
  ssl_protocols TLSv1.3;
  ssl_certificate {files}/cert.pem;
  ssl_certificate_key {files}/key.pem;
  ssl_client_certificate {files}/ca.pem;
  ssl_verify_client on;
  ssl_session_cache shared:bench:10m;
  ssl_session_timeout 1h;
"""


def config(host: str, server: str, files: Path) -> str:
    """The configuration of a host; `server` is the address of the server's."""
    text = _HEAD.format(module=MODULE, files=files)
    text += (_CLIENT if host == "client" else _SERVER).format(files=files)
    for port, near in NEAR.items():
        if host == "client":
            text += f"  server {{ listen {LOOPBACK}:{near}; proxy_pass {server}:{FAR[port]}; }}\n"
        else:
            text += f"  server {{ listen {server}:{FAR[port]} ssl; proxy_pass {LOOPBACK}:{port}; }}\n"
    return text + "}\n"


def start(pair: Lab) -> Endpoint:
    """Run nginx on both hosts."""
    certificates.equip(pair)
    server = pair["server"].host.ip4

    def command(node: Node) -> list[str]:
        files = folder(node)
        file = secret(files / "nginx.conf", config(node.name, server, files))
        return ["nginx", "-e", "stderr", "-p", str(files), "-c", str(file)]

    return proxies(pair, command)
